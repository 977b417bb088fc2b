import lightning.pytorch as pl
import pytest
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_feat.callbacks import DataPlan, NeuralCollapseMonitor
from tests.callbacks.plans import SIZE, Hook, Seeing, Warm, fit, indexed, plan, planned
from tests.helpers import Plain, points, trainer


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
        ({"plan": plan}, lambda: DataLoader(points(SIZE), batch_size=None), "nothing in the place of a batch size"),
        *(
            ({"plan": plan}, lambda sampler=sampler: DataLoader(points(SIZE), sampler=sampler), text)
            for sampler, text in (
                (
                    WeightedRandomSampler([1.0] * SIZE, SIZE),
                    "a WeightedRandomSampler of its own, .* the weights to the loss; or, .* DataPlan",
                ),
                (
                    SubsetRandomSampler([0, 2]),
                    "a SubsetRandomSampler of its own, .* these examples, and shuffle=True",
                ),
                (
                    RandomSampler(points(SIZE), num_samples=3),
                    "a RandomSampler of num_samples=3 of its own, .* each example once, and short epochs by",
                ),
                (
                    RandomSampler(points(SIZE), replacement=True, num_samples=9),
                    "a RandomSampler of num_samples=9, with replacement, of its own, .* more epochs in",
                ),
                (
                    RandomSampler(points(SIZE), replacement=True),
                    "a RandomSampler, with replacement, of its own",
                ),
                (SequentialSampler(range(3)), "a SequentialSampler of num_samples=3 of its own, which would be lost"),
                ([0, 1, 2], "a list of its own, .* where that leaves examples out a torch.utils.data.Subset"),
            )
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path, options, loaders, text):
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, Plain(), DataPlan(**options), loaders=loaders())


def test_overfitting_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"overfit_batches=2 .* Overfit without this callback"):
        fit(tmp_path, module := Seeing(), DataPlan(plan), loaders=indexed(), overfit_batches=2)
    assert not module.seen


def test_the_same_plan_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"DataPlan\[train\] twice"):
        fit(tmp_path, Plain(), DataPlan(plan), DataPlan(plan), loaders=indexed())


def test_what_cuts_a_plan_short_is_said(tmp_path):
    with pytest.warns(UserWarning, match="by limit_train_batches=3: 75% of the plan are shown"):
        fit(tmp_path, Seeing(), DataPlan(plan), loaders=indexed(), limit_train_batches=3)
    a, b = indexed(), indexed(batch_size=4)
    module = Seeing(lambda batch: batch["a"])
    with pytest.warns(UserWarning, match="by another training loader beside it: 50% of the plan are shown"):
        fit(tmp_path, module, DataPlan(plan, loader="a"), loaders=CombinedLoader({"a": a, "b": b}, "min_size"))
    module = Seeing(lambda batch: batch["b"])
    with pytest.warns(UserWarning, match="200% of the plan are shown"):
        fit(tmp_path, module, DataPlan(plan, loader="b"), loaders={"a": a, "b": b})
    assert module.seen[0] == planned(0) * 2
