"""What two gloo processes do, for ``test_ddp.py``: one pair runs all cases, as starting it costs more than they do."""

import json
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from helpers import Plain, points, trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_feat.callbacks import FeatureRegularizer, GrassmannHead, NeuralCollapseMonitor
from lightning_feat.functional.grassmann import orthonormality_error
from lightning_feat.layers import GrassmannLinear
from lightning_feat.loss_terms import WeightSchedule

SAMPLES = 44  # 22 for each process, in batches of 8, 8, 6


class Center(nn.Module):
    def __init__(self):
        super().__init__()
        self.center = nn.Parameter(torch.zeros(8))

    def forward(self, features):
        return (features - self.center).square().sum(1).mean()


class OneClass(Center):
    """Zero for a process without a sample of class 2: then its parameter is not used there."""

    def forward(self, features, targets):
        if not (targets == 2).any():
            return 0.0 * features.sum()
        return super().forward(features[targets == 2])


class Momentum(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Built(Momentum):
    """Has its head from the start: Lightning seeds anew for DDP, so one that is put in later is drawn otherwise."""

    def __init__(self):
        super().__init__()
        self.net.fc = GrassmannLinear(8, 3, 2)


class BuiltAdaptive(Built):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class WithTerm(Momentum):
    """The term of ``FeatureRegularizer(Center(), ..., weight=0.3)`` written by hand."""

    def __init__(self):
        super().__init__()
        self.term = Center()

    def training_step(self, batch, batch_idx):
        features = self.net.body(batch[0])
        return cross_entropy(self.net.fc(features), batch[1]) + 0.3 * self.term(features)


def data(world: int, rank: int) -> DataLoader:
    """Batches of the pair that, taken together, are the batches of one process."""
    points_ = points(SAMPLES)
    if world == 1:
        return DataLoader(points_, batch_size=16)
    return DataLoader(points_, batch_size=8, sampler=DistributedSampler(points_, world, rank, shuffle=False))


def fit(module, callbacks, world, rank, shuffle=False, **kwargs):
    pl.seed_everything(0)
    module = module()
    two = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, "use_distributed_sampler": shuffle}
    with tempfile.TemporaryDirectory() as root:
        run = trainer(Path(root), callbacks=callbacks, **{"max_epochs": 2, **(two if world == 2 else {}), **kwargs})
        loader = DataLoader(points(43), batch_size=8, shuffle=True) if shuffle else data(world, rank)
        run.fit(module, loader)
    return run, module


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()]).double().tolist()


def by_hand(world, rank):
    _, module = fit(WithTerm, [], world, rank)
    return flat(module)


def term(world, rank):
    center = Center()
    _, module = fit(Momentum, [FeatureRegularizer(center, "center", weight=0.3)], world, rank)
    return flat(module) + center.center.tolist()


def term_now_and_then(world, rank):
    center = OneClass()
    weight = WeightSchedule(0.3, every_n_batches=2)
    _, module = fit(Momentum, [FeatureRegularizer(center, "center", weight=weight)], world, rank)
    return flat(module) + center.center.tolist()


def grassmann(world, rank):
    _, module = fit(Momentum, [GrassmannHead(2)], world, rank)
    return [float(orthonormality_error(module.net.fc.basis.detach()).max()), *flat(module)]


def grassmann_built(world, rank):
    _, module = fit(Built, [GrassmannHead()], world, rank)
    return [float(orthonormality_error(module.net.fc.basis.detach()).max()), *flat(module)]


def grassmann_adaptive(world, rank):
    _, module = fit(BuiltAdaptive, [GrassmannHead(2)], world, rank)
    return [float(orthonormality_error(module.net.fc.basis.detach()).max()), *flat(module)]


def collapse(world, rank, mode):
    monitor = NeuralCollapseMonitor(mode=mode, measures=["*"])
    module = lambda: Plain(lr=0.0)  # noqa: E731  # the same weights on both sides
    run, _ = fit(module, [monitor], world, rank, shuffle=True)
    return {name: float(value) for name, value in run.callback_metrics.items() if "collapse" in name}


def collapse_online(world, rank):
    return collapse(world, rank, "online")


def collapse_exact(world, rank):
    return collapse(world, rank, "exact")


CASES = [
    by_hand,
    term,
    term_now_and_then,
    grassmann,
    grassmann_built,
    grassmann_adaptive,
    collapse_online,
    collapse_exact,
]


def main(world: int, rank: int, out: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {}
    for case in CASES:
        try:
            results[case.__name__] = case(world, rank)
        except BaseException:
            results[case.__name__] = traceback.format_exc()
            break  # the other process may be anywhere
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(2, int(os.environ["LOCAL_RANK"]), Path(sys.argv[1]))
