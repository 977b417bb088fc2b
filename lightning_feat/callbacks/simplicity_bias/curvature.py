from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_feat.callbacks.simplicity_bias.slow_pass import Criterion, losses_of_each
from lightning_feat.functional.simplicity_bias.curvature import top_eigenvalue
from lightning_feat.functional.simplicity_bias.sharpness import sharpness_step
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.drawn import drawn_batches
from lightning_feat.joints.data.epoch_ends import EpochEnds, MeasuresAtEpochEnds
from lightning_feat.joints.data.passes import hear, whole_set
from lightning_feat.joints.data.trace import without_trace
from lightning_feat.joints.data.val_loader import make_val_loader, val_loaders
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey, class_indices, targets_of
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.loss.hessian import Curvature
from lightning_feat.joints.module.head_check import check_found, forget_check
from lightning_feat.joints.run.averaging import WhichWeights
from lightning_feat.joints.run.twins import refuse_twin


class SharpnessMonitor(MeasuresAtEpochEnds):
    """Log how sharp the minimum is that the network comes to, whatever optimizer trains it.

    After the first epoch, every n-th and the last, in eval mode, over the same examples each time; it leaves no trace
    in the training. The loss is the mean of that of each example, without decay and regularizers.

    - ``sharpness/worst_rise``: how much higher the loss is at the worst point within ``rho``, to first order (the step
      of SAM, ``functional.simplicity_bias.sharpness_step``, on all examples together);
    - ``sharpness/top_eigenvalue``: the largest eigenvalue of the Hessian with respect to all trained parameters, by
      power iteration on Hessian-vector products (``functional.simplicity_bias.top_eigenvalue``). From 2 over the
      learning rate on, plain gradient descent diverges along it.

    What has no second derivative is nan, and is said once. Computed in full precision under mixed precision, too, and
    with several processes each takes its share of the examples.

    Cost: two passes and a gradient; for the eigenvalue up to ``max_products`` times (twice that where the Hessian has a
    negative eigenvalue as large) three to four passes over ``num_examples`` examples, and a few vectors of the size of
    all parameters.

    Args:
        top_eigenvalue: whether to measure the eigenvalue, by far the most expensive part.
        rho: of the worst rise.
        data: the ``"train"`` or the ``"val"`` data, in the form in which their loader gives them.
        num_examples: over all processes, drawn once.
        max_products: bound of the power iteration.
        tolerance: of its residual, against the eigenvalue, which is then off by about the square of that.
        every_n_epochs: after the first epoch, every n-th and the last; ``"log"`` for 1, 2, 3, 4, 6, 8, 12, ...
        layer: dotted name of the classifier, whose output are the logits; None finds it.
        criterion: gives the loss of each example, ``criterion(logits, targets)`` to ``(N,)``; None is cross entropy.
        seed: of the examples and the first vector.
        target_key: where a batch keeps class indices, see ``joints.features.batches``; an example with a target below
            zero counts not.
        forward: ``forward(module, batch)`` that runs the network; None runs it as the module's own step does, see
            ``joints.data.ways``.
        weights: which weights to look at: the ``"current"`` ones, or those that are ``"averaged"`` by an
            ``EMAWeightAveraging`` or another ``WeightAveraging`` of the Trainer, which validates and saves them.

    Source: the worst rise Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021, arXiv 2010.01412.
    """

    @checked
    def __init__(
        self,
        top_eigenvalue: bool = True,
        rho: float = 0.05,
        data: Literal["train", "val"] = "train",
        num_examples: int = 512,
        max_products: int = 50,
        tolerance: float = 0.05,
        every_n_epochs: int | Literal["log"] = 1,
        layer: str | None = None,
        criterion: Criterion | None = None,
        seed: int = 0,
        target_key: TargetKey = None,
        forward: Forward | None = None,
        weights: WhichWeights = "current",
    ) -> None:
        if num_examples < 1 or max_products < 1 or (every_n_epochs != "log" and every_n_epochs < 1):
            raise ValueError(f"{num_examples=}, {max_products=} and {every_n_epochs=} must be at least 1.")
        if not rho > 0 or not tolerance > 0:
            raise ValueError(f"{rho=} and {tolerance=} must be above zero.")
        self.top_eigenvalue, self.rho, self.data, self.num_examples = top_eigenvalue, rho, data, num_examples
        self.max_products, self.tolerance, self.every_n_epochs = max_products, tolerance, every_n_epochs
        self.criterion, self.seed, self.target_key, self.weights = criterion, seed, target_key, weights
        self.logits = FeatureTap(layer, "output", pools=False)
        self.differentiable = FeatureTap(layer, "output", pools=False, keep_graph=True)
        self.ends, self.ways = EpochEnds(every_n_epochs), Ways(forward, self.state_key)
        self._batches: list[Any] = []  # of this process
        self._total = 0  # examples that count, of all of them
        self._said = False

    @property
    def state_key(self) -> str:
        return f"SharpnessMonitor[{self.data}, {self.logits.label}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        names = {cls.__name__ for cls in type(trainer.strategy).__mro__}
        if stage == "fit" and not names & {"SingleDeviceStrategy", "DDPStrategy"}:
            raise ValueError(
                f"SharpnessMonitor under {type(trainer.strategy).__name__}: it differentiates with respect to whole "
                "parameters, which this strategy shards or keeps elsewhere. Use DDP."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._batches, self._total, self._said = [], 0, False
        self.ways.begin()
        self.logits.attach(pl_module)
        self.differentiable.attach(pl_module)
        check_found(pl_module, self.state_key, [self.logits], only_reads=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._batches or self._total:
            return
        if self.data == "val":
            make_val_loader(trainer)
        loader = (
            val_loaders(trainer, self.state_key, "set data='train'") if self.data == "val" else trainer.train_dataloader
        )
        shared = whole_set(trainer, loader, self.data)[2]
        batches = drawn_batches(trainer, pl_module, loader, self.data, self.num_examples, self.seed)
        if not batches:
            return
        with without_trace(trainer, pl_module):
            moved = move_data_to_device(batches[0], pl_module.device)
            way = self.ways.find(trainer, pl_module, moved, self.data, [self.logits])
            (logits,) = hear(trainer, pl_module, moved, [self.logits], way)
            there = self._classes(moved, len(logits)) >= 0
            losses_of_each(logits[there].float(), self._classes(moved, len(logits))[there], self.criterion)
        mine = batches[trainer.global_rank :: trainer.world_size] if shared else batches
        targets = [targets_of(batch, self.target_key) for batch in mine]
        number = torch.tensor(sum(int((t >= 0).sum()) for t in targets), device=pl_module.device)
        self._batches, self._total = mine, int(trainer.strategy.reduce(number, reduce_op="sum"))

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with without_trace(trainer, pl_module), isolate_rng():
            values = self._values(trainer, pl_module)
        for name, value in values.items():
            # All processes have the same value; sync_dist only spares the reader a warning from Lightning.
            pl_module.log(f"sharpness/{name}", value.float().to(pl_module.device), sync_dist=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def _let_go(self, pl_module: LightningModule) -> None:
        self.logits.remove()
        self.differentiable.remove()
        forget_check(pl_module, self.state_key)
        self._batches = []

    def _values(self, trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
        def loss(batch: Any) -> Tensor:
            return self._loss(trainer, module, move_data_to_device(batch, module.device))

        curvature = Curvature(trainer, module, loss, self._batches)
        missing = torch.tensor(torch.nan)
        names = ["worst_rise", *(["top_eigenvalue"] if self.top_eigenvalue else [])]
        if not curvature.parameters or not self._total:
            return dict.fromkeys(names, missing)
        values = {"worst_rise": self._rise(curvature)}
        if self.top_eigenvalue:
            generator = torch.Generator().manual_seed(self.seed)
            start = torch.randn(curvature.size, generator=generator).to(module.device)
            found = top_eigenvalue(curvature.product, start, self.max_products, self.tolerance)
            values["top_eigenvalue"] = found.value
        if curvature.error and not self._said:
            self._said = True
            rank_zero_warn(f"{self.state_key}: a derivative of the loss could not be taken: {curvature.error}")
        return values

    def _rise(self, curvature: Curvature) -> Tensor:
        at_weights = curvature.total()
        steps = sharpness_step(curvature.shaped(curvature.gradient()), self.rho)
        before = [p.detach().clone() for p in curvature.parameters]
        try:
            for p, step in zip(curvature.parameters, steps, strict=True):
                p.data.add_(step)
            return curvature.total() - at_weights
        finally:
            for p, old in zip(curvature.parameters, before, strict=True):
                p.data.copy_(old)

    def _loss(self, trainer: Trainer, module: LightningModule, batch: Any) -> Tensor:
        way = self.ways.known(self.data)
        tap = self.differentiable if torch.is_grad_enabled() else self.logits
        mixed = str(trainer.precision).endswith("mixed")
        torch.manual_seed(self.seed)  # a network that draws is the same function each time
        with tap.listening(), nullcontext() if mixed else trainer.precision_plugin.forward_context():
            way(module, batch)
            logits = tap.take().float()
        t = self._classes(batch, len(logits)).to(logits.device)
        there = t >= 0
        views = max(1, len(logits) // max(1, targets_of(batch, self.target_key).numel()))
        return losses_of_each(logits[there], t[there], self.criterion).sum() / (views * self._total)

    def _classes(self, batch: Any, num_samples: int) -> Tensor:
        return class_indices(targets_of(batch, self.target_key), num_samples, f"the targets of {self.state_key}")
