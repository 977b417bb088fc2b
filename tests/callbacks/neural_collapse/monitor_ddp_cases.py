"""What two gloo processes do, for ``test_monitor_ddp.py``."""

import csv
import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_feat.callbacks import CollapseThreshold, NeuralCollapseMonitor
from lightning_feat.data import IndexedDataset
from tests.helpers import Plain, points, trainer
from tests.joints import ddp_cases

SAMPLES = 43  # odd: the sampler repeats one


class Indexed(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0], batch_idx)


def monitor(mode, **kwargs):
    return NeuralCollapseMonitor(
        mode=mode,
        measures=["*"],
        target_key=lambda batch: batch[0][1],
        forward=lambda module, batch: module(batch[0][0]),
        **kwargs,
    )


def fit(world, callback, folder, **kwargs):
    pl.seed_everything(0)
    two = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}
    run = trainer(Path(folder), callbacks=[callback], **{"max_epochs": 2, **(two if world == 2 else {}), **kwargs})
    run.fit(Indexed(lr=0.0), DataLoader(IndexedDataset(points(SAMPLES)), batch_size=8, shuffle=True))
    return run


def indexed(world, mode):
    with tempfile.TemporaryDirectory() as folder:
        run = fit(world, monitor(mode), folder)
    return {name: float(value) for name, value in run.callback_metrics.items() if "collapse" in name}


def indexed_online(world):
    return indexed(world, "online")


def indexed_exact(world):
    return indexed(world, "exact")


def written(world, mode):
    """Rows of the table and names of the figures, of one folder for all processes."""
    root = Path(sys.argv[1]).parent if world == 2 else Path(tempfile.mkdtemp())
    folder = root / f"written-{mode}-{world}"
    callback = monitor(mode, figures=True, table=True)
    run = fit(world, callback, folder)
    run.strategy.barrier()
    with (folder / "neural_collapse.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    return {"rows": rows, "figures": sorted(path.name for path in folder.glob("*.png"))}


def written_online(world):
    return written(world, "online")


def written_exact(world):
    return written(world, "exact")


def stopped(world):
    stop = CollapseThreshold("nc1_quotient", 1e9, action="stop", from_epoch=2)
    with tempfile.TemporaryDirectory() as folder:
        return fit(world, monitor("online", thresholds=[stop]), folder, max_epochs=5).current_epoch


if __name__ == "__main__":
    ddp_cases.CASES[:] = [indexed_online, indexed_exact, written_online, written_exact, stopped]
    ddp_cases.main(Path(sys.argv[1]))
