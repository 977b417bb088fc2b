"""Look at the features of a network while it trains in PyTorch Lightning, and make them better.

The rooms: ``functional`` (the mathematics), ``metrics``, ``manifolds``, ``layers``, ``optim``, ``callbacks``,
``mixins``, ``data`` and ``baselines``; ``taps`` reads features, ``loss_terms`` adds to the loss. Nothing heavy is
imported here.
"""

__version__ = "0.1.0"
