"""Run the network over a data set, change the training loader, begin again."""
