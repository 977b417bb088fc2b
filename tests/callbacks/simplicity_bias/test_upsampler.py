import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_feat.callbacks import DataPlan, GrassmannHead, GrassmannMonitor, SimplicityBiasUpsampler, SummaryTable
from lightning_feat.data import PlanSampler, Selection
from lightning_feat.functional.simplicity_bias.clusters import slow_examples
from lightning_feat.functional.simplicity_bias.epochs import separating_epoch
from tests.helpers import EMAWeightAveraging, Plain, equal, points, trainer, weights

SIZE, EPOCHS = 22, 5


def loader(**kwargs):
    return DataLoader(points(SIZE), batch_size=4, shuffle=True, **kwargs)


class Noisy(Plain):
    """Draws random numbers in each step, and has a schedule for the length of the run."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((nn.functional.dropout(x, 0.2, self.training), y), batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Kept(Noisy):
    """Makes its optimizer and its schedule but once."""

    def __init__(self):
        super().__init__()
        self.own_optimizer = torch.optim.Adam(self.net.parameters(), lr=0.05)
        self.own_schedule = torch.optim.lr_scheduler.StepLR(self.own_optimizer, 2, 0.5)

    def configure_optimizers(self):
        return [self.own_optimizer], [self.own_schedule]


def fit(root, module, *callbacks, data=None, ckpt_path=None, **kwargs):
    kwargs = {"max_epochs": EPOCHS, **kwargs}
    run = trainer(root, callbacks=list(callbacks), **kwargs)
    run.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return run


def twins(kind=Noisy):
    """Two modules with the same weights."""
    pl.seed_everything(1)
    first = kind()
    pl.seed_everything(1)
    return first, kind()


def averaging():
    return [EMAWeightAveraging(decay=0.9)] if EMAWeightAveraging is not None else []


@pytest.mark.parametrize("kind", [Noisy, Kept])
def test_the_second_start_is_bit_for_bit_the_run_by_hand(tmp_path, kind):
    module, by_hand = twins(kind)
    upsampler = SimplicityBiasUpsampler(separating_epoch=2, seed=7)
    run = fit(tmp_path, module, upsampler, *averaging())
    assert 0 < upsampler.selection.slow.sum() < SIZE

    pl.seed_everything(7)
    other = fit(tmp_path, by_hand, DataPlan(upsampler.selection.counts(), seed=7), *averaging())
    assert equal(weights(module), weights(by_hand))
    assert run.global_step == other.global_step
    assert run.current_epoch == other.current_epoch == EPOCHS


class Hooked(pl.Callback):
    """Registers a step hook in the hook of this name."""

    def __init__(self, where):
        def count(*_):
            self.steps += 1

        def register(trainer, *_):
            trainer.optimizers[0].register_step_post_hook(count)

        self.steps = 0
        setattr(self, where, register)


@pytest.mark.parametrize("where", ["on_fit_start", "on_train_start"])
def test_a_step_hook_that_the_second_start_loses_is_named(tmp_path, where):
    hooked = Hooked(where)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Plain(), SimplicityBiasUpsampler(separating_epoch=2), hooked)
    lost = [str(w.message) for w in caught if "without step hooks" in str(w.message)]
    per_epoch = math.ceil(SIZE / 4)
    if where == "on_fit_start":
        assert len(lost) == 1
        assert "count. Register them there, or in on_train_start" in lost[0]
        assert hooked.steps == 2 * per_epoch
    else:
        assert not lost
        assert hooked.steps > 2 * per_epoch


def test_going_on_is_a_plan_that_changes_at_the_separating_epoch(tmp_path):
    module, by_hand = twins(Plain)
    upsampler = SimplicityBiasUpsampler(separating_epoch=2, restart=False)
    fit(tmp_path, module, upsampler)
    counts = upsampler.selection.counts()
    fit(tmp_path, by_hand, DataPlan(lambda epoch: counts if epoch >= 2 else None))
    assert equal(weights(module), weights(by_hand))


def test_the_selection_is_that_of_the_network_at_the_separating_epoch(tmp_path):
    module, by_hand = twins(Plain)
    upsampler = SimplicityBiasUpsampler(separating_epoch=3)
    fit(tmp_path, module, upsampler)
    fit(tmp_path, by_hand, DataPlan(lambda epoch: None), max_epochs=3)
    x, y = points(SIZE).tensors
    with torch.no_grad():
        logits = by_hand(x)
    found = slow_examples(logits, cross_entropy(logits, y, reduction="none"), y, num_classes=3)
    selection = upsampler.selection
    assert torch.equal(selection.slow, found.slow)
    assert torch.equal(selection.cluster, found.cluster)
    torch.testing.assert_close(selection.loss, found.loss)  # summed in batches: rounding of float32
    assert selection.epoch == 3
    per_class = torch.cat(list(selection.per_class().values())).sort().values
    assert torch.equal(per_class, found.slow.nonzero()[:, 0])


@pytest.mark.parametrize("choose", ["loss", "random", "misclassified"])
def test_what_it_is_compared_with(tmp_path, choose):
    module, by_hand = twins(Plain)
    clusters, other = (SimplicityBiasUpsampler(separating_epoch=2, choose=c) for c in ("clusters", choose))
    fit(tmp_path, module, clusters)
    fit(tmp_path, by_hand, other)
    slow, targets = other.selection.slow, other.selection.targets
    if choose == "misclassified":
        _, again = twins(Plain)
        fit(tmp_path, again, DataPlan(lambda epoch: None), max_epochs=2)
        assert torch.equal(slow, again(points(SIZE).tensors[0]).argmax(1) != targets)
    else:
        sizes = [[len(members) for members in s.per_class().values()] for s in (clusters.selection, other.selection)]
        assert sizes[0] == sizes[1]
        assert choose != "random" or not torch.equal(slow, clusters.selection.slow)


class Weighted(Plain):
    """The loss of slow examples counts three times, written by hand."""

    slow = torch.zeros(SIZE)

    def training_step(self, batch, batch_idx):
        (x, y), index = batch
        return (cross_entropy(self(x), y, reduction="none") * (1 + 2 * self.slow[index])).mean()


class Numbered(Dataset):
    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return points(SIZE)[index], index


def test_weights_in_place_of_copies_are_the_loss_written_by_hand(tmp_path):
    module, by_hand = twins(Plain)
    upsampler = SimplicityBiasUpsampler(separating_epoch=1, show="weights", factor=3)
    fit(tmp_path, module, upsampler, max_epochs=3)
    torch.manual_seed(0)
    weighted = Weighted()
    weighted.load_state_dict(by_hand.state_dict())
    weighted.slow = upsampler.selection.slow.float()
    data = DataLoader(Numbered(), batch_size=4, shuffle=True)
    fit(tmp_path, weighted, DataPlan(lambda epoch: None), data=data, max_epochs=3)
    for ours, theirs in zip(weights(module), weights(weighted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # two sums in place of one


class SaveAt(pl.Callback):
    """Saves in the part ``part`` of a run, counted by starts of training, after a batch of an epoch."""

    def __init__(self, path, part, epoch, batch_idx):
        self.path, self.at, self.part = path, (part, epoch, batch_idx), 0

    def on_train_start(self, trainer, pl_module):
        self.part += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (self.part, trainer.current_epoch, batch_idx) == self.at:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("at", [(1, 0, 2), (1, 1, 0), (1, 1, 5), (2, 0, 1), (2, 3, 4)])
def test_a_run_cut_off_in_mid_epoch_ends_as_the_whole_one(tmp_path, at, restart):
    if not restart and at[0] == 2:
        at = (1, *at[1:])
    whole, rest = twins(Plain)
    path = str(tmp_path / "cut.ckpt")
    first = SimplicityBiasUpsampler(separating_epoch=2, restart=restart)
    fit(tmp_path, whole, first, SaveAt(path, *at))
    torch.load(path, weights_only=True)
    for p in rest.parameters():
        p.data.normal_()  # what it begins with is in the checkpoint
    second = SimplicityBiasUpsampler(separating_epoch=2, restart=restart)
    run = fit(tmp_path, rest, second, ckpt_path=path)
    assert torch.equal(first.selection.slow, second.selection.slow)
    assert equal(weights(rest), weights(whole))
    assert run.current_epoch == EPOCHS


class SaveEpochs(ModelCheckpoint):
    """Saves at the end of each epoch, in a folder for each start of training."""

    def __init__(self, root):
        super().__init__(root, save_top_k=0)
        self.root, self.part = root, 0

    def on_train_start(self, trainer, pl_module):
        self.part += 1

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{self.root}/{self.part}-{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("name", ["1-0", "1-1", "2-0", "2-3"])
def test_a_run_cut_off_between_epochs_ends_as_the_whole_one(tmp_path, name):
    whole, rest = twins(Plain)
    fit(tmp_path, whole, SimplicityBiasUpsampler(separating_epoch=2), SaveEpochs(tmp_path), enable_checkpointing=True)
    for p in rest.parameters():
        p.data.normal_()
    stages = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["callbacks"]["SimplicityBiasUpsampler[train]"]
    assert stages["stage"] == {"1-0": "searching", "1-1": "found"}.get(name, "using")
    fit(tmp_path, rest, SimplicityBiasUpsampler(separating_epoch=2), ckpt_path=tmp_path / f"{name}.ckpt")
    assert equal(weights(rest), weights(whole))


def test_a_saved_selection_is_used_from_the_first_epoch(tmp_path):
    module, again = twins(Plain)
    first = SimplicityBiasUpsampler(separating_epoch=2, seed=3)
    fit(tmp_path, module, first, logger=pl.loggers.CSVLogger(tmp_path, "", ""))
    second = SimplicityBiasUpsampler(selection=str(tmp_path / "selection.pt"), seed=3)
    fit(tmp_path, again, second)
    assert torch.equal(first.selection.slow, second.selection.slow)
    assert equal(weights(module), weights(again))
    loaded = Selection.load(str(tmp_path / "selection.pt"))
    assert (loaded.epoch, loaded.factor, loaded.seed, loaded.choose) == (2, 2, 3, "clusters")


def test_states_of_other_callbacks_begin_again_too(tmp_path):
    class Val(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 1.0 + self.current_epoch + 10 * self.trainer.fit_loop.epoch_loop._batches_that_stepped)

        def on_train_start(self):
            self.starts = getattr(self, "starts", 0) + 1

    stopping, curves = EarlyStopping("val/loss", patience=2), SummaryTable()
    saving = ModelCheckpoint(tmp_path / "saved", monitor="val/loss", save_last=True)
    module = Val()
    run = trainer(
        tmp_path,
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        callbacks=[SimplicityBiasUpsampler(separating_epoch=2), stopping, curves, saving],
    )
    run.fit(module, loader(), loader())
    assert module.starts == 2
    assert run.current_epoch == 3  # best in its first epoch, as val/loss grows, and two epochs of patience
    assert [epoch for epoch, _ in curves.points["val/loss"]] == [1.0, 2.0, 3.0]
    assert saving.best_model_score > 10 * 6 * 2  # of the second start, whose logged steps go on
    assert sorted(path.name for path in (tmp_path / "saved").glob("last*")) == ["last.ckpt"]


def test_the_logged_step_goes_on(tmp_path):
    class Logged(pl.loggers.CSVLogger):
        steps = ()

        def log_metrics(self, metrics, step=None):
            self.steps = (*self.steps, step)

    log = Logged(tmp_path)
    fit(tmp_path, Plain(), SimplicityBiasUpsampler(separating_epoch=2), logger=log, log_every_n_steps=1)
    assert len(log.steps) > 0
    assert sorted(log.steps) == list(log.steps)


def test_class_subspaces_stay_on_their_manifold(tmp_path):
    head, monitor = GrassmannHead(subspace_dim=2), GrassmannMonitor()
    module = Plain()
    run = fit(tmp_path, module, head, monitor, SimplicityBiasUpsampler(separating_epoch=2))
    assert run.callback_metrics["grassmann/orthonormality_error/net.fc"] < 1e-5
    assert run.callback_metrics["grassmann/distance_from_start_mean/net.fc"] > 0


class Losing(Plain):
    """Notes its loss."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.losses = {}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.setdefault(self.current_epoch, []).append((len(batch[1]), float(loss)))
        return loss


def test_the_knee_of_the_training_loss(tmp_path):
    upsampler = SimplicityBiasUpsampler(separating_epoch="knee", restart=False)
    module = Losing(lr=0.5)
    fit(tmp_path, module, upsampler, max_epochs=60)
    means = [sum(n * loss for n, loss in epoch) / SIZE for epoch in module.losses.values()]
    assert upsampler.selection.epoch == separating_epoch(means, 60, start=math.log(3))
    assert 1 < upsampler.selection.epoch < 60


def test_of_several_training_loaders_the_batches_of_its_own_are_heard(tmp_path):
    class Several(Losing):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["mine"], batch_idx)

    upsampler = SimplicityBiasUpsampler(separating_epoch="knee", restart=False, loader="mine")
    module = Several(lr=0.5)
    fit(tmp_path, module, upsampler, max_epochs=60, data={"other": loader(), "mine": loader()})
    means = [sum(n * loss for n, loss in epoch) / SIZE for epoch in module.losses.values()]
    torch.testing.assert_close(upsampler.knee.losses, means[: len(upsampler.knee.losses)])
    assert upsampler.selection is not None


def test_a_selection_is_not_taken_for_other_data(tmp_path):
    upsampler = SimplicityBiasUpsampler(separating_epoch=1, restart=False)
    module = Plain()
    run = fit(tmp_path, module, upsampler, max_epochs=2)
    run.fit_loop.max_epochs = 3
    with pytest.raises(ValueError, match="the selection is of 22 examples, but the training data have 12: give"):
        run.fit(module, DataLoader(points(12), batch_size=4))


class Shaken(Dataset):
    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        x, y = points(SIZE)[index]
        return x + torch.randn(4), y


class Data(pl.LightningDataModule):
    asked = 0

    def train_dataloader(self):
        return DataLoader(Shaken(), batch_size=4, shuffle=True)

    def clean_train_dataloader(self):
        self.asked += 1
        return DataLoader(points(SIZE), batch_size=4)


def test_augmented_data_are_looked_at_as_they_are(tmp_path):
    data = Data()
    run = trainer(tmp_path, callbacks=[SimplicityBiasUpsampler(separating_epoch=1)], max_epochs=2)
    run.fit(Plain(), datamodule=data)
    assert data.asked >= 1
    with pytest.warns(UserWarning, match="by augmentation it seems"):
        fit(tmp_path, Plain(), SimplicityBiasUpsampler(separating_epoch=1), data=DataLoader(Shaken(), batch_size=4))


@pytest.mark.parametrize(
    "options", [{"reload_dataloaders_every_n_epochs": 1}, {"accumulate_grad_batches": 2}, {"min_epochs": 4}]
)
def test_trainers_with_other_options(tmp_path, options):
    module, by_hand = twins()
    upsampler = SimplicityBiasUpsampler(separating_epoch=1)
    fit(tmp_path, module, upsampler, **options)
    pl.seed_everything(0)
    fit(tmp_path, by_hand, DataPlan(upsampler.selection.counts()), **options)
    assert equal(weights(module), weights(by_hand))


def test_persistent_workers_get_the_plan(tmp_path):
    data = loader(num_workers=1, persistent_workers=True)
    upsampler = SimplicityBiasUpsampler(separating_epoch=1)
    run = fit(tmp_path, Plain(), upsampler, data=data, max_epochs=2)
    sampler = PlanSampler(upsampler.selection.counts())
    assert run.global_step == 2 * -(-len(sampler) // 4)


def test_it_leaves_nothing_behind(tmp_path):
    module = Plain()
    run = fit(tmp_path, module, SimplicityBiasUpsampler(separating_epoch=2, show="weights"))
    assert "run" not in run.fit_loop.__dict__
    assert "_feat_wraps" not in module.__dict__
    assert not module.net.fc._forward_hooks
    assert not module.net.fc._forward_pre_hooks
    assert run.fit_loop.min_epochs == 0

    class Stumbling(Plain):
        def on_train_epoch_end(self):
            raise RuntimeError("stumbled")

    module = Stumbling()
    run = trainer(tmp_path, callbacks=[SimplicityBiasUpsampler(separating_epoch=1)])
    with pytest.raises(RuntimeError, match="stumbled"):
        run.fit(module, loader())
    assert "run" not in run.fit_loop.__dict__
    assert not module.net.fc._forward_hooks


def test_a_moment_is_enough_to_try_all_of_it(tmp_path):
    upsampler = SimplicityBiasUpsampler()
    run = fit(tmp_path, Plain(), upsampler, max_epochs=100, fast_dev_run=True)
    assert (upsampler.selection.targets >= 0).sum() == 4  # one batch
    assert run.global_step == 1


def test_a_number_of_epochs_may_come_as_a_float():
    assert SimplicityBiasUpsampler(separating_epoch=8.0).separating_epoch == 8


def test_a_run_that_ends_before_says_so(tmp_path):
    with pytest.warns(UserWarning, match="ended before the separating epoch"):
        fit(tmp_path, Plain(), SimplicityBiasUpsampler(separating_epoch=3), max_epochs=None, max_steps=7)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(points(SIZE))


@pytest.mark.parametrize(
    ("options", "kwargs", "text"),
    [
        ({"separating_epoch": 1.5}, {}, "separating_epoch=1.5: give a share"),
        ({"separating_epoch": 0}, {}, "separating_epoch=0: give a share"),
        ({"separating_epoch": "elbow"}, {}, "separating_epoch='elbow'"),
        ({"choose": "fast"}, {}, "choose='fast': choose 'clusters', 'loss'"),
        ({"outputs": "tokens"}, {}, "outputs='tokens'"),
        ({"show": "twice"}, {}, "choose 'copies'"),
        ({"factor": 1}, {}, "factor=1 must be at least 2"),
        ({"separating_epoch": 6}, {}, "epoch 6 of max_epochs=5: choose an earlier one"),
        ({"separating_epoch": 5, "restart": False}, {}, "epoch 5 of max_epochs=5"),
        ({}, {"max_epochs": -1}, "needs max_epochs"),
        ({"selection": "nowhere.pt"}, {}, "no selection at nowhere.pt"),
        ({"clean": "tidy"}, {}, "neither the datamodule nor the module"),
        ({}, {"data": DataLoader(Stream())}, "a DataLoader over an IterableDataset"),
        ({"criterion": nn.CrossEntropyLoss()}, {}, "reduction='none'"),
    ],
)
def test_what_cannot_be_is_said_at_once(tmp_path, options, kwargs, text):
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, Plain(), SimplicityBiasUpsampler(**options), **kwargs)


def test_averages_that_cannot_begin_again_are_refused(tmp_path):
    averaging = StochasticWeightAveraging(0.1, swa_epoch_start=1)
    with pytest.raises(ValueError, match="begins in epoch 1, before"):
        fit(tmp_path, Plain(), averaging, SimplicityBiasUpsampler(separating_epoch=2))


def test_a_checkpoint_without_the_first_weights_is_refused(tmp_path):
    fit(tmp_path, Plain(), SaveEpochs(tmp_path), max_epochs=1, enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"was written without SimplicityBiasUpsampler\[train\]"):
        fit(tmp_path, Plain(), SimplicityBiasUpsampler(separating_epoch=3), ckpt_path=tmp_path / "1-0.ckpt")


def test_a_selection_of_other_data_is_refused(tmp_path):
    upsampler = SimplicityBiasUpsampler(separating_epoch=1)
    fit(tmp_path, Plain(), upsampler)
    assert not (tmp_path / "selection.pt").exists()  # no logger, no file
    upsampler.selection.save(str(tmp_path / "selection.pt"))
    other = DataLoader(points(9), batch_size=4)
    with pytest.raises(ValueError, match=r"has 22 counts|is of 22 examples"):
        fit(tmp_path, Plain(), SimplicityBiasUpsampler(selection=str(tmp_path / "selection.pt")), data=other)


def test_two_plans_for_the_same_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two callbacks plan the same training data"):
        fit(tmp_path, Plain(), SimplicityBiasUpsampler(), DataPlan([1] * SIZE))
