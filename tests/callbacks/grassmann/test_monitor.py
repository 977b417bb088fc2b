import os
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_feat.callbacks import GrassmannHead, GrassmannMonitor, LinearProbe, NeuralCollapseMonitor
from lightning_feat.functional.grassmann import geodesic_distance, principal_angles
from lightning_feat.functional.transfer.class_separation import (
    class_separation_r2,
    direction_sums,
    pair_angle_sums,
    sample_of_each_class,
    within_class_variability,
)
from lightning_feat.layers import GrassmannLinear
from lightning_feat.optim import follow_subspaces
from tests.helpers import Plain, equal, loader, points, trainer, weights
from tests.pairs import two_processes


class Built(Plain):
    """Has its head from the start, and keeps the features of each epoch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net.fc = GrassmannLinear(8, 3, 2)
        self.heard = {}

    def training_step(self, batch, batch_idx):
        features = self.net.body(batch[0])
        self.heard.setdefault(self.current_epoch, []).append((features.detach(), batch[1]))
        return cross_entropy(self.net.fc(features), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        follow_subspaces(optimizer, self)
        return optimizer


def seeded(cls=Built, seed=0, **kwargs):
    pl.seed_everything(seed)
    return cls(**kwargs)


def fit(tmp_path, module, *callbacks, data=None, ckpt_path=None, **kwargs):
    run = trainer(tmp_path, callbacks=list(callbacks), **kwargs)
    run.fit(module, loader(60) if data is None else data, loader(24), ckpt_path=ckpt_path)
    return run


def logged(run, prefix="grassmann/", label="/net.fc"):
    ours = {name: value for name, value in run.callback_metrics.items() if name.startswith(prefix)}
    assert all(name.endswith(label) for name in ours)
    return {name[len(prefix) : -len(label)]: value for name, value in ours.items()}


def spread_of(features, targets):
    r2 = class_separation_r2(direction_sums(features, targets, 3))
    return r2.float(), within_class_variability(pair_angle_sums(features, targets, 3)).float()


def test_the_subspaces_against_pairs_taken_one_by_one(tmp_path):
    module = seeded()
    start = module.net.fc.basis.detach().clone()
    values = logged(fit(tmp_path, module, GrassmannMonitor(), max_epochs=2))
    basis = module.net.fc.basis.detach()
    angles = torch.stack([principal_angles(basis[i], basis[j]) for i, j in ((0, 1), (0, 2), (1, 2))]).rad2deg()
    moved = torch.stack([geodesic_distance(a, b) for a, b in zip(basis, start, strict=True)])
    assert moved.min() > 1e-2
    for measure, expected in {
        "angle_mean": angles.mean(),
        "smallest_angle": angles.min(),
        "distance_from_start_mean": moved.mean(),
        "distance_from_start_max": moved.max(),
    }.items():
        torch.testing.assert_close(values[measure], expected, rtol=1e-4, atol=0, msg=measure)  # float32 bases
    assert values["orthonormality_error"] < 1e-5


def test_beside_the_head_callback_no_name_is_logged_twice(tmp_path):
    columns = []

    class Watched(Plain):
        def log(self, name, *args, **kwargs):
            columns.append(name)
            super().log(name, *args, **kwargs)

    values = logged(fit(tmp_path, seeded(Watched), GrassmannMonitor(), GrassmannHead(2)))
    ours = [name for name in columns if name.startswith("grassmann/")]
    assert len(ours) == len(set(ours)) == 7
    assert set(values) == {
        *("angle_mean", "distance_from_start_max", "distance_from_start_mean", "r2", "variability"),
        *("orthonormality_error", "smallest_angle"),
    }


def test_online_is_of_the_training_batches_as_they_pass(tmp_path):
    module = seeded()
    values = logged(fit(tmp_path, module, GrassmannMonitor(), max_epochs=2))
    batches = module.heard[1]
    features, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    torch.testing.assert_close(values["r2"], spread_of(features, targets)[0])
    sums = [pair_angle_sums(h, t, 3) for h, t in batches]
    angle = sum(s.angles for s in sums) / sum(s.pairs for s in sums)
    torch.testing.assert_close(values["variability"], angle.mean().rad2deg().float())


@pytest.mark.parametrize(("data", "size", "prefix"), [("train", 60, "grassmann/"), ("val", 24, "grassmann_val/")])
def test_exact_is_of_all_pairs_at_the_weights_of_the_end(tmp_path, data, size, prefix):
    module = seeded()
    monitor = GrassmannMonitor(mode="exact", data=data, max_samples_per_class=None)
    values = logged(fit(tmp_path, module, monitor, data=loader(60, shuffle=True)), prefix)
    with torch.no_grad():
        r2, variability = spread_of(module.net.body(points(size).tensors[0]), points(size).tensors[1])
    torch.testing.assert_close(values["r2"], r2)
    torch.testing.assert_close(values["variability"], variability)


def test_exact_takes_the_variability_of_a_sample_of_each_class_and_r2_of_all(tmp_path):
    module = seeded()
    values = logged(fit(tmp_path, module, GrassmannMonitor(mode="exact", max_samples_per_class=5, seed=3)))
    x, targets = points(60).tensors
    chosen = sample_of_each_class(targets, 5, seed=3)
    with torch.no_grad():
        features = module.net.body(x)
    torch.testing.assert_close(values["r2"], spread_of(features, targets)[0])
    torch.testing.assert_close(values["variability"], spread_of(features[chosen], targets[chosen])[1])


@pytest.mark.parametrize("mode", ["online", "exact"])
def test_the_training_is_bit_for_bit_what_it_is_without_the_monitor(tmp_path, mode):
    plain, watched = seeded(), seeded()
    torch.manual_seed(1)
    fit(tmp_path, plain, data=loader(60, shuffle=True), max_epochs=3)
    torch.manual_seed(1)
    monitor = GrassmannMonitor(mode=mode, max_pairs=2)
    fit(tmp_path, watched, monitor, data=loader(60, shuffle=True), max_epochs=3)
    assert equal(weights(plain), weights(watched))
    assert not watched.net.fc._forward_pre_hooks


@pytest.mark.parametrize("mode", ["online", "exact"])
def test_only_chosen_epochs_are_measured(tmp_path, mode):
    epochs = []

    class Watched(GrassmannMonitor):
        def _log(self, module, measure, value, suffix=""):
            epochs.append((module.current_epoch, measure))

    fit(tmp_path, seeded(), Watched(mode=mode, every_n_epochs=3), max_epochs=7)
    for measure in ("angle_mean", "r2", "variability", "distance_from_start_mean"):
        assert [epoch for epoch, name in epochs if name == measure] == [0, 2, 5, 6]


def test_a_resumed_run_remembers_the_start_and_a_new_run_begins_anew(tmp_path):
    whole = fit(tmp_path, seeded(), GrassmannMonitor(), max_epochs=4)
    half = fit(tmp_path, seeded(), GrassmannMonitor(), max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    monitor, module = GrassmannMonitor(), seeded(seed=5)
    resumed = fit(tmp_path, module, monitor, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert logged(resumed) == logged(whole)
    before = module.net.fc.basis.detach().clone()
    fit(tmp_path, module, monitor)
    assert monitor.start.equal(before)


def test_more_pairs_than_max_pairs_are_sampled(tmp_path):
    module = seeded()
    values = logged(fit(tmp_path, module, GrassmannMonitor(max_pairs=1, seed=4)))
    basis = module.net.fc.basis.detach()
    means = [principal_angles(basis[i], basis[j]).mean().rad2deg() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(abs(values["angle_mean"] - mean) for mean in means) < 1e-3


def test_the_figure_lies_beside_the_loggers_files_and_in_tensorboard(tmp_path):
    pytest.importorskip("matplotlib")
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = loggers.TensorBoardLogger(tmp_path / "board")
    run = fit(tmp_path, seeded(), GrassmannMonitor(figure=True), logger=[CSVLogger(tmp_path), board], max_epochs=2)
    board.finalize("success")
    names = sorted(path.name for path in Path(run.log_dir).glob("*.png"))
    assert names == ["grassmann_angles-net.fc-epoch=0.png", "grassmann_angles-net.fc-epoch=1.png"]
    read = events.EventAccumulator(board.log_dir)
    read.Reload()
    assert len(read.Images("grassmann/angles/net.fc")) == 2


def test_an_optimizer_that_runs_its_closure_twice_is_heard_once(tmp_path):
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    class Module(Built):
        def configure_optimizers(self):
            return Twice(self.net.body.parameters(), lr=self.lr)

    module = seeded(Module)
    values = logged(fit(tmp_path, module, GrassmannMonitor()))
    features, targets = (torch.cat(column) for column in zip(*module.heard[0][::2], strict=True))
    torch.testing.assert_close(values["r2"], spread_of(features, targets)[0])


def test_ignored_targets_are_left_out(tmp_path):
    class Module(Built):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0], batch[1].clamp(min=0)), batch_idx)

    data = points(60)
    data.tensors[1][::4] = -1
    module = seeded(Module)
    values = logged(fit(tmp_path, module, GrassmannMonitor(ignore_index=-1), data=DataLoader(data, 60)))
    features, keep = module.heard[0][0][0], data.tensors[1] >= 0
    r2, variability = spread_of(features[keep], data.tensors[1][keep])
    torch.testing.assert_close(values["r2"], r2)
    torch.testing.assert_close(values["variability"], variability)


def test_another_head_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"the classifier net.fc is a Linear, not a GrassmannLinear: add the Grassm"):
        fit(tmp_path, seeded(Plain), GrassmannMonitor())


def test_no_hook_is_left_behind_by_an_exception(tmp_path):
    class Breaks(Built):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("boom")

    module = seeded(Breaks)
    with pytest.raises(RuntimeError, match="boom"):
        fit(tmp_path, module, GrassmannMonitor())
    assert not module.net.fc._forward_pre_hooks


@pytest.mark.parametrize(
    "kwargs",
    [{"mode": "offline"}, {"data": "val"}, {"every_n_epochs": 0}, {"max_pairs": 0}, {"max_samples_per_class": 1}],
    ids=str,
)
def test_impossible_arguments_are_refused_at_once(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}="):
        GrassmannMonitor(**kwargs)


def test_the_same_monitor_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the Trainer has GrassmannMonitor\[classifier\] twice"):
        fit(tmp_path, seeded(), GrassmannMonitor(), GrassmannMonitor())


def ddp_run(folder, processes):
    """All that the monitor, in both modes, and the probe log for 43 samples: one process has one more."""
    values = {}
    for mode in ("online", "exact"):
        two = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}  # a strategy serves one trainer
        monitor = GrassmannMonitor(mode=mode, max_samples_per_class=9)
        probe = LinearProbe(test=DataLoader(points(31, 1), 8), train=DataLoader(points(37, 2), 8))
        data = DataLoader(points(43), batch_size=43, shuffle=True)  # one batch on each process
        run = fit(Path(folder), seeded(lr=0.0), monitor, probe, data=data, **(two if processes == 2 else {}))
        found = {f"{mode} {name}": float(value) for name, value in run.callback_metrics.items() if "/net" in name}
        values |= found | {f"{mode} probe": float(run.callback_metrics["linear_probe/accuracy/penultimate"])}
    return values


def worker(process, port, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ.update(where, LOCAL_RANK=str(process))
    torch.save(ddp_run(folder, 2), f"{folder}/{process}.pt")


def test_two_processes_log_what_one_does(tmp_path):
    two_processes(worker, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{process}.pt") for process in range(2))
    assert first == second
    alone = ddp_run(tmp_path, 1)
    # Online the pairs are those inside a batch, which two processes share out otherwise.
    inside = first.pop("online grassmann/variability/net.fc"), alone.pop("online grassmann/variability/net.fc")
    assert inside[0] == pytest.approx(inside[1], rel=0.2)
    assert first == pytest.approx(alone, rel=1e-5, abs=1e-6)  # logged in float32


def test_angles_of_subspaces_that_nobody_follows_are_nan_and_that_is_said_once(tmp_path):
    module = Plain(lr=1.0)
    module.net.fc = GrassmannLinear(8, 3, 2)
    run = trainer(tmp_path, callbacks=[GrassmannMonitor(), NeuralCollapseMonitor()], max_epochs=3)
    with pytest.warns(UserWarning, match="off their manifold") as said:
        run.fit(module, loader(64))
    assert sum("Their angles are nan" in str(w.message) for w in said) == 1
    assert run.callback_metrics["grassmann/angle_mean/net.fc"].isnan()
    assert run.callback_metrics["grassmann/orthonormality_error/net.fc"] > 0.01
    assert not [name for name in run.callback_metrics if "nc3" in name]
