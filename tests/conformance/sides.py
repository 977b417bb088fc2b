"""The two runs of a cell: a user's module with callbacks, and the module with the methods written in."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from tests.conformance import datasets, modules
from tests.conformance.datasets import Source
from tests.conformance.modules import Habits
from tests.conformance.registry import Entry


@dataclass
class Run:
    """What a course leaves behind, to be compared."""

    module: Any
    trainer: Any
    callbacks: list[Any]
    more: dict[str, Any] = field(default_factory=dict)  # beside the weights: losses, predictions
    here: bool = True  # whether the module of this process is the one that was trained


class Side:
    """Makes modules, callbacks and trainers for one of the two runs; a course does the same things with either.

    Attributes:
        ours: whether the callbacks are there, or the methods are written in.
        by_mixin: whether the module brings the callbacks, and not the Trainer.
        made: modules and trainers so far.
    """

    def __init__(
        self,
        entry: Entry,
        habits: Habits,
        folder: Path,
        ours: bool,
        trainer_options: Any = dict,
        source: Source = "points",
        val_loaders: int = 1,
        named: bool = False,
        by_mixin: bool = False,
    ) -> None:
        self.entry, self.folder, self.ours = entry, folder, ours
        self.habits = habits.but(task=entry.task)
        self.trainer_options, self.source, self.val_loaders = trainer_options, source, val_loaders
        self.named, self.by_mixin = named, by_mixin and ours
        self.brought: list[Any] = []
        self.root: Any = pl  # the package that module and Trainer come from
        self.hooked = False  # whether a module of a user gives its training data itself
        self.made: list[Run] = []

    def module(self, active: bool = True) -> Any:
        """A new module; not ``active``: the method does nothing in it, but its parameters are there."""
        torch._dynamo.reset()
        pl.seed_everything(0, verbose=False)
        if self.ours:
            module = modules.user(self.habits, self.root, self.by_mixin)
            if self.hooked:
                module.batch_size, module.train_dataloader = datasets.BATCH, lambda: self.loader("train")
            return module
        module = modules.written(self.habits, self.entry.methods(), datasets.tensors(self.habits), self.root)
        module.active = active
        module.given_loader, module.batch_size = self.loader("train"), datasets.BATCH
        return module

    def callbacks(self, active: bool = True) -> list[Any]:
        built = [member.build(self.named) for member in self.entry.family()] if self.ours and active else []
        self.brought += built
        return built

    def loader(self, part: str) -> Any:
        return datasets.loader(self.habits, part, self.source)

    def trainer(self, callbacks: Sequence[Any] = (), **options: Any) -> Any:
        """A quiet trainer on one CPU."""
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        short = {"max_epochs": self.entry.epochs, "num_sanity_val_steps": 0, "accelerator": "cpu", "devices": 1}
        anew = not self.ours and any(method.changes_loader for method in self.entry.methods())
        own = {"reload_dataloaders_every_n_epochs": int(anew), "log_every_n_steps": 1}
        if self.by_mixin:
            callbacks = [callback for callback in callbacks if not any(callback is other for other in self.brought)]
        chosen = {**quiet, **short, **own, **self.trainer_options(), **options}
        return self.root.Trainer(default_root_dir=self.folder, callbacks=[*callbacks], **chosen)

    def loaders(self) -> dict[str, Any]:
        """What ``fit`` gets; the written side asks its module for the training data."""
        val = [self.loader("val") for _ in range(self.val_loaders)]
        given = {"val_dataloaders": val if self.val_loaders > 1 else val[0]}
        return {**given, "train_dataloaders": self.loader("train")} if self.ours and not self.hooked else given

    def start(self, trainer: Any, module: Any, callbacks: Sequence[Any] = ()) -> Any:
        """Same random numbers on both sides from here on."""
        self.made.append(Run(module, trainer, [*callbacks]))
        pl.seed_everything(1, verbose=False)
        if self.by_mixin:
            module.bring(*callbacks)
        if not self.ours and trainer.world_size == 1:  # of several processes each seeds anew, before its setup
            module.prepare()  # and not in setup: averaging callbacks copy the module before
        return torch.compile(module, backend="eager") if self.habits.compiled == "module" else module

    def fit(self, trainer: Any, module: Any, callbacks: Sequence[Any] = (), **options: Any) -> Run:
        trainer.fit(self.start(trainer, module, callbacks), **self.loaders(), **options)
        return self.made[-1]


def patches(module: Any) -> list[str]:
    """What of ours is still on a module: wraps, own parameters, hooks. The head that was put in stays."""
    left = [name for name in module.__dict__ if name.startswith("_feat")]
    left += [name for name, value in module.__dict__.items() if hasattr(value, "_feat_wrapper")]
    left += [name for name in module._modules if name.startswith("_feat")]
    for name, part in module.named_modules():
        hooked = part._forward_hooks or part._forward_pre_hooks
        if hooked and any("lightning_feat" in (_home(hook) or "") for hook in hooked.values()):
            left.append(f"a hook on {name}")
    return left


def _home(hook: Any) -> str | None:
    return getattr(hook, "__module__", None) or type(hook).__module__


def state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the network, whole where they are sharded."""
    tensors = {**dict(module.network.named_parameters()), **dict(module.network.named_buffers())}
    return {name: modules.whole(t).clone() for name, t in tensors.items()}
