"""One run, and who runs it: what trains is here and nowhere else in this room."""
