"""The command line: ``lightning-feat fit --config FILE``, which is LightningCLI with recipes that can be found by
name, ``lightning-feat doctor --config FILE``, which tries the same run for a moment and says what is wrong,
``lightning-feat compare``, which runs it in several arms and says how they differ, and ``lightning-feat report``, which
writes a page about the features of a checkpoint.
"""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

SUBCOMMANDS = {
    "fit": "train, and validate meanwhile",
    "validate": "one pass over the validation data",
    "test": "one pass over the test data",
    "predict": "one pass over the data to predict for",
    "doctor": "try the same run as fit for a moment, and say what is wrong with it",
    "report": "write one page about the features of a checkpoint",
    "compare": "fit in several arms with the same seeds, and say how much they differ",
}
_HELP = """usage: lightning-feat SUBCOMMAND --config FILE [options]

subcommands:
{subcommands}

--config takes a file or the name of a shipped recipe, such as quickstart; any option of it may follow, such as
--trainer.max_epochs 3. `lightning-feat SUBCOMMAND --help` lists the options; they are those of LightningCLI."""
_PACKAGE = Path(__file__).parent


def recipe_folder() -> Path:
    """Where the shipped recipes are: in an installed wheel inside the package, in a checkout beside it."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def find_recipe(name: str) -> str:
    """The path of a configuration: ``name`` itself if there is such a file, else the shipped recipe of that name.

    A recipe may be named with or without ``recipes/`` before it and ``.yaml`` after it: ``quickstart``.

    Raises:
        ValueError: if there is neither; the message lists the recipes.
    """
    if Path(name).is_file():
        return name
    folder = recipe_folder()
    short = name.removeprefix("recipes/").removesuffix(".yaml")
    if (folder / f"{short}.yaml").is_file():
        return str(folder / f"{short}.yaml")
    shipped = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    raise ValueError(f"there is no file {name!r} and no recipe of that name; the recipes are: {', '.join(shipped)}.")


def with_recipes(arguments: Sequence[str]) -> list[str]:
    """The arguments with the value of each ``--config`` replaced by the path that ``find_recipe`` gives."""
    found = list(arguments)
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-c"):
            continue
        if equals:
            found[i] = f"{name}={find_recipe(value)}"
        elif i + 1 < len(arguments):
            found[i + 1] = find_recipe(arguments[i + 1])
    return found


def answer_at_once(arguments: Sequence[str]) -> str | None:
    """The help, where it is asked for; None where there is something to run. Lightning is not imported for this, which
    takes seconds.

    Raises:
        ValueError: if there is no such subcommand; the message names the one that is meant.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        return _HELP.format(subcommands="\n".join(f"  {name:10}{what}" for name, what in SUBCOMMANDS.items()))
    first = arguments[0]
    if first in SUBCOMMANDS or first.startswith("-"):
        return None
    near = difflib.get_close_matches(first, SUBCOMMANDS, n=1)
    meant = f"did you mean {near[0]!r}?" if near else f"they are {', '.join(SUBCOMMANDS)}."
    raise ValueError(f"there is no subcommand {first!r}: {meant}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run LightningCLI on ``arguments``, those of the process by default. Its own options are unchanged. After
    ``doctor`` come those of ``fit``.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        answer = answer_at_once(given)
        given = with_recipes(given)
    except ValueError as error:
        sys.exit(f"lightning-feat: {error}")
    if answer is not None:
        print(answer)
        return
    try:
        import jsonargparse  # noqa: F401  # what LightningCLI needs, and Lightning alone does not bring
    except ImportError:
        sys.exit('the command line needs jsonargparse: pip install "lightning-feat[recipes]"')
    if given[0] == "doctor":
        from lightning_feat.doctor.command import run_doctor

        sys.exit(run_doctor(given[1:]))
    if given[0] == "compare":
        from lightning_feat.compare.command import run_compare

        sys.exit(run_compare(given[1:]))
    if given[0] == "report":
        from lightning_feat.report.command import run_report

        sys.exit(run_report(given[1:]))
    from lightning.pytorch.cli import LightningCLI

    if arguments is not None:
        LightningCLI(args=list(given))
    else:  # LightningCLI warns of arguments given twice
        sys.argv[1:] = given
        LightningCLI()


if __name__ == "__main__":
    main()
