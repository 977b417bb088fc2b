"""What can be told from a trial that ran."""

from collections.abc import Callable

import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from lightning_feat.callbacks.data_plan import DataPlan
from lightning_feat.callbacks.grassmann.monitor import GrassmannMonitor
from lightning_feat.callbacks.neural_collapse.monitor import NeuralCollapseMonitor
from lightning_feat.callbacks.simplicity_bias.upsampler import SimplicityBiasUpsampler
from lightning_feat.doctor.blame import name_of
from lightning_feat.doctor.checks.awaited import find_awaited
from lightning_feat.doctor.checks.gradients import find_silent_terms
from lightning_feat.doctor.checks.labels import differ, num_mixed
from lightning_feat.doctor.checks.noise import find_noise
from lightning_feat.doctor.checks.schedules import check_schedules
from lightning_feat.doctor.checks.terms import terms_in
from lightning_feat.doctor.finding import Finding
from lightning_feat.doctor.trial import Run, Trial
from lightning_feat.doctor.watch import Watch
from lightning_feat.joints.features.batches import TargetKey, targets_of
from lightning_feat.joints.features.heads import find_classifier


def check_trial(run: Run, trial: Trial, watch: Watch) -> list[Finding]:
    """All findings of a trial that has run, wholly or in part."""
    checks: list[Callable[[Run, Trial, Watch], list[Finding]]] = [
        _sharding,
        _optimizers,
        _subspaces,
        find_silent_terms,
        _losses,
        _labels,
        _samplers,
        _schedules,
        find_awaited,
        find_noise,
    ]
    return [finding for check in checks for finding in check(run, trial, watch)]


def _subspaces(run: Run, trial: Trial, watch: Watch) -> list[Finding]:
    return [
        Finding(
            "error",
            "subspaces-without-follower",
            name,
            f"the optimizer moves the class subspaces of {name} off their manifold.",
            "Neither their logits nor their angles mean what they say.",
            "Add the GrassmannHead callback, or call lightning_feat.optim.follow_subspaces(optimizer, self) in "
            "configure_optimizers.",
        )
        for name in watch.unfollowed
    ]


def _optimizers(run: Run, trial: Trial, watch: Watch) -> list[Finding]:
    held = {id(p) for optimizer in watch.optimizers for group in optimizer.param_groups for p in group["params"]}
    if not watch.optimizers:
        return []
    if any(id(p) in held for p in run.module.parameters()):
        return [
            Finding(
                "warning",
                "not-tried",
                type(run.module).__name__,
                "the optimizer of the copy holds the parameters of the module itself, so what it trains was not looked "
                "at.",
                "configure_optimizers gives an optimizer that was made before, and is kept where no copy reaches.",
                "Make the optimizer in configure_optimizers, or keep it as an attribute of the module.",
            )
        ]
    missing = [name for name, p in watch.trained.items() if p.requires_grad and id(p) not in held]
    try:
        head_name, head = find_classifier(trial.module)
    except ValueError:
        head_name, head = "", torch.nn.Identity()
    of_head = {id(p) for p in head.parameters()}
    findings = []
    if any(id(watch.trained[name]) in of_head for name in missing):
        findings.append(
            Finding(
                "error",
                "head-not-in-optimizer",
                head_name,
                f"the classifier, a {type(head).__name__}, gets gradients but stands in no optimizer.",
                "It stays as it was drawn, and nothing says so: it was replaced after the optimizer was made, or left "
                "out.",
                "Replace it in configure_model or before, and give its parameters to configure_optimizers.",
            )
        )
    others = [name for name in missing if id(watch.trained[name]) not in of_head]
    if others:
        shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        findings.append(
            Finding(
                "warning",
                "not-in-optimizer",
                shown,
                "these parameters get gradients but stand in no optimizer.",
                "They stay as they are.",
                "Give them to configure_optimizers, or freeze them by requires_grad_(False).",
            )
        )
    return findings


def _sharding(run: Run, trial: Trial, watch: Watch) -> list[Finding]:
    whole = watch.whole
    if not whole:
        return []
    return [
        Finding(
            "error",
            "head-unsharded",
            ", ".join(whole[:4]) + (f" and {len(whole) - 4} more" if len(whole) > 4 else ""),
            "under FSDP2 the rest of the module is sharded, but not these parameters.",
            "Nothing synchronises their gradients: the processes drift apart, and nothing says so.",
            "Put what is new in before configure_model shards the module, or call fully_shard on it too.",
        )
    ]


def _losses(run: Run, trial: Trial, watch: Watch) -> list[Finding]:
    bad = [i for i, loss in enumerate(watch.losses) if not -float("inf") < loss < float("inf")]
    if not bad or any(h.nonfinite for h in watch.terms):
        return []
    return [
        Finding(
            "error",
            "nonfinite-loss",
            type(run.module).__name__,
            f"the loss of batch {bad[0]} is NaN or inf.",
            "One such batch makes all weights NaN.",
            "Look at the learning rate, the precision and the inputs.",
        )
    ]


def reads_labels(callback: Callback) -> tuple[bool, TargetKey]:
    """Whether this callback of ours pairs features of a training step with the targets of the batch, and where it takes
    them from.
    """
    if isinstance(callback, NeuralCollapseMonitor):
        return callback.mode == "online", callback.taps.target_key
    if isinstance(callback, GrassmannMonitor):
        return callback.mode == "online", callback.target_key
    if isinstance(callback, SimplicityBiasUpsampler):
        return callback.separating_epoch == "knee" or callback.show == "weights", callback.target_key
    for term in terms_in(callback):
        if hasattr(term, "target_key") and getattr(term, "takes_targets", True):
            return True, term.target_key
    return False, None


def _labels(run: Run, trial: Trial, watch: Watch) -> list[Finding]:
    findings = []
    for position, callback in trial.callbacks.items():
        reads, key = reads_labels(callback)
        mixed, seen, other = 0, 0, False
        for batch, ear in watch.steps if reads else ():
            try:
                targets = targets_of(batch, key)
            except ValueError:
                break  # the callback says so itself
            if targets.ndim == 1 and not targets.is_floating_point():
                mixed, seen = mixed + num_mixed(targets, ear), seen + len(targets)
                other = other or differ(targets, ear)
        where = name_of(run.callbacks[position])
        if mixed:
            findings.append(
                Finding(
                    "error",
                    "mixed-labels",
                    where,
                    f"it pairs features with the labels of the batch, but training_step mixes samples: {mixed} of "
                    f"{seen} were mixed with another.",
                    "Features of mixes are counted for one class of the two, and what comes out means nothing.",
                    "Mix in on_after_batch_transfer, which puts the soft labels into the batch, or measure by "
                    "mode='exact'.",
                )
            )
        elif other:
            findings.append(
                Finding(
                    "warning",
                    "other-labels",
                    where,
                    "the labels that it finds in the batch are not those that the loss is made of.",
                    "It may measure another task than the one that is trained.",
                    "Set target_key to where the labels of the loss are, a function of the batch if need be.",
                )
            )
    return findings


def _samplers(run: Run, trial: Trial, watch: Watch) -> list[Finding]:
    replaces = run.trainer._accelerator_connector.use_distributed_sampler
    if run.num_processes < 2 or not replaces:
        return []
    findings = []
    for loader in watch.loaders:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            continue
        sampler, n = loader.sampler, run.num_processes
        if isinstance(sampler, (DistributedSampler, RandomSampler)):
            continue
        name = type(sampler).__name__
        if isinstance(sampler, SequentialSampler):
            what = f"the loader keeps the order of the data, but Lightning shuffles it for {n} processes."
            why = "An order that is meant (a curriculum, a time series) is lost."
            remedy = "Set shuffle=True if none is meant; else set use_distributed_sampler=False and deal by yourself."
        else:
            what = (
                f"Lightning wraps the {name} for {n} processes: each draws a list, takes every {n}th of it, shuffled."
            )
            why = "Where the random numbers of the processes differ, examples come twice or never."
            remedy = (
                "Use callbacks.DataPlan or data.PlanSampler, which deal one order to all processes, or a sampler of "
                "the class DistributedSampler."
            )
        findings.append(Finding("warning", "sampler-replaced", f"training data, {name}", what, why, remedy))
    return findings


def _schedules(run: Run, trial: Trial, watch: Watch) -> list[Finding]:
    plans = [callback for callback in trial.callbacks.values() if isinstance(callback, DataPlan)]
    if not watch.completed:
        return []
    return check_schedules(trial.trainer, trial.module, watch.schedules, plans, watch.loaders, watch.num_batches)
