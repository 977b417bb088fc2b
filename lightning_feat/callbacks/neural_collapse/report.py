from lightning.pytorch import Trainer

from lightning_feat.callbacks.neural_collapse.figures import draw_collapse
from lightning_feat.callbacks.neural_collapse.table import CollapseTable
from lightning_feat.callbacks.reports.curves import Points
from lightning_feat.callbacks.reports.figures import folder_for_figures, publish_figure
from lightning_feat.callbacks.reports.history import set_point
from lightning_feat.functional.neural_collapse import CollapsePicture
from lightning_feat.joints.run.folder import run_folder
from lightning_feat.joints.run.loggers import send_file
from lightning_feat.joints.run.spared import run_spared


class CollapseReport:
    """Figures and table of a ``NeuralCollapseMonitor``, written by one process; what goes wrong becomes a warning.

    Attributes:
        points: for the curves of the figures: by ``<data>/<layer>``, ``(epochs completed, value)`` by measure.
    """

    def __init__(self, mode: str, figures: bool, table: bool | None) -> None:
        self.mode, self.figures, self.table = mode, figures, table
        self._writes_table, self._written = False, ""
        self.points: dict[str, Points] = {}
        self._folder = ""
        self._failed: set[str] = set()

    def start(self, trainer: Trainer) -> None:
        """Before a fit, on all processes. Raises ``ModuleNotFoundError`` where figures need what is not installed."""
        self._failed = set()
        if trainer.global_step == 0:
            self.points = {}  # of an earlier run; a checkpoint, if any, is loaded after this
        if self.figures:
            folder_for_figures(trainer, "figures=True")  # says what is not installed
        self._folder = run_folder(trainer)  # a broadcast: all processes ask, and now
        self._writes_table = bool(trainer.loggers) if self.table is None else self.table
        self._written = ""

    def add(
        self, trainer: Trainer, layer: str, data: str, values: dict[str, float], picture: CollapsePicture | None
    ) -> None:
        """Take in what was measured of one layer on one set of data, and draw it where there is a picture."""
        if self.figures:
            self._remember(f"{data}/{layer}", trainer.current_epoch + 1.0, values)
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):  # the latter leaves nothing behind
            return
        if self._writes_table:
            with run_spared("NeuralCollapseMonitor", "write its table", self._failed):
                table = CollapseTable(self._folder)
                table.add(trainer.current_epoch, trainer.global_step, self.mode, layer, data, values)
                self._written = table.path
        if picture is not None:
            with run_spared("NeuralCollapseMonitor", "draw its figure", self._failed):
                self._draw(trainer, layer, data, picture)

    def finish(self, trainer: Trainer) -> None:
        """When a fit ends, also by an error: the loggers that keep files get the table."""
        written, self._written = self._written, ""
        if written:
            with run_spared("NeuralCollapseMonitor", "give its table to the loggers", self._failed):
                send_file(trainer, written)

    def _remember(self, place: str, epochs: float, values: dict[str, float]) -> None:
        points = self.points.setdefault(place, {})
        for name, value in values.items():
            set_point(points.setdefault(name, []), epochs, value)

    def _draw(self, trainer: Trainer, layer: str, data: str, picture: CollapsePicture) -> None:
        epochs = trainer.current_epoch + 1
        where = f"{'training' if data == 'train' else 'validation'} data"
        if self.mode == "online":
            where = "training batches as they passed"
        title = f"{layer}, {where}, after {epochs} {'epoch' if epochs == 1 else 'epochs'}"
        figure = draw_collapse(picture, self.points[f"{data}/{layer}"], title)
        method = "neural_collapse" if data == "train" else "neural_collapse_val"
        name = f"{method}-{layer}-epoch={epochs}.png"
        publish_figure(trainer, figure, self._folder, name, f"{method}/figure/{layer}")
