"""Whether a loss term trains the network: what comes back to the features that it was made of."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.loss.engine import loss_terms_of
from lightning_feat.joints.loss.terms import LossTerm


@dataclass
class Heard:
    """What was seen of one term.

    Attributes:
        reads: whether it took features, or made its value of weights of the network.
        reaches: whether a path leads from its value to weights of the network.
        largest: absolute entry of the gradient at the features, over all batches.
        nonfinite: batches in which its value was NaN or inf.
        first: its value in the first batch.
    """

    term: LossTerm
    batches: int = 0
    reads: bool = False
    reaches: bool = False
    largest: float = 0.0
    nonfinite: int = 0
    first: float = 0.0
    features: list[Tensor] = field(default_factory=list)

    def around_take(self, take: Callable[..., Tensor], *args: Any) -> Tensor:
        """In place of ``take`` of a tap of this term."""
        taken = take(*args)
        self.features.append(taken)
        return taken

    def around_value(
        self, value: Callable[[LightningModule, Any], Tensor], module: LightningModule, batch: Any
    ) -> Tensor:
        """In place of ``value`` of the term."""
        self.features = []
        result = value(module, batch)
        self.first = float(result.detach()) if self.batches == 0 else self.first
        self.batches += 1
        self.nonfinite += not bool(result.detach().isfinite().all())
        if self.features:
            self.reads = True
            self._judge_features(result)
        elif reaches_weights(result):
            self.reads = self.reaches = True
            self.largest = float("nan")  # not known
        self.features = []
        return result

    def _judge_features(self, result: Tensor) -> None:
        through = [h for h in self.features if h.requires_grad]
        if not (result.requires_grad and through):
            return
        gradients = torch.autograd.grad(result.sum(), through, retain_graph=True, allow_unused=True)
        for h, gradient in zip(through, gradients, strict=True):
            if gradient is not None and reaches_weights(h):
                self.reaches = True
                self.largest = max(self.largest, float(gradient.abs().nan_to_num(posinf=1.0).max()))


def begin_now(module: LightningModule) -> None:
    """Let every term of a copy have its peak weight from the first batch on, whatever its schedule says."""
    for term in loss_terms_of(module):
        term.weight = replace(term.weight, start_epoch=0, end_epoch=None, warmup_epochs=0.0, every_n_batches=1)


def listen_to(term: LossTerm) -> Heard:
    """Watch this term from now on. It is one of a copy: nothing is put back."""
    heard = Heard(term)
    term.value = _Around(heard.around_value, term.value)  # type: ignore[assignment, method-assign]
    for tap in term.taps:
        tap.take = _Around(heard.around_take, tap.take)  # type: ignore[assignment, method-assign]
    return heard


class _Around:
    def __init__(self, watch: Callable[..., Tensor], method: Callable[..., Tensor]) -> None:
        self.watch, self.method = watch, method

    def __call__(self, *args: Any) -> Tensor:
        return self.watch(self.method, *args)


def reaches_weights(value: Tensor) -> bool:
    """Whether a trained parameter that is not a callback's own stands behind ``value``."""
    if value.grad_fn is None:
        return isinstance(value, nn.Parameter) and value.requires_grad
    seen: set[Any] = set()
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        weight = getattr(node, "variable", None)
        # A reentrant checkpoint does not show what is inside.
        users = isinstance(weight, nn.Parameter) and not hasattr(weight, "_feat_own")
        if users or "CheckpointFunction" in node.name():
            return True
        waiting += [following for following, _ in node.next_functions if following is not None]
    return False


def terms_in(owner: Any) -> list[LossTerm]:
    """The loss terms that a callback keeps."""
    return [value for value in vars(owner).values() if isinstance(value, LossTerm)]


def taps_in(owner: Any) -> list[FeatureTap]:
    """The taps that a callback keeps, as far as they can be seen."""
    found: list[FeatureTap] = []
    for value in vars(owner).values():
        if isinstance(value, FeatureTap):
            found.append(value)
        elif isinstance(value, LossTerm):
            found += value.taps
        elif isinstance(getattr(value, "taps", None), list):
            found += [tap for tap in value.taps if isinstance(tap, FeatureTap)]
    return found
