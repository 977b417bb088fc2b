from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.callbacks.transfer.probe import Part, Probe
from lightning_feat.functional.transfer.probe import PENALTIES, LinearProbeResult, Scaling, linear_probe
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import Read
from lightning_feat.joints.run.averaging import WhichWeights


class LinearProbe(Probe):
    """Log how well a linear classifier reads classes from the features of a layer, as
    ``linear_probe/accuracy/<layer>``: the network stays as it is, and the classifier is fitted beside it.

    At the end of the last epoch, or of chosen ones, the network runs over the data once, in eval mode, each sample once
    over all processes, and leaves no trace in the training. A logistic regression is fitted to the features
    (``functional.transfer``), its penalty chosen on the validation part, and tested on the test part. Data with
    other classes than those trained on measure how well the features transfer.

    Without data of its own the probe takes those of the run: fitted on four fifths of the training data, in the form
    that the training loader gives them, penalty chosen on the last fifth, tested on the validation data. A fifth of
    the training part is held out in this way wherever there is no validation part beside the test part.

    Every process holds all features, and fits: ``4 N D`` bytes, and three times as much in float64 while it fits.

    Args:
        layer: dotted name of a submodule; None for the input of the classifier.
        read: the ``"output"`` (default where a name is given) or the ``"input"`` of the layer.
        pooling: how features that are not ``(N, D)`` become so, see ``joints.features.pooling.pool``.
        data: a datamodule whose training, validation and test loaders to use. Its batches are converted and moved as
            those of the run.
        train: or loaders: to fit on,
        val: to choose the penalty on,
        test: to test on. Without one of the two the other is the test part.
        name: of the data: logged as ``linear_probe_<name>/accuracy/<layer>``, so that several probes can be told apart.
        every_n_epochs: after every n-th epoch and the last; None for the last alone.
        scaling: of the features, see ``functional.transfer.linear_probe``.
        penalties: to choose from.
        target_key: where a batch keeps class indices, see ``joints.features.batches``.
        ignore_index: samples with this target are left out, and so are those with a target below zero, which say that
            there is no label.
        mask_key: where a batch keeps which tokens count ``(N, T)``, for ``pooling="mean"``, ``"max"``,
            ``"last"`` or ``"tokens"``: without it padding counts.
        forward: ``forward(module, batch)`` that runs the network; None runs it as the module's own step does, see
            ``joints.data.ways``.
        weights: which weights to look at: the ``"current"`` ones, or those that are
            ``"averaged"`` by an ``EMAWeightAveraging`` or another ``WeightAveraging`` of the Trainer, which validates
            and saves them.

    Attributes:
        result: of the last probe, with the chosen penalty and the validation curve; None before.
    """

    method, title, chooses = "linear_probe", "Linear probe", True

    @checked
    def __init__(
        self,
        layer: str | None = None,
        read: Read | None = None,
        pooling: Pooling | None = None,
        data: LightningDataModule | None = None,
        train: DataLoader[Any] | None = None,
        val: DataLoader[Any] | None = None,
        test: DataLoader[Any] | None = None,
        name: str = "",
        every_n_epochs: int | None = None,
        scaling: Scaling = "standardize",
        penalties: Sequence[float] = PENALTIES,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        forward: Forward | None = None,
        mask_key: TargetKey = None,
        weights: WhichWeights = "current",
    ) -> None:
        super().__init__(
            layer, read, pooling, data, train, val, test, name, every_n_epochs, target_key, ignore_index, forward,
            mask_key, weights,
        )  # fmt: skip
        self.scaling: Scaling = scaling
        self.penalties = tuple(penalties)
        self.result: LinearProbeResult | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.result = None
        super().on_fit_start(trainer, pl_module)

    def accuracy(self, parts: Mapping[str, Part]) -> Tensor:
        train, val, test = (parts[name] for name in ("train", "val", "test"))
        self.result = linear_probe(*train, *val, *test, scaling=self.scaling, penalties=self.penalties)
        return self.result.accuracy
