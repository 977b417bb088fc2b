import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import FewShotMonitor, LinearProbe
from lightning_feat.functional.transfer import few_shot_error
from tests.helpers import Plain, equal, loader, points, trainer, weights


def seeded(cls=Plain):
    pl.seed_everything(0)
    return cls()


def unseen(seed=1, size=60, shift=7):
    """Classes 7, 8 and 9, which the head has no row for."""
    x, y = points(size, seed).tensors
    return TensorDataset(x, y + shift)


def fit(tmp_path, module, *callbacks, val=True, **kwargs):
    run = trainer(tmp_path, callbacks=list(callbacks), **kwargs)
    run.fit(module, loader(64, shuffle=True), loader(24) if val else None)
    return run


def features(module, data):
    with torch.no_grad():
        return module.net.body(data.tensors[0]), data.tensors[1]


def test_unseen_classes_are_measured_at_the_weights_of_the_end(tmp_path):
    data, module = unseen(), seeded()
    monitor = FewShotMonitor("net.body", data={"unseen": DataLoader(data, 16, shuffle=True)}, episodes=20, seed=3)
    run = fit(tmp_path, module, monitor)
    h, t = features(module, data)
    for n in (1, 5):
        slow = few_shot_error(h, t, n, 20, generator=torch.Generator().manual_seed(3))
        assert monitor.results["unseen"][n].episodes.equal(slow.episodes)
        assert run.callback_metrics[f"few_shot_unseen/error_{n}_shot/net.body"] == slow.mean.float()
        assert run.callback_metrics[f"few_shot_unseen/half_width_{n}_shot/net.body"] == slow.half_width.float()
    # The definitions, by hand.
    parts = [h[t == c].double() for c in (7, 8, 9)]
    means, spread = [part.mean(0) for part in parts], [(part - part.mean(0)).square().sum(1).mean() for part in parts]
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    square = {(i, j): (means[i] - means[j]).square().sum() for i, j in pairs}
    cdnv = sum((spread[i] + spread[j]) / (2 * square[i, j]) for i, j in pairs) / 6
    assert float(run.callback_metrics["few_shot_unseen/cdnv/net.body"]) == pytest.approx(float(cdnv), rel=1e-6)
    share = 5**-0.5
    reach = {(i, j): (2 + share) * spread[i].sqrt() + share * spread[j].sqrt() for i, j in pairs}
    bound = min(1.0, float(sum(reach[p] ** 2 / square[p] for p in pairs) / 3))
    assert float(run.callback_metrics["few_shot_unseen/bound_5_shot/net.body"]) == pytest.approx(bound, rel=1e-6)


def test_features_that_are_one_point_for_each_class_have_no_error(tmp_path):
    class Collapsed(Plain):
        """One direction for each of the four corners of the plane of the first two inputs, far from each other."""

        def forward(self, x):
            corner = (x[:, :2] > 0).long() @ torch.tensor([1, 2])
            h = torch.eye(8)[corner] + 0 * self.net.body(x)
            return self.net.fc(h)

    x = torch.randn(64, 4)
    y = (x[:, :2] > 0).long() @ torch.tensor([1, 2])
    monitor = FewShotMonitor(data={"corners": DataLoader(TensorDataset(x, y), 16)}, shots=[1])
    metrics = fit(tmp_path, seeded(Collapsed), monitor).callback_metrics
    assert metrics["few_shot_corners/error_1_shot/penultimate"] == 0
    assert metrics["few_shot_corners/bound_1_shot/penultimate"] == 0
    assert metrics["few_shot_corners/half_width_1_shot/penultimate"] == 0
    assert metrics["few_shot_corners/cdnv/penultimate"] == 0


def test_without_data_of_its_own_it_takes_the_validation_data(tmp_path):
    module = seeded()
    run = fit(tmp_path, module, FewShotMonitor(shots=[2], episodes=4))
    slow = few_shot_error(*features(module, points(24)), 2, 4, generator=torch.Generator().manual_seed(0))
    assert run.callback_metrics["few_shot/error_2_shot/penultimate"] == slow.mean.float()


class Other(pl.LightningDataModule):
    def setup(self, stage):
        torch.rand(3)  # must not move the random numbers of the run

    def train_dataloader(self):
        return DataLoader(unseen(5), 16)

    def val_dataloader(self):
        return DataLoader(unseen(6), 16)


class Tested(Other):
    def test_dataloader(self):
        return DataLoader(unseen(7), 16)


@pytest.mark.parametrize(("data", "seed"), [(Other(), 6), (Tested(), 7)])
def test_of_a_datamodule_it_takes_the_test_part_or_else_the_validation_part(tmp_path, data, seed):
    monitor, module = FewShotMonitor(data={"unseen": data}, shots=[1], episodes=4), seeded()
    fit(tmp_path, module, monitor)
    slow = few_shot_error(*features(module, unseen(seed)), 1, 4, generator=torch.Generator().manual_seed(0))
    assert monitor.results["unseen"][1].episodes.equal(slow.episodes)


@pytest.mark.parametrize("data", [None, {"a": Other(), "b": Tested()}])
def test_the_training_is_bit_for_bit_what_it_is_without_it(tmp_path, data):
    plain, watched = seeded(), seeded()
    torch.manual_seed(1)
    fit(tmp_path, plain, max_epochs=3)
    torch.manual_seed(1)
    fit(tmp_path, watched, FewShotMonitor(data=data, every_n_epochs=1, episodes=2), max_epochs=3)
    assert equal(weights(plain), weights(watched))
    assert not watched.net.fc._forward_pre_hooks


def test_beside_a_probe_of_the_same_data_the_network_runs_once(tmp_path):
    count = []

    class Counts(Plain):
        def forward(self, x):
            if not self.training:
                count.append(len(x))
            return super().forward(x)

    def runs(*callbacks):
        count.clear()
        fit(tmp_path, seeded(Counts), *callbacks)
        return len(count)

    plain, monitored = runs(), runs(FewShotMonitor(episodes=2))
    probed, both = runs(LinearProbe(penalties=[0.1])), runs(LinearProbe(penalties=[0.1]), FewShotMonitor(episodes=2))
    assert both - probed == monitored - plain - 3  # it tries the first batch, and has no pass of its own


def test_too_few_samples_are_nan_and_told_once(tmp_path):
    small = DataLoader(unseen(size=6), 4)
    monitor = FewShotMonitor(data={"unseen": small}, shots=[1, 50], every_n_epochs=1, episodes=2)
    with pytest.warns(UserWarning, match="0 have more than shots=50 samples.*the error for 50 shots is nan") as said:
        metrics = fit(tmp_path, seeded(), monitor, max_epochs=3).callback_metrics
    assert len([w for w in said if "50 shots" in str(w.message)]) == 1
    assert metrics["few_shot_unseen/error_50_shot/penultimate"].isnan()
    assert not metrics["few_shot_unseen/error_1_shot/penultimate"].isnan()
    assert [*monitor.results["unseen"]] == [1]


def test_features_that_are_not_finite_are_nan_and_told(tmp_path):
    x, y = unseen().tensors
    x = x.clone()
    x[3] = torch.inf
    monitor = FewShotMonitor(data={"unseen": DataLoader(TensorDataset(x, y), 16)})
    with pytest.warns(UserWarning, match="the errors are nan"):
        metrics = fit(tmp_path, seeded(), monitor).callback_metrics
    assert metrics["few_shot_unseen/error_1_shot/penultimate"].isnan()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shots": []}, r"shots=\[\]: give numbers"),
        ({"shots": [5, 5]}, "each once"),
        ({"shots": [0]}, "of at least 1"),
        ({"episodes": 0}, "episodes=0"),
        ({"classes_per_episode": 1}, "of at least two classes"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"data": {}}, "name at least one data set"),
        ({"data": {"a": 3}}, "FewShotMonitor: data="),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FewShotMonitor(**kwargs)


def test_what_it_cannot_read_is_refused_before_training(tmp_path):
    class OnlyTrains(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(unseen(5), 16)

    steps = []

    class Steps(Plain):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    x, _ = unseen().tensors
    soft = DataLoader(TensorDataset(x, torch.rand(60, 3)), 16)
    for data, val, message in (
        ({"unseen": OnlyTrains()}, True, "neither a test nor a validation loader"),
        ({"unseen": soft}, True, "soft labels"),
        (None, False, "has nothing to look at: the run has no validation data"),
    ):
        module = seeded(Steps)
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, module, FewShotMonitor(data=data), val=val)
        assert not module.net.fc._forward_pre_hooks
    assert not steps
