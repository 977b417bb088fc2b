"""A run that is cut off anywhere goes on with what it had not seen."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_feat.callbacks import DataPlan
from lightning_feat.data import IndexedDataset, PlanSampler
from tests.callbacks.plans import SIZE, SaveAt, Seeing, Warm, fit, indexed, plan, planned
from tests.helpers import equal, loader, points, trainer, weights


@pytest.mark.parametrize(("epoch", "batch_idx"), [(0, 1), (1, 0), (2, 3), (3, 0), (0, 3), (1, 4)])
def test_a_run_cut_off_in_mid_epoch_sees_what_it_had_not_seen(tmp_path, epoch, batch_idx):
    whole, path = Seeing(), str(tmp_path / "cut.ckpt")
    fit(tmp_path, whole, DataPlan(plan), SaveAt(path, epoch, batch_idx), loaders=indexed())
    rest = Seeing()
    fit(tmp_path, rest, DataPlan(plan), loaders=indexed(), ckpt_path=path)
    assert rest.seen.get(epoch, []) == planned(epoch)[2 * (batch_idx + 1) :]
    assert {e: seen for e, seen in rest.seen.items() if e > epoch} == {e: planned(e) for e in range(epoch + 1, 4)}
    assert equal(weights(rest), weights(whole))


class SaveInValidation(pl.Callback):
    """Saves once, in a hook of the validation that comes after a batch."""

    def __init__(self, path, hook, epoch, batch_idx):
        self.path, self.at = path, (epoch, batch_idx)
        setattr(self, hook, self.save)

    def save(self, trainer, pl_module, *_):
        if (trainer.current_epoch, trainer.fit_loop.batch_idx) == self.at:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("hook", "workers"),
    [("on_validation_start", 0), ("on_validation_batch_end", 0), ("on_validation_end", 0), ("on_validation_end", 1)],
)
@pytest.mark.parametrize(
    ("epoch", "batch_idx", "interval"), [(0, 3, 1.0), (1, 4, 1.0), (2, 4, 1.0), (0, 3, 2), (1, 1, 2)]
)
def test_a_run_cut_off_in_validation_leaves_no_epoch_out(tmp_path, hook, workers, epoch, batch_idx, interval):
    path = str(tmp_path / "cut.ckpt")

    def fit_by(module, *callbacks, **kwargs):
        run = trainer(tmp_path, callbacks=[DataPlan(plan), *callbacks], max_epochs=4, val_check_interval=interval)
        run.fit(module, indexed(num_workers=workers), loader(8), **kwargs)

    fit_by(whole := Seeing(), SaveInValidation(path, hook, epoch, batch_idx))
    fit_by(rest := Seeing(), ckpt_path=path)
    assert rest.seen.get(epoch, []) == planned(epoch)[2 * (batch_idx + 1) :]
    assert {e: seen for e, seen in rest.seen.items() if e > epoch} == {e: planned(e) for e in range(epoch + 1, 4)}
    assert equal(weights(rest), weights(whole))


@pytest.mark.parametrize("module", [Seeing, Warm])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_run_cut_off_between_epochs_goes_on_with_the_next(tmp_path, module, epoch):
    whole = module()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, whole, DataPlan(plan), saver, loaders=indexed(), enable_checkpointing=True)
    rest = module()
    fit(tmp_path, rest, DataPlan(plan), loaders=indexed(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert rest.seen == {e: planned(e) for e in range(epoch + 1, 4)}


@pytest.mark.parametrize("batch_idx", [0, 1, 2])
def test_a_loader_that_begins_again_in_an_epoch_goes_on_where_it_was(tmp_path, batch_idx):
    path, loaders = str(tmp_path / "cut.ckpt"), {"a": indexed(), "b": indexed(batch_size=4)}
    whole, rest = (Seeing(lambda batch: batch["b"]) for _ in range(2))
    fit(tmp_path, whole, DataPlan([1] * SIZE, loader="b"), SaveAt(path, 1, batch_idx), loaders=loaders, max_epochs=3)
    fit(tmp_path, rest, DataPlan([1] * SIZE, loader="b"), loaders=loaders, max_epochs=3, ckpt_path=path)
    order = PlanSampler([1] * SIZE)
    order.set_epoch(1)
    once = list(order)
    assert whole.seen[1] == once * 2
    assert rest.seen[1] == (once * 2)[[4, 7, 11][batch_idx] :]
    assert rest.seen[2] == whole.seen[2]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", ["loader", "hook"])
def test_a_loader_that_restores_its_own_position_follows_the_plan(tmp_path, source, workers):
    loader_of = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    class Stateful(Seeing):
        def train_dataloader(self):
            return loader_of(IndexedDataset(points(SIZE)), 2, True, num_workers=workers)

    given = Stateful().train_dataloader() if source == "loader" else None
    kind = Seeing if source == "loader" else Stateful
    for epoch, batch_idx in ((0, 1), (0, 3), (1, 2), (2, 4))[:: 1 + 2 * workers]:
        path, whole, rest = str(tmp_path / f"{epoch}-{batch_idx}.ckpt"), kind(), kind()
        run = fit(tmp_path, whole, DataPlan(plan), SaveAt(path, epoch, batch_idx), loaders=given)
        assert whole.seen == {e: planned(e) for e in range(4)}
        assert type(run.train_dataloader) is loader_of
        fit(tmp_path, rest, DataPlan(plan), loaders=given, ckpt_path=path)
        expected = {epoch: planned(epoch)[2 * (batch_idx + 1) :], **{e: planned(e) for e in range(epoch + 1, 4)}}
        assert rest.seen == {e: seen for e, seen in expected.items() if seen}
