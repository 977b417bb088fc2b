import csv
import io
import os
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem

FILENAME = "neural_collapse.csv"
_KEYS = ("epoch", "step", "mode", "layer", "data")


class CollapseTable:
    """``neural_collapse.csv``: a row for each epoch, mode, layer and data, a column for each measure.

    ``epoch`` and ``step`` are those of Lightning, which counts epochs from zero, as in the ``metrics.csv`` of its
    ``CSVLogger``. Values are written with all digits, ``nan`` where the data do not define one; the cell of a measure
    that a layer does not have is empty. A row that is there is replaced, and rows of later epochs, which a run had
    written before it was set back, are dropped. One process writes, and may write remotely.
    """

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, FILENAME)

    def add(self, epoch: int, step: int, mode: str, layer: str, data: str, values: dict[str, float]) -> None:
        """Add a row, and the columns it needs."""
        row: dict[str, Any] = {"epoch": epoch, "step": step, "mode": mode, "layer": layer, "data": data, **values}
        place = (str(epoch), mode, layer, data)
        rows = [
            old
            for old in self.rows()
            if int(old["epoch"]) <= epoch and (old["epoch"], old["mode"], old["layer"], old["data"]) != place
        ]
        rows.append({name: _digits(value) for name, value in row.items()})
        columns = dict.fromkeys([*_KEYS, *(name for line in rows for name in line)])
        content = io.StringIO(newline="")
        writer = csv.DictWriter(content, [*columns], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files = get_filesystem(self.path)
        files.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        unfinished = f"{self.path}.part"
        with files.open(unfinished, "w", newline="") as file:
            file.write(content.getvalue())
        files.mv(unfinished, self.path)  # in one step where the disk is local: a full one does not cost the old rows

    def rows(self) -> list[dict[str, str]]:
        """What the file holds; nothing where there is none."""
        files = get_filesystem(self.path)
        if not files.exists(self.path):
            return []
        with files.open(self.path, "r", newline="") as file:
            return [*csv.DictReader(file)]


def _digits(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
