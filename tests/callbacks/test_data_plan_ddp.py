import os
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Subset

from lightning_feat.callbacks import DataPlan
from lightning_feat.data import IndexedDataset
from lightning_feat.joints.data.passes import clean_loader
from lightning_feat.joints.data.processes import repeated_rows
from tests.callbacks.plans import SIZE, SaveAt, Seeing, fit, indexed, plan, planned
from tests.helpers import points
from tests.pairs import two_processes


def start(process, port):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ.update(where, LOCAL_RANK=str(process))
    return {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}


def seen_by_two(worker, tmp_path):
    two_processes(worker, str(tmp_path))
    return [torch.load(tmp_path / f"{process}.pt") for process in range(2)]


class Counting(pl.Callback):
    """Counts the samples of each epoch that are not there to fill up shares, as an online monitor does."""

    def __init__(self):
        self.counted = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.counted.append(0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        repeated = repeated_rows(trainer, batch_idx, len(batch[1]), pl_module.device)
        self.counted[-1] += int((~repeated).sum())


def size_of_pass(trainer, pl_module):
    """Examples that an exact monitor would look at in this process."""
    return len(clean_loader(trainer, trainer.train_dataloader, "training").dataset)


def worker(process, port, folder):
    ddp, found = start(process, port), {}
    module, counting = Seeing(), Counting()
    fit(folder, module, DataPlan(plan), SaveAt(f"{folder}/two.ckpt", 1, 1), counting, loaders=indexed(), **ddp)
    found |= {"shared": module.seen, "counted": counting.counted}
    ddp["strategy"] = DDPStrategy(process_group_backend="gloo")
    own, sizes = Seeing(), []
    own.on_train_epoch_end = lambda: sizes.append(size_of_pass(own.trainer, own))
    files = [range(4), range(4, 7)][process]  # of its own; three batches each, as DDP wants them
    loaders = DataLoader(Subset(IndexedDataset(points(SIZE)), files), batch_size=1 + (process == 0), shuffle=True)
    each = DataPlan([[1, 2, 0, 3], [1, 2, 0]][process])
    fit(folder, own, each, loaders=loaders, max_epochs=1, use_distributed_sampler=False, **ddp)
    torch.save({**found, "own": own.seen, "own pass": sizes}, f"{folder}/{process}.pt")


def test_two_processes(tmp_path):
    first, second = seen_by_two(worker, tmp_path)
    for process, seen in enumerate((first["shared"], second["shared"])):  # one order
        assert seen == {epoch: planned(epoch, num_replicas=2, rank=process) for epoch in range(4)}
    # What fills up the shares of two counts once.
    assert [sum(epoch) for epoch in zip(first["counted"], second["counted"], strict=True)] == [7, 9, 9, 4]
    # where each has data of its own, all of what was planned for these
    assert [sorted(found["own"][0]) for found in (first, second)] == [[0, 1, 1, 3, 3, 3], [4, 5, 5]]
    assert [found["own pass"] for found in (first, second)] == [[4], [3]]

    # One process goes on with what the two had not seen, and each epoch has the length of one process again.
    fit(tmp_path, rest := Seeing(), DataPlan(plan), loaders=indexed(), ckpt_path=tmp_path / "two.ckpt")
    assert rest.seen == {1: planned(1)[8:], 2: planned(2), 3: planned(3)}


def fewer(process, port, folder):
    module = Seeing()
    path = f"{folder}/one.ckpt"
    fit(folder, module, DataPlan(plan), loaders=indexed(), ckpt_path=path, **start(process, port))
    torch.save(module.seen, f"{folder}/{process}.pt")


@pytest.mark.slow
def test_more_processes_go_on_with_what_was_not_seen(tmp_path):
    fit(tmp_path, Seeing(), DataPlan(plan), SaveAt(str(tmp_path / "one.ckpt"), 1, 1), loaders=indexed())
    first, second = seen_by_two(fewer, tmp_path)
    left = planned(1)[4:]  # five: one of them to fill up
    assert (first[1], second[1]) == (left[0::2], [left[1], left[3], planned(1)[0]])
    for process, seen in enumerate((first, second)):
        assert {e: seen[e] for e in (2, 3)} == {e: planned(e, num_replicas=2, rank=process) for e in (2, 3)}
