from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from lightning_feat.callbacks.transfer.probe import Part, Probe
from lightning_feat.functional.common.lengths import tamed
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import Read
from lightning_feat.joints.run.averaging import WhichWeights


class LinearSVMProbe(Probe):
    """Log how well a linear support vector machine reads classes from the features of a layer, as
    ``linear_svm_probe/accuracy/<layer>``.

    scikit-learn's ``LinearSVC``, one class against the rest, on features of length one: the classifier of "CNN features
    off-the-shelf: an astounding baseline for recognition" (Razavian et al., CVPR workshops 2014, arXiv 1403.6382). At
    the end of the last epoch, or of chosen ones, the network runs over the data once, in eval mode, each sample once
    over all processes, and leaves no trace in the training; several probes of one layer and the same data share the
    run. Without data of its own it is fitted on four fifths of the training data of the run, its penalty chosen on the
    last fifth, and tested on the validation data. It is fitted in the memory of the host: some seconds for 10,000
    samples of width 512. Needs scikit-learn.

    Args:
        layer: dotted name of a submodule; None for the input of the classifier.
        read: the ``"output"`` (default where a name is given) or the ``"input"`` of the layer.
        pooling: how features that are not ``(N, D)`` become so, see ``joints.features.pooling.pool``.
        data: a datamodule whose training, validation and test loaders to use. Its batches are converted and moved as
            those of the run.
        train: or loaders: to fit on,
        val: to choose the penalty on,
        test: to test on. Without one of the two the other is the test part.
        name: of the data: logged as ``linear_svm_probe_<name>/accuracy/<layer>``, so that several probes can be told
            apart.
        every_n_epochs: after every n-th epoch and the last; None for the last alone.
        penalties: values of C to choose from: the smaller, the wider the margin.
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

    Attributes:
        chosen: the penalty of the last probe; None before.
    """

    method, title, chooses = "linear_svm_probe", "Linear support vector machine", True

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
        penalties: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0),
        target_key: TargetKey = None,
        ignore_index: int = -100,
        forward: Forward | None = None,
        mask_key: TargetKey = None,
        weights: WhichWeights = "current",
    ) -> None:
        if find_spec("sklearn") is None:
            raise ModuleNotFoundError(
                'LinearSVMProbe needs scikit-learn, which is not installed: pip install "lightning-feat[recipes]"'
            )
        if not penalties or min(penalties) <= 0:
            raise ValueError(f"penalties={[*penalties]}: give at least one, all above zero.")
        super().__init__(
            layer, read, pooling, data, train, val, test, name, every_n_epochs, target_key, ignore_index, forward,
            mask_key, weights,
        )  # fmt: skip
        self.penalties = tuple(penalties)
        self.chosen: float | None = None

    def accuracy(self, parts: Mapping[str, Part]) -> Tensor:
        from sklearn.svm import LinearSVC

        (train, t), (val, v), (test, u) = (
            (normalize(tamed(h.double().cpu())[0], dim=1).numpy(), classes.cpu().numpy())
            for h, classes in (parts[name] for name in ("train", "val", "test"))
        )
        fitted = {c: LinearSVC(C=c, max_iter=10_000, random_state=0).fit(train, t) for c in self.penalties}
        self.chosen = max(self.penalties, key=lambda c: fitted[c].score(val, v))  # the first of equally good ones
        return torch.tensor(fitted[self.chosen].score(test, u), dtype=torch.float64)
