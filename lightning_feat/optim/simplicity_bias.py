"""Sharpness-aware minimisation with any optimizer: SAM and ASAM.

Two passes make a step: the gradient at the weights leads to the worst point near them
(``functional.simplicity_bias.sharpness``); the gradient there, from the weights as they were, is what the optimizer
gets. Weight decay stays with the optimizer and does not enter the first of the two.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_feat.functional.grassmann import geodesic_, tangent_projection
from lightning_feat.functional.simplicity_bias.sharpness import adaptive_scales, sharpness_step
from lightning_feat.layers.grassmann import GrassmannLinear


class Ascent:
    """Moves parameters to the worst point near them, and back.

    The bases of Grassmann heads follow the geodesic along the tangent part of their gradient, and stay on their
    manifold; their entries have no scale of their own, so that they take no part in the adaptive form.

    Args:
        rho: how far.
        adaptive: ASAM.
        eta: of ASAM.
        module: whose Grassmann heads to know.
    """

    def __init__(self, rho: float, adaptive: bool, eta: float, module: nn.Module | None = None) -> None:
        if not rho > 0 or eta < 0:
            raise ValueError(f"{rho=} must be above zero, and {eta=} not below: the papers have 0.05 and 0.01.")
        self.rho, self.adaptive, self.eta = rho, adaptive, eta
        self.heads = [part for part in (module or nn.Module()).modules() if isinstance(part, GrassmannLinear)]

    @contextmanager
    def __call__(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside, those with a gradient are at the worst point; afterwards they are bit for bit where they were."""
        moved = [p for p in parameters if p.grad is not None]
        steps = self._steps(moved)
        before = [p.detach().clone() for p in moved]
        try:
            self._move(moved, steps, before)
            yield
        finally:
            with torch.no_grad():
                for p, old in zip(moved, before, strict=True):
                    p.copy_(old)

    def _is_basis(self, p: nn.Parameter) -> bool:
        return any(head.basis is p for head in self.heads)

    @torch.no_grad()
    def _steps(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        gradients = [tangent_projection(p, _gradient(p)) if self._is_basis(p) else _gradient(p) for p in parameters]
        scales = [
            adaptive_scales([p], self.eta)[0] if self.adaptive and not self._is_basis(p) else None for p in parameters
        ]
        return sharpness_step(gradients, self.rho, scales)

    @torch.no_grad()
    def _move(self, parameters: list[nn.Parameter], steps: list[Tensor], before: list[Tensor]) -> None:
        for p, step, old in zip(parameters, steps, before, strict=True):
            p.add_(step)
            if self._is_basis(p):
                geodesic_(p.data, old)


def _gradient(p: nn.Parameter) -> Tensor:
    gradient: Any = p.grad
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} has a sparse gradient, along which sharpness-aware minimisation "
            "cannot step: make its embedding with sparse=False."
        )
    return gradient  # type: ignore[no-any-return]


def sharpness_aware(
    optimizer: Optimizer,
    module: nn.Module | None = None,
    rho: float = 0.05,
    adaptive: bool = False,
    eta: float = 0.01,
) -> RemovableHandle:
    """Make each ``step(closure)`` of an optimizer one of sharpness-aware minimisation, in any loop of your own.

    The optimizer stays the object it is, with its groups, state, schedulers and state dict. The closure runs twice: it
    zeroes the gradients, runs the network and its backward, and returns the loss. torch's random numbers of the second
    run are those of the first, so that both see the same dropout. What the second run writes into the buffers of
    ``module`` (statistics of BatchNorm) is put back. In a LightningModule take
    ``callbacks.SharpnessAwareMinimization``, which also knows what is logged, fp16, and several processes.

    Args:
        optimizer: any whose step calls its closure once.
        module: the network; None if it has neither buffers nor a ``GrassmannLinear``.
        rho: how far the worst point may be; 0.05 in the paper, about ten times that for ASAM.
        adaptive: ASAM, for which the size of each weight is its unit of length.
        eta: of ASAM, lets weights of zero move.

    Returns:
        A handle whose ``remove()`` makes the optimizer what it was.

    Raises:
        ValueError: if a number is out of range, or the optimizer calls its closure several times.
        RuntimeError: in a step without a closure, or where a gradient is sparse.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> handle = sharpness_aware(optimizer, rho=0.5)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = weight.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)  # the gradient at 1.5
        >>> weight.detach()
        tensor([0.7000])
    """
    refuse_many_closures(optimizer)
    ascent = Ascent(rho, adaptive, eta, module)

    def twice(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            raise RuntimeError(
                f"sharpness-aware minimisation takes two passes for a step: call {type(optimizer).__name__}.step with "
                "a closure that zeroes the gradients, runs forward and backward, and returns the loss."
            )

        def both() -> Any:
            with torch.enable_grad():
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                with torch.random.fork_rng({p.device for p in parameters if p.device.type == "cuda"}):
                    loss = closure()
                with ascent(parameters), buffers_kept(module):
                    closure()
            return loss

        return (args[0], both, *args[2:]), {name: value for name, value in kwargs.items() if name != "closure"}

    return optimizer.register_step_pre_hook(twice)


def refuse_many_closures(optimizer: Optimizer) -> None:
    """Raise a ``ValueError`` for one that calls its closure several times in a step."""
    if any(cls.__name__ == "LBFGS" for cls in type(optimizer).__mro__):
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss several times in a step, between which sharpness-aware "
            "minimisation would move the weights: take SGD, AdamW or another optimizer of one gradient."
        )


@contextmanager
def buffers_kept(module: nn.Module | None) -> Iterator[None]:
    """Afterwards the buffers of the module hold what they held."""
    before = [] if module is None else [(b, b.detach().clone()) for b in module.buffers() if not b.is_meta]
    try:
        yield
    finally:
        for buffer, old in before:
            buffer.data.copy_(old)
