"""How long a learning rate schedule lasts, and how long the training."""

import math
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, OneCycleLR, SequentialLR
from torch.utils.data import DataLoader

from lightning_feat.callbacks.data_plan import DataPlan
from lightning_feat.callbacks.simplicity_bias.upsampler import SimplicityBiasUpsampler
from lightning_feat.doctor.finding import Finding, Severity


class Length(NamedTuple):
    """Of a training: its optimizer steps, and the batches of a grown epoch for which a schedule may be made anew."""

    steps: int
    anew: int | None


def horizon(scheduler: Any) -> float:
    """Steps after which a schedule is over: it ends in an error (``OneCycleLR``) or turns round; inf where it may go on
    for ever, or that is not known.
    """
    if isinstance(scheduler, OneCycleLR):
        return float(scheduler.total_steps)
    if isinstance(scheduler, CosineAnnealingLR):
        return float(scheduler.T_max)
    if isinstance(scheduler, SequentialLR):
        return float(scheduler._milestones[-1]) + horizon(scheduler._schedulers[-1])
    if isinstance(scheduler, ChainedScheduler):
        return min((horizon(part) for part in scheduler._schedulers), default=math.inf)
    return math.inf


def check_schedules(
    trainer: Trainer,
    module: LightningModule,
    configs: list[Any],
    plans: list[DataPlan],
    loaders: list[Any],
    batches: float,
) -> list[Finding]:
    """Findings about schedules that are over before the training is; to be called when the trial is over.

    Args:
        trainer: of the trial.
        module: of the trial.
        configs: its schedules as they were at the start.
        plans: callbacks that change how long epochs are.
        loaders: of the first epoch.
        batches: of the first epoch.
    """
    if not module.automatic_optimization:
        return []  # its schedules are stepped by hand
    growing = next((plan for plan in plans if plan.length == "grow"), None)
    findings = []
    for position, config in enumerate(configs):
        lasts, every = horizon(config.scheduler), config.frequency
        if config.interval == "epoch":
            epochs = max(trainer.max_epochs or 0, 0) // every
            if lasts < epochs:
                findings.append(_too_short(config.scheduler, lasts, epochs, "epochs", "warning", "Size it for them."))
            continue
        lengths = _lengths(trainer, growing, loaders, batches)
        severity: Severity = "error"
        for length in lengths:
            if length.anew is not None:
                lasts = _horizon_of(trainer, module, position, length.anew, lasts)
            if lasts < length.steps // every:
                sure = "" if severity == "error" else " if all examples turn out slow"
                remedy = "Size it by trainer.estimated_stepping_batches"
                if growing is not None:
                    remedy = "Size it for the longer epochs, or set length='keep'"
                steps = length.steps // every
                findings.append(_too_short(config.scheduler, lasts, steps, f"steps{sure}", severity, f"{remedy}."))
                break
            severity = "warning"
    return findings


def _too_short(scheduler: Any, lasts: float, planned: int, unit: str, severity: Severity, remedy: str) -> Finding:
    last = scheduler._schedulers[-1] if isinstance(scheduler, SequentialLR) else scheduler
    raises = isinstance(last, OneCycleLR)
    ends = "Then it raises an error." if raises else "Then it turns round, and the learning rate rises again."
    what = f"the schedule is over after {lasts:g} {unit.split()[0]}, but the training takes {planned} {unit}."
    return Finding("error" if raises else severity, "schedule-too-short", type(scheduler).__name__, what, ends, remedy)


def _lengths(trainer: Trainer, plan: DataPlan | None, loaders: list[Any], batches: float) -> list[Length]:
    """Of the whole training, at least and at most; nothing where it is not known."""
    epochs, limit = trainer.max_epochs, trainer.max_steps if trainer.max_steps > 0 else math.inf
    if not math.isfinite(batches) or not epochs or epochs < 0:
        return [Length(int(limit), None)] if math.isfinite(limit) else []

    def total(of_epochs: list[int], anew: int | None = None) -> Length:
        steps = sum(math.ceil(n / trainer.accumulate_grad_batches) for n in of_epochs)
        return Length(int(min(steps, limit)), anew)

    loader = loaders[0] if len(loaders) == 1 and isinstance(loaders[0], DataLoader) else None
    if plan is None or loader is None or loader.batch_size is None:
        return [total([int(batches)] * epochs)]
    if not isinstance(plan, SimplicityBiasUpsampler) or plan.path is not None:
        size = len(loader.dataset)  # type: ignore[arg-type]
        shown = [sum(plan._counts_of(epoch)) or size for epoch in range(epochs)]
        return [total([_limited(trainer, _batches(n, loader)) for n in shown])]
    if plan.show == "weights":
        return [total([int(batches)] * epochs)]
    ends = []
    for grown in (len(loader) + 1, len(loader) * plan.factor):  # few are slow, or all are
        longer = _limited(trainer, grown)
        begins = 0 if plan.restart else max(plan.separating.until, 1)
        ends.append(total([int(batches)] * begins + [longer] * (epochs - begins), longer if plan.restart else None))
    return ends


def _batches(examples: int, loader: DataLoader[Any]) -> int:
    size = loader.batch_size or 1
    return examples // size if loader.drop_last else math.ceil(examples / size)


def _limited(trainer: Trainer, batches: int) -> int:
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))


def _horizon_of(trainer: Trainer, module: LightningModule, position: int, batches: int, otherwise: float) -> float:
    """How long the schedule lasts that the module makes for epochs of so many batches."""
    before = trainer.fit_loop.max_batches
    try:
        trainer.fit_loop.max_batches = batches
        return horizon(_init_optimizers_and_lr_schedulers(module)[1][position].scheduler)
    except Exception:  # the trial is over, and a module may miss something of it
        return otherwise
    finally:
        trainer.fit_loop.max_batches = before
