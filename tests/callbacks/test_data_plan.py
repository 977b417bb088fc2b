import os
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from lightning_feat.callbacks import DataPlan, NeuralCollapseMonitor
from lightning_feat.data import IndexedDataset, PlanSampler
from tests.helpers import Plain, equal, points, trainer, weights
from tests.pairs import two_processes

SIZE = 7
COUNTS = {0: None, 1: [2, 0, 1, 1, 1, 3, 1], 2: [2, 0, 1, 1, 1, 3, 1], 3: torch.tensor([1, 1, 1, 1, 0, 0, 0])}


def plan(epoch):
    return COUNTS.get(epoch)


def indexed(batch_size=2, **kwargs):
    return DataLoader(IndexedDataset(points(SIZE)), batch_size=batch_size, shuffle=True, **kwargs)


class Seeing(Plain):
    """Notes the index of each example it trains on, by epoch."""

    def __init__(self, unpack=lambda batch: batch, **kwargs):
        super().__init__(**kwargs)
        self.unpack, self.seen = unpack, {}

    def training_step(self, batch, batch_idx):
        example, index = self.unpack(batch)
        self.seen.setdefault(self.current_epoch, []).extend(index.tolist())
        return super().training_step(example, batch_idx)


def planned(epoch, **kwargs):
    sampler = PlanSampler(plan(epoch) if plan(epoch) is not None else [1] * SIZE, **kwargs)
    sampler.set_epoch(epoch)
    return list(sampler)


def fit(tmp_path, module, *callbacks, loaders=None, ckpt_path=None, **kwargs):
    kwargs = {"max_epochs": 4, **kwargs}
    run = trainer(tmp_path, callbacks=list(callbacks), **kwargs)
    if isinstance(loaders, pl.LightningDataModule):
        run.fit(module, datamodule=loaders, ckpt_path=ckpt_path)
    else:
        run.fit(module, loaders, ckpt_path=ckpt_path)
    return run


class Hook(Seeing):
    def train_dataloader(self):
        return indexed()


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return indexed()


@pytest.mark.parametrize(
    ("module", "loaders", "name"),
    [
        (Seeing, indexed, None),
        (Hook, lambda: None, None),
        (Seeing, Data, None),
        (lambda: Seeing(lambda batch: batch["a"]), lambda: {"a": indexed()}, None),
        (lambda: Seeing(lambda batch: batch[0]), lambda: [indexed()], None),
        (
            lambda: Seeing(lambda batch: batch["a"]),
            lambda: CombinedLoader({"a": indexed(), "b": indexed(batch_size=1)}, "min_size"),
            "a",
        ),
        (Seeing, lambda: indexed(num_workers=1, persistent_workers=True), None),
    ],
    ids=["loader", "module", "datamodule", "dict", "list", "combined", "workers"],
)
def test_every_epoch_shows_its_plan(tmp_path, module, loaders, name):
    module = module()
    run = fit(tmp_path, module, DataPlan(plan, loader=name), loaders=loaders())
    assert module.seen == {epoch: planned(epoch) for epoch in range(4)}
    assert run.global_step == 4 + 5 + 5 + 2  # ceil of 7, 9, 9 and 4 examples by twos


def test_without_a_plan_it_is_a_plain_shuffled_run(tmp_path):
    module = Seeing()
    fit(tmp_path, module, DataPlan(lambda epoch: None), loaders=indexed(), max_epochs=2)
    assert [sorted(seen) for seen in module.seen.values()] == [list(range(SIZE))] * 2
    assert module.seen[0] != module.seen[1]


def test_an_epoch_may_keep_its_length(tmp_path):
    module = Seeing()
    run = fit(tmp_path, module, DataPlan([3, 1, 1, 1, 1, 1, 1], length="keep"), loaders=indexed(), max_epochs=2)
    assert run.global_step == 8
    assert all(len(seen) == SIZE and seen.count(0) in (2, 3) for seen in module.seen.values())


class SaveAt(pl.Callback):
    def __init__(self, path, epoch, batch_idx):
        self.path, self.at = path, (epoch, batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("epoch", "batch_idx"), [(0, 1), (1, 0), (2, 3), (3, 0), (0, 3), (1, 4)])
def test_a_run_cut_off_in_mid_epoch_sees_what_it_had_not_seen(tmp_path, epoch, batch_idx):
    whole, path = Seeing(), str(tmp_path / "cut.ckpt")
    fit(tmp_path, whole, DataPlan(plan), SaveAt(path, epoch, batch_idx), loaders=indexed())
    rest = Seeing()
    fit(tmp_path, rest, DataPlan(plan), loaders=indexed(), ckpt_path=path)
    assert rest.seen.get(epoch, []) == planned(epoch)[2 * (batch_idx + 1) :]
    assert {e: seen for e, seen in rest.seen.items() if e > epoch} == {e: planned(e) for e in range(epoch + 1, 4)}
    assert equal(weights(rest), weights(whole))


class Warm(Seeing):
    """Its scheduler asks for the length of the run before the checkpoint is restored."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=max(1, int(steps)))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


@pytest.mark.parametrize("module", [Seeing, Warm])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_run_cut_off_between_epochs_goes_on_with_the_next(tmp_path, module, epoch):
    whole = module()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, whole, DataPlan(plan), saver, loaders=indexed(), enable_checkpointing=True)
    rest = module()
    fit(tmp_path, rest, DataPlan(plan), loaders=indexed(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert rest.seen == {e: planned(e) for e in range(epoch + 1, 4)}


def test_a_schedule_that_counts_batches_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="a learning rate scheduler counts them: size it for the whole plan"):
        fit(tmp_path, Warm(), DataPlan(plan), loaders=indexed())


def test_monitors_that_read_the_training_data_still_find_them(tmp_path):
    monitor = NeuralCollapseMonitor(
        mode="exact", target_key=lambda batch: batch[0][1], forward=lambda module, batch: module(batch[0][0])
    )
    run = fit(tmp_path, Seeing(), DataPlan(plan), monitor, loaders=indexed())
    assert any(name.startswith("neural_collapse/") for name in run.callback_metrics)


def test_nothing_is_left_behind(tmp_path):
    run = trainer(tmp_path, callbacks=[DataPlan(plan)], max_epochs=1)
    run.fit(Seeing(), indexed())
    assert type(run.fit_loop._data_source).__name__ == "_DataLoaderSource"

    class Stumbling(Seeing):
        def on_train_epoch_end(self):
            raise RuntimeError("stumbled")

    run = trainer(tmp_path, callbacks=[DataPlan(plan)])
    with pytest.raises(RuntimeError, match="stumbled"):
        run.fit(Stumbling(), indexed())
    assert type(run.fit_loop._data_source).__name__ == "_DataLoaderSource"


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("options", "loaders", "text"),
    [
        ({"plan": [1, 2]}, indexed, "has 2 counts, but the training data 7 examples"),
        ({"plan": plan}, lambda: DataLoader(Stream()), "a DataLoader over an IterableDataset"),
        ({"plan": plan}, lambda: {"a": indexed(), "b": indexed()}, r"loader=None: say which .* \['a', 'b'\]"),
        ({"plan": plan, "loader": "c"}, lambda: {"a": indexed()}, "loader='c': say which"),
        ({"plan": plan, "loader": "a"}, indexed, "there is one training loader, without a name"),
        (
            {"plan": plan},
            lambda: DataLoader(points(SIZE), sampler=WeightedRandomSampler([1.0] * SIZE, SIZE)),
            "a WeightedRandomSampler of its own, which would be lost",
        ),
        ({"plan": plan}, lambda: DataLoader(points(SIZE), batch_size=None), "in the place of a batch size"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path, options, loaders, text):
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, Plain(), DataPlan(**options), loaders=loaders())


def test_the_same_plan_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"DataPlan\[train\] twice"):
        fit(tmp_path, Plain(), DataPlan(plan), DataPlan(plan), loaders=indexed())


def worker(process, port, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ.update(where, LOCAL_RANK=str(process))
    module = Seeing()
    strategy = DDPStrategy(process_group_backend="gloo")
    fit(folder, module, DataPlan(plan), loaders=indexed(), strategy=strategy, devices=2)
    torch.save(module.seen, f"{folder}/{process}.pt")


def test_two_processes_share_one_order(tmp_path):
    two_processes(worker, str(tmp_path))
    for process in range(2):
        seen = torch.load(tmp_path / f"{process}.pt")
        assert seen == {epoch: planned(epoch, num_replicas=2, rank=process) for epoch in range(4)}
