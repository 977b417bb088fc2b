"""How much a network seems to move that has not: the noise floor of a shift in train mode."""

from lightning_feat.callbacks.feature_shift.monitor import FeatureShiftMonitor
from lightning_feat.callbacks.feature_shift.regularizer import FeatureShiftRegularizer
from lightning_feat.doctor.blame import name_of
from lightning_feat.doctor.finding import Finding
from lightning_feat.doctor.trial import Run, Trial
from lightning_feat.doctor.watch import Watch

_MUCH = 0.05  # relative; what rounding in half precision makes is below 0.01


def find_noise(run: Run, trial: Trial, watch: Watch) -> list[Finding]:
    """Findings about shifts from the start that are there before the first step."""
    findings = []
    for position, callback in trial.callbacks.items():
        where = name_of(run.callbacks[position])
        if isinstance(callback, FeatureShiftMonitor):
            floor = watch.first_shifts.get(position, 0.0)
            remedy = "Set data='val', which compares in eval mode."
        elif isinstance(callback, FeatureShiftRegularizer) and _starts_at_zero(callback):
            floor = max((heard.first for heard in watch.terms if heard.term is callback.term), default=0.0)
            remedy = "Put such layers in eval mode while training, or hold the weights (form='l2_sp')."
        else:
            continue
        if floor > _MUCH:
            findings.append(
                Finding(
                    "warning",
                    "noise-floor",
                    where,
                    f"it finds a shift of {floor:.2f} in the first batch, in which no weight has moved.",
                    "The reference is in eval mode: dropout and batch statistics of train mode count as a shift.",
                    remedy,
                )
            )
    return findings


def _starts_at_zero(callback: FeatureShiftRegularizer) -> bool:
    """Whether the term is that of features held to those that the run began with, zero where nothing has moved."""
    return callback.form in ("relative", "cosine", "distillation") and callback.start is None
