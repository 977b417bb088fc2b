from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_feat.callbacks.simplicity_bias.reliance_pass import RelianceReading
from lightning_feat.functional.common.class_sums import check_target_range
from lightning_feat.functional.simplicity_bias.blocks import block_mask
from lightning_feat.functional.simplicity_bias.linear_rule import LinearRule, linear_discriminant
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.drawn import drawn_batches
from lightning_feat.joints.data.epoch_ends import EpochEnds, MeasuresAtEpochEnds
from lightning_feat.joints.data.passes import clean_loader, try_first_batch
from lightning_feat.joints.data.shared_pass import read_clean
from lightning_feat.joints.data.val_loader import make_val_loader, val_loaders
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey, class_indices, targets_of
from lightning_feat.joints.features.inputs import InputKey, floating_inputs
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.module.head_check import check_found, forget_check
from lightning_feat.joints.run.averaging import WhichWeights
from lightning_feat.joints.run.twins import refuse_twin

# Strings before functions: jsonargparse writes what stands behind a function as 'Unable to serialize instance'.
Block: TypeAlias = int | str | Sequence[Any] | slice | Tensor | Callable[[Tensor, Tensor], Tensor]
Best: TypeAlias = Literal["linear"] | Callable[[Tensor], Tensor] | None


class FeatureRelianceMonitor(MeasuresAtEpochEnds):
    """Log how much the network relies on each of some blocks of its inputs, as ``feature_reliance/<measure>/<block>``:
    each block is dealt out anew among the samples, and all else stays.

    After the first epoch, every n-th and the last, the network runs in eval mode over the data as they are, and over
    samples that have one block of another one each, by the same permutations each time; it leaves no trace in the
    training. The measures:

    - ``randomised_accuracy``: how often it is still right, to be held against ``feature_reliance/accuracy/all``: where
      nothing is lost the block is ignored, at one over the number of classes nothing else is looked at;
    - ``randomised_auc``: with two classes, the area under the ROC curve, likewise;
    - ``reliance``: how far the output follows the class of the sample that lent the block: 0 as by chance, 1 always
      (``functional.simplicity_bias.reliance_of_counts``);
    - ``shortcut_bias``: by how much that is more than the reliance of the ``best`` rule, where one is given: what a
      feature tells deserves to be used.

    Cost: a pass over the data, and for each permutation two examples loaded and one run for each block, of each sample.

    Args:
        blocks: by their names. An index into one input, without the axis of the samples: a slice, a position, a tuple
            of both or the same as a string, as in YAML (``":, :, 8:"`` is the right part of images 16 wide); a mask;
            or a function ``block(inputs, others)`` that gives the inputs ``(N, ...)`` the block of the others, for
            features that are not some of the numbers.
        data: the ``"val"`` or the ``"train"`` data; the latter in the form in which the training loader gives them.
        best: ``"linear"`` for the linear discriminant of the training data (``linear_discriminant``), or a function of
            inputs ``(N, ...)`` that gives classes ``(N,)``, such as ``ShortcutDataModule.best_rule``.
        num_fit: training examples that the linear discriminant is fitted to, before training. Takes a singular value
            decomposition of ``(num_fit, D)`` for inputs of D numbers.
        repeats: permutations, over which the measures are taken together.
        every_n_epochs: after the first epoch, every n-th and the last.
        layer: dotted name of the classifier, whose output are the logits; None finds it.
        seed: of the permutations, and of the examples for the discriminant.
        target_key: where a batch keeps class indices, see ``joints.features.batches``; a sample with a target below
            zero has none, neither lends nor borrows, and counts nowhere.
        input_key: where it keeps its inputs, one floating tensor: a position, a key or an attribute. None takes the
            first entry, or the one of a usual name (``joints.features.inputs``).
        forward: ``forward(module, batch)`` that runs the network; None runs it as the module's own step does, see
            ``joints.data.ways``.
        weights: which weights to look at: the ``"current"`` ones, or those that are ``"averaged"`` by an
            ``EMAWeightAveraging`` or another ``WeightAveraging`` of the Trainer, which validates and saves them.

    Source: Shah, Tamuly, Raghunathan, Jain, Netrapalli, NeurIPS 2020, arXiv 2006.07710 (randomised accuracy and AUC);
    Hermann, Mobahi, Fel, Mozer, ICLR 2024, arXiv 2310.16228 (shortcut bias). That the class of the lender stands for
    that of the feature is ours: a permutation crosses the blocks as their balanced probe does.
    """

    @checked
    def __init__(
        self,
        blocks: Mapping[str, Block],
        data: Literal["train", "val"] = "val",
        best: Best = None,
        num_fit: int = 2000,
        repeats: int = 1,
        every_n_epochs: int | Literal["log"] = 1,
        layer: str | None = None,
        seed: int = 0,
        target_key: TargetKey = None,
        input_key: InputKey = None,
        forward: Forward | None = None,
        weights: WhichWeights = "current",
    ) -> None:
        if not blocks:
            raise ValueError("blocks={}: name at least one block of the inputs.")
        if num_fit < 1 or repeats < 1 or (every_n_epochs != "log" and every_n_epochs < 1):
            raise ValueError(f"{num_fit=}, {repeats=} and {every_n_epochs=} must be at least 1.")
        self.blocks, self.data, self.best = dict(blocks), data, best
        self.num_fit, self.repeats, self.every_n_epochs, self.seed = num_fit, repeats, every_n_epochs, seed
        self.target_key, self.input_key, self.weights = target_key, input_key, weights
        self.logits = FeatureTap(layer, "output", pools=False)
        self.ends = EpochEnds(every_n_epochs)
        self.ways = Ways(forward, self.state_key)
        self._rule: LinearRule | None = None

    @property
    def state_key(self) -> str:
        return f"FeatureRelianceMonitor[{self.data}, {self.logits.label}, {', '.join(self.blocks)}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._rule = None
        self.ways.begin()
        self.logits.attach(pl_module)
        check_found(pl_module, self.state_key, [self.logits], only_reads=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.data == "val":
            make_val_loader(trainer)
        # What is wrong with data or network is said now.
        clean = clean_loader(trainer, self.loader(trainer), self.data)
        batch = try_first_batch(trainer, pl_module, clean, self.data, self.ways, [self.logits])
        if batch is not None:
            inputs = floating_inputs(batch, self.input_key)
            self.classes(batch, len(inputs))
            for name in self.blocks:
                self.exchanged(name, inputs, inputs)
            if callable(self.best):
                self.best_classes(inputs)
        if self.best == "linear" and self._rule is None:
            self._rule = self._fitted(trainer, pl_module)

    def wanted(self, trainer: Trainer) -> dict[str, Any]:
        return {self.data: self.loader(trainer)} if self.ends.is_due(trainer) else {}

    def new_reading(self, trainer: Trainer, module: LightningModule, name: str) -> RelianceReading:
        return RelianceReading(trainer, module, self)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reading: RelianceReading = read_clean(trainer, pl_module, self, self.data, self.loader(trainer))
        for name, value in reading.values.items():
            # All processes have the same value; sync_dist only spares the reader a warning from Lightning.
            pl_module.log(f"feature_reliance/{name}", value.float().to(pl_module.device), sync_dist=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def _let_go(self, pl_module: LightningModule) -> None:
        self.logits.remove()
        forget_check(pl_module, self.state_key)

    def loader(self, trainer: Trainer) -> Any:
        """Of the data that are measured."""
        if self.data == "train":
            return trainer.train_dataloader
        return val_loaders(trainer, self.state_key, "set data='train'")

    def classes(self, batch: Any, num_samples: int) -> Tensor:
        """Class indices ``(num_samples,)``, below zero where there is none."""
        return class_indices(targets_of(batch, self.target_key), num_samples, f"the targets of {self.state_key}")

    def exchanged(self, name: str, inputs: Tensor, others: Tensor) -> Tensor:
        """The inputs with this block of the others."""
        block = self.blocks[name]
        if not callable(block) or isinstance(block, Tensor):
            return torch.where(block_mask(block, inputs.shape[1:]).to(inputs.device), others, inputs)
        found = block(inputs, others)
        if not isinstance(found, Tensor) or found.shape != inputs.shape:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"the function of block {name!r} gives {what} for inputs {tuple(inputs.shape)}: return the inputs, of "
                "the same shape, with that block of the others."
            )
        return found

    def best_classes(self, inputs: Tensor) -> Tensor | None:
        """What the best rule chooses; None without one."""
        if callable(self.best):
            found = self.best(inputs)
            if not isinstance(found, Tensor) or found.shape != inputs.shape[:1] or found.is_floating_point():
                raise ValueError(f"best gives {found!r:.60} for {len(inputs)} inputs: return a class index for each.")
            return found.to(inputs.device)
        if self._rule is None:
            return None
        weight, bias = (t.to(inputs.device, torch.float32) for t in self._rule)
        return (inputs.flatten(1).float() @ weight.T + bias).argmax(1)

    def _fitted(self, trainer: Trainer, module: LightningModule) -> LinearRule:
        """The linear discriminant of some training examples; the same on all processes that share them."""
        batches = drawn_batches(trainer, module, trainer.train_dataloader, "training", self.num_fit, self.seed)
        inputs = [floating_inputs(batch, self.input_key) for batch in batches]
        targets = torch.cat([self.classes(batch, len(x)) for batch, x in zip(batches, inputs, strict=True)])
        features, there = torch.cat([x.flatten(1) for x in inputs]), targets >= 0
        num_classes = int(targets.max()) + 1
        check_target_range(targets[there], num_classes)
        return linear_discriminant(features[there], targets[there], num_classes)
