"""What is compared: an arm makes a trainer, a module and data, from YAML files or by a function."""

import contextlib
import functools
import inspect
import io
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_feat.compare.running.start import Start, hashed, source_of
from lightning_feat.compare.running.task import Arm, Built

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class YamlArm:
    """Options of ``lightning-feat fit``: files one over the other, then single options.

    Args:
        name: of the arm.
        configs: paths. In a later one ``callbacks+`` appends to the list of an earlier one, ``callbacks`` replaces it.
        options: such as ``["--trainer.max_epochs", "3"]``.
        seed_options: further options that get the seed of the run, such as ``data.init_args.seed``.
    """

    name: str
    configs: tuple[str, ...]
    options: tuple[str, ...] = ()
    seed_options: tuple[str, ...] = ()

    def digest(self) -> str:
        """By what the files say, not by how they are laid out."""
        import yaml

        content: list[Any] = []
        for path in self.configs:
            try:
                content.append(yaml.safe_load(Path(path).read_text()))
            except (OSError, yaml.YAMLError) as error:
                raise ValueError(f"arm {self.name!r}: {path} cannot be read: {error}") from error
        return hashed([content, self.options, self.seed_options])

    def build(self, seed: int) -> Built:
        """By LightningCLI.

        Raises:
            ValueError: with what LightningCLI says to an option.
        """
        import yaml

        arguments = ["fit", *(part for path in self.configs for part in ("--config", path)), *self.options]
        for key in self.seed_options:
            arguments += [f"--{key}", str(seed)]
        cli = _built_by_cli([*arguments, "--seed_everything", str(seed)])
        options = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))["fit"]
        config = yaml.safe_dump(options, sort_keys=False)
        for key in ("seed_everything", *self.seed_options):
            *path, last = key.split(".")
            functools.reduce(lambda inner, part: inner[part], path, options).pop(last)
        ckpt_path = cli.config_init["fit"].get("ckpt_path")
        return Built(cli.trainer, cli.model, cli.datamodule, config, hashed(options), ckpt_path)


@dataclass(frozen=True)
class FunctionArm:
    """A function that makes ``(trainer, module, data)``, or ``(trainer, module, data, measure)``; data may be missing.

    It gets ``seed`` if it names it, and ``start``: what the start of the study made for this seed. ``measure`` is a
    function without arguments that is called after the fit, and after the test, and gives more metrics by name.

    Args:
        name: of the arm.
        function: defined at the top of a file, as other processes import it; or ``functools.partial`` of one.
        start: of the study.
    """

    name: str
    function: Callable[..., Any] = field(compare=False)
    start: Start | None = field(default=None, compare=False)

    def digest(self) -> str:
        """By its source and what is bound to it, and that of the start if it takes it."""
        source = source_of(self.function)
        return hashed(source + self.start.digest() if self.start and self._wants("start") else source)

    def build(self, seed: int) -> Built:
        """Call it.

        Raises:
            TypeError: if it gives something else, or takes a start and there is none.
        """
        given: dict[str, Any] = {"seed": seed} if self._wants("seed") else {}
        if self._wants("start"):
            if self.start is None:
                raise TypeError(f"arm {self.name!r}: its function takes a start: give compare(..., start=FUNCTION).")
            given["start"] = self.start.of(seed)
        made = self.function(**given)
        if not isinstance(made, tuple) or len(made) not in (2, 3, 4):
            raise TypeError(
                f"arm {self.name!r}: the function gave {type(made).__name__}: give (trainer, module, data)."
            )
        trainer, module, data, measure = (*made, None, None)[:4]
        if not hasattr(trainer, "fit") or not hasattr(module, "training_step"):
            kinds = f"({type(trainer).__name__}, {type(module).__name__}, ...)"
            raise TypeError(f"arm {self.name!r}: the function gave {kinds}: give (trainer, module, data).")
        if measure is not None and not callable(measure):
            raise TypeError(
                f"arm {self.name!r}: the fourth that its function gave is {type(measure).__name__}: give a function "
                "without arguments that is called after the fit and gives metrics by name."
            )
        return Built(trainer, module, data, measure=measure)

    def _wants(self, name: str) -> bool:
        parameters = inspect.signature(self.function).parameters
        bound = self.function.keywords if isinstance(self.function, functools.partial) else {}
        return name in parameters and name not in bound


def as_arms(
    arms: Mapping[str, Callable[..., Any] | Arm] | Sequence[Arm], elsewhere: bool, start: Start | None = None
) -> dict[str, Arm]:
    """By name, checked.

    Args:
        arms: functions or arms.
        elsewhere: whether they are sent to other processes.
        start: for those that take it.

    Raises:
        ValueError: for fewer than two, a name that cannot be a folder's, or a function that cannot be sent.
    """
    named = arms if isinstance(arms, Mapping) else {arm.name: arm for arm in arms}
    if len(named) < 2 or len(named) < len(arms):
        names = [arm.name for arm in arms] if not isinstance(arms, Mapping) else list(arms)
        raise ValueError(f"arms={names}: give a base and at least one arm to compare with it, each with its own name.")
    found: dict[str, Arm] = {}
    given: Any
    for name, given in named.items():
        check_name("arm", name)
        if not hasattr(given, "build"):
            if not callable(given):
                raise ValueError(
                    f"arm {name!r} is {type(given).__name__}: give a function that makes (trainer, module, data)."
                )
            given = FunctionArm(name, given, start)
        if elsewhere:
            try:
                pickle.dumps(given)
            except Exception as error:  # whatever a class raises that cannot be pickled
                raise ValueError(
                    f"arm {name!r} cannot be sent to another process ({error}): define the function at the top of a "
                    "file, without lambda, or give executor='inline'."
                ) from error
        found[name] = given
    return found


def check_name(what: str, name: str) -> None:
    """Refuse one that is none for a folder."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r}: a folder is named by it; take letters, digits and _ . + - alone.")


class _Built(BaseException):
    """Carries what the command line built past the place where it would fit. No error, which somebody might catch."""

    def __init__(self, cli: Any) -> None:
        super().__init__()
        self.cli = cli


def _built_by_cli(arguments: list[str]) -> Any:
    from lightning.pytorch.cli import LightningCLI

    class Builder(LightningCLI):
        def before_fit(self) -> None:
            raise _Built(self)

    before, said = sys.argv, io.StringIO()
    sys.argv = [before[0]]  # LightningCLI warns of arguments given twice
    try:
        with contextlib.redirect_stderr(said):
            Builder(args=arguments, save_config_callback=None)
    except _Built as built:
        sys.stderr.write(said.getvalue())
        return built.cli
    except SystemExit as end:
        lines = [line for line in said.getvalue().splitlines() if line.strip() and not line.startswith("usage:")]
        raise ValueError(" ".join(" ".join(lines).split()) or f"LightningCLI ended with {end.code}.") from None
    finally:
        sys.argv = before
    raise RuntimeError("LightningCLI did not come to the fit.")
