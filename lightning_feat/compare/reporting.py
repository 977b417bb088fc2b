"""Table, figure and answer from runs that are on disk, wherever they came from."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lightning_feat.compare.effects import Effect, Question, effects_of
from lightning_feat.compare.foreign import read_csv_runs
from lightning_feat.compare.overview import overview
from lightning_feat.compare.records import Record, read_json, read_runs, split_metric, write_json, write_text
from lightning_feat.compare.shared import pairing_report
from lightning_feat.compare.tables import answer, cost_table, method, result_table, runs_csv


@dataclass
class Comparison:
    """What the runs say.

    Attributes:
        effects: one for each arm and metric.
        records: the runs, failed ones too.
        question: what was asked.
        table: means, differences and intervals, as Markdown; the same runs give the same text.
        cost: time and memory, as Markdown; empty where nothing is known.
        pairing: what the arms shared in the runs of one seed, a sentence for each arm.
        problems: failed runs, and runs that were not made alike, a sentence for each.
        folder: where the files are.
        titles: of arms and metrics, by their names.
    """

    effects: list[Effect]
    records: list[Record]
    question: Question
    table: str
    cost: str
    pairing: list[str]
    problems: list[str] = field(default_factory=list)
    folder: Path = field(default_factory=Path)
    titles: Mapping[str, str] = field(default_factory=dict)

    @property
    def answers(self) -> list[str]:
        """One sentence for each effect."""
        return [answer(effect) for effect in self.effects]

    @property
    def overview(self) -> str:
        """Two Markdown tables with all metrics side by side: means and spreads, differences and intervals."""
        return overview({"": (self.records, self.effects, self.question)}, self.titles)

    def __str__(self) -> str:
        parts = [self.table, self.cost, "\n".join(self.pairing), "\n".join(self.problems)]
        return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def report(
    *folders: str | Path,
    metrics: str | Sequence[str] | None = None,
    base: str | None = None,
    level: float | None = None,
    bounds: Mapping[str, tuple[float, float] | None] | None = None,
    joint: bool | None = None,
    out: str | Path | None = None,
) -> Comparison:
    """Make table and figure again from finished runs.

    Args:
        folders: of studies that ``compare`` made, several together; or of runs that Lightning's ``CSVLogger`` wrote:
            a folder for each arm, or ``"NAME=FOLDER"``. Their seeds are read from ``config.yaml`` or ``hparams.yaml``
            beside them.
        metrics: of the study by default; must be given for runs that were not started here.
        base: name of the arm to compare with: of the study, or the first.
        level: of the intervals; of the study, or 0.95.
        bounds: see ``compare``.
        joint: whether the intervals of all arms hold together; of the study, or true.
        out: where to write to: the folder of the study if it is one, else ``comparison``.

    Raises:
        ValueError: if there are no runs, or some are there twice or of different arms with one name.
    """
    studies: list[tuple[Path, dict[str, Any]]] = []
    records: list[Record] = []
    for given in map(str, folders):
        name, equals, path = given.partition("=")
        folder = Path(path if equals else given)
        if not folder.is_dir():
            raise ValueError(f"{given!r}: there is no folder {folder}.")
        if (folder / "study.json").is_file() and not equals:
            study = read_json(folder / "study.json")
            studies.append((folder, study))
            records += chosen(read_runs(folder), study)
        else:
            records += read_csv_runs(folder, name if equals else None)
    if not folders:
        raise ValueError("give at least one folder with runs.")
    _refuse_mixtures(records, studies)
    first = studies[0][1] if studies else {}
    asked = [metrics] if isinstance(metrics, str) else metrics or first.get("metrics")
    if not asked:
        logged = sorted({name for record in records for name in record.curves})
        raise ValueError(f"give the metrics to compare; the runs logged {', '.join(logged)}.")
    check_metrics(records, asked)
    question = Question(
        base or first.get("base") or next(iter(records)).arm,
        tuple(asked),
        level or first.get("level", 0.95),
        looking=any(_was_looked_at(folder, study) for folder, study in studies),
        bounds={**{key: value and tuple(value) for key, value in first.get("bounds", {}).items()}, **(bounds or {})},
        joint=first.get("joint", True) if joint is None else joint,
    )
    target = Path(out) if out else _own_folder(studies, folders)
    return make_comparison(records, question, target, first.get("arms", {}), first.get("titles", {}))


def _own_folder(studies: Sequence[tuple[Path, Any]], folders: Sequence[Any]) -> Path:
    """The folder of the only study, else one beside."""
    return studies[0][0] if len(studies) == len(folders) == 1 else Path("comparison")


def make_comparison(
    records: list[Record], question: Question, folder: Path, order: Mapping[str, Any], titles: Mapping[str, str]
) -> Comparison:
    """Ask ``question``, and write ``table.md``, ``cost.md``, ``runs.csv`` and the figure into ``folder``."""
    places = {name: place for place, name in enumerate(order)}
    records = sorted(records, key=lambda r: (r.arm != question.base, places.get(r.arm, len(places)), _seed(r)))
    effects = effects_of(records, question)
    if not effects:
        raise ValueError(f"there are runs of {question.base!r} alone: nothing to compare it with.")
    arms = [question.base, *dict.fromkeys(effect.arm for effect in effects)]
    made = Comparison(
        effects,
        records,
        question,
        result_table(records, effects, question),
        cost_table(records, arms),
        pairing_report(records, question.base),
        problems_of(records),
        folder,
        titles,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "table.md", made.table)
    write_text(folder / "cost.md", "\n".join([made.cost, *made.pairing, *made.problems]) + "\n")
    write_text(folder / "runs.csv", runs_csv(records, question.metrics))
    if len(question.metrics) > 1:
        write_text(folder / "overview.md", made.overview + "\n" + method(effects, question) + "\n")
    drawn_if_possible("save_figure", records, effects, question, titles, folder / "comparison")
    return made


def drawn_if_possible(how: str, *what: Any) -> None:
    """By the function of this name in ``figure``; a warning where matplotlib is not installed."""
    try:
        from lightning_feat.compare import figure

        getattr(figure, how)(*what)
    except ModuleNotFoundError:
        warnings.warn('the figure needs matplotlib: pip install "lightning-feat[recipes]"', stacklevel=2)


def chosen(records: Sequence[Record], study: Mapping[str, Any]) -> list[Record]:
    """The runs of the seeds that the study is about: with a rule for stopping there may be more on disk."""
    seeds = study.get("used", study["seeds"])
    return [record for record in records if record.seed in seeds and record.arm in study["arms"]]


def problems_of(records: Sequence[Record]) -> list[str]:
    """Failed runs, and runs of one arm that were not made alike."""
    said = []
    for record in records:
        if not record.finished:
            said.append(f"FAILED: {record.arm}, seed {record.seed}: {record.status.get('error', '')}")
    failed = {record.arm for record in records if not record.finished}
    if failed:
        said.append(
            f"Runs of {', '.join(sorted(failed))} failed: if they did so for what the arm does, the others are a "
            "choice, and the differences above flatter it. The same command tries them again."
        )
    done = [record for record in records if record.finished]
    for arm in dict.fromkeys(record.arm for record in done):
        options = {record.status.get("options") for record in done if record.arm == arm} - {None, ""}
        if len(options) > 1:
            said.append(f"{arm}: its runs had {len(options)} different sets of options, see their config.yaml.")
    for what in ("versions", "device", "threads", "precision", "git"):
        found = {str(r.status["environment"].get(what)) for r in done if "environment" in r.status}
        if len(found) > 1 and not (what == "precision" and len({r.arm for r in done}) > 1):
            said.append(f"Not all runs had the same {what}: {'; '.join(sorted(found))}.")
    return said


def check_metrics(records: Sequence[Record], metrics: Sequence[str]) -> None:
    """Refuse one that no run logged, naming the nearest."""
    logged = sorted({name for record in records for name in record.curves})
    for metric in metrics:
        name = split_metric(metric)[0]
        if logged and name not in logged:
            near = ", ".join(get_close_matches(name, logged, n=3, cutoff=0.4) or logged[:8])
            raise ValueError(f"no run logged {name!r}; nearest: {near}.")


def _seed(record: Record) -> int:
    return -1 if record.seed is None else record.seed


def _was_looked_at(folder: Path, study: dict[str, Any]) -> bool:
    """Whether the number of seeds may have followed from what was seen; remembers a look at an unfinished study."""
    ended = {(record.arm, record.seed) for record in read_runs(folder)}
    wanted = study.get("used", study["seeds"])
    complete = [seed for seed in wanted if all((arm, seed) in ended for arm in study["arms"])]
    if len(complete) not in study["looks"] and complete:
        study["looks"].append(len(complete))
        write_json(folder / "study.json", study)
    return study["until_told"] is not None or len(study["looks"]) > 1


def _refuse_mixtures(records: Sequence[Record], studies: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    places: dict[tuple[str, int], Path] = {}
    for record in records:
        if record.seed is None:
            continue
        other = places.setdefault((record.arm, record.seed), record.folder)
        if other != record.folder:
            raise ValueError(
                f"seed {record.seed} of arm {record.arm!r} is in {other} and in {record.folder}: give one."
            )
    digests: dict[str, tuple[Path, str]] = {}
    for folder, study in studies:
        for arm, about in study["arms"].items():
            before, digest = digests.setdefault(arm, (folder, about["digest"]))
            if digest != about["digest"]:
                raise ValueError(
                    f"arm {arm!r} is another one in {before} than in {folder}: they cannot be put together."
                )
