"""What comes twice where a callback runs training_step twice in a step."""

from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_feat.callbacks.simplicity_bias.sharpness import SharpnessAwareMinimization
from lightning_feat.doctor.blame import is_ours, name_of
from lightning_feat.doctor.finding import Finding
from lightning_feat.doctor.trial import Run

_TWICE = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")


def find_two_passes(run: Run, notes: bool) -> list[Finding]:
    """A note on what two passes cost and what logged values then mean, and a warning where hooks of the user's come
    twice.
    """
    sharpness = next((c for c in run.callbacks if isinstance(c, SharpnessAwareMinimization)), None)
    if sharpness is None:
        return []
    findings, often, where = [], sharpness.interval, name_of(sharpness)
    steps = "each step" if often == 1 else f"every {often}th step"
    if notes:
        findings.append(
            Finding(
                "note",
                "two-passes",
                where,
                f"{steps} runs training_step and backward twice: an epoch takes {1 + 1 / often:.3g} times as long.",
                "Losses and metrics that are logged are those of the first pass, at the weights themselves; "
                "sharpness/rise is how much the loss is higher at the worst point.",
            )
        )
    others: list[tuple[Any, type]] = [
        (run.module, LightningModule),
        *((c, Callback) for c in run.callbacks if not is_ours(c)),
    ]
    heard = [
        f"{type(other).__name__}.{hook}" for other, base in others for hook in _TWICE if _is_own(other, base, hook)
    ]
    if heard:
        findings.append(
            Finding(
                "warning",
                "hooks-twice",
                where,
                f"{', '.join(heard)} will run twice in {steps}, once at the weights and once at the worst point.",
                "What counts calls there, or keeps gradients, gets the second pass too.",
                "Count in on_train_batch_end instead, or look at what the hook does at the worst point.",
            )
        )
    return findings


def _is_own(other: Any, base: type, hook: str) -> bool:
    """Whether its class has this hook, and not from Lightning."""
    module = str(getattr(getattr(type(other), hook, None), "__module__", "")).partition(".")[0]
    return is_overridden(hook, other, base) and module not in ("lightning", "pytorch_lightning")
