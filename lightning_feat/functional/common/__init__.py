"""What the families share: class statistics, lengths, and checks of shapes."""
