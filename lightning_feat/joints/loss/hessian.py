"""Gradient, and products with the Hessian, of a loss over several batches, on all processes of a run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Any], Tensor]


class Curvature:
    """Derivatives of a loss with respect to the trained parameters of a module, as flat vectors ``(P,)``.

    Args:
        trainer: knows the processes.
        module: whose parameters; those that ask for no gradient stay out.
        loss: of a batch, a share of the whole: those of all batches, over all processes, add up.
        batches: of this process; there may be none.

    Attributes:
        error: the last that a derivative ended in, in words: then it is nan on all processes, and ends no run.
    """

    def __init__(self, trainer: Trainer, module: nn.Module, loss: Loss, batches: Sequence[Any]) -> None:
        self.trainer, self.loss, self.batches = trainer, loss, batches
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.error = ""
        self._looked = False

    @property
    def size(self) -> int:
        """Number P of trained parameters."""
        return sum(p.numel() for p in self.parameters)

    def total(self) -> Tensor:
        """The loss, without gradient; scalar, float32."""
        with torch.no_grad():
            losses = [self.loss(batch).float() for batch in self.batches]
        return self._of_all(torch.stack([self._zero(), *losses]).sum())

    def gradient(self) -> Tensor:
        """``(P,)`` float32."""
        return self._summed(lambda loss: self._slopes(loss))

    def product(self, vector: Tensor) -> Tensor:
        """The Hessian times ``vector`` ``(P,)``."""

        def once(loss: Tensor) -> Tensor:
            slopes = self._slopes(loss, graph=True)
            along = torch.dot(slopes, vector.to(slopes))
            self._refuse_lost_terms(along)
            return self._slopes(along) if along.requires_grad else torch.zeros_like(slopes)

        return self._summed(once)

    def shaped(self, vector: Tensor) -> list[Tensor]:
        """A flat vector as one tensor for each trained parameter."""
        parts = vector.split([p.numel() for p in self.parameters])
        return [part.view_as(p).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)]

    def _summed(self, of_one: Callable[[Tensor], Tensor]) -> Tensor:
        device = self.parameters[0].device
        total = torch.zeros(self.size, device=device)
        try:
            with torch.enable_grad(), _twice_differentiable():
                for batch in self.batches:
                    total += of_one(self.loss(batch)).detach().float()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            # A kernel without a second derivative, say. The others wait: the error is told by a nan.
            self.error = " ".join(str(error).split())[:300]
            total = torch.full_like(total, torch.nan)
        return self._of_all(total)

    def _slopes(self, value: Tensor, graph: bool = False) -> Tensor:
        if not value.requires_grad:  # no parameter had a part in it
            return torch.zeros(self.size, device=self.parameters[0].device)
        slopes = torch.autograd.grad(value, self.parameters, create_graph=graph, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(slopes, self.parameters, strict=True)]
        return torch.cat([(g.to_dense() if g.layout != torch.strided else g).flatten().float() for g in parts])

    def _refuse_lost_terms(self, along: Tensor) -> None:
        """Raise a ``RuntimeError`` where a kernel is marked as differentiable once: autograd would not run the node
        that says so, as no parameter lies behind it, and leave its terms out.
        """
        seen: set[Any] = set()
        nodes = [] if self._looked else [along.grad_fn]
        self._looked = True
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name().rpartition("::")[2] in ("Error", "DelayedError"):
                raise RuntimeError("a layer has no second derivative (once_differentiable).")
            nodes += [following for following, _ in node.next_functions]

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.parameters[0].device)

    def _of_all(self, value: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return value
        total: Any = self.trainer.strategy.reduce(value, reduce_op="sum")
        return total  # type: ignore[no-any-return]


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Fused attention, the recurrent layers of cuDNN and compiled code have no second derivative."""
    stance: Any = getattr(torch.compiler, "set_stance", None)
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            if stance is None:
                yield
            else:
                with stance("force_eager"):
                    yield
    finally:
        torch.backends.cudnn.enabled = before
