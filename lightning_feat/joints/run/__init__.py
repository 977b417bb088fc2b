"""How callbacks behave in a run: one of a kind, and no run lost for a picture."""
