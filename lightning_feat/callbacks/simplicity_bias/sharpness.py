from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.trace import unheard
from lightning_feat.joints.features.kept import remember, remember_generators
from lightning_feat.joints.module.own_parameters import in_order
from lightning_feat.joints.module.wraps import add_link, get_link, remove_link
from lightning_feat.joints.run.twins import refuse_twin
from lightning_feat.optim.simplicity_bias import Ascent, refuse_many_closures

_KEY = "SharpnessAwareMinimization"


class SharpnessAwareMinimization(Callback):
    """Train any LightningModule by SAM or ASAM with its own optimizer: each step takes the gradient at the worst point
    near the weights, and so prefers flat minima.

    A step runs ``training_step`` and backward twice. The second run sees the same batch and the same random numbers
    (dropout, augmentation), and leaves no trace but its gradient: weights are put back bit for bit, BatchNorm counts
    once, metrics and ``self.log`` hear the first run alone. Optimizer, scheduler, clipping (of the second gradient),
    precision, also fp16, and checkpoints stay as they are: the optimizer's state loads without this callback, and a run
    resumes exactly. Subspaces of a ``GrassmannHead`` are perturbed along their manifold. Hooks of yours around
    backward, and what ``training_step`` does outside of the module, come twice.

    Logs ``sharpness/rise``, how much the loss is higher at the worst point, the mean over the steps of an epoch.

    Cost: each step that it takes part in is two; a copy of the trained parameters, and of the buffers.

    Args:
        rho: length of the perturbation over all parameters; 0.05 in the paper, about ten times that for ASAM.
        adaptive: ASAM (Kwon et al., ICML 2021), for which the size of each weight is its unit of length.
        eta: of ASAM, lets weights of zero move.
        interval: take part in every n-th optimizer step, counted from the first of the run, the others being plain.
        scope: with several processes, look for the worst point of the batch of all (``"joint"``), or each for that of
            its own share (``"per_process"``, m-sharpness of the paper, which generalises better there; it also spares
            one synchronisation).

    Source: Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021, arXiv 2010.01412; see ``functional.simplicity_bias``.
    """

    @checked
    def __init__(
        self,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.01,
        interval: int = 1,
        scope: Literal["joint", "per_process"] = "joint",
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1.")
        Ascent(rho, adaptive, eta)  # says what is out of range
        self.rho, self.adaptive, self.eta, self.interval, self.scope = rho, adaptive, eta, interval, scope

    @property
    def state_key(self) -> str:
        return _KEY

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        if stage != "fit":
            return
        self._refuse(trainer, pl_module)
        # In setup: a search for a learning rate calls no later hook of ours, and would tune another training.
        options = self.rho, self.adaptive, self.eta
        add_link(pl_module, "optimizer_step", _KEY, _TwoPasses(*options, self.interval, self.scope == "per_process"))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            refuse_many_closures(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        link = get_link(pl_module, "optimizer_step", _KEY)
        if isinstance(link, _TwoPasses) and link.rise is not None:
            pl_module.log("sharpness/rise", link.rise, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
            link.rise = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        remove_link(pl_module, "optimizer_step", _KEY)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        remove_link(pl_module, "optimizer_step", _KEY)  # after an exception Lightning does not call teardown

    def _refuse(self, trainer: Trainer, module: LightningModule) -> None:
        if not module.automatic_optimization:
            raise ValueError(
                f"{_KEY} needs automatic optimization, as it runs training_step twice: in a training_step that "
                "optimizes by hand call optim.sharpness_aware(optimizer, self) and give optimizer.step a closure."
            )
        callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
        schedules = any(_is_a(callback, "GradientAccumulationScheduler") for callback in callbacks)
        if trainer.accumulate_grad_batches != 1 or schedules:
            number = "a GradientAccumulationScheduler" if schedules else f"{trainer.accumulate_grad_batches=}"
            raise ValueError(
                f"{_KEY} beside {number.removeprefix('trainer.')}: the batches that were accumulated before the last "
                "cannot be run again at the worst point. Accumulate nothing and take larger batches or more processes, "
                "or smaller ones with a smaller learning rate."
            )
        strategy = trainer.strategy
        if not _is_a(strategy, "SingleDeviceStrategy", "DDPStrategy") or strategy.handles_gradient_accumulation:
            raise ValueError(
                f"{_KEY} under {type(strategy).__name__}: it moves whole parameters, which this strategy shards or "
                "keeps elsewhere. Use DDP."
            )


class _TwoPasses:
    """Around ``optimizer_step``: the closure that runs ``training_step`` and backward becomes two of it."""

    def __init__(self, rho: float, adaptive: bool, eta: float, interval: int, per_process: bool) -> None:
        self.options = rho, adaptive, eta
        self.interval, self.per_process = interval, per_process
        self.rise: Tensor | None = None

    def __call__(
        self,
        module: LightningModule,
        call: Callable[..., Any],
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Any = None,
    ) -> Any:
        if optimizer_closure is None or module.trainer.global_step % self.interval:
            return call(epoch, batch_idx, optimizer, optimizer_closure)

        def both() -> Any:
            return self._both(module, optimizer, optimizer_closure)

        return call(epoch, batch_idx, optimizer, both)

    def _both(self, module: LightningModule, optimizer: Any, closure: Any) -> Any:
        strategy: Any = module.trainer.strategy
        alone = strategy.block_backward_sync() if self.per_process and _synchronises(strategy) else nullcontext()
        random, own_random = _collect_rng_states(), remember_generators(module)
        with alone:
            loss = closure()
        if loss is None:
            return None  # training_step leaves the batch out
        result = getattr(closure, "_result", None)  # what Lightning hands to the hooks after the step
        put_back, ascent = remember(module), Ascent(*self.options, module)
        try:
            with ascent(in_order(optimizer)), unheard(module.trainer, module):
                _set_rng_states(random)
                own_random()
                second = closure()
        finally:
            put_back()
        if result is not None:
            closure._result = result
        if second is not None:
            self.rise = (second - loss).detach()
        return loss


def _synchronises(strategy: Any) -> bool:
    return _is_a(strategy, "DDPStrategy") and isinstance(strategy.model, nn.parallel.DistributedDataParallel)


def _is_a(value: Any, *names: str) -> bool:
    """By name: the classes of pytorch_lightning are others than those of lightning.pytorch."""
    return any(cls.__name__ in names for cls in type(value).__mro__)
