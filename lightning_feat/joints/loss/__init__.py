"""Add terms to the loss of any training step."""
