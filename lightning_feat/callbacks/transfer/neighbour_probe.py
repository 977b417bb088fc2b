from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.callbacks.transfer.probe import Part, Probe
from lightning_feat.functional.transfer.voting import neighbour_votes
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import Read
from lightning_feat.joints.run.averaging import WhichWeights


class NeighbourProbe(Probe):
    """Log how often the nearest labelled samples tell the class of a new one, as ``neighbour_probe/accuracy/<layer>``.

    The weighted k-NN classifier on cosines, see ``functional.transfer.neighbour_votes``. It fits nothing, so it is the
    cheapest look at the features of a training without labels. At the end of the last epoch, or of chosen ones, the
    network runs over the data once, in eval mode, each sample once over all processes, and leaves no trace in the
    training; several probes of one layer and the same data share the run. Without data of its own it takes the
    training data of the run as labelled, in the form that the training loader gives them, and tests on the validation
    data. Every process holds all features, ``4 N D`` bytes.

    Args:
        layer: dotted name of a submodule; None for the input of the classifier.
        read: the ``"output"`` (default where a name is given) or the ``"input"`` of the layer.
        pooling: how features that are not ``(N, D)`` become so, see ``joints.features.pooling.pool``.
        data: a datamodule whose training and test loaders to use, or its validation loader where it has no test. Its
            batches are converted and moved as those of the run.
        train: or loaders: of the labelled samples,
        val: and of those to test on, where there is no ``test``.
        test: those to test on.
        name: of the data: logged as ``neighbour_probe_<name>/accuracy/<layer>``, so that several probes can be told
            apart.
        every_n_epochs: after every n-th epoch and the last; None for the last alone.
        num_neighbours: K; all where there are no more. 20 as in DINO; instance discrimination took 200.
        temperature: how fast the vote of a neighbour falls with its cosine; infinite lets all count the same.
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

    method, title, chooses = "neighbour_probe", "Nearest neighbours", False

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
        num_neighbours: int = 20,
        temperature: float = 0.07,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        forward: Forward | None = None,
        mask_key: TargetKey = None,
        weights: WhichWeights = "current",
    ) -> None:
        if num_neighbours < 1 or temperature <= 0:
            raise ValueError(f"{num_neighbours=} must be at least one, and {temperature=} above zero.")
        super().__init__(
            layer, read, pooling, data, train, val, test, name, every_n_epochs, target_key, ignore_index, forward,
            mask_key, weights,
        )  # fmt: skip
        self.num_neighbours, self.temperature = num_neighbours, temperature

    def accuracy(self, parts: Mapping[str, Part]) -> Tensor:
        train, test = parts["train"], parts["test"]
        classes, index = train[1].unique(return_inverse=True)  # indices may be far apart
        votes = neighbour_votes(train[0], index, test[0], len(classes), self.num_neighbours, self.temperature)
        return (classes[votes.argmax(1)] == test[1]).double().mean()
