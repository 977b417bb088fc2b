"""Read what layers put out, and the targets that belong to it."""
