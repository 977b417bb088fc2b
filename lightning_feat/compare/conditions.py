"""The same question under several conditions, such as data sets or sizes: a study for each, and one overview."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_feat.compare.overview import overview
from lightning_feat.compare.records import read_json, write_json, write_text
from lightning_feat.compare.reporting import Comparison, drawn_if_possible, report
from lightning_feat.compare.running.arms import check_name
from lightning_feat.compare.running.task import Arm
from lightning_feat.compare.study import compare
from lightning_feat.compare.tables import method


@dataclass
class Conditions:
    """What the runs say under each condition.

    Attributes:
        comparisons: by the names of the conditions.
        folder: where the files are, with a folder for the study of each condition.
        titles: of arms, metrics and conditions, by their names.
        heading: of the column of conditions.
        overview: means and differences of all conditions, as Markdown.
    """

    comparisons: dict[str, Comparison]
    folder: Path
    titles: Mapping[str, str] = field(default_factory=dict)
    heading: str = "condition"

    @property
    def overview(self) -> str:
        parts = {name: (made.records, made.effects, made.question) for name, made in self.comparisons.items()}
        return overview(parts, self.titles, self.heading)

    def write(self) -> None:
        """``overview.md``, and ``comparison.png`` and ``.pdf`` where matplotlib is."""
        write_text(self.folder / "overview.md", str(self))
        effects = {name: made.effects for name, made in self.comparisons.items()}
        drawn_if_possible("save_forest", effects, self.titles, self.heading, self.folder / "comparison")

    def __str__(self) -> str:
        methods = dict.fromkeys(method(made.effects, made.question) for made in self.comparisons.values())
        problems = [f"{name}: {said}" for name, made in self.comparisons.items() for said in made.problems]
        return "\n".join([self.overview, *methods, *problems]) + "\n"


def compare_conditions(
    conditions: Mapping[str, Mapping[str, Callable[..., Any] | Arm]],
    seeds: int | Sequence[int] = 5,
    metrics: str | Sequence[str] = "val/accuracy",
    *,
    folder: str | Path = "comparison",
    titles: Mapping[str, str] | None = None,
    heading: str = "condition",
    quiet: bool = False,
    **options: Any,
) -> Conditions:
    """``compare`` under each condition, with the base of that condition.

    The intervals of one condition hold together; each condition is a family of its own.

    Args:
        conditions: the arms of each, by name; they need not be the same in all.
        seeds: see ``compare``.
        metrics: see ``compare``.
        folder: for ``overview.md``, ``comparison.png`` and the study of each condition.
        titles: of arms, metrics and conditions, by their names, for tables and the figure.
        heading: of the column of conditions.
        quiet: whether to print nothing.
        options: others of ``compare``.

    Raises:
        ValueError: for a name that cannot be a folder's, and what ``compare`` refuses.
    """
    if not conditions:
        raise ValueError("conditions={}: give the arms of at least one.")
    for name in conditions:
        check_name("condition", name)
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"conditions": list(conditions), "titles": dict(titles or {}), "heading": heading}
    write_json(root / "conditions.json", about)
    found = {}
    for name, arms in conditions.items():
        if not quiet:
            print(f"{name}:", flush=True)
        found[name] = compare(arms, seeds, metrics, folder=root / name, quiet=quiet, answer=False, **options)
    return _told(Conditions(found, root, about["titles"], heading), quiet)


def report_conditions(folder: str | Path, *, quiet: bool = False, **options: Any) -> Conditions:
    """Tables and figures again from what ``compare_conditions`` left.

    Args:
        folder: of all conditions.
        quiet: whether to print nothing.
        options: of ``report``.

    Raises:
        ValueError: if there are no conditions in the folder.
    """
    if not (Path(folder) / "conditions.json").is_file():
        raise ValueError(f"{folder} holds no conditions.json: give the folder of compare_conditions.")
    root = Path(folder)
    about = read_json(root / "conditions.json")
    found = {name: report(root / name, **options) for name in about["conditions"]}
    return _told(Conditions(found, root, about["titles"], about["heading"]), quiet)


def _told(made: Conditions, quiet: bool) -> Conditions:
    made.write()
    if not quiet:
        print(made)
        print(f"Files: {made.folder}/overview.md, comparison.png, comparison.pdf, and a study for each condition")
    return made
