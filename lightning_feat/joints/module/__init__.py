"""Change a user's module, and put it back."""
