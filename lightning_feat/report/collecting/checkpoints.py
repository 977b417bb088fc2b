"""The features of checkpoints of a run that a configuration describes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_feat.joints.data.ways import Ways
from lightning_feat.report.collecting.collect import Budget, Collecting, run_pass, source_of
from lightning_feat.report.collecting.ears import Ears
from lightning_feat.report.feature_set import FeatureSet
from lightning_feat.report.learned import Learned

_STAGES = {"val": "validate", "train": "validate", "test": "test"}


@dataclass
class Question:
    """What is wanted.

    Attributes:
        arguments: of ``lightning-feat fit``.
        checkpoints: the first is the one the page is about; None for the weights that the module is made with.
        data: ``"val"``, ``"train"`` or ``"test"``.
        ears: on what is heard.
        budget: what is kept.
    """

    arguments: list[str]
    checkpoints: Sequence[str | None]
    data: str
    ears: Ears
    budget: Budget


@dataclass
class Found:
    """The set of the first checkpoint, the one that is furthest back, and when samples were right for good."""

    rows: FeatureSet
    before: FeatureSet | None = None
    learned: Learned | None = None


class _Built(BaseException):
    """Carries what the command line built past the place where it would fit. No error, which somebody might catch."""

    def __init__(self, cli: Any) -> None:
        super().__init__()
        self.cli = cli


def build(arguments: Sequence[str]) -> tuple[Trainer, LightningModule, Any]:
    """Trainer, module and data of the run that these arguments of ``fit`` describe, without a logger.

    Raises:
        ValueError: if it cannot be built.
    """
    from lightning.pytorch.cli import LightningCLI

    class Builder(LightningCLI):
        def before_fit(self) -> None:
            raise _Built(self)

    before = sys.argv
    sys.argv = [before[0]]  # LightningCLI warns of arguments given twice
    try:
        Builder(args=["fit", *arguments, "--trainer.logger=false"], save_config_callback=None)
    except _Built as built:
        cli = built.cli
        return cli.trainer, cli.model, cli.datamodule
    except SystemExit:  # jsonargparse has said what is wrong
        raise ValueError("the run that the configuration describes cannot be built; see above.") from None
    finally:
        sys.argv = before
    raise RuntimeError("LightningCLI did not come to the fit.")


def collect_checkpoints(question: Question) -> Found | None:
    """Run the network over the data for each checkpoint; None on all processes but the first.

    Raises:
        ValueError: if a layer, the data or the way to run the network cannot be found.
    """
    trainer, module, data = build(question.arguments)
    sets: list[tuple[int, str, FeatureSet]] = []
    for age, path in zip(_ages(question.checkpoints), question.checkpoints, strict=True):
        name = "the first weights" if path is None else Path(path).name
        made = _collect(trainer, module, data, path, question)
        if made is not None:
            made.source = f"{name}, {question.data} data"
            sets.append((age, name, made))
        elif trainer.is_global_zero:
            raise ValueError(
                f"the {question.data} data gave fewer than two samples that have a target: nothing to show."
            )
    if not sets:
        return None
    rows = sets[0][2]
    before = min(sets[1:], key=lambda entry: entry[0])[2] if len(sets) > 1 else None
    learned = Learned()
    for _, name, one in sorted(sets, key=lambda entry: entry[0]):
        learned.note(one, name)
    newest = max(sets, key=lambda entry: entry[0])[2] is rows  # else the page is about an earlier one
    return Found(rows, before, learned.of(rows) if newest else None)


def _collect(
    trainer: Trainer, module: LightningModule, data: Any, path: str | None, question: Question
) -> FeatureSet | None:
    stage, made = _STAGES[question.data], []
    loop: Any = trainer.validate_loop if stage == "validate" else trainer.test_loop
    if question.data == "train" or not _has_step(module, stage):
        stage, loop = "predict", trainer.predict_loop

    def run() -> Any:
        """In the place of Lightning's loop, when devices, processes and weights are ready."""
        loader = _loader(trainer, module, data, question.data)
        source = source_of(trainer, loader, question.data, question.budget)
        question.ears.attach(module)
        try:
            reading = Collecting(trainer, module, question.ears, source, question.budget)
            ways = Ways(None, "lightning-feat report")
            with _bar(trainer, len(source.loader)) as bar:
                run_pass(trainer, module, source, question.data, ways, reading, bar.update)
            made.append(reading.result())
        finally:
            question.ears.remove()
        return []

    whole = loop.run
    loop.run = run
    try:
        # A loader to pass Lightning's checks, where the data have none for this stage; it is not read.
        given: dict[str, Any] = {"datamodule": data} if data is not None and stage != "predict" else {}
        if stage == "predict":
            given = {"dataloaders": []}
        kept: dict[str, Any] = {"return_predictions": False} if stage == "predict" else {"verbose": False}
        getattr(trainer, stage)(module, ckpt_path=path, **given, **kept)
    finally:
        loop.run = whole
    return made[0] if made else None


def _has_step(module: LightningModule, stage: str) -> bool:
    name = "validation_step" if stage == "validate" else "test_step"
    return getattr(type(module), name) is not getattr(LightningModule, name)


def _loader(trainer: Trainer, module: LightningModule, data: Any, name: str) -> Any:
    holder = module if data is None else data
    if data is not None:
        data.prepare_data() if trainer.local_rank == 0 else None
        trainer.strategy.barrier("report data")
        data.setup("test" if name == "test" else "fit")
    try:
        made = getattr(holder, f"{name}_dataloader")()
    except (MisconfigurationException, NotImplementedError) as error:
        raise ValueError(f"the run has no {name} data ({error}): choose others by --data.") from None
    if isinstance(made, (list, tuple)) and len(made) == 1:
        made = made[0]
    return made


def _ages(checkpoints: Sequence[str | None]) -> list[int]:
    """Numbers that grow along the run: the optimizer steps that checkpoints have behind them. Where one does not say,
    which is told, they are taken to be given from the latest to the earliest.
    """
    steps = [-1 if path is None else _step_of(path) for path in checkpoints]
    known = [step for step in steps if step is not None]
    if len(known) == len(steps):
        return known
    if len(steps) > 1:
        unknown = ", ".join(str(path) for path, step in zip(checkpoints, steps, strict=True) if step is None)
        rank_zero_warn(
            f"how many steps {unknown} has behind it cannot be read, as it is sharded or holds other objects than "
            "tensors and numbers: the checkpoints are taken to be given from the latest to the earliest."
        )
    return [-place for place in range(len(steps))]


def _step_of(path: str) -> int | None:
    """Optimizer steps that a checkpoint has behind it; None where it does not say."""
    try:
        step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception:  # whatever a file raises that is a folder, holds objects of the user or is of another format
        return None
    return int(step)


def _bar(trainer: Trainer, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="Features", disable=not trainer.is_global_zero, leave=False)
