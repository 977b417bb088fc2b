"""The conditions of the matrix: what a user's loop may be like, and what may happen to it."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from tests.conformance import courses
from tests.conformance.datasets import Source
from tests.conformance.modules import Habits
from tests.conformance.registry import Entry
from tests.conformance.sides import Run, Side

# torch 2.6 fails inside FSDP2 on a CPU, 2.15 works; below 2.8 it was not tried
FSDP2 = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)


@dataclass(frozen=True)
class Condition:
    """One line of the table.

    Args:
        name: in the table.
        group: the part of the table it stands in.
        course: what happens.
        habits: how the user's module differs from the usual one.
        trainer: makes the options of the Trainer; called for each, as plugins are not to be shared.
        source: of the training data, see ``datasets.loader``.
        val_loaders: how many.
        quick: part of the short half, whose cells are run by mixin as well.
        where: in this process, or in the pair of processes that a script has started.
        available: whether the installed packages have it.
        lacks: the reason why an entry has nothing to compare here, if there is one.
        rounding: allowed difference of weights, beside that of the methods.
        with_others: the entry comes in company of all that can go with it, see ``registry.company``.
        named: callbacks that replace the classifier are told its name.
    """

    name: str
    group: str
    course: Callable[[Side], Run] = courses.fit
    habits: Mapping[str, Any] = field(default_factory=dict)
    trainer: Callable[[], dict[str, Any]] = dict
    source: Source = "points"
    val_loaders: int = 1
    quick: bool = False
    where: Literal["here", "pair"] = "here"
    available: bool = True
    lacks: Callable[[Entry], str | None] = lambda entry: None
    rounding: float = 0.0
    with_others: bool = False
    named: bool = False

    def __str__(self) -> str:
        return self.name

    def side(self, entry: Entry, folder: Any, ours: bool, by_mixin: bool = False) -> Side:
        how = self.trainer, self.source, self.val_loaders, self.named, by_mixin
        return Side(entry, Habits(**self.habits), folder, ours, *how)


def scaled() -> dict[str, Any]:
    """fp16 with a GradScaler; one that starts low, as 2^16 overflows in the first steps of so small a network."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]}


def bfloat16() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("bf16-mixed", "cpu")]}


def two_processes() -> dict[str, Any]:
    return {"strategy": DDPStrategy(process_group_backend="gloo", timeout=timedelta(minutes=1)), "devices": 2}


def two_with_data_of_their_own() -> dict[str, Any]:
    return {**two_processes(), "use_distributed_sampler": False}


def spawned() -> dict[str, Any]:
    return {"strategy": DDPStrategy(process_group_backend="gloo", start_method="spawn"), "devices": 2}


def sharded() -> dict[str, Any]:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    return {"strategy": strategy, "devices": 2}


def options(**given: Any) -> Callable[[], dict[str, Any]]:
    return lambda: given


def only_with_failure(entry: Entry) -> str | None:
    return None if entry.failure else "runs nothing of its own inside the loop"


ALONE = {"regression": "goes with a regression", "clip": "goes with a CLIP"}
STEP, LOOP, DATA, RUN, CHECKPOINTS, AROUND = (
    "The optimizer step",
    "The module",
    "The data",
    "The run",
    "Checkpoints",
    "What stands around it",
)

FIRST = {  # of the default run: one of each kind of fault that has been made
    "fp32",
    "16-mixed, GradScaler",
    "accumulate 3 batches",
    "manual_backward",
    "batches as dict",
    "several validation loaders",
    "fit twice, two Trainers",
    "exception in mid-epoch",
    "resume in mid-epoch",
}
CONDITIONS = [
    Condition("fp32", STEP, quick=True),
    Condition("bf16-mixed", STEP, trainer=bfloat16),
    Condition("16-mixed, GradScaler", STEP, trainer=scaled, quick=True),
    Condition("accumulate 3 batches", STEP, trainer=options(accumulate_grad_batches=3), quick=True),
    Condition("clip by norm", STEP, trainer=options(gradient_clip_val=0.1), quick=True),
    Condition("clip by value", STEP, trainer=options(gradient_clip_val=0.01, gradient_clip_algorithm="value")),
    Condition("closure run twice (SAM)", STEP, habits={"optimizer": "sam"}, quick=True),
    Condition(
        "two optimizers, with schedulers", STEP, habits={"optimizer": "two", "optimization": "manual"}, quick=True
    ),
    Condition("manual_backward", LOOP, habits={"optimization": "manual"}, quick=True),
    Condition("bare loss.backward()", LOOP, habits={"optimization": "bare"}, quick=True),
    Condition("LossTermsMixin", LOOP, habits={"optimization": "mixin"}, quick=True),
    Condition("gradient checkpointing", LOOP, habits={"checkpointing": True}),
    Condition("compiled module", LOOP, habits={"compiled": "module"}),
    Condition("compiled network", LOOP, habits={"compiled": "network"}),
    Condition("step returns a dict", LOOP, habits={"returns": "dict"}, quick=True),
    Condition("step returns None now and then", LOOP, habits={"returns": "none"}, quick=True),
    Condition("no forward", LOOP, habits={"forward": False}),
    Condition("second input of forward", DATA, habits={"batch": "two inputs"}),
    Condition("batches as list", DATA, habits={"batch": "list"}),
    Condition("batches as dict", DATA, habits={"batch": "dict"}, quick=True),
    Condition("batches as dataclass", DATA, habits={"batch": "dataclass"}, quick=True),
    Condition("soft labels", DATA, habits={"soft": True}, quick=True),
    Condition("iterable data set", DATA, source="stream", quick=True),
    Condition(
        "StatefulDataLoader",
        DATA,
        courses.resume_midway,
        habits={"dropout": 0.0},
        source="stateful",
        available=importlib.util.find_spec("torchdata") is not None,
    ),
    Condition("several validation loaders", DATA, val_loaders=2, quick=True),
    Condition("sanity check", RUN, trainer=options(num_sanity_val_steps=2)),
    Condition("limit_*_batches", RUN, trainer=options(limit_train_batches=3, limit_val_batches=1), quick=True),
    Condition("overfit_batches", RUN, trainer=options(overfit_batches=2)),
    Condition("fit twice, two Trainers", RUN, courses.fit_twice, quick=True),
    Condition("fit twice, one Trainer", RUN, courses.fit_on),
    Condition("fit, validate, test, predict", RUN, courses.fit_validate_test_predict),
    Condition("early stopping", RUN, courses.early_stopping),
    Condition("KeyboardInterrupt in mid-epoch", RUN, courses.interrupted),
    Condition("exception in mid-epoch", RUN, courses.exception, quick=True),
    Condition("out of memory in the callback", RUN, courses.fails_inside, lacks=only_with_failure, quick=True),
    Condition("resume from last", CHECKPOINTS, courses.resume_last, habits={"dropout": 0.0}, quick=True),
    Condition("resume in mid-epoch", CHECKPOINTS, courses.resume_midway, habits={"dropout": 0.0}, quick=True),
    Condition(
        "resume after a validation",
        CHECKPOINTS,
        courses.resume_after_validation,
        habits={"dropout": 0.0},
        quick=True,
    ),
    # Without dropout, as above: a loader made anew draws a random number, and whoever plans by hand makes it twice.
    Condition("plain checkpoint to suite", CHECKPOINTS, courses.plain_to_suite, habits={"dropout": 0.0}, quick=True),
    Condition("suite checkpoint to plain", CHECKPOINTS, courses.suite_to_plain, quick=True),
    Condition("load_from_checkpoint of the plain class", CHECKPOINTS, courses.load_plain),
    Condition("weights_only=True", CHECKPOINTS, courses.weights_only),
    Condition(
        "pytorch_lightning",
        AROUND,
        courses.other_name,
        available=importlib.util.find_spec("pytorch_lightning") is not None,
    ),
    Condition("Tuner.lr_find", AROUND, courses.find_rate),
    Condition("LearningRateFinder", AROUND, courses.rate_finder),
    Condition("LearningRateFinder at a milestone", AROUND, courses.rate_finder_at_milestone, quick=True),
    Condition("BatchSizeFinder", AROUND, courses.batch_size_finder),
    Condition("EMA", AROUND, courses.ema, available=hasattr(lightning_callbacks, "EMAWeightAveraging")),
    Condition(
        "EMA, validated and resumed",
        AROUND,
        courses.ema_resumed,
        habits={"dropout": 0.0},
        available=hasattr(lightning_callbacks, "EMAWeightAveraging"),
    ),
    Condition("SWA", AROUND, courses.swa),
    Condition("fine-tuning, validated and resumed", AROUND, courses.thawed_and_resumed, habits={"dropout": 0.0}),
    Condition("LightningCLI", AROUND, courses.cli),
    Condition("deepcopy and pickling", AROUND, courses.copied),
    Condition(
        "all others of all methods at once",
        AROUND,
        lacks=lambda entry: None if entry.task == "classes" else f"{ALONE[entry.task]}, the others with a classifier",
        with_others=True,
        rounding=1e-4,  # gradients of many terms add up in another order
    ),
    Condition("two processes, by a script", AROUND, courses.fit_together, trainer=two_processes, where="pair"),
    Condition(
        "two processes, each with data of its own",
        AROUND,
        courses.fit_together,
        trainer=two_with_data_of_their_own,
        source="own",
        where="pair",
    ),
    Condition("two processes, spawned", AROUND, courses.fit_spawned, trainer=spawned, with_others=True, rounding=1e-4),
    Condition(
        "FSDP2", AROUND, courses.fit_together, habits={"sharded": True}, trainer=sharded, where="pair", available=FSDP2
    ),
    Condition(
        "FSDP2, classifier named",
        AROUND,
        courses.fit_together,
        habits={"sharded": True},
        trainer=sharded,
        where="pair",
        available=FSDP2,
        named=True,
    ),
]

# Precision, accumulation, clipping, the kind of module and what happens to the run: any two that can meet do so in one
# line. (Lightning refuses clipping and accumulation in manual optimization, and a closure under a GradScaler. Its SWA
# ends in an epoch without gradients, which no GradScaler outlives, nor clipping by value and SAM with accumulation.)
BF16, FP16, THRICE, NORM, VALUE = (
    "bf16-mixed",
    "16-mixed, GradScaler",
    "accumulate 3 batches",
    "clip by norm",
    "clip by value",
)
TWICE, MANUAL, AGAIN, DICT = (
    "closure run twice (SAM)",
    "manual_backward",
    "gradient checkpointing",
    "step returns a dict",
)
LAST, MIDWAY, BROKEN = "resume from last", "resume in mid-epoch", "exception in mid-epoch"
PAIRWISE = [
    (BF16, NORM, DICT, LAST),
    (BF16, THRICE, AGAIN, BROKEN),
    (VALUE, AGAIN),
    (THRICE, NORM, TWICE, MIDWAY),
    (FP16, MIDWAY),
    (DICT, "SWA"),
    (BF16, VALUE, TWICE, BROKEN),
    (FP16, THRICE, NORM),
    (MANUAL, LAST),
    (FP16, THRICE, NORM, AGAIN, LAST),
    (BF16, NORM, "SWA"),
    (NORM, BROKEN),
    (BF16, THRICE, DICT),
    (FP16, THRICE, VALUE, DICT),
    (BF16, THRICE, VALUE, DICT, MIDWAY),
    (FP16, VALUE, LAST),
    (FP16, MANUAL, BROKEN),
    (VALUE, DICT, BROKEN),
    (BF16, MANUAL, MIDWAY),
    (AGAIN, "SWA"),
    (FP16, THRICE, VALUE, AGAIN, MIDWAY),
    (THRICE, NORM, TWICE),
    (BF16, NORM, TWICE, LAST),
]


def combined(names: tuple[str, ...]) -> Condition:
    """The conditions of these names at once; what one of them refuses is not asked again."""
    parts = [condition for condition in CONDITIONS if condition.name in names]
    course = next((part.course for part in parts if part.course is not courses.fit), courses.fit)

    def trainer() -> dict[str, Any]:
        return {key: value for part in parts for key, value in part.trainer().items()}

    def lacks(entry: Entry) -> str | None:
        alone = next((n for n in names if n in {**entry.refuses, **entry.lacks}), None)
        return alone and f"not alone either: {alone}"

    habits = {key: value for part in parts for key, value in part.habits.items()}
    return Condition(" + ".join(names), "Combinations", course, habits, trainer, lacks=lacks)


CONDITIONS += [combined(names) for names in PAIRWISE]
