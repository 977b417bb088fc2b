"""Ask every model of the libraries, or one of each family, for its classifier; write the answers, and docs/models.md.

``python -m tests.models.sweep`` takes all of them, ``--quick`` one of each family; ``--write`` puts the answers
into the table of expected ones, to be looked at before they are committed.
"""

import argparse
import json
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.models.answers import answer
from tests.models.libraries import LIBRARIES, one_of_each

_HEADER = """# Models of other libraries

Written by `make sweep`, which builds the models without weights and asks each for its classifier. *Layer* is what
`find_classifier` finds, and what callbacks take without a `layer`: `SimplexETFHead` and `GrassmannHead` replace it,
`NeuralCollapseMonitor` and the regularizers read its input. *asked*: several layers could be it, and one must be named.
*none*: there is no classifier, as in a detector. *made by*: other layers make the output too, or come after it, so that
the head callbacks refuse the model in the first training step, and monitors warn. *stays*: it is read, but not
replaced. *not built*: it needs files or arguments that the sweep has not. Of *several* with a plus between them the
model averages the logits, and they are replaced together, which the first training step checks.

Of models of images and texts the page says what `PromptLearner` does: the position of the first word, which prompts
replace, and where the text is read; and of the image tower whether it takes prompts. A module's tokenizer, or
`start_token=`, has the last word about the start. *Layers are asked for*: by the argument `layers`.
"""

_PACKAGES = "packages"
HERE = Path(__file__).parent
TABLE = HERE / "expected.json"
PAGE = HERE.parents[1] / "docs" / "models.md"


def expected() -> dict[str, dict[str, list[str]]]:
    """By library and family, the answers that are right."""
    table: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table.pop(_PACKAGES, None)
    return table


def ran_on() -> dict[str, str]:
    """The packages, with their versions, that the answers are of."""
    table: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    packages: dict[str, str] = table.get(_PACKAGES, {})
    return packages


def installed() -> dict[str, str]:
    """The versions of the packages that are here."""
    return {name: version(name) for name in ("torch", "timm", "torchvision", "transformers", "open_clip_torch")}


def write(table: dict[str, dict[str, list[str]]], packages: dict[str, str]) -> None:
    """The table of expected answers, and the page that shows it."""
    TABLE.write_text(json.dumps({_PACKAGES: packages, **table}, indent=1) + "\n")
    PAGE.write_text(page(table, packages))


def sweep(libraries: list[str], quick: bool, run: bool) -> dict[str, dict[str, list[str]]]:
    """The answers, by library and family, sorted."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for library in libraries:
        models = LIBRARIES[library]()
        for model in one_of_each(models) if quick else models:
            said = answer(model, run)
            found[library][model.family].add(said)
            print(library, model.family, model.name, said, flush=True)
    return {library: {f: sorted(a) for f, a in sorted(families.items())} for library, families in found.items()}


def page(table: dict[str, dict[str, list[str]]], packages: dict[str, str]) -> str:
    """docs/models.md."""
    lines = [_HEADER, f"These answers are of {', '.join(f'{name} {number}' for name, number in packages.items())}.", ""]
    for library, families in table.items():
        what = "towers" if library in ("open_clip", "transformers, of images and texts") else "layer"
        lines += [f"## {library}", "", f"| family | {what} |", "| --- | --- |"]
        lines += [f"| {family} | {'; '.join(answers)} |" for family, answers in families.items()]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Compare with the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libraries", nargs="*", default=[])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-run", action="store_true", help="by name alone")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found = sweep(args.libraries or list(LIBRARIES), args.quick, not args.no_run)
    table = expected()
    wrong = [
        f"{library} {family}: {said}, expected {' or '.join(table.get(library, {}).get(family, ['no such family']))}"
        for library, families in found.items()
        for family, answers in families.items()
        for said in answers
        if said not in table.get(library, {}).get(family, [])
    ]
    if args.write:
        for library, families in found.items():
            known = table.setdefault(library, {})
            for family, answers in families.items():
                known[family] = sorted({*(known.get(family, []) if args.quick else []), *answers})
            table[library] = dict(sorted(known.items()))
        write(table, installed())
    print(*wrong, sep="\n")
    return int(bool(wrong) and not args.write)


if __name__ == "__main__":
    sys.exit(main())
