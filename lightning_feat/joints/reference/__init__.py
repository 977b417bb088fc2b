"""What a network is compared with: itself at the start of the run, or itself without its prompts.

A *reference* gives the features that some layers would have for the batch of this step. ``FrozenStart`` runs a frozen
copy of the network, ``CachedStart`` looks them up, ``WithoutPrompts`` runs the network itself with its prompts switched
off; ``StartWeights`` keeps weights alone. ``Comparison``, and ``TowerComparison`` for the two towers of a CLIP, lay the
features of a step beside those of their reference. The start is that of the run, and stays so when
the run resumes: it is part of the callback's checkpoint.

A copy lives outside the module. As a submodule it would enter the optimizer and the checkpoint, averaging callbacks
would double it, and the user's own ``train()`` would switch its dropout on.
"""

from lightning_feat.joints.reference.cached_start import CachedStart
from lightning_feat.joints.reference.comparison import Compared, Comparison
from lightning_feat.joints.reference.frozen_start import FrozenStart
from lightning_feat.joints.reference.hearing import silence
from lightning_feat.joints.reference.runs import is_new_run, refuse_sharding, warn_of_missing_start
from lightning_feat.joints.reference.start_weights import StartWeights
from lightning_feat.joints.reference.tower_comparison import TowerComparison, compare_towers, text_tokens
from lightning_feat.joints.reference.without_prompts import WithoutPrompts, find_brings

__all__ = [
    "CachedStart",
    "Compared",
    "Comparison",
    "FrozenStart",
    "StartWeights",
    "TowerComparison",
    "WithoutPrompts",
    "compare_towers",
    "find_brings",
    "is_new_run",
    "refuse_sharding",
    "silence",
    "text_tokens",
    "warn_of_missing_start",
]
