"""What can be told of a run before a batch is run."""

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, LearningRateFinder

from lightning_feat.callbacks.feature_shift.prompts import PromptLearner
from lightning_feat.callbacks.grassmann.head import GrassmannHead
from lightning_feat.callbacks.neural_collapse.regularizer import NeuralCollapseRegularizer
from lightning_feat.callbacks.neural_collapse.simplex import SimplexETFHead
from lightning_feat.doctor.blame import is_ours, name_of
from lightning_feat.doctor.checks.terms import taps_in
from lightning_feat.doctor.finding import Finding
from lightning_feat.doctor.trial import Run
from lightning_feat.joints.features.heads import is_compiled
from lightning_feat.joints.loss.terms import LossTerm
from lightning_feat.joints.run.averaging import averages

_BRING = (GrassmannHead, SimplexETFHead, NeuralCollapseRegularizer, PromptLearner)


def averaging_before_heads(run: Run) -> tuple[list[Finding], list[int]]:
    """Findings about averaging callbacks that copy the module before its head is replaced, or parameters are brought
    in; and the positions of all callbacks in an order in which they do not.
    """
    findings: list[Finding] = []
    early: list[int] = []
    for i, callback in enumerate(run.callbacks):
        heads = [other for other in run.callbacks[i + 1 :] if _brings(other)]
        if heads and averages(callback):
            early.append(i)
            name, head = type(callback).__name__, type(heads[0]).__name__
            findings.append(
                Finding(
                    "error",
                    "averaging-before-head",
                    name,
                    f"{name} stands before {head}.",
                    f"It copies the module without what {head} puts in, and would average the wrong tensors.",
                    f"Put {head} before {name} in Trainer(callbacks=[...]).",
                )
            )
    return findings, [i for i in range(len(run.callbacks)) if i not in early] + early


def _brings(callback: Callback) -> bool:
    """Whether it puts a head or parameters of its own into the module."""
    terms = [value for value in vars(callback).values() if isinstance(value, LossTerm)]
    own = any(term.parameters is not None and any(True for _ in term.parameters.parameters()) for term in terms)
    return isinstance(callback, _BRING) or (own and is_ours(callback))


def compiled_before_hooks(run: Run) -> list[Finding]:
    """Findings about code that was compiled from this module and has run, which calls no hook that comes now."""
    if any(is_compiled(part) for part in run.module.modules()):
        return []  # where a tap sees that, it lets everything be traced again
    tapping = [name_of(callback) for callback in run.callbacks if is_ours(callback) and taps_in(callback)]
    findings = []
    for name, part in run.module.named_modules() if tapping else ():
        for attribute, value in vars(part).items():
            function = getattr(value, "_torchdynamo_orig_callable", None)
            if function is not None and _has_run(function):
                findings.append(
                    Finding(
                        "error",
                        "compiled-before-hooks",
                        f"{name}.{attribute}".lstrip("."),
                        "this compiled function has run already, and its code was traced without the hooks of "
                        f"{', '.join(tapping)}.",
                        "It will not call them, and says nothing: there would be no features.",
                        "Call torch.compiler.reset() before fit, or do not validate or call the module before it.",
                    )
                )
    return findings


def search_when_resumed(run: Run) -> list[Finding]:
    """A finding where Lightning would not resume a checkpoint of this run, but begin it anew (seen in 2.6)."""
    search = next((callback for callback in run.callbacks if isinstance(callback, LearningRateFinder)), None)
    if search is None or not any(isinstance(callback, Checkpoint) for callback in run.callbacks):
        return []
    return [
        Finding(
            "warning",
            "search-when-resumed",
            type(search).__name__,
            "it searches again whenever the run is resumed from a checkpoint.",
            "Its search makes Lightning forget the place in the run: weights are those of the checkpoint, but epoch, "
            "step, optimizer and what callbacks keep begin anew, and nothing says so.",
            f"Leave {type(search).__name__} out of a run that resumes.",
        )
    ]


def _has_run(function: Any) -> bool:
    try:
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        code = getattr(getattr(function, "__func__", function), "__code__", None)
        return code is not None and len(_debug_get_cache_entry_list(code)) > 0
    except ImportError:  # another version of PyTorch: not known
        return False
