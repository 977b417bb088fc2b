"""The panels of a page: each makes numbers by ``functional`` and says how they are drawn."""
