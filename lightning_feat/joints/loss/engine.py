"""Add terms to the loss that ``training_step`` returns, in any LightningModule.

A term is added inside ``training_step``: there it meets the loss before the fp16 scale and the division by
accumulated batches, and inside the forward of DDP. ``on_before_backward`` comes after all three. With manual
optimization a term joins a ``manual_backward`` of the step; a module that calls ``loss.backward()`` itself asks for
the terms through ``LossTermsMixin``. One that accumulates by hand, ``manual_backward(loss / n)``, says so by an
attribute ``loss_terms_factor = 1 / n``, as what a loss was divided by cannot be seen.

All terms of a module share one engine, so that the order of the callbacks that bring them does not matter.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_feat.joints.loss.terms import LossTerm
from lightning_feat.joints.module import own_parameters
from lightning_feat.joints.module.head_check import check_found, forget_check
from lightning_feat.joints.module.wraps import add_link, get_link, remove_link

_KEY = "loss_terms"


class _Engine:
    """Adds the due terms of one module to each loss. Its methods are the links around methods of the module."""

    def __init__(self) -> None:
        self.terms: dict[str, LossTerm] = {}
        self.checked: set[str] = set()  # terms whose schedule has met data without length
        self.waiting: dict[str, float] = {}  # weights of the terms that this step has still to add
        self.batch: Any = None
        self.backwards = 0  # calls of manual_backward in this step
        self.ever_joined = False
        self.logged_batch = -1

    def around_configure_optimizers(self, module: LightningModule, call: Callable[..., Any]) -> Any:
        # Here and not in on_fit_start: Tuner.lr_find never calls that hook of ours, and would tune another training.
        for term in self.terms.values():
            for tap in term.taps:
                tap.attach(module)
            if term.parameters is not None:
                own_parameters.adopt_sharded(module, term.key, term.parameters)
        configured = call()
        for term in self.terms.values():
            if term.parameters is not None:
                near = term.taps[0].find(module) if term.taps else module
                own_parameters.append_to_optimizer(term.parameters, configured, near)
        return configured

    def around_training_step(self, module: LightningModule, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)  # validation by the training step, or a pass: nothing is trained
        self.batch = args[0] if args else next(iter(kwargs.values()), None)
        self.waiting = self._due(module)
        self.backwards = 0
        try:
            with ExitStack() as stack:
                for key in self.waiting:
                    for tap in self.terms[key].taps:
                        stack.enter_context(tap.listening())
                returned = call(*args, **kwargs)
                if not module.automatic_optimization:
                    self._refuse_bare_backward(module)
                    return returned
                if returned is None:
                    return None  # Lightning skips this batch
                if isinstance(returned, dict):
                    return {**returned, "loss": self.add(module, returned["loss"])}
                return self.add(module, returned)
        finally:
            self.waiting, self.batch = {}, None

    def around_manual_backward(
        self, module: LightningModule, call: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        index, self.backwards = self.backwards, self.backwards + 1
        joining = [key for key in self.waiting if self.terms[key].backward_index == index]
        returned = call(self.add(module, loss, joining, _factor_of(module)), *args, **kwargs)
        if not kwargs.get("retain_graph", False):
            for key in self.waiting:  # what they heard so far belongs to a graph that is gone
                for tap in self.terms[key].taps:
                    tap.listen()
        return returned

    def add(
        self, module: LightningModule, loss: Tensor, keys: Sequence[str] | None = None, factor: float = 1.0
    ) -> Tensor:
        """The loss plus the waiting terms (of ``keys``), each logged; all times ``factor``."""
        keys = list(self.waiting) if keys is None else keys
        weights = {key: factor * self.waiting.pop(key) for key in keys}
        owners = [term.parameters for term in self.terms.values() if term.parameters is not None]
        with torch.autocast(module.device.type, enabled=False), own_parameters.in_use(owners):
            values = {key: self.terms[key].value(module, self.batch) for key in keys}
            total = loss
            for key, value in values.items():
                total = total + weights[key] * value
            # DDP waits for every parameter in every batch, due or not; so touch them all.
            own = [p for owner in owners for p in owner.parameters()]
            if own:
                total = total + 0.0 * torch.stack([p.sum() for p in own]).sum()
        self.ever_joined = self.ever_joined or bool(keys)
        self._log(module, values, weights, total)
        return total

    def _due(self, module: LightningModule) -> dict[str, float]:
        trainer = module._trainer  # None where the step is called by hand
        if trainer is None:
            now: tuple[int, int, float] = (0, 0, math.inf)
        else:
            now = (trainer.current_epoch, trainer.fit_loop.batch_idx, trainer.num_training_batches)
            if math.isinf(trainer.num_training_batches):
                self._check_stream(trainer.max_epochs)
        weights = {key: term.weight.at(*now) for key, term in self.terms.items()}
        return {key: weight for key, weight in weights.items() if weight != 0.0}

    def _check_stream(self, max_epochs: int | None) -> None:
        for key, term in self.terms.items():
            if key not in self.checked:
                self.checked.add(key)
                term.weight.check_stream(max_epochs, key)

    def _refuse_bare_backward(self, module: LightningModule) -> None:
        if self.waiting and not self.ever_joined:  # later a step may leave out its backward on purpose
            raise RuntimeError(
                f"the loss terms {', '.join(self.waiting)} never reached a loss: {type(module).__name__} uses manual "
                f"optimization but called self.manual_backward {self.backwards} times in its step. Call "
                "self.manual_backward(loss) in place of loss.backward(), set backward_index, or derive the module "
                "from lightning_feat.mixins.LossTermsMixin and add self.loss_terms() to the loss."
            )

    def _log(
        self, module: LightningModule, values: dict[str, Tensor], weights: dict[str, float], total: Tensor
    ) -> None:
        trainer = module._trainer
        if trainer is None or not values or self.logged_batch == trainer.fit_loop.total_batch_idx:
            return  # the second closure of SAM, at the perturbed weights
        if len(self.waiting) == 0:
            self.logged_batch = trainer.fit_loop.total_batch_idx
        whole = total.detach().float()
        for key, value in values.items():
            value = value.detach().float()
            how: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": 1}
            module.log(self.terms[key].log_name("loss"), value, **how)
            weighted = weights[key] * value
            share = torch.where(weighted == 0, 0.0, weighted / whole)  # also of a loss that is zero: an empty batch
            module.log(self.terms[key].log_name("share"), share, **how)


def _factor_of(module: LightningModule) -> float:
    """What a module that accumulates by hand, ``manual_backward(loss / n)``, has divided its loss by."""
    factor: Any = getattr(module, "loss_terms_factor", 1.0)
    if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise ValueError(
            f"loss_terms_factor={factor!r} of {type(module).__name__}: it multiplies the loss terms that join a "
            "manual_backward, and is 1 / n where the module passes loss / n."
        )
    return float(factor)


def add_loss_term(module: LightningModule, term: LossTerm) -> None:
    """Add ``term`` to each loss of ``module`` from now on; call it in ``setup("fit")``, before optimizers are
    configured.

    Raises:
        ValueError: if another term of the same name and layer is there already.
    """
    engine = _engine_of(module)
    if engine is None:
        engine = _Engine()
        add_link(module, "configure_optimizers", _KEY, engine.around_configure_optimizers)
        add_link(module, "manual_backward", _KEY, engine.around_manual_backward)
        add_link(module, "training_step", _KEY, engine.around_training_step)
    there = engine.terms.get(term.key)
    if there is not None and there is not term:
        raise ValueError(
            f"there are two loss terms {term.name!r} on layer {term.taps[0].label!r}: drop one, or rename it."
        )
    engine.terms[term.key] = term
    check_found(module, f"the term {term.key}", term.taps)
    if term.parameters is not None:
        own_parameters.adopt(module, term.key, term.parameters)


def remove_loss_term(module: LightningModule, term: LossTerm) -> None:
    """Undo ``add_loss_term``; with the last term the module is as it was. Nothing happens if the term is not there."""
    engine = _engine_of(module)
    if engine is None or engine.terms.get(term.key) is not term:
        return
    del engine.terms[term.key]
    forget_check(module, f"the term {term.key}")
    for tap in term.taps:
        tap.remove()
    own_parameters.release(module, term.key)
    if not engine.terms:
        for method in ("configure_optimizers", "manual_backward", "training_step"):
            remove_link(module, method, _KEY)


def waiting_loss_terms(module: LightningModule) -> Tensor:
    """The weighted sum of the terms that this step has still to add; they count as added. Zero if there are none."""
    engine = _engine_of(module)
    nothing = torch.zeros((), device=module.device)
    return nothing if engine is None else engine.add(module, nothing)


def loss_terms_of(module: LightningModule) -> list[LossTerm]:
    """The terms that are added to the loss of ``module``."""
    engine = _engine_of(module)
    return [] if engine is None else [*engine.terms.values()]


def _engine_of(module: LightningModule) -> _Engine | None:
    link = get_link(module, "training_step", _KEY)
    engine = getattr(link, "__self__", None)
    return engine if isinstance(engine, _Engine) else None
