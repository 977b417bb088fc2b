"""The command line: ``lightning-feat fit --config FILE``, which is LightningCLI with recipes that can be found by
name, ``lightning-feat doctor --config FILE``, which tries the same run for a moment and says what is wrong,
``lightning-feat compare``, which runs it in several arms and says how they differ, ``lightning-feat report``, which
writes a page about the features of a checkpoint, and ``lightning-feat recipes``, which lists, shows and copies the
recipes.
"""

import difflib
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

SUBCOMMANDS = {
    "fit": "train, and validate meanwhile",
    "validate": "one pass over the validation data",
    "test": "one pass over the test data",
    "predict": "one pass over the data to predict for",
    "doctor": "try the same run as fit for a moment, and say what is wrong with it",
    "report": "write one page about the features of a checkpoint",
    "compare": "fit in several arms with the same seeds, and say how much they differ",
    "recipes": "list the shipped recipes; `recipes show NAME` prints one, `recipes copy NAME` puts it here to change",
}
_HELP = """usage: lightning-feat SUBCOMMAND --config FILE [options]

subcommands:
{subcommands}

--config takes a file or the name of a shipped recipe, such as quickstart; any option of it may follow, such as
--trainer.max_epochs 3. Several --config are merged, the later over the earlier, such as a recipe and your data.
`lightning-feat SUBCOMMAND --help` lists the options; they are those of LightningCLI. --version tells the version."""
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
    """The arguments with the value of each ``--config`` replaced by the path that ``find_recipe`` gives, and so are
    the files of each ``--arm NAME=FILE,FILE`` and ``--condition`` of ``compare``.
    """
    found = list(arguments)
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        find = {"--config": find_recipe, "-c": find_recipe, "--arm": _find_each, "--condition": _find_each}.get(name)
        if find is None:
            continue
        if equals:
            found[i] = f"{name}={find(value)}"
        elif i + 1 < len(arguments):
            found[i + 1] = find(arguments[i + 1])
    return found


def _find_each(named: str) -> str:
    """A file that is not there stays as it was given: ``compare`` tells of it."""
    name, equals, files = named.partition("=")
    found = []
    for file in files.split(","):
        try:
            found.append(find_recipe(file))
        except ValueError:
            found.append(file)
    return f"{name}{equals}{','.join(found)}"


def recipe_files() -> dict[str, Path]:
    """The shipped recipes by name: configurations without an ending, and scripts with theirs."""
    folder = recipe_folder()
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    return found | {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}


def what_it_shows(path: Path) -> str:
    """The first sentence about a recipe: of the text after the commands on top of a configuration, or of the docstring
    of a script.
    """
    text = path.read_text()
    if path.suffix == ".py":
        paragraph = text.partition('"""')[2].partition("\n\n")[0]
    else:
        head = [line.lstrip("#").strip() for line in text.splitlines()[:30] if line.startswith("#")]
        paragraph = " ".join(head[head.index("") :] if "" in head else head)
    sentence, _, _ = " ".join(paragraph.split()).partition(". ")
    return sentence.removesuffix(".") + "."


def run_recipes(arguments: Sequence[str]) -> str:
    """What ``lightning-feat recipes`` prints.

    Raises:
        ValueError: if the command or the recipe is not known, or a file would be replaced.
    """
    files = recipe_files()
    command, *names = arguments or ("list",)
    if command in ("-h", "--help"):
        return "usage: lightning-feat recipes [list] | show NAME | copy NAME"
    if command == "list" and not names:
        lines = [
            f"{name}\n{textwrap.fill(what_it_shows(path), 100, initial_indent='  ', subsequent_indent='  ')}"
            for name, path in files.items()
        ]
        return "\n".join(
            [*lines, "", "lightning-feat fit --config NAME runs one; those that end in .py run by themselves."]
        )
    if command not in ("show", "copy") or len(names) != 1:
        raise ValueError(f"recipes {' '.join(arguments)}: it is `recipes`, `recipes show NAME` or `recipes copy NAME`.")
    name = names[0].removeprefix("recipes/").removesuffix(".yaml")
    if name not in files:
        near = difflib.get_close_matches(name, files, n=3) or [*files]
        raise ValueError(f"there is no recipe {names[0]!r}; nearest: {', '.join(near)}.")
    if command == "show":
        return f"{files[name]}\n\n{files[name].read_text()}"
    here = Path(files[name].name)
    if here.exists():
        raise ValueError(f"{here} is here already: move it away, or copy the recipe in another folder.")
    shutil.copyfile(files[name], here)
    runs = f"python {here}" if here.suffix == ".py" else f"lightning-feat fit --config {here}"
    return f"{here} is here now, to change; run it by: {runs}"


def answer_at_once(arguments: Sequence[str]) -> str | None:
    """The help, where it is asked for; None where there is something to run. Lightning is not imported for this, which
    takes seconds.

    Raises:
        ValueError: if there is no such subcommand; the message names the one that is meant.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:10}{what}" for name, what in SUBCOMMANDS.items()]
        return _HELP.format(subcommands="\n".join(lines))
    first = arguments[0]
    if first == "--version":
        return f"lightning-feat {version('lightning-feat')}"
    if first == "recipes":
        return run_recipes(arguments[1:])
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
