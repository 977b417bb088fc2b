r"""Let any optimizer train class subspaces: it steps as it likes, and its step is turned into one along the manifold.

A hook before the step copies each basis, a hook after it moves the basis from there along the geodesic, so that
schedulers, clipping, gradient scaling, accumulation and the optimizer's state dict stay as they are. There are three
rules:

* ``displacement``: the geodesic follows the displacement that the optimizer made. With ``torch.optim.SGD`` this is
  the Riemannian SGD of the paper (Wang, Li, Zhang, ICCV 2023, arXiv 2308.01547), whose momentum buffer is Euclidean and
  projected at the step.
* ``momentum``: the geodesic follows a momentum SGD of our own, and what the optimizer made of the basis is dropped. It
  is what the paper does beside AdamW and LAMB: an elementwise second moment is not invariant to the choice of basis,
  and turns every subspace by about the learning rate whatever the gradient.
* ``adam``: likewise, with one second moment for each class, which is invariant; see ``optim.grassmann.rules``.

No weight decay acts on a subspace. The two rules of our own take the gradient before the optimizer steps, as some
write into it what they add; and where the displacement counts, each basis stands in a parameter group without decay
while the step lasts. A learned scale of the head is a weight like others, and decays.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_feat.functional.grassmann import geodesic_
from lightning_feat.joints.arguments import checked
from lightning_feat.layers.grassmann import GrassmannLinear, local_part
from lightning_feat.optim.grassmann.around import Gradients, Held, WithoutDecay
from lightning_feat.optim.grassmann.rules import move_by_adam, move_by_momentum

Rule: TypeAlias = Literal["displacement", "momentum", "adam"]
Update: TypeAlias = Literal["auto", "displacement", "momentum", "adam"]

_BUFFER, _SQUARES, _STEPS, _COUNT = "subspace_momentum", "subspace_squares", "subspace_steps", "subspace_count"
_PEAK = "subspace_peak"
_OPTIONS = {"displacement": (), "momentum": ("lr", "momentum"), "adam": ("lr", "momentum", "second_momentum")}
_STEPS_OF = "_feat_subspace_steps"  # on an optimizer: who follows it; not pickled or copied with it, like its hooks
_REPAIR_EVERY = 8  # steps; between repairs rounding leaves float32 bases orthonormal to 2e-6
# Their state holds weights, not gradients, or they evaluate the loss inside the step, at points that are off the
# manifold.
_CANNOT_FOLLOW = ("LBFGS", "Lookahead", "ScheduleFree")


class SubspaceStep:
    """The hooks on one optimizer. Made by ``follow_subspaces``.

    Attributes:
        steps: optimizer steps that were followed so far.
    """

    @checked
    def __init__(
        self,
        optimizer: Optimizer,
        heads: Sequence[GrassmannLinear],
        update: Rule,
        lr_factor: float,
        lr: float,
        momentum: float,
        second_momentum: float,
    ) -> None:
        self.optimizer = optimizer
        self.lr_factor, self.lr = lr_factor, lr
        self.momentum, self.second_momentum = momentum, second_momentum
        self.update = update
        self.steps = 0
        self._heads = list(heads)  # and not their parameters: a move or a sharding may replace these
        self._start: dict[nn.Parameter, Tensor] = {}
        self._gradients = Gradients(copies=self.update != "displacement")
        self._decay = WithoutDecay(optimizer)
        self._between = False  # a step has begun and not ended
        optimizer.__dict__.setdefault(_STEPS_OF, []).append(self)
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def holds(self, basis: nn.Parameter) -> bool:
        """Whether the optimizer trains this basis and the hooks follow it."""
        return any(held is basis for held, _ in self._held())

    def undo_unfinished(self) -> None:
        """Put the bases back to where they were before a step that an exception cut off."""
        self._decay.put_back()
        if self._between:
            self._between = False
            for basis, start in self._start.items():
                local_part(basis).copy_(start)

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        followers = self.optimizer.__dict__.get(_STEPS_OF, [])
        if self in followers:
            followers.remove(self)
        self._start.clear()
        self._gradients.forget()
        self._decay.put_back()

    def _held(self) -> list[Held]:
        bases = {head.basis for head in self._heads if head.basis.requires_grad or head.basis.grad is not None}
        return [(p, group) for group in self.optimizer.param_groups for p in group["params"] if p in bases]

    @torch.no_grad()
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self._decay.put_back()  # after a step that an exception cut off
        for basis, _group in self._held():
            local = local_part(basis)
            start = self._start.get(basis)
            if start is None or (start.shape, start.dtype, start.device) != (local.shape, local.dtype, local.device):
                start = self._start[basis] = torch.empty_like(local, memory_format=torch.contiguous_format)
            start.copy_(local)
        is_inner = self._between  # the step of a subclass that calls that of its base fires the hooks twice
        self._between = True
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._prepare(anew=not is_inner)
            return None

        def prepared() -> Any:  # Lightning computes the gradients in here, and clips them
            self._decay.put_back()  # it may look at the optimizer
            loss = closure()
            with torch.no_grad():
                self._prepare(anew=True)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": prepared}
        return (args[0], prepared, *args[2:]), kwargs

    def _prepare(self, anew: bool) -> None:
        """Just before the optimizer moves anything: take the gradients, and the bases out of decay."""
        held = self._held()
        self._gradients.take([basis for basis, _ in held], anew)
        if self.update == "displacement":
            self._decay.take_out(held)

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        if not self._between:
            return  # a step that calls the step of its base class: hooks fire for both, the inner one has done the work
        self._decay.put_back()
        for basis, group in self._held():
            moved, start = local_part(basis), self._start[basis]
            if not moved.numel():
                continue  # FSDP2 may leave a process without a class
            if not self._gradients.has(basis) or not basis.requires_grad:
                moved.copy_(start)  # it may still have been decayed, or moved by its momentum
                continue
            state = self.optimizer.state[basis]  # the optimizer's own, so that it is saved and restored with the rest
            if self.update != "displacement":
                self._move(basis, moved, start, group, state)
            count = state[_COUNT] = state.get(_COUNT, 0) + 1
            factor = self.lr_factor if self.update == "displacement" else 1.0
            geodesic_(moved, start, factor=factor, repair=count % _REPAIR_EVERY == 1)
        self._gradients.forget()
        self._between = False
        self.steps += 1

    def _move(
        self, basis: nn.Parameter, moved: Tensor, start: Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Put the displacement of one of our own rules in the place of the optimizer's."""
        gradient = self._gradients.of(basis).to(moved.dtype)
        # Under fp16 a fused optimizer is called with gradients that are still scaled, and also where they are infinite:
        # it unscales, or skips the step, inside its kernel.
        scale, skipped = getattr(self.optimizer, "grad_scale", None), getattr(self.optimizer, "found_inf", None)
        if scale is not None:
            gradient = gradient / scale
        if group.get("maximize", False):
            gradient = -gradient
        rate = self.lr * self.lr_factor * self._share_of_peak(group, state)
        if _BUFFER not in state:
            state[_BUFFER] = torch.zeros_like(basis)
        buffer = local_part(state[_BUFFER])
        if self.update == "momentum":
            move_by_momentum(moved, start, gradient, buffer, rate, self.momentum, skipped)
        else:
            if _SQUARES not in state:
                state[_SQUARES] = torch.zeros_like(basis).sum((1, 2))
                state[_STEPS] = torch.zeros((), dtype=basis.dtype, device=basis.device)
            squares, steps = local_part(state[_SQUARES]), state[_STEPS]
            moments = self.momentum, self.second_momentum
            move_by_adam(moved, start, gradient, buffer, squares, steps, rate, *moments, skipped)

    def _share_of_peak(self, group: dict[str, Any], state: dict[str, Any]) -> float:
        """The learning rate now over the highest one, as far as that is known; between 0 and 1."""
        if group.get("lr") is None:  # optimizers that choose it themselves
            return 1.0
        rate = float(group["lr"])
        known = (float(group.get(name) or 0.0) for name in ("max_lr", "initial_lr"))
        # In the state, so that it survives a resume, and those who lower initial_lr on the way, as weight averaging.
        peak = state[_PEAK] = max(state.get(_PEAK, 0.0), rate, *known)
        return rate / peak if peak else 0.0


def follow_subspaces(
    optimizer: Optimizer,
    module: nn.Module,
    update: Update = "auto",
    lr_factor: float = 1.0,
    lr: float | None = None,
    momentum: float | None = None,
    second_momentum: float | None = None,
) -> SubspaceStep:
    """Make ``optimizer`` leave the class subspaces of every ``GrassmannLinear`` in ``module`` on their manifold.

    Call it once for each optimizer, in ``configure_optimizers``; the ``GrassmannHead`` callback does so by itself.

    Args:
        optimizer: any optimizer whose step moves each parameter once and whose state holds gradients.
        module: where the heads are; those whose basis the optimizer does not hold are left alone.
        update: ``"displacement"`` follows the optimizer's own step, ``"momentum"`` an SGD with momentum beside it
            (see the top of this file); ``"auto"`` is the first for SGD and the second for any other optimizer.
        lr_factor: multiplies the step of the subspaces, by either rule.
        lr: peak learning rate of the ``momentum`` and ``adam`` rules; None for 0.1, as in the paper (0.3 beside LAMB).
            It follows the shape of the group's schedule, whose highest rate is the largest of ``max_lr`` and
            ``initial_lr``, which schedulers set, and of the rates so far. Under a schedule whose factor never comes
            near 1, such as Noam's, it stays as far below; under one that rises without saying how far (``CyclicLR``)
            it is ``lr`` until the first turn.
        momentum: of the ``momentum`` and ``adam`` rules; None for 0.9.
        second_momentum: of the ``adam`` rule, for the squared length of the gradient of each class; None for 0.999.

    Raises:
        ValueError: if the optimizer is known to be one that cannot be followed, is followed already, or a number is
            out of range or belongs to another rule than the one that is followed. Hooks are not copied with an
            optimizer: call this again for a copy.
    """
    optimizer = local_optimizer(optimizer)
    for cls in type(optimizer).__mro__:
        if any(name in cls.__name__ for name in _CANNOT_FOLLOW):
            raise ValueError(
                f"class subspaces cannot follow {type(optimizer).__name__}: it moves the weights several times in a "
                "step, or averages them in its state. Use SGD, AdamW, LAMB or another optimizer whose state holds "
                "gradients."
            )
    if update not in get_args(Update):
        raise ValueError(f"update={update!r}: choose one of {', '.join(get_args(Update))}.")
    rule = _choose(update, optimizer)
    given = {"lr": lr, "momentum": momentum, "second_momentum": second_momentum}
    unused = [name for name, value in given.items() if value is not None and name not in _OPTIONS[rule]]
    if unused:
        why = f"with {type(optimizer).__name__} and update={update!r} " if update == "auto" else ""
        raise ValueError(
            f"{', '.join(f'{name}={given[name]}' for name in unused)}: no effect, as {why}the subspaces follow the "
            f"{rule} rule. Leave it out (lr_factor scales the step by any rule), or choose another update."
        )
    lr, momentum, second_momentum = (
        default if value is None else value for value, default in zip(given.values(), (0.1, 0.9, 0.999), strict=True)
    )
    if lr_factor < 0 or lr < 0:
        raise ValueError(f"need lr_factor >= 0 and lr >= 0, got {lr_factor} and {lr}.")
    if not 0 <= momentum < 1 or not 0 <= second_momentum < 1:
        raise ValueError(f"need momentum and second_momentum in [0, 1), got {momentum} and {second_momentum}.")
    heads = [part for part in module.modules() if isinstance(part, GrassmannLinear)]
    if any(following(optimizer, head) is not None for head in heads):
        raise ValueError(
            f"the class subspaces already follow this {type(optimizer).__name__}: call follow_subspaces once for each "
            "optimizer."
        )
    return SubspaceStep(optimizer, heads, rule, lr_factor, lr, momentum, second_momentum)


def local_optimizer(optimizer: Optimizer) -> Optimizer:
    """The one that steps: of a ``ZeroRedundancyOptimizer`` that of this process, which knows its share of the
    parameters and whose state is saved.
    """
    inner: Any = getattr(optimizer, "optim", None)
    return inner if type(optimizer).__name__ == "ZeroRedundancyOptimizer" else optimizer


def following(optimizer: Optimizer, head: GrassmannLinear) -> SubspaceStep | None:
    """Who makes the optimizer keep this head on its manifold, if anyone does."""
    followers: list[SubspaceStep] = local_optimizer(optimizer).__dict__.get(_STEPS_OF, [])
    return next((step for step in followers if step.holds(head.basis)), None)


def _choose(update: Update, optimizer: Optimizer) -> Rule:
    if update != "auto":
        return update
    return "displacement" if isinstance(optimizer, torch.optim.SGD) else "momentum"
