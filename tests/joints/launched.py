"""What each process does, however it was launched: a head, loss terms, an exact pass, a plan, the upsampler, a resume.

python -m tests.joints.launched FOLDER NODES   # writes FOLDER/RANK.json
"""

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_feat.callbacks import (
    DataPlan,
    FeatureRegularizer,
    GrassmannHead,
    NeuralCollapseMonitor,
    SimplicityBiasUpsampler,
)
from tests.helpers import Momentum, points, trainer
from tests.joints.ddp_cases import Center

SIZE = 40


def fit(folder, nodes, callbacks, ckpt_path=None, epochs=2):
    pl.seed_everything(0, verbose=False)
    module = Momentum()
    where = {"strategy": DDPStrategy(process_group_backend="gloo"), "num_nodes": nodes} if nodes > 1 else {}
    run = trainer(folder, max_epochs=epochs, callbacks=callbacks, **where)
    run.fit(module, DataLoader(points(SIZE), batch_size=8 // nodes), ckpt_path=ckpt_path)
    return run, module


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()]).double().tolist()


def several():
    """Callbacks that need to know of all processes, each in its own way."""
    counts = 1 + torch.arange(SIZE) % 2  # 60 in all, an even number: nothing is shown twice to even out the processes
    head, plan = GrassmannHead(2), DataPlan(lambda epoch: counts)
    return [
        head,
        plan,
        FeatureRegularizer(Center(), "center", weight=0.1),
        NeuralCollapseMonitor(mode="exact", measures=["*"]),
    ]


def results(folder, nodes):
    run, module = fit(folder, nodes, several())
    measured = {name: float(value) for name, value in run.callback_metrics.items() if "/" in name}
    run.save_checkpoint(folder / "both.ckpt")  # on all processes, one of which writes
    _, resumed = fit(folder, nodes, several(), ckpt_path=folder / "both.ckpt", epochs=4)
    upsampler = SimplicityBiasUpsampler(separating_epoch=1, seed=0)
    _, upsampled = fit(folder, nodes, [upsampler])
    return {
        "rank": run.global_rank,
        "world_size": run.world_size,
        "weights": weights(module),
        "measured": measured,
        "resumed": weights(resumed),
        "upsampled": weights(upsampled),
        "slow": upsampler.selection.slow.tolist(),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    target, nodes = Path(sys.argv[1]), int(sys.argv[2])
    found = results(target, nodes)
    (target / f"{found['rank']}.json").write_text(json.dumps(found))
