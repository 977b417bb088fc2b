from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lightning_feat.callbacks.reports.curves import Points
from lightning_feat.callbacks.reports.figures import folder_for_figures, publish_figure
from lightning_feat.callbacks.reports.history import set_point
from lightning_feat.callbacks.spectrum.figures import Spectra, draw_spectra
from lightning_feat.callbacks.spectrum.spectrum_pass import OF_MOMENTS, OF_SAMPLE, LayerSpectrum, SpectrumReading
from lightning_feat.functional.spectrum import covariance_spectrum
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.epoch_ends import EpochEnds, MeasuresAtEpochEnds
from lightning_feat.joints.data.shared_pass import read_clean, try_reading
from lightning_feat.joints.data.val_loader import make_val_loader, val_loaders
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.nonfinite import NonfiniteWatch
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import FeatureTap, Read
from lightning_feat.joints.module.head_check import check_found, forget_check
from lightning_feat.joints.run.averaging import WhichWeights
from lightning_feat.joints.run.spared import run_spared
from lightning_feat.joints.run.twins import refuse_twin

Measure: TypeAlias = Literal[
    "effective_rank",
    "rankme",
    "decay",
    "wasserstein_uniformity",
    "channel_energy",
    "gaussian_uniformity",
    "koleo",
    "tolerance",
]
MEASURES: tuple[Measure, ...] = ("effective_rank", "rankme", "decay", "wasserstein_uniformity", "gaussian_uniformity")


class SpectrumMonitor(MeasuresAtEpochEnds):
    """Log how many directions the features of chosen layers use, and how evenly, as ``spectrum/<measure>/<layer>``.

    At the end of chosen epochs the network runs over the data once, in eval mode, each sample once over all processes,
    and leaves no trace in the training. No labels are needed, but for the tolerance. ``functional.spectrum`` defines
    the measures:

    - ``effective_rank`` of the centred features, ``rankme`` of the features as they are, and ``decay``, the exponent
      of the spectrum of their covariance: from second moments over all data, ``8 D^2`` bytes a layer.
    - ``wasserstein_uniformity`` of the directions, as many bytes again, and ``channel_energy``, likewise over all data.
    - ``gaussian_uniformity``, ``koleo`` and ``tolerance``, which compare samples with one another: over at most
      ``max_samples``, drawn by the seed. KoLeo falls with the number of samples: compare equal numbers.

    Args:
        layers: dotted name or names, from input to output; None for the input of the classifier.
        read: the ``"output"`` or the ``"input"`` of ``layers``.
        pooling: how features that are not ``(N, D)`` become so, see ``joints.features.pooling.pool``.
        data: the ``"val"`` data of the run (logged as ``spectrum_val/...``), or the ``"train"`` data.
        measures: which of those above.
        max_samples: see above.
        every_n_epochs: after the first epoch, every n-th and the last.
        figure: when fitting ends, draw the first and the last spectrum of each layer, and the effective rank over the
            epochs, as ``spectrum.png`` (``spectrum_val.png``) in the run's own folder (``joints.run.folder``), and in
            every logger that shows images. Needs matplotlib.
        seed: of the sample.
        target_key: where a batch keeps class indices, see ``joints.features.batches``; for ``tolerance`` alone.
        ignore_index: samples with this target, or one below zero, do not count for ``tolerance``.
        mask_key: where a batch keeps which tokens count ``(N, T)``, for ``pooling="mean"``, ``"max"``, ``"last"`` or
            ``"tokens"``: without it padding counts.
        forward: ``forward(module, batch)`` that runs the network; None runs it as the module's own step does, see
            ``joints.data.ways``.
        weights: which weights to look at: the ``"current"`` ones, or those that are ``"averaged"`` by an
            ``EMAWeightAveraging`` or another ``WeightAveraging`` of the Trainer, which validates and saves them.

    Attributes:
        spectra: by layer, the first and the last spectrum measured, each with the epochs completed then; a resumed run
            has both.
    """

    @checked
    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        read: Read | None = None,
        pooling: Pooling | None = None,
        data: Literal["val", "train"] = "val",
        measures: Sequence[Measure] = MEASURES,
        max_samples: int = 2048,
        every_n_epochs: int = 1,
        figure: bool = False,
        seed: int = 0,
        target_key: TargetKey = None,
        ignore_index: int = -100,
        mask_key: TargetKey = None,
        forward: Forward | None = None,
        weights: WhichWeights = "current",
    ) -> None:
        named: list[str | None] = [layers] if layers is None or isinstance(layers, str) else list(layers)
        if len(set(named)) < len(named) or not named:
            raise ValueError(f"layers={layers}: name each layer once, and at least one.")
        if len(set(measures)) < len(measures) or not measures:
            raise ValueError(f"measures={[*measures]}: name each measure once, and at least one.")
        if max_samples < 2:
            raise ValueError(f"max_samples={max_samples} must be at least 2: samples are compared with one another.")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs} must be at least 1.")
        self.taps = [FeatureTap(name, read, pooling) for name in named]
        self.data, self.measures, self.max_samples, self.seed = data, tuple(measures), max_samples, seed
        self.every_n_epochs, self.figure, self.weights = every_n_epochs, figure, weights
        self.target_key, self.ignore_index, self.mask_key = target_key, ignore_index, mask_key
        self.ends, self.ways = EpochEnds(every_n_epochs), Ways(forward, self.state_key)
        self.nonfinite = NonfiniteWatch(self.state_key, " and are left out of the spectrum")
        self.spectra: dict[str, Spectra] = {}
        self.ranks: Points = {}
        self._folder = ""

    @property
    def state_key(self) -> str:
        return f"SpectrumMonitor[{self.data}, {', '.join(tap.label for tap in self.taps)}]"

    # Not by state_dict: of two stateful callbacks with one key Lightning complains before refuse_twin can say why.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[self.state_key] = {"spectra": self.spectra, "ranks": self.ranks}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            stored = checkpoint.get(self.state_key, {})
            self.spectra = {name: [(x, line) for x, line in pair] for name, pair in stored.get("spectra", {}).items()}
            self.ranks = {name: [(x, y) for x, y in line] for name, line in stored.get("ranks", {}).items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        if stage == "fit":
            if trainer.global_step == 0:
                self.spectra, self.ranks = {}, {}  # of an earlier run; a checkpoint, if any, is loaded after this
            if self.figure:
                self._folder = folder_for_figures(trainer, "figure=True")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.nonfinite.reset()
        super().on_fit_start(trainer, pl_module)
        self.ways.begin()
        for tap in self.taps:
            tap.attach(pl_module)
        check_found(pl_module, self.state_key, self.taps, only_reads=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.data == "val":
            make_val_loader(trainer)
        try_reading(trainer, pl_module, self, self.data, self._loader(trainer))  # what is wrong is said now

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.figure and self.spectra and not getattr(trainer, "fast_dev_run", False):
            self._show(trainer)

    def wanted(self, trainer: Trainer) -> dict[str, Any]:
        """For ``shared_pass``."""
        return {self.data: self._loader(trainer)} if self.ends.is_due(trainer) else {}

    def new_reading(self, trainer: Trainer, module: LightningModule, name: str) -> SpectrumReading:
        """For ``shared_pass``."""
        return SpectrumReading(trainer, module, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reading: SpectrumReading = read_clean(trainer, pl_module, self, self.data, self._loader(trainer))
        method = "spectrum_val" if self.data == "val" else "spectrum"
        for label, layer in reading.layers.items():
            self.nonfinite.check(trainer, label, layer.lost, layer.seen)
            values = {name: (OF_MOMENTS | OF_SAMPLE)[name](layer) for name in self.measures}
            logged = {f"{method}/{name}/{label}": value.to(pl_module.device).float() for name, value in values.items()}
            # All processes hold the same sums; sync_dist only spares the reader a warning from Lightning.
            pl_module.log_dict(logged, sync_dist=True)
            if self.figure:
                self._remember(trainer, label, layer)

    def _remember(self, trainer: Trainer, label: str, layer: LayerSpectrum) -> None:
        epochs = float(trainer.current_epoch + 1)
        if layer.moments is None:
            return
        spectrum = covariance_spectrum(layer.moments)
        first = self.spectra.get(label, [])[:1]
        self.spectra[label] = [*(first if first and first[0][0] < epochs else []), (epochs, spectrum.tolist())]
        set_point(self.ranks.setdefault(label, []), epochs, float(OF_MOMENTS["effective_rank"](layer)))

    @rank_zero_only
    def _show(self, trainer: Trainer) -> None:
        name = "spectrum_val" if self.data == "val" else "spectrum"
        with run_spared("SpectrumMonitor", "draw its figure"):
            figure = draw_spectra(self.spectra, self.ranks)
            publish_figure(trainer, figure, self._folder, f"{name}.png", f"{name}/figure")

    def _loader(self, trainer: Trainer) -> Any:
        if self.data == "train":
            return trainer.train_dataloader
        return val_loaders(trainer, self.state_key, "take data='train'")

    def _let_go(self, pl_module: LightningModule) -> None:
        for tap in self.taps:
            tap.remove()
        forget_check(pl_module, self.state_key)
