from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_feat.functional.common.class_sums import check_target_range
from lightning_feat.functional.simplicity_bias.clones import gaussian_clones
from lightning_feat.functional.simplicity_bias.epochs import next_log_step
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.drawn import drawn_batches
from lightning_feat.joints.data.epoch_ends import EpochEnds, MeasuresAtEpochEnds
from lightning_feat.joints.data.passes import hear, whole_set
from lightning_feat.joints.data.trace import without_trace
from lightning_feat.joints.data.val_loader import make_val_loader, val_loaders
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey, class_indices, targets_of
from lightning_feat.joints.features.inputs import InputKey, floating_inputs, with_inputs
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.module.head_check import check_found, forget_check
from lightning_feat.joints.run.twins import refuse_twin

_KINDS = ("real", "gaussian", "isotropic")


class DistributionalSimplicityMonitor(MeasuresAtEpochEnds):
    """Log how well the network in training tells real examples, and clones that keep only simple statistics of their
    class, as ``distributional_simplicity/accuracy_<kind>/<layer>``.

    The kinds are ``isotropic`` (of each class the mean, and how far it spreads), ``gaussian`` (mean and covariance) and
    ``real`` (all there is), see ``functional.simplicity_bias.gaussian_clones``. A network that has learned
    nothing beyond means does as well on all three; where the curves part, it has begun to use more.

    After the steps 1, 2, 3, 4, 6, 10, 16, ..., evenly spaced in the logarithm, and the last, the network runs in eval
    mode over the same examples and clones, which are made once, before training, from a bounded number of examples
    drawn by the seed; the clones are made of what the network gets. It leaves no trace in the training, and in the
    other steps does not look at the device. The loggers get every value at its step, whatever ``log_every_n_steps``
    says.

    Cost: ``3 * num_examples`` examples without gradient at each of these steps, 26 in the first 100,000; in
    the memory of the host three times the inputs of ``num_examples`` examples on each process, once more while clones
    are made.

    Args:
        data: the ``"train"`` or the ``"val"`` data, in the form in which their loader gives them.
        num_examples: over all processes, which take part in the measuring.
        per_decade: how many steps in each power of ten.
        shrinkage: of the covariance of the Gaussian clones, see ``gaussian_clones``: None for that of Ledoit and Wolf.
        layer: dotted name of the classifier, whose output are the logits; None finds it.
        seed: draws the examples and the clones, by generators of its own.
        target_key: where a batch keeps class indices, see ``joints.features.batches``; an example with a target below
            zero has none and is left out.
        input_key: where it keeps its inputs, one floating tensor: a position, a key or an attribute. None takes the
            first entry, or the one of a usual name (``joints.features.inputs``).
        forward: ``forward(module, batch)`` that runs the network; None runs it as the module's own step does, see
            ``joints.data.ways``.

    Attributes:
        curve: what was measured, ``{"step": ..., "real": ..., "gaussian": ..., "isotropic": ...}`` for each step; of a
            run that is resumed also that of before. Accuracies are nan where a logit is.

    Source: Refinetti, Ingrosso, Goldt, ICML 2023, arXiv 2211.11567.
    """

    @checked
    def __init__(
        self,
        data: Literal["train", "val"] = "train",
        num_examples: int = 1000,
        per_decade: int = 5,
        shrinkage: float | None = None,
        layer: str | None = None,
        seed: int = 0,
        target_key: TargetKey = None,
        input_key: InputKey = None,
        forward: Forward | None = None,
    ) -> None:
        if num_examples < 1 or per_decade < 1:
            raise ValueError(f"{num_examples=} and {per_decade=} must be at least 1.")
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage={shrinkage}: give a number in [0, 1], or None.")
        self.data, self.num_examples, self.per_decade, self.shrinkage = data, num_examples, per_decade, shrinkage
        self.seed, self.target_key, self.input_key = seed, target_key, input_key
        self.logits = FeatureTap(layer, "output", pools=False)
        self.ways = Ways(forward, self.state_key)
        self.ends, self.weights = EpochEnds(None, first=False), "current"  # of the run
        self.curve: list[dict[str, float]] = []
        self._measured = self._logger_step = 0  # the last steps
        self._examples: list[_Examples] = []
        self._shared = True  # whether all processes have the same

    @property
    def state_key(self) -> str:
        return f"DistributionalSimplicityMonitor[{self.data}, {self.logits.label}]"

    def state_dict(self) -> dict[str, Any]:
        return {"measured": self._measured, "curve": list(self.curve)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._measured, self.curve = state_dict["measured"], list(state_dict["curve"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        if stage == "fit" and trainer.global_step == 0:
            self._measured, self.curve = 0, []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._examples = []
        self.ways.begin()
        self.logits.attach(pl_module)
        check_found(pl_module, self.state_key, [self.logits], only_reads=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.data == "val":
            make_val_loader(trainer)
        if not self._examples:
            self._examples = self._made(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._logger_step = trainer.fit_loop.epoch_loop._batches_that_stepped  # what loggers count, from zero
        if trainer.global_step >= next_log_step(self._measured, self.per_decade):
            self._run(trainer, pl_module, on_step=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def _let_go(self, pl_module: LightningModule) -> None:
        self.logits.remove()
        forget_check(pl_module, self.state_key)
        self._examples = []

    def _made(self, trainer: Trainer, module: LightningModule) -> "list[_Examples]":
        """The examples and their clones; of several processes each has all of those that they share."""
        loader = (
            val_loaders(trainer, self.state_key, "set data='train'") if self.data == "val" else trainer.train_dataloader
        )
        self._shared = whole_set(trainer, loader, self.data)[2]
        batches = drawn_batches(trainer, module, loader, self.data, self.num_examples, self.seed)
        inputs = [floating_inputs(batch, self.input_key) for batch in batches]
        targets = [
            class_indices(targets_of(batch, self.target_key), len(x), f"the targets of {self.state_key}")
            for batch, x in zip(batches, inputs, strict=True)
        ]
        with without_trace(trainer, module):
            for batch in batches[:1]:
                moved = move_data_to_device(batch, module.device)
                way = self.ways.find(trainer, module, moved, self.data, [self.logits])
                (logits,) = hear(trainer, module, moved, [self.logits], way)
                check_target_range(targets[0][targets[0] >= 0], logits.shape[1])
        if not batches:
            return []
        flat, labels = torch.cat([x.flatten(1) for x in inputs]), torch.cat(targets)
        there = labels >= 0
        num_classes = int(labels.max()) + 1
        sizes = [len(x) for x in inputs]
        kinds = []
        for number, shrinkage in enumerate((self.shrinkage, 1.0)):
            clones = flat.clone()
            drawn = gaussian_clones(flat[there], labels[there], num_classes, shrinkage, self.seed + number)
            clones[there] = drawn.to(clones.dtype)
            kinds.append(clones.split(sizes))
        return [
            _Examples(batch, t, [g.view_as(x), i.view_as(x)])
            for batch, x, t, g, i in zip(batches, inputs, targets, *kinds, strict=True)
        ]

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._measured:
            self._run(trainer, pl_module, on_step=False)

    def _run(self, trainer: Trainer, module: LightningModule, on_step: bool) -> None:
        self._measured = trainer.global_step
        sums = torch.zeros(len(_KINDS), 2, dtype=torch.float64)  # right, and all
        with without_trace(trainer, module):
            for examples in self._own(trainer):
                for kind, batch in enumerate(examples.kinds(self.input_key)):
                    moved = move_data_to_device(batch, module.device)
                    (logits,) = hear(trainer, module, moved, [self.logits], self.ways.known(self.data))
                    sums[kind] += right_and_all(logits, examples.targets).cpu()
        total: Tensor = trainer.strategy.reduce(sums.float().to(module.device), reduce_op="sum")
        accuracy = (total[:, 0] / total[:, 1]).tolist()
        values = dict(zip(_KINDS, accuracy, strict=True))
        self.curve.append({"step": self._measured, **values})
        named = {f"distributional_simplicity/accuracy_{kind}/{self.logits.label}": v for kind, v in values.items()}
        # Not by Lightning to the loggers, which it gives one in every log_every_n_steps.
        module.log_dict(named, on_step=on_step, on_epoch=not on_step, logger=False, batch_size=1, sync_dist=not on_step)
        for logger in trainer.loggers:
            logger.log_metrics(named, step=self._logger_step)

    def _own(self, trainer: Trainer) -> "list[_Examples]":
        """Those that this process measures."""
        together = type(trainer.strategy).__name__ == "ModelParallelStrategy"  # sharded: all run in step
        if together or not self._shared:
            return self._examples
        return self._examples[trainer.global_rank :: trainer.world_size]


class _Examples:
    """A batch, and clones of its inputs."""

    def __init__(self, batch: Any, targets: Tensor, clones: list[Tensor]) -> None:
        self.batch, self.targets, self.clones = batch, targets, clones

    def kinds(self, input_key: InputKey) -> list[Any]:
        return [self.batch, *(with_inputs(self.batch, clones, input_key) for clones in self.clones)]


def right_and_all(logits: Tensor, targets: Tensor) -> Tensor:
    """How many are right, and how many there are: ``(2,)`` float64; nan where a logit is. Targets below zero are left
    out.
    """
    t = class_indices(targets, len(logits)).to(logits.device)
    there = t >= 0
    right = ((logits.argmax(1) == t) & there).sum().double()
    bad = ~logits[there].isfinite().all()
    return torch.stack([torch.where(bad, torch.nan, right), there.sum().double()])
