from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.callbacks.transfer.probe import Part, Probe
from lightning_feat.functional.common.class_sums import class_means, class_sums
from lightning_feat.functional.transfer.prototypes import Nearness, nearest_mean_scores
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import Read
from lightning_feat.joints.run.averaging import WhichWeights


class NearestMeanProbe(Probe):
    """Log how often the nearest class mean tells the class of a new sample, as ``nearest_mean_probe/accuracy/<layer>``.

    The baseline that continual learning is held against, see ``functional.transfer.nearest_mean_scores``; one mean for
    each class, and nothing to fit. At the end of the last epoch, or of chosen ones, the network runs over the data
    once, in eval mode, each sample once over all processes, and leaves no trace in the training; several probes of one
    layer and the same data share the run. Without data of its own it takes the means of the training data of the run,
    in the form that the training loader gives them, and tests on the validation data.

    Args:
        layer: dotted name of a submodule; None for the input of the classifier.
        read: the ``"output"`` (default where a name is given) or the ``"input"`` of the layer.
        pooling: how features that are not ``(N, D)`` become so, see ``joints.features.pooling.pool``.
        data: a datamodule whose training and test loaders to use, or its validation loader where it has no test. Its
            batches are converted and moved as those of the run.
        train: or loaders: of the labelled samples,
        val: and of those to test on, where there is no ``test``.
        test: those to test on.
        name: of the data: logged as ``nearest_mean_probe_<name>/accuracy/<layer>``, so that several probes can be told
            apart.
        every_n_epochs: after every n-th epoch and the last; None for the last alone.
        nearness: by the ``"cosine"``, or the ``"euclidean"`` distance.
        target_key: where a batch keeps class indices, see ``joints.features.batches``.
        ignore_index: samples with this target are left out, and so are those with a target below zero, which say that
            there is no label.
        forward: ``forward(module, batch)`` that runs the network; None runs it as the module's own step does, see
            ``joints.data.ways``.
        mask_key: where a batch keeps which tokens count ``(N, T)``, for ``pooling="mean"``, ``"max"``,
            ``"last"`` or ``"tokens"``: without it padding counts.
        weights: which weights to look at: the ``"current"`` ones, or those that are
            ``"averaged"`` by an ``EMAWeightAveraging`` or another ``WeightAveraging`` of the Trainer, which validates
            and saves them.
    """

    method, title, chooses = "nearest_mean_probe", "Nearest class means", False

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
        nearness: Nearness = "cosine",
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
        self.nearness: Nearness = nearness

    def accuracy(self, parts: Mapping[str, Part]) -> Tensor:
        train, test = parts["train"], parts["test"]
        classes, index = train[1].unique(return_inverse=True)  # indices may be far apart
        means = class_means(class_sums(train[0], index, len(classes)))
        scores = nearest_mean_scores(test[0], means, self.nearness)
        return (classes[scores.argmax(1).to(classes.device)] == test[1]).double().mean()
