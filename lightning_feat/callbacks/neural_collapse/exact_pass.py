from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.joints.data.pass_progress import PassProgress, pass_progress
from lightning_feat.joints.data.passes import Forward, clean_batches, clean_loader, run_forward, without_trace
from lightning_feat.joints.features.labelled_taps import Heard, LabelledTaps
from lightning_feat.metrics.neural_collapse import NeuralCollapse


def exact_pass(
    trainer: Trainer,
    module: LightningModule,
    loader: Any,
    name: str,
    taps: LabelledTaps,
    new_metric: Callable[[Tensor], NeuralCollapse],
    forward: Forward | None,
    memory_budget_mb: float,
) -> dict[str, NeuralCollapse]:
    """The exact mode of ``NeuralCollapseMonitor``: one pass for the sums, and what needs the class means from kept
    features or, where these exceed the budget, from a second pass.

    Args:
        trainer: knows the processes, the precision and the progress bar.
        module: the network.
        loader: of the data; each sample is taken once over all processes.
        name: of the data, in messages: "training" or "validation".
        taps: attached to the module.
        new_metric: makes the metric for features like those it is given.
        forward: see ``NeuralCollapseMonitor``.
        memory_budget_mb: see there.

    Returns:
        A metric for each layer, by its label, on all processes alike.
    """
    clean = clean_loader(trainer, loader, name)
    metrics: dict[str, NeuralCollapse] = {}
    kept: list[Heard] | None = []
    free = memory_budget_mb * 2**20
    with without_trace(trainer, module), pass_progress(trainer) as progress:
        progress.start(f"Neural collapse, {name} data", len(clean))
        with isolate_rng():  # a second pass meets the same random numbers, and so the same augmentations
            for heard in _heard(trainer, module, clean, taps, forward, progress):
                for label, (features, targets) in heard.labelled.items():
                    if label not in metrics:
                        metrics[label] = new_metric(features)
                    metrics[label].update(features, targets)
                    free -= features.nbytes
                free -= 0 if heard.logits is None else heard.logits.nbytes
                if kept is not None and free >= 0:
                    kept.append(heard)
                elif kept is not None:
                    kept = None
                    rank_zero_info(
                        f"neural collapse: the features of the {name} data exceed "
                        f"memory_budget_mb={memory_budget_mb:g}, so the network runs over them twice."
                    )
        _complete(trainer, module, taps, metrics, new_metric)
        for metric in metrics.values():
            metric.start_second_pass()
        if kept is None:
            progress.start(f"Neural collapse, {name} data again", len(clean))
        for heard in kept if kept is not None else _heard(trainer, module, clean, taps, forward, progress):
            for label, (features, targets) in heard.labelled.items():
                metrics[label].update_second_pass(features, targets, heard.logits if taps.feeds[label] else None)
    return metrics


def _heard(
    trainer: Trainer,
    module: LightningModule,
    loader: DataLoader[Any],
    taps: LabelledTaps,
    forward: Forward | None,
    progress: PassProgress,
) -> Iterator[Heard]:
    """Run the network over the data."""
    for batch in clean_batches(trainer, module, loader):
        taps.listen()
        run_forward(trainer, module, batch, forward)
        yield taps.take(batch)
        progress.step()


def _complete(
    trainer: Trainer,
    module: LightningModule,
    taps: LabelledTaps,
    metrics: dict[str, NeuralCollapse],
    new_metric: Callable[[Tensor], NeuralCollapse],
) -> None:
    """Let a process without a sample take part in the sums: all must know the width of the features."""
    for label in taps.labels:
        width = metrics[label].num_features if label in metrics else 0
        widest = int(trainer.strategy.reduce(torch.tensor(width, device=module.device), reduce_op="max"))
        if width == 0:
            metrics[label] = new_metric(torch.zeros(0, widest, device=module.device))
        feeds = torch.tensor(taps.feeds.get(label, False), dtype=torch.int, device=module.device)
        taps.feeds[label] = bool(trainer.strategy.reduce(feeds, reduce_op="max"))
