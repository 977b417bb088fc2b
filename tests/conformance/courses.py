"""What may happen to a run: fitted once or twice, broken off, resumed, searched for a learning rate, copied. A course
does the same to both sides and gives what is to be compared.
"""

import contextlib
import copy
import importlib
import inspect
import io
import pickle
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.tuner import Tuner

from tests.conformance import datasets, modules
from tests.conformance.expected import everywhere
from tests.conformance.modules import whole
from tests.conformance.registry import Failure
from tests.conformance.sides import Run, Side, patches


def fit(side: Side) -> Run:
    module, callbacks = side.module(), side.callbacks()
    return side.fit(side.trainer(callbacks), module, callbacks)


def fit_together(side: Side) -> Run:
    """On several processes, which must end with the same weights."""
    run = fit(side)
    trained = {name: whole(parameter) for name, parameter in run.module.network.named_parameters()}
    if side.ours:
        brought = [p for member, c in zip(side.entry.family(), run.callbacks, strict=True) for p in member.own(c)]
    else:
        brought = [p for method in run.module.methods for p in method.own(run.module)]
    trained |= {f"own parameter {i}": p for i, p in enumerate(brought)}
    digests = everywhere({name: value.double().sum().item() for name, value in trained.items()})
    for name in trained:
        assert len({digest[name] for digest in digests}) == 1, f"{name} differs between the processes"
    return run


class SaveAtEnd(pl.Callback):
    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


def fit_spawned(side: Side) -> Run:
    """By processes that Lightning spawns: what they have done is read from a checkpoint."""
    path = side.folder / "spawned.ckpt"
    module, callbacks = side.module(), side.callbacks()
    run = side.fit(side.trainer([*callbacks, SaveAtEnd(path)]), module, callbacks)
    saved = torch.load(path, weights_only=True)["state_dict"]
    run.more["saved"] = {name: value for name, value in saved.items() if name.startswith("net.")}
    run.here = False
    return run


def fit_twice(side: Side) -> Run:
    """The same module and callbacks with a second Trainer."""
    first = fit(side)
    return side.fit(side.trainer(first.callbacks), first.module, first.callbacks)


def fit_on(side: Side) -> Run:
    """A second ``fit`` of the same Trainer, for more epochs."""
    first = fit(side)
    first.trainer.fit_loop.max_epochs = 4
    return side.fit(first.trainer, first.module, first.callbacks)


def fit_validate_test_predict(side: Side) -> Run:
    run = fit(side)
    trainer, module, loader = run.trainer, run.module, side.loader("val")
    values = {**trainer.callback_metrics}  # before the others replace them
    run.more["validated"] = trainer.validate(module, loader, verbose=False)
    run.more["tested"] = trainer.test(module, loader, verbose=False)
    run.more["predicted"] = trainer.predict(module, loader)
    again = side.fit(side.trainer(run.callbacks), module, run.callbacks)  # and the module is still sound
    again.more = {**run.more, "first fit": values.get("val/loss")}
    return again


def early_stopping(side: Side) -> Run:
    module, callbacks = side.module(), side.callbacks()
    stop = EarlyStopping("val/loss", patience=1, mode="max")
    run = side.fit(side.trainer([*callbacks, stop], max_epochs=6), module, callbacks)
    run.more["stopped"] = stop.stopped_epoch
    return run


class RaiseAt(pl.Callback):
    """Raises at the end of a batch, or of an epoch; once."""

    def __init__(self, error: BaseException, epoch: int = 1, batch: int | None = 1) -> None:
        self.error, self.epoch, self.batch = error, epoch, batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.at(trainer, batch_idx)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.at(trainer, None)

    def at(self, trainer: Any, batch: int | None) -> None:
        if (trainer.current_epoch, batch) == (self.epoch, self.batch):
            raise self.error


def broken_off(side: Side, error: BaseException) -> Run:
    """In the middle of the second epoch; then fitted anew."""
    module, callbacks = side.module(), side.callbacks()
    with expecting(type(error)):
        side.fit(side.trainer([*callbacks, RaiseAt(error)]), module, callbacks)
    assert not patches(module), f"left behind by the error: {patches(module)}"
    return side.fit(side.trainer(callbacks), module, callbacks)


def interrupted(side: Side) -> Run:
    return broken_off(side, KeyboardInterrupt())


def exception(side: Side) -> Run:
    return broken_off(side, ArithmeticError("the user's own"))


@contextlib.contextmanager
def expecting(kind: type[BaseException]) -> Iterator[None]:
    """An error that must come; Lightning makes a ``SystemExit`` of an interrupt."""
    try:
        yield
    except kind:
        return
    except SystemExit:
        if kind is KeyboardInterrupt:
            return
        raise
    raise AssertionError(f"{kind.__name__} was swallowed")


class Breaks:
    """Calls a function, but raises in its n-th call."""

    def __init__(self, function: Any, n: int) -> None:
        self.function, self.n, self.calls = function, n, 0

    def __get__(self, instance: Any, owner: Any = None) -> Any:  # it may stand in the place of a method
        return self if instance is None else lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.n:
            raise torch.OutOfMemoryError("out of memory, inside the callback")
        return self.function(*args, **kwargs)


def fails_inside(side: Side) -> Run:
    """Memory runs out inside the callback; the user catches that, and fits again.

    The error passes through as it is. What was computed until then stays, and is the same on the written side, where
    the author's own lines fail in their place.
    """
    failure = side.entry.failure
    module, callbacks = side.module(), side.callbacks()
    with contextlib.ExitStack() as stack:
        stack.enter_context(expecting(torch.OutOfMemoryError))
        if side.ours:
            owner, name = _resolve(failure.path)
            stack.enter_context(mock.patch.object(owner, name, Breaks(getattr(owner, name), failure.call)))
            side.fit(side.trainer(callbacks), module, callbacks)
        else:
            _fail(side, module, failure)
    assert not patches(module), f"left behind by the error: {patches(module)}"
    assert all(part.training for part in module.modules()), "left in eval mode"
    return side.fit(side.trainer(callbacks), module, callbacks)


def _fail(side: Side, module: Any, failure: Failure) -> None:
    error = torch.OutOfMemoryError("the same, in the author's own lines")
    if failure.place in ("batch end", "epoch end"):
        batch = 1 if failure.place == "batch end" else None
        side.fit(side.trainer([RaiseAt(error, failure.epoch, batch)]), module)
        return
    owner = module.methods[-1]
    calls = []
    if failure.place == "loss":

        def once(*args: Any) -> Any:
            calls.append(None)
            if len(calls) == 2:
                raise error
            return type(owner).loss(owner, *args)

        with mock.patch.object(owner, "loss", once):
            side.fit(side.trainer(), module)
    else:

        def before(module: Any) -> Any:
            start = module.network.fc.basis.detach().clone()
            calls.append(None)
            if len(calls) < 2:
                return type(owner).before_step(owner, module)

            def fail() -> None:
                module.network.fc.basis.data.copy_(start)  # a step that was not completed is taken back
                raise error

            return fail

        with mock.patch.object(owner, "before_step", before):
            side.fit(side.trainer(), module)


def _resolve(path: str) -> tuple[Any, str]:
    """The module or class that holds the last name of a dotted path."""
    parent, _, name = path.rpartition(".")
    try:
        return importlib.import_module(parent), name
    except ModuleNotFoundError:
        outer, _, inner = parent.rpartition(".")
        return getattr(importlib.import_module(outer), inner), name


class SaveAt(pl.Callback):
    """Saves a checkpoint in the middle of the second epoch."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 2):  # where a step ends, also one of three batches
            trainer.save_checkpoint(self.path)


def first_epoch(side: Side, active: bool = True, beside: Sequence[Any] = ()) -> Any:
    """A run that is cut off when its second epoch has begun, and its checkpoint of the first."""
    keep, end = ModelCheckpoint(side.folder, save_last=True), RaiseAt(ArithmeticError("cut off"), batch=0)
    module, callbacks = side.module(active), side.callbacks(active)
    every = [*callbacks, *beside, keep, end]
    trainer = side.trainer(every, max_epochs=max(2, side.entry.epochs), enable_checkpointing=True)
    with expecting(ArithmeticError):
        side.fit(trainer, module, callbacks)
    return side.folder / "last.ckpt"


def resume_last(side: Side) -> Run:
    """In a new process, so to speak. Lightning does not restore random numbers: no dropout here, and in mid-epoch."""
    if side.entry.resumes_exactly and not side.ours:
        return fit(side)
    path = first_epoch(side)
    module, callbacks = side.module(), side.callbacks()
    return side.fit(side.trainer(callbacks), module, callbacks, ckpt_path=path)


def resume_midway(side: Side) -> Run:
    """Saved in the middle of the second epoch of three."""
    path = side.folder / "midway.ckpt"
    module, callbacks = side.module(), side.callbacks()
    run = side.fit(side.trainer([*callbacks, SaveAt(path)], max_epochs=3), module, callbacks)
    if side.entry.resumes_exactly and not side.ours:
        return run
    module, callbacks = side.module(), side.callbacks()
    return side.fit(side.trainer(callbacks, max_epochs=3), module, callbacks, ckpt_path=path)


class SaveInValidation(pl.Callback):
    """Saves a checkpoint at the end of the validation that ends the second epoch."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def resume_after_validation(side: Side) -> Run:
    """Saved by the validation at the end of the second epoch of three: the third is run whole."""
    path = side.folder / "validated.ckpt"
    module, callbacks = side.module(), side.callbacks()
    run = side.fit(side.trainer([*callbacks, SaveInValidation(path)], max_epochs=3), module, callbacks)
    if side.entry.resumes_exactly and not side.ours:
        return run
    module, callbacks = side.module(), side.callbacks()
    resumed = side.fit(side.trainer(callbacks, max_epochs=3), module, callbacks, ckpt_path=path)
    assert resumed.trainer.global_step == run.trainer.global_step, "an epoch is left out"
    return resumed


def handed_over(side: Side, before: bool, after: bool) -> Run:
    """One epoch with or without the suite, and the next without or with it."""
    path = first_epoch(side, before)
    module, callbacks = side.module(after), side.callbacks(after)
    plain = {} if after else {"reload_dataloaders_every_n_epochs": 0}
    return side.fit(side.trainer(callbacks, **plain), module, callbacks, ckpt_path=path)


def plain_to_suite(side: Side) -> Run:
    return handed_over(side, before=False, after=True)


def suite_to_plain(side: Side) -> Run:
    return handed_over(side, before=True, after=False)


def load_plain(side: Side) -> Run:
    """``load_from_checkpoint`` of the user's class, which knows nothing of the suite."""
    run = fit(side)
    path = side.folder / "plain.ckpt"
    run.trainer.save_checkpoint(path)
    if side.ours:
        run.module = type(run.module).load_from_checkpoint(path, habits=side.habits)
    return run


def weights_only(side: Side) -> Run:
    """The checkpoint holds nothing but tensors and plain types."""
    run = fit(side)
    run.trainer.save_checkpoint(side.folder / "safe.ckpt")
    torch.load(side.folder / "safe.ckpt", weights_only=True)
    return run


def other_name(side: Side) -> Run:
    """Module and Trainer come from ``pytorch_lightning``, the callbacks as ever."""
    import pytorch_lightning

    side.root = pytorch_lightning
    return fit(side)


def find_rate(side: Side) -> Run:
    """``Tuner.lr_find`` meets the losses of the training that follows, over an epoch."""
    module, callbacks = side.module(), side.callbacks()
    trainer = side.trainer(callbacks)
    target = side.start(trainer, module, callbacks)
    found = Tuner(trainer).lr_find(target, **side.loaders(), num_training=4, update_attr=False)
    run = side.fit(trainer, module, callbacks)
    run.more["losses"] = torch.tensor(found.results["loss"])
    return run


class Search:
    """Tells the module that what it goes through now is a search."""

    def searched(self, search: Any, trainer: Any, pl_module: Any) -> None:
        pl_module.searching = True
        search(trainer, pl_module)
        pl_module.searching = False


class FindRate(Search, LearningRateFinder):
    """Before training, or where an epoch begins."""

    def __init__(self, epoch: int | None = None) -> None:
        super().__init__(num_training_steps=3, early_stop_threshold=None, update_attr=False)
        self.epoch = epoch

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.epoch is None:
            self.searched(self.lr_find, trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.searched(self.lr_find, trainer, pl_module)


class FindBatchSize(Search, BatchSizeFinder):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.searched(self.scale_batch_size, trainer, pl_module)


def searched_in_fit(side: Side, search: Any) -> Run:
    """A run that searches before it trains, or between two epochs, and goes back to where it was."""
    module, callbacks = side.module(), side.callbacks()
    return side.fit(side.trainer([*callbacks, search], max_epochs=3), module, callbacks)


def rate_finder(side: Side) -> Run:
    return searched_in_fit(side, FindRate())


def rate_finder_at_milestone(side: Side) -> Run:
    return searched_in_fit(side, FindRate(epoch=1))


def batch_size_finder(side: Side) -> Run:
    side.hooked = True  # it asks for that
    return searched_in_fit(side, FindBatchSize(max_trials=1, steps_per_trial=2, init_val=datasets.BATCH))


def averaged(side: Side, average: Any) -> Run:
    module, callbacks = side.module(), side.callbacks()
    return side.fit(side.trainer([*callbacks, average], max_epochs=3), module, callbacks)


def ema(side: Side) -> Run:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return averaged(side, EMAWeightAveraging(decay=0.8))


def swa(side: Side) -> Run:
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    lr = 0.001 if side.entry.task == "clip" else 0.05
    return averaged(side, StochasticWeightAveraging(lr, swa_epoch_start=1, annealing_epochs=1))


def resumed_beside(side: Side, make: Any) -> Run:
    """Beside another callback: cut off after an epoch, its checkpoint validated by a new module, then resumed."""
    if side.entry.resumes_exactly and not side.ours:
        return averaged(side, make())
    path = first_epoch(side, beside=[make()])
    module, callbacks = side.module(), side.callbacks()
    validating = side.trainer(callbacks)
    side.start(validating, module, callbacks)
    validated = validating.validate(module, side.loader("val"), ckpt_path=path, verbose=False)
    module, callbacks = side.module(), side.callbacks()
    run = side.fit(side.trainer([*callbacks, make()], max_epochs=3), module, callbacks, ckpt_path=path)
    if not side.entry.resumes_exactly:  # else the written side has not been cut off
        run.more["validated"] = validated
    return run


def ema_resumed(side: Side) -> Run:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return resumed_beside(side, lambda: EMAWeightAveraging(decay=0.8))


class Thaws(BaseFinetuning):
    """Freezes the body of the network for an epoch; when a run resumes it makes the groups of the optimizer anew."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.network.body)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch >= 1:
            self.make_trainable(pl_module.network.body)


def thawed_and_resumed(side: Side) -> Run:
    return resumed_beside(side, Thaws)


class Copies(pl.Callback):
    """In the middle of a run, a deep copy and a pickle of the module each take a training step of their own.

    The copy has the terms of the original. The pickle has the methods of its class, and so no terms; layers and hooks
    are in it.
    """

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) != (1, 1):
            return
        copied, pickled = copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))
        pickled.adds_terms = False
        for other in (copied, pickled):
            with torch.no_grad():
                for p in other.parameters():
                    p.mul_(0.9)  # a step through the network of the original would not see this
            self.losses.append(other.training_step(batch, batch_idx).detach())


def copied(side: Side) -> Run:
    """Callbacks that were copied and pickled, and a module that is so in the middle of the run."""
    module = side.module()
    callbacks = [pickle.loads(pickle.dumps(copy.deepcopy(callback))) for callback in side.callbacks()]
    copies = Copies()
    run = side.fit(side.trainer([*callbacks, copies]), module, callbacks)
    run.more["losses of copies"] = torch.stack(copies.losses)
    return run


def cli(side: Side) -> Run:
    """The callbacks from YAML: what ``--print_config`` prints names each argument, and is itself a config."""
    if not side.ours:
        return fit(side)
    callbacks = [
        {"class_path": f"lightning_feat.callbacks.{member.cls.__name__}", "init_args": as_yaml(member.arguments)}
        for member in side.entry.family()
    ]
    config = {
        "trainer": {"callbacks": callbacks, "default_root_dir": str(side.folder), "max_epochs": 2, "accelerator": "cpu"}
        | {"devices": 1, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
        | {"enable_progress_bar": False, "enable_model_summary": False},
        "model": {"habits": {"task": side.entry.task}},
        "seed_everything": 0,
    }
    path = side.folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        command_line(path, "--print_config")
    path.write_text(printed.getvalue())
    shown = yaml.safe_load(printed.getvalue())["trainer"]["callbacks"]
    for member, entry in zip(shown, side.entry.family(), strict=True):
        names = inspect.signature(entry.cls).parameters
        assert set(member["init_args"]) == set(names), f"{entry}: --print_config does not show all of {[*names]}"
    made = command_line(path)
    family = [c for c in made.trainer.callbacks if type(c).__module__.startswith("lightning_feat")]
    return side.fit(made.trainer, made.model, family)


def command_line(path: Any, *more: str) -> LightningCLI:
    return LightningCLI(
        modules.User,
        args=["--config", str(path), *more],
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
    )


def as_yaml(value: Any) -> Any:
    """Arguments as one writes them into YAML: functions by their import path, dataclasses by their fields."""
    if isinstance(value, dict):
        return {key: as_yaml(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [as_yaml(entry) for entry in value]
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return vars(value) if hasattr(value, "__dataclass_fields__") else value
