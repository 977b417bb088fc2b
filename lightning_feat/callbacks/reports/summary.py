"""The run in a table, when it ends."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_warn

from lightning_feat.callbacks.reports.history import MetricHistory, Selection, select, unmatched
from lightning_feat.joints.arguments import checked


class SummaryTable(MetricHistory):
    """Print the first and the last value of each metric when fitting ends, also early, interrupted or by an error.

    Column heads say after how many epochs; where that differs between metrics, each value says so itself. Needs
    nothing installed; with rich the table has lines.

    Args:
        metrics: patterns for metric names, in the order of the rows (``neural_collapse/*``); or the pattern for each
            name to show (``{NC1: neural_collapse/nc1/*}``). ``None`` takes all.
        title: shown above the table; of two tables in one run each needs its own.
    """

    @checked
    def __init__(self, metrics: list[str] | dict[str, str] | None = None, title: str = "Summary") -> None:
        super().__init__()
        if metrics is not None and not metrics:
            raise ValueError(f"metrics={metrics}: give at least one pattern, or None for all metrics.")
        self.metrics: Selection = ["*"] if metrics is None else metrics
        self.title = title

    @property
    def state_key(self) -> str:
        return self._generate_state_key(title=self.title)

    def report(self, trainer: Trainer) -> None:
        for sentence in unmatched(self.metrics, self.points):
            rank_zero_warn(f"SummaryTable: {sentence}")
        shown = select(self.metrics, self.points)
        if not isinstance(self.metrics, dict):
            shown = {name: name for name in shown}  # there is room for the whole name
        if shown:
            bar = trainer.progress_bar_callback
            if isinstance(bar, RichProgressBar):  # it stays at the foot of the screen until its turn, below the table
                bar.teardown(trainer, trainer.lightning_module, stage="fit")
            show(self.title, *rows({title: self.points[name] for name, title in shown.items()}))


def rows(points: dict[str, list[tuple[float, float]]]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table."""
    ends = {name: (values[0], values[-1]) for name, values in points.items()}
    heads, columns = ["metric"], [list(points)]
    for head, which in (("first", 0), ("last", 1)):
        epochs = {end[which][0] for end in ends.values()}
        heads.append(f"{head} (epoch {epochs.pop():g})" if len(epochs) == 1 else head)
        said = len(heads[-1]) > len(head)
        columns.append([f"{y:.4g}" if said else f"{y:.4g} (epoch {x:g})" for x, y in (e[which] for e in ends.values())])
    return heads, [list(row) for row in zip(*columns, strict=True)]


def show(title: str, heads: list[str], cells: list[list[str]]) -> None:
    """Print the table, by rich if it is there."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        print(plain_table(title, heads, cells))
        return
    table = Table(title=Text(title), title_justify="left")
    for column, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if column else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))  # as Text: brackets in a name are no markup
    Console().print("\n", table, sep="")


def plain_table(title: str, heads: list[str], cells: list[list[str]]) -> str:
    """The table in letters.

    Example:
        >>> print(plain_table("Run", ["metric", "first"], [["val/loss", "2.3"], ["NC1", "0.01"]]))
        <BLANKLINE>
        Run
        metric    first
        --------  -----
        val/loss    2.3
        NC1        0.01
    """
    widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *cells]
    return "\n".join(
        [
            f"\n{title}",
            *(
                "  ".join(
                    [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
                )
                for line in lines
            ),
        ]
    )
