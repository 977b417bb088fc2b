"""The page about features, written when a fit ends."""

import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer

from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.epoch_ends import EpochEnds, MeasuresAtEpochEnds
from lightning_feat.joints.data.pass_progress import pass_progress
from lightning_feat.joints.data.passes import clean_loader, try_first_batch
from lightning_feat.joints.data.shared_pass import read_clean
from lightning_feat.joints.data.val_loader import make_val_loader, val_loaders
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import Read
from lightning_feat.joints.module.head_check import check_found, forget_check
from lightning_feat.joints.run.averaging import WhichWeights
from lightning_feat.joints.run.folder import run_folder
from lightning_feat.joints.run.loggers import send_file
from lightning_feat.joints.run.spared import run_spared
from lightning_feat.joints.run.twins import refuse_twin
from lightning_feat.report.collecting.collect import Budget, Collecting, Source, run_pass, source_of
from lightning_feat.report.collecting.ears import Ears
from lightning_feat.report.embedding import Map
from lightning_feat.report.feature_set import FeatureSet
from lightning_feat.report.learned import Learned
from lightning_feat.report.writing import FeaturePage, check_output, write_report


class FeatureReport(MeasuresAtEpochEnds):
    """Write one self-contained HTML page about the features when fitting ends: headline numbers in plain words, a map
    that shows the sample under the cursor, how alike the classes are, in how many directions they spread, what is taken
    for what, the hardest examples, and how far classes and layers have moved since the start.

    The network runs over the data in eval mode, each sample once over all processes, and leaves no trace in the
    training: at the end of the last epoch, with ``from_start`` before the first, and after every n-th epoch if that is
    asked for. The page is beside the files of the run's first logger, and loggers that keep files get a copy. Needs
    ``pip install "lightning-feat[report]"``. What goes wrong with the page at the end becomes a warning.

    Args:
        layers: dotted names of submodules; None for the input of the classifier.
        read: the ``"output"`` (default where names are given) or the ``"input"`` of the layers.
        pooling: how features that are not ``(N, D)`` become so, see ``joints.features.pooling.pool``; with ``"tokens"``
            each token is a sample.
        data: ``"val"`` or ``"train"`` data of the run.
        filename: of the page, in the folder of the run.
        title: of the page.
        map: shown first: ``"pca"``, ``"tsne"`` or ``"umap"``.
        from_start: run the network before training too, to show how far features have moved.
        every_n_epochs: look after every n-th epoch which samples are right, to show those that were learned last.
        max_samples: the network runs on no more, 20,000 at most; beyond, a seeded sample, which the page says.
        megabytes: of the memory of the host for one set of features; beyond, a seeded sample of the rows.
        seed: of what is drawn.
        save: name of a file beside the page for the features, ``.safetensors`` or ``.npz``.
        classifier: dotted name of the classifier, where it cannot be found.
        target_key: where a batch keeps its targets, see ``joints.features.batches``. Without targets the page shows
            what can be seen without.
        ignore_index: rows with this target are left out, and so are those with a class index below zero.
        mask_key: where a batch keeps which tokens count ``(N, T)``.
        forward: ``forward(module, batch)`` that runs the network; None runs it as the module's own step does.
        weights: which weights to look at, the ``"current"`` ones or those that are ``"averaged"``.

    Attributes:
        page: the page that was written, with its numbers; on the first process.
    """

    @checked
    def __init__(
        self,
        layers: list[str] | None = None,
        read: Read | None = None,
        pooling: Pooling | None = None,
        data: Literal["val", "train"] = "val",
        filename: str = "features.html",
        title: str = "Features",
        map: Map = "pca",
        from_start: bool = True,
        every_n_epochs: int | None = None,
        max_samples: int = 10_000,
        megabytes: float = 512.0,
        seed: int = 0,
        save: str | None = None,
        classifier: str | None = None,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        mask_key: TargetKey = None,
        forward: Forward | None = None,
        weights: WhichWeights = "current",
    ) -> None:
        if layers is not None and (not layers or len({*layers}) < len(layers)):
            raise ValueError(f"layers={layers}: give at least one, each once, or None for the input of the classifier.")
        for argument, name in (("filename", filename), ("save", save)):
            if name is not None and os.path.basename(name) != name:
                raise ValueError(f"{argument}={name!r}: give a name without a folder; the folder is that of the run.")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs} must be at least 1, or None for the last epoch alone.")
        if megabytes <= 0:
            raise ValueError(f"megabytes={megabytes}: give some memory.")
        check_output(filename, map, max_samples, save)
        self.ears = Ears(
            [None] if layers is None else [*layers], read, pooling, classifier, target_key, ignore_index, mask_key
        )
        self.data, self.filename, self.title, self.map, self.save = data, filename, title, map, save
        self.from_start, self.weights = from_start, weights
        self.budget = Budget(max_samples, max_samples, megabytes, seed)
        self.ends, self.ways = (
            EpochEnds(every_n_epochs, first=every_n_epochs is not None),
            Ways(forward, self.state_key),
        )
        self.page: FeaturePage | None = None
        self._start: FeatureSet | None = None
        self._learned = Learned()
        self._last: FeatureSet | None = None
        self._folder = ""
        self._source: Source | None = None

    @property
    def state_key(self) -> str:
        return f"FeatureReport[{self.filename}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        if stage == "fit":
            self._folder = run_folder(trainer)
            if trainer.global_step == 0:
                self._learned = Learned()  # of an earlier run; a checkpoint, if any, is loaded after this

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._start, self._last, self._source, self.page = None, None, None, None
        self.ways.begin()
        self.ears.attach(pl_module)
        check_found(pl_module, self.state_key, self.ears.taps, only_reads=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.data == "val":
            make_val_loader(trainer)
        loader = self._loader(trainer)
        clean = clean_loader(trainer, loader, self.data)
        try_first_batch(trainer, pl_module, clean, self.data, self.ways, self.ears.all_taps)
        self._source = source_of(trainer, loader, self.data, self.budget)
        if self.from_start and trainer.global_step == 0:
            self._start = self._collected(trainer, pl_module, self._source, shared=False)
            if self._start is not None:
                self._start.source = "the start of the training"
                self._learned.note(self._start, "the start")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._last is not None:
            with run_spared("FeatureReport", "write its page"):
                self._write(trainer, self._last)
        self._start, self._last = None, None

    def wanted(self, trainer: Trainer) -> dict[str, Any]:
        """For ``shared_pass``: only where all of the data are read, which others may share."""
        whole = self._source is not None and self._source.whole
        return {self.data: self._loader(trainer)} if whole and self.ends.is_due(trainer) else {}

    def new_reading(self, trainer: Trainer, module: LightningModule, name: str) -> Collecting:
        """For ``shared_pass``."""
        if self._source is None:
            raise RuntimeError("the report reads only while fitting.")
        return Collecting(trainer, module, self.ears, self._source, self.budget)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def state_dict(self) -> dict[str, Any]:
        return {"learned": self._learned.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._learned = Learned(**state_dict["learned"])

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._source is None:
            self._source = source_of(trainer, self._loader(trainer), self.data, self.budget)
        made = self._collected(trainer, pl_module, self._source)
        if made is not None:
            made.source = f"{self.data} data after epoch {trainer.current_epoch + 1}"
            self._learned.note(made, f"epoch {trainer.current_epoch + 1}")
        self._last = made

    def _collected(
        self, trainer: Trainer, module: LightningModule, source: Source, shared: bool = True
    ) -> FeatureSet | None:
        """After a pass; None on all processes but the first."""
        if shared and source.whole:
            reading: Collecting = read_clean(trainer, module, self, self.data, self._loader(trainer))
        else:
            reading = self.new_reading(trainer, module, self.data)
            with pass_progress(trainer) as progress:
                progress.start(f"{reading.title}, {self.data} data", len(source.loader))
                run_pass(trainer, module, source, self.data, self.ways, reading, progress.step)
        made: FeatureSet | None = None
        with run_spared("FeatureReport", "make something of the features"):
            made = reading.result()
        return made  # noqa: RET504  # what is spared comes here, too

    def _write(self, trainer: Trainer, rows: FeatureSet) -> None:
        folder = get_filesystem(self._folder)
        folder.makedirs(self._folder, exist_ok=True)
        with tempfile.TemporaryDirectory() as aside:
            save = None if self.save is None else os.path.join(aside, self.save)
            self.page = write_report(
                rows,
                os.path.join(aside, self.filename),
                title=self.title,
                map=self.map,
                max_samples=self.budget.samples,
                seed=self.budget.seed,
                save=save,
                before=self._start,
                learned=self._learned.of(rows),
            )
            for name in filter(None, (self.filename, self.save)):
                path = os.path.join(self._folder, name)
                folder.put(os.path.join(aside, name), f"{path}.part")
                folder.mv(f"{path}.part", path)
                send_file(trainer, path)
        self.page.path = Path(self._folder) / self.filename

    def _loader(self, trainer: Trainer) -> Any:
        if self.data == "train":
            return trainer.train_dataloader
        return val_loaders(trainer, self.state_key, "take data='train'")

    def _let_go(self, pl_module: LightningModule) -> None:
        self.ears.remove()
        self._start, self._last, self._source = None, None, None
        forget_check(pl_module, self.state_key)
