"""Loss terms of a trial that train nothing, or ruin everything."""

from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_feat.doctor.blame import is_ours, name_of
from lightning_feat.doctor.checks.terms import terms_in
from lightning_feat.doctor.finding import Finding
from lightning_feat.doctor.trial import Run, Trial
from lightning_feat.doctor.watch import Watch


def find_silent_terms(run: Run, trial: Trial, watch: Watch) -> list[Finding]:
    """Findings about loss terms without a gradient, or with one that is not finite."""
    findings = []
    for position, callback in trial.callbacks.items():
        mine = terms_in(callback)
        heard = [h for h in watch.terms if any(h.term is term for term in mine) and h.batches]
        where = name_of(run.callbacks[position])
        bad = [h.term.key for h in heard if h.nonfinite]
        if bad:
            findings.append(
                Finding(
                    "error",
                    "nonfinite-term",
                    where,
                    f"the loss term {', '.join(bad)} is NaN or inf.",
                    "One such batch makes all weights NaN.",
                    "Lower its weight, or look at its features: are they zero, or in half precision?",
                )
            )
        elif heard and not any(h.reads and h.reaches for h in heard) and _unfreezes(run):
            findings.append(
                Finding(
                    "note",
                    "frozen-for-now",
                    where,
                    f"the layer of the loss term {heard[0].term.key} is frozen at the start; {_unfreezes(run)} lets it "
                    "go later.",
                    "Until then the term trains nothing, and after that was not looked at.",
                )
            )
        elif heard and not any(h.reads and h.reaches for h in heard):
            hooks = _epoch_hooks(run)
            later = f", unless {hooks} lets its layer go later" if hooks else ""
            findings.append(
                Finding(
                    "warning" if hooks else "error",
                    "zero-gradient",
                    where,
                    f"no gradient comes from the loss term {heard[0].term.key} to the network.",
                    f"It is logged, and trains nothing{later}.",
                    "Look for detach, argmax or rounding in the loss; and is the layer frozen?",
                )
            )
        elif heard and watch.largest_rate and max(h.largest for h in heard if h.reads) == 0.0:
            findings.append(
                Finding(
                    "warning",
                    "zero-gradient",
                    where,
                    f"the gradient of the loss term {heard[0].term.key} was zero in {heard[0].batches} batches.",
                    "So far it trains nothing.",
                    "Is there a margin that all features keep, or a function that is flat where they are?",
                )
            )
    return findings


def _unfreezes(run: Run) -> str:
    """The callback that lets frozen layers go while the run goes on; nothing where there is none."""
    return next((type(callback).__name__ for callback in run.callbacks if isinstance(callback, BaseFinetuning)), "")


def _epoch_hooks(run: Run) -> str:
    """The user's own hooks at the beginning or end of an epoch, where layers may be let go; nothing if none is."""
    hooks = ("on_train_epoch_start", "on_train_epoch_end")
    others = [callback for callback in run.callbacks if not is_ours(callback)]
    for owner, parent in [(run.module, LightningModule), *((callback, Callback) for callback in others)]:
        for hook in hooks:
            # What Lightning's own callbacks do there is known, and was looked at.
            if is_overridden(hook, owner, parent) and not _of_lightning(getattr(type(owner), hook)):
                return f"{type(owner).__name__}.{hook}"
    return ""


def _of_lightning(method: Any) -> bool:
    return str(getattr(method, "__module__", "")).partition(".")[0] in ("lightning", "pytorch_lightning")
