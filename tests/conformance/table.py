"""The table in ``docs/compatibility.md``: written from the outcomes of a whole run, and read by each later cell."""

import os
import platform
from collections.abc import Iterable
from pathlib import Path

import lightning
import torch
import torchmetrics

from tests.conformance.cells import Outcome
from tests.conformance.conditions import CONDITIONS, Condition
from tests.conformance.registry import CALLBACKS, Entry

FILE = Path(__file__).parents[2] / "docs" / "compatibility.md"
WRITING = os.environ.get("WRITE_COMPATIBILITY") == "1"
SIGNS = {"equal": "=", "near": "~", "refused": "R", "not applicable": "-"}

Cells = dict[tuple[str, str], Outcome]  # by condition and callback
FOUND: Cells = {}


def sign(outcome: Outcome) -> str:
    return SIGNS["near" if outcome.word == "equal" and outcome.detail else outcome.word]


def check(entry: Entry, condition: Condition, outcome: Outcome) -> None:
    """Take the outcome down; and unless the table is being written, it must say the same."""
    FOUND[condition.name, entry.name] = outcome
    if not WRITING:
        said = committed().get((condition.name, entry.name), "nothing")
        assert said == sign(outcome), (
            f"docs/compatibility.md says {said!r} of {entry} under {condition}, but it is {sign(outcome)!r}: "
            f"{outcome.word} {outcome.detail}. If that is as it should be, write the page anew; its head says how."
        )


def check_again(entry: Entry, condition: Condition, outcome: Outcome) -> None:
    """A second way to the same cell must come to the same outcome."""
    cell = condition.name, entry.name
    assert sign(outcome) == (sign(FOUND[cell]) if WRITING else committed()[cell])


def committed() -> dict[tuple[str, str], str]:
    """The signs in the file."""
    signs: dict[tuple[str, str], str] = {}
    names: list[str] = []
    for line in FILE.read_text().splitlines() if FILE.exists() else []:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| |"):
            names = [cell.strip("`") for cell in cells[1:]]
        elif line.startswith("| ") and not line.startswith("| **") and len(cells) == len(names) + 1:
            signs |= {(cells[0], name): cell for name, cell in zip(names, cells[1:], strict=True)}
        elif not line:
            names = []
    return signs


FAMILIES = {
    "grassmann": "Classes as subspaces",
    "neural_collapse": "Neural collapse",
    "simplicity_bias": "Simplicity bias",
    "feature_shift": "Feature shift and prompts",
    "transfer": "Transfer",
    "spectrum": "Spectrum and uniformity",
}
OTHERS = "Of no family"  # plans, reports, any loss on features
AT_A_GLANCE = {  # what a newcomer asks first, and the conditions that answer
    "AMP": ("bf16-mixed", "16-mixed, GradScaler"),
    "accumulation": ("accumulate 3 batches",),
    "DDP": ("two processes, by a script", "two processes, spawned"),
    "FSDP2": ("FSDP2, classifier named",),
    "compile": ("compiled module", "compiled network"),
    "manual optimization": ("manual_backward",),
    "resume": ("resume from last", "resume in mid-epoch"),
    "EMA, SWA": ("EMA", "SWA"),
}


def families() -> dict[str, list[Entry]]:
    """The entries of each family, by its title."""
    found: dict[str, list[Entry]] = {title: [] for title in (*FAMILIES.values(), OTHERS)}
    for entry in CALLBACKS:
        found[FAMILIES.get(entry.cls.__module__.split(".")[2], OTHERS)].append(entry)
    return {title: entries for title, entries in found.items() if entries}


def missing() -> list[str]:
    """Cells without an outcome."""
    pairs = [(condition.name, entry.name) for condition in CONDITIONS for entry in CALLBACKS]
    return [f"{entry}, {condition}" for condition, entry in pairs if (condition, entry) not in FOUND]


def render(cells: Cells) -> str:
    """The whole page."""
    return "\n".join([*_head(), *_glance(cells), *_tables(cells), *_lists(cells)]) + "\n"


HEAD = """# Compatibility

Each callback under each condition, as `tests/conformance` found it. This page is written by that run
(`WRITE_COMPATIBILITY=1 python -m pytest tests/conformance`), and every later run holds its cells against it.

- `=`: the final weights, buffers and own parameters are equal bit for bit to those of the same module with the method
  written in by hand, under the same Trainer; for a monitor, to those without it. What is logged is what was computed by
  hand, and no patch is left on the module.
- `~`: the same to 1e-4, relative and absolute, in float32: where subspaces are moved by another formula than by hand
  and the network follows them, where a distance of weights is added up in another order, and where the gradients of
  many terms are.
- `R`: refused by an error in the first batch, which says what to do instead; the module is left as it was.
- `-`: not applicable, for the reason below.

The cells of the short half were run twice, with one outcome: the callback in the Trainer's list, and brought by the
module (`mixins.CallbacksMixin`).
"""


def _head() -> Iterable[str]:
    yield HEAD
    yield (
        f"Versions: torch {torch.__version__.split('+')[0]}, lightning {lightning.__version__}, torchmetrics "
        f"{torchmetrics.__version__}, Python {platform.python_version()}, on a CPU, processes by gloo."
    )


def _glance(cells: Cells) -> Iterable[str]:
    yield "\n## At a glance\n"
    yield "Yes: right under all conditions of that name. Refused: by an error in the first batch, with the way out.\n"
    yield f"| callback | {' | '.join(AT_A_GLANCE)} |"
    yield "|---" * (len(AT_A_GLANCE) + 1) + "|"
    for entry in CALLBACKS:
        answers = [_answer([cells[name, entry.name] for name in names]) for names in AT_A_GLANCE.values()]
        yield f"| {_shown(entry)} | {' | '.join(answers)} |"


def _answer(outcomes: list[Outcome]) -> str:
    words = {outcome.word for outcome in outcomes} - {"not applicable"}
    return {frozenset({"equal"}): "yes", frozenset({"refused"}): "refused", frozenset(): "-"}.get(
        frozenset(words), "in part, see below"
    )


def _shown(entry: Entry) -> str:
    return f"`{entry.name}`" + (f" beside `{entry.beside[0].name}`" if entry.beside else "")


def _tables(cells: Cells) -> Iterable[str]:
    for title, entries in families().items():
        yield f"\n## {title}\n"
        yield f"| | {' | '.join(f'`{entry.name}`' for entry in entries)} |"
        yield "|---" * (len(entries) + 1) + "|"
        for group in dict.fromkeys(condition.group for condition in CONDITIONS):
            yield f"| **{group}** |{' |' * len(entries)}"
            for condition in [condition for condition in CONDITIONS if condition.group == group]:
                signs = [sign(cells[condition.name, entry.name]) for entry in entries]
                yield f"| {condition.name} | {' | '.join(signs)} |"


def _lists(cells: Cells) -> Iterable[str]:
    for word, title in (("refused", "Refused"), ("not applicable", "Not applicable")):
        lines: dict[tuple[str, str], list[str]] = {}
        for (condition, name), outcome in cells.items():
            if outcome.word == word:
                said = outcome.detail if len(outcome.detail) < 300 else f"{outcome.detail[:300].rsplit(' ', 1)[0]} ..."
                lines.setdefault((condition, said), []).append(f"`{name}`")
        if lines:
            yield f"\n## {title}\n"
            order = [condition.name for condition in CONDITIONS]
            for (condition, said), names in sorted(lines.items(), key=lambda item: order.index(item[0][0])):
                yield f"- {condition}, {', '.join(sorted(names))}: {said}"
