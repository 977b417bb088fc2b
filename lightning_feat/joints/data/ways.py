"""How a module runs its network on a batch, found out on the first one.

The module's own step knows: ``validation_step``, else ``training_step`` where Lightning optimizes. It is run once, in
eval mode and without a trace, and what the tapped layers put out is compared with what simple calls give, such as
``module(batch[0])``: the first that gives the same is taken, as it costs less. Where none does, the step itself runs
the network; where there is no step to ask and the calls differ, the user is asked.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_feat.joints.data.calls import Forward, OwnStep, name_of, usual_calls
from lightning_feat.joints.features.batches import describe
from lightning_feat.joints.features.kept import remember
from lightning_feat.joints.features.taps import FeatureTap, TapError
from lightning_feat.joints.module.wraps import overrides

IN_YAML = (
    "give forward=, a function forward(module, batch) that runs it; in YAML as a dotted path, "
    "`forward: my_package.my_file.run_network`"
)


def find_way(
    trainer: Trainer,
    module: LightningModule,
    batch: Any,
    taps: Sequence[FeatureTap],
    owner: str,
    steps: bool = True,
    first: Forward | None = None,
) -> Forward:
    """How ``module`` runs its network on ``batch``, as far as the taps hear it; see the docstring of this file.

    Called within ``without_trace``.

    Args:
        trainer: knows the precision.
        module: the module.
        batch: as the module gets it.
        taps: attached to the module.
        owner: begins the message.
        steps: whether the module's own steps may be run; not on data of another task, whose classes it does not have.
        first: a way that is known from other data, tried first.

    Raises:
        ValueError: if there is no way, or several that differ; the message says how to give one.
    """
    tries = _Tries(trainer, module, batch, taps)
    calls = [*([] if first is None or isinstance(first, OwnStep) else [first]), *usual_calls(module, batch)]
    step, truth = _own_step(tries, module) if steps else (None, None)
    usual = next((features for way in calls if (features := tries.features(way)) is not None), None)
    if step is not None and truth is not None and (usual is None or _fit(truth, usual)):
        same = (way for way in calls if _same(tries.features(way), truth))
        # Or it runs the network on the same again, for another loss or metric: once is enough, and one row of each.
        once = (way for way in calls if _repeated(tries.features(way), truth))
        return next(itertools.chain(same, once), step)
    if first is not None and tries.features(first) is not None:
        return first
    working = [way for way in calls if tries.features(way) is not None]
    if usual is None:
        raise ValueError(
            f"{owner}: no way was found to run the network of {type(module).__name__} on {describe(batch)}. Tried: "
            f"{'; '.join(tries.told()) or 'nothing, as it has neither a forward nor a step that could be run'}. For a "
            f"pass over the data {IN_YAML}."
        )
    others = [way for way in working if not _same(tries.features(way), usual)]
    if others:
        raise ValueError(
            f"{owner}: {name_of(working[0])} and {name_of(others[0])} both run the network of {type(module).__name__} "
            f"on {describe(batch)}, and give different features, and no step of the module could be asked: {IN_YAML}."
        )
    return working[0]


class _Tries:
    """What the taps hear by each way, or why they hear nothing."""

    def __init__(self, trainer: Trainer, module: LightningModule, batch: Any, taps: Sequence[FeatureTap]) -> None:
        self.trainer, self.module, self.batch, self.taps = trainer, module, batch, taps
        self.found: dict[Forward, list[Tensor] | str] = {}

    def features(self, way: Forward) -> list[Tensor] | None:
        if way not in self.found:
            self.found[way] = self.run(way)
        found = self.found[way]
        return None if isinstance(found, str) else found

    def told(self) -> list[str]:
        return [f"{name_of(way)}: {error}" for way, error in self.found.items() if isinstance(error, str)]

    def run(self, way: Forward, seed: int | None = None) -> list[Tensor] | str:
        trains = way == OwnStep("training_step")
        put_back = remember(self.module, parameters=trains)
        with isolate_rng():
            if seed is not None:
                torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)  # noqa: NPY002  # all there are
            for tap in self.taps:
                tap.listen()
            try:
                with self.trainer.precision_plugin.forward_context():
                    way(self.module, self.batch)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            finally:
                for tap in self.taps:
                    tap.hold()
                changed = put_back()
            if trains and changed:
                return "it changes parameters by itself"
            try:
                return [tap.take() for tap in self.taps]
            except TapError as error:
                return str(error).partition(".")[0]
            finally:
                for tap in self.taps:
                    tap.drop()


def _own_step(tries: _Tries, module: LightningModule) -> tuple[Forward | None, list[Tensor] | None]:
    """The step that knows how the network is run, and what the taps heard in it."""
    names = ["validation_step", "test_step"] + ["training_step"] * module.automatic_optimization
    for step in (OwnStep(name) for name in names if overrides(module, name)):
        features = tries.features(step)
        if features is None:
            continue
        if step.name == "training_step":
            again = tries.run(step, seed=7)
            if isinstance(again, str) or not _same(again, features):
                tries.found[step] = "what it puts in differs from time to time, by augmentation it seems"
                continue
        return step, features
    return None, None


def _same(features: list[Tensor] | None, others: list[Tensor]) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return features is not None and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(features, others, strict=True)
    )


def _repeated(features: list[Tensor] | None, others: list[Tensor]) -> bool:
    """Whether the others are these several times, bit for bit."""
    if features is None or any(len(a) == 0 or len(b) % len(a) for a, b in zip(features, others, strict=True)):
        return False
    again = [torch.cat([a] * (len(b) // len(a))) for a, b in zip(features, others, strict=True)]
    return _same(again, others)


def _fit(features: list[Tensor], others: list[Tensor]) -> bool:
    """Whether the step runs the network on whole batches: on all of one, or on several views of it."""
    return all(len(b) == 0 or len(a) % len(b) == 0 for a, b in zip(features, others, strict=True))


class Ways:
    """How the network is run on each of several data sets, by their names; found on the first batch of each.

    Args:
        forward: what the user gives, for all of them; None to find it.
        owner: begins the message where there is no way.
    """

    def __init__(self, forward: Forward | None, owner: str) -> None:
        self.forward, self.owner = forward, owner
        self.found: dict[str, Forward] = {}

    def begin(self) -> None:
        """Forget an earlier run."""
        self.found = {}

    def of(self, name: str) -> Forward | None:
        """The way, if it is known."""
        return self.found.get(name, self.forward)

    def known(self, name: str) -> Forward:
        """The way that was found. ``RuntimeError`` where no batch has been looked at yet."""
        way = self.of(name)
        if way is None:
            raise RuntimeError(f"{self.owner}: no batch of the {name} data has shown yet how the network is run.")
        return way

    def find(
        self,
        trainer: Trainer,
        module: LightningModule,
        batch: Any,
        name: str,
        taps: Sequence[FeatureTap],
        foreign: bool = False,
    ) -> Forward:
        """The way for the data of this name, found on ``batch`` where it is not known.

        Args:
            trainer: knows the precision.
            module: the module.
            batch: of the data.
            name: of the data.
            taps: attached to the module.
            foreign: the data are not those of the run, so that the steps of the module are not for them.
        """
        way = self.of(name)
        if way is None:
            known = next(iter(self.found.values()), None) if foreign else None
            way = find_way(trainer, module, batch, taps, self.owner, not foreign, known)
            self.found[name] = way
        return way
