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
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_feat.callbacks import FeatureRegularizer, GrassmannHead, NeuralCollapseMonitor
from lightning_feat.functional.grassmann import orthonormality_error
from lightning_feat.joints.loss.terms import WeightSchedule
from lightning_feat.layers import GrassmannLinear
from tests.helpers import Plain, points, trainer

FSDP2_ON_CPU = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (
    2,
    8,
)  # 2.6 fails inside torch, 2.15 works; between them it was not tried below this
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


class Sharded(Built):
    """Shards itself as users of FSDP2 do."""

    def configure_model(self):
        if not isinstance(self.net.body[0].weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.fc, mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class ShardedPlain(Sharded):
    """With a classifier that is to be replaced."""

    def __init__(self):
        super().__init__()
        self.net.fc = nn.Linear(8, 3)


class PlainBuilt(Built):
    """The same, not sharded."""

    def __init__(self):
        super().__init__()
        self.net.fc = nn.Linear(8, 3)


class WithTerm(Momentum):
    """The term of ``FeatureRegularizer(Center(), ..., weight=0.3)`` written by hand."""

    def __init__(self):
        super().__init__()
        self.term = Center()

    def training_step(self, batch, batch_idx):
        features = self.net.body(batch[0])
        return cross_entropy(self.net.fc(features), batch[1]) + 0.3 * self.term(features)


def data(world: int) -> DataLoader:
    """Batches of the pair that, taken together, are the batches of one process."""
    points_ = points(SAMPLES)
    if world == 1:
        return DataLoader(points_, batch_size=16)
    rank = int(os.environ["LOCAL_RANK"])
    return DataLoader(points_, batch_size=8, sampler=DistributedSampler(points_, world, rank, shuffle=False))


def fit(module, callbacks, world, shuffle=False, ckpt_path=None, **kwargs):
    pl.seed_everything(0)
    module = module()
    two = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, "use_distributed_sampler": shuffle}
    with tempfile.TemporaryDirectory() as root:
        run = trainer(Path(root), callbacks=callbacks, **{"max_epochs": 2, **(two if world == 2 else {}), **kwargs})
        loader = DataLoader(points(43), batch_size=8, shuffle=True) if shuffle else data(world)
        run.fit(module, loader, ckpt_path=ckpt_path)
    return run, module


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()]).double().tolist()


def by_hand(world):
    _, module = fit(WithTerm, [], world)
    return flat(module)


def term(world):
    center = Center()
    _, module = fit(Momentum, [FeatureRegularizer(center, "center", weight=0.3)], world)
    return flat(module) + center.center.tolist()


def term_now_and_then(world):
    center = OneClass()
    weight = WeightSchedule(0.3, every_n_batches=2)
    _, module = fit(Momentum, [FeatureRegularizer(center, "center", weight=weight)], world)
    return flat(module) + center.center.tolist()


def grassmann(world):
    _, module = fit(Momentum, [GrassmannHead(2)], world)
    return [float(orthonormality_error(module.net.fc.basis.detach()).max()), *flat(module)]


def grassmann_built(world):
    _, module = fit(Built, [GrassmannHead()], world)
    return [float(orthonormality_error(module.net.fc.basis.detach()).max()), *flat(module)]


def sharded(module, callback, save=None, **kwargs):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    run, module = fit(module, [callback], 2, strategy=strategy, **kwargs)
    if save is not None:
        run.save_checkpoint(save)
    parameters = [p.detach() for p in module.parameters()]
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    return [float(orthonormality_error(full[-1]).max()), *torch.cat([p.flatten() for p in full]).double().tolist()]


def fsdp2(world):
    return sharded(Sharded, GrassmannHead())


def fsdp2_swap(world):
    return sharded(ShardedPlain, GrassmannHead(2, layer="net.fc"))


def fsdp2_resume(world):
    path = Path(sys.argv[1]).parent / "sharded.ckpt"
    sharded(Sharded, GrassmannHead(), save=path, max_epochs=1)
    return sharded(Sharded, GrassmannHead(), ckpt_path=path)


def own(world, module=PlainBuilt, also=None, **kwargs):
    """A term with a parameter, clipped with the rest, and a batch in which no process uses it."""
    if module is ShardedPlain:
        kwargs["strategy"] = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
        )
    center = OneClass()
    callback = FeatureRegularizer(center, "center", weight=WeightSchedule(0.3, every_n_batches=2))
    callbacks = [callback] if also is None else [callback, also]
    _, module = fit(module, callbacks, world, gradient_clip_val=0.5, **kwargs)
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([p.detach().flatten() for p in [*whole, center.center]]).double().tolist()


def fsdp2_own(world):
    return own(world, ShardedPlain)


class Save(pl.Callback):
    """After the first epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def fsdp2_own_resume(world):
    path = Path(sys.argv[1]).parent / "own.ckpt"
    own(world, ShardedPlain, also=Save(path))
    return own(world, ShardedPlain, ckpt_path=path)


def grassmann_adaptive(world):
    _, module = fit(BuiltAdaptive, [GrassmannHead(2)], world)
    return [float(orthonormality_error(module.net.fc.basis.detach()).max()), *flat(module)]


class Dealt(Built):
    """Its optimizer keeps a share of the parameters on each process."""

    def configure_optimizers(self):
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)


def dealt(world, kind=Dealt, **kwargs):
    center = Center()
    head, own = GrassmannHead(2), FeatureRegularizer(center, "center", weight=0.3)
    run, module = fit(kind, [head, own], world, **kwargs)
    return run, flat(module) + center.center.tolist()


def not_dealt(world):
    return dealt(world, Built)[1]


def dealt_out(world):
    return dealt(world)[1]


def dealt_out_resumed(world):
    path = Path(sys.argv[1]).parent / "dealt.ckpt"
    run, _ = dealt(world, max_epochs=1)
    run.save_checkpoint(path)
    return dealt(world, ckpt_path=path)[1]


def collapse_over_budget_of_one(world):
    """The budget is exceeded where a process has one sample more; under FSDP2 all must run again then."""
    runs = []
    monitor = NeuralCollapseMonitor(mode="exact", memory_budget_mb=21.5 * 11 * 4 / 2**20)

    class Counts(Plain):
        def forward(self, x):
            runs.append(len(x))
            return super().forward(x)

    fit(lambda: Counts(lr=0.0), [monitor], world, shuffle=True, max_epochs=1)
    return len(runs)


def collapse(world, mode):
    monitor = NeuralCollapseMonitor(mode=mode, measures=["*"])
    module = lambda: Plain(lr=0.0)  # noqa: E731  # the same weights on both sides
    run, _ = fit(module, [monitor], world, shuffle=True)
    return {name: float(value) for name, value in run.callback_metrics.items() if "collapse" in name}


def collapse_online(world):
    return collapse(world, "online")


def collapse_exact(world):
    return collapse(world, "exact")


CASES = [
    by_hand,
    term,
    term_now_and_then,
    grassmann,
    grassmann_built,
    grassmann_adaptive,
    collapse_online,
    collapse_exact,
    collapse_over_budget_of_one,
    not_dealt,
    dealt_out,
    dealt_out_resumed,
    own,
    *([fsdp2, fsdp2_swap, fsdp2_resume, fsdp2_own, fsdp2_own_resume] if FSDP2_ON_CPU else []),
]


def main(out: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {}
    for case in CASES:
        try:
            results[case.__name__] = case(2)
        except BaseException:
            results[case.__name__] = traceback.format_exc()
            break  # the other process may be anywhere
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
