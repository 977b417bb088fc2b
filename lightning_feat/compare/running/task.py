"""What a run is made of, and what the process that does it is told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass
class Built:
    """What an arm made.

    Attributes:
        trainer: a ``Trainer``.
        module: a ``LightningModule``.
        data: a datamodule, loaders, or ``None`` where the module brings its own.
        config: all options as YAML for ``fit``, where there are such.
        options: digest of them without the seed, the same in all runs of an arm.
        ckpt_path: where to go on from, as ``fit`` takes it.
        measure: gives more metrics by name, called after the fit.
    """

    trainer: Any
    module: Any
    data: Any = None
    config: str = ""
    options: str = ""
    ckpt_path: str | None = None
    measure: Callable[[], Mapping[str, float]] | None = None


class Arm(Protocol):
    """Can be sent to another process."""

    name: str

    def digest(self) -> str:
        """Changes when the arm does."""

    def build(self, seed: int) -> Built:
        """Make all anew, after the global seed was set."""


@dataclass(frozen=True)
class Task:
    """What a process is given.

    Attributes:
        arm: what to run.
        seed: of everything.
        folder: of the study.
        digest: of the arm when the study began.
        threads: of this process.
        share_order: whether the order of the data follows the seed alone, see ``pairing``.
        test: whether to test the last weights after the fit.
        only: ``"build"`` to make all and stop before the fit, ``"trial"`` to fit one batch of the first and the last
            epoch and leave no run: to hear of a mistake early.
        alone: whether the process is for this run alone: then what is printed goes into the run's ``log.txt``.
    """

    arm: Arm
    seed: int
    folder: str
    digest: str
    threads: int | None
    share_order: bool
    test: bool
    only: Literal["", "build", "trial"] = ""
    alone: bool = True
