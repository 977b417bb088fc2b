from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_feat.callbacks.grassmann.head import GrassmannHead
from lightning_feat.callbacks.grassmann.monitor import GrassmannMonitor
from lightning_feat.callbacks.neural_collapse.simplex import DotRegressionRegularizer, SimplexETFHead
from lightning_feat.doctor.blame import blame, name_of, warning_findings
from lightning_feat.doctor.checks.before import averaging_before_heads, compiled_before_hooks, search_when_resumed
from lightning_feat.doctor.checks.trained import check_trial
from lightning_feat.doctor.checks.two_passes import find_two_passes
from lightning_feat.doctor.cost import measure_costs
from lightning_feat.doctor.finding import Finding, in_order
from lightning_feat.doctor.trial import LEFT_OUT, LedBack, Run, make_trial, without_a_trace
from lightning_feat.doctor.watch import Watch

NEEDS: dict[type[Callback], type[Callback]] = {
    GrassmannMonitor: GrassmannHead,
    DotRegressionRegularizer: SimplexETFHead,
}


def doctor(
    trainer: Trainer,
    module: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    batches: int = 3,
    cost: bool = True,
    seconds: float = 60.0,
) -> list[Finding]:
    """What is wrong with a run, or will be: train a copy of it for a few real batches, end its epoch, and look.

    The arguments are those of ``trainer.fit``; a datamodule may also stand in the place of the training loader. Module,
    trainer, callbacks, loaders and random numbers stay as they are, loggers get nothing and no checkpoint is written.
    ``prepare_data`` is not called, since it may download. The copy takes one device of the accelerator of the trainer,
    as one process, and what is compiled runs uncompiled. Callbacks that are not of this library run in the copy, with
    ``trainer.fast_dev_run`` set; what they write to a place of their own they do write.

    Args:
        trainer: as it would fit.
        module: what it would fit.
        train_dataloaders: see ``trainer.fit``, and there the next two.
        val_dataloaders: see there.
        datamodule: see there.
        batches: how many to train on; more where gradients are accumulated, so that there is a step.
        cost: also say, as notes, which layer is taken for the classifier, and what each callback of this library costs.
        seconds: that the measurement may take, about.

    Returns:
        Errors, warnings and notes, in this order. A healthy run has only notes, and without ``cost`` none at all.

    Cost: two or three times the memory of the module, the time of the batches, and ``seconds``.
    """
    if batches < 2:
        raise ValueError(f"batches={batches} must be at least 2: some faults show after the first step.")
    run = Run(trainer, module, train_dataloaders, val_dataloaders, datamodule)
    findings, order = averaging_before_heads(run)
    findings += compiled_before_hooks(run) + search_when_resumed(run) + find_two_passes(run, notes=cost)
    order = [i for i in order if not isinstance(run.callbacks[i], LEFT_OUT)]
    findings += _rehearse(run, order, max(batches, trainer.accumulate_grad_batches + 1), cost)
    if cost and not any(finding.severity == "error" for finding in findings):
        findings += measure_costs(run, order, seconds, NEEDS)
    return in_order(findings)


def _rehearse(run: Run, order: list[int], batches: int, notes: bool) -> list[Finding]:
    """Try the run, again and again without the callbacks that fail."""
    findings: list[Finding] = []
    order = list(order)
    while True:
        trial, raised, position = None, None, None
        with without_a_trace(run) as (folder, seen):
            watch = Watch(batches, seen)
            try:
                trial = make_trial(run, folder, batches, order, [], [watch])
                watch.callbacks = trial.callbacks
                trial.fit()
            except Exception as error:  # what the run raises is what was looked for
                raised = error
            if trial is None or isinstance(raised, LedBack):
                return [*findings, _not_copied(run, raised)]
            if raised is not None:
                position, finding = blame(raised, trial.callbacks, trial.module, watch)
                if position is None and run.datamodule is not None and is_overridden("prepare_data", run.datamodule):
                    missing = "The doctor does not call prepare_data, which may download: call it, if data are missing."
                    finding = replace(finding, remedy=f"{finding.remedy} {missing}")
                findings.append(finding)
                raised.__traceback__ = None  # it holds the whole trial
            if position is None:
                if notes and watch.classifier is not None:
                    findings.append(watch.classifier.note())
                return [*findings, *warning_findings(watch.warned), *check_trial(run, trial, watch)]
        order = _without(run, order, position, findings)


def _without(run: Run, order: list[int], position: int, findings: list[Finding]) -> list[int]:
    """The order without a callback that failed, and without those that would fail for the want of it."""
    failed = run.callbacks[position]
    rest = []
    for i in order:
        needs = next((head for kind, head in NEEDS.items() if isinstance(run.callbacks[i], kind)), None)
        if i != position and needs is not None and isinstance(failed, needs):
            what = f"it was not looked at, since {name_of(failed)} failed."
            findings.append(Finding("note", "not-looked-at", name_of(run.callbacks[i]), what))
        elif i != position:
            rest.append(i)
    return rest


def _not_copied(run: Run, error: BaseException | None) -> Finding:
    return Finding(
        "warning",
        "not-tried",
        type(run.module).__name__,
        f"a copy of the run could not be made and tried: {type(error).__name__}: {' '.join(str(error).split())}",
        "The doctor works on a copy, and could only look at what needs no batch.",
        "Keep open files, locks and tensors with a graph out of the attributes of module, callbacks and datamodule.",
    )
