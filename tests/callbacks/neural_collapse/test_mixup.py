import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_feat.callbacks import GrassmannHead, MixupGeometryMonitor, SimplexETFHead
from lightning_feat.functional.neural_collapse.mixup import draw_pairs, free_slope, plane_residual
from tests.helpers import DictBatches, Disturbed, Plain, equal, loader, points, trainer, weights

SHARES = (0.2, 0.5, 0.9)


def fit(tmp_path, monitor, module=None, data=None, val=None, **kwargs):
    pl.seed_everything(0)
    module = Disturbed() if module is None else module
    run = trainer(tmp_path, callbacks=[monitor] if monitor else [], **kwargs)
    run.fit(module, loader(64, shuffle=True) if data is None else data, loader(41) if val is None else val)
    return run, module


def logged(run, label="penultimate"):
    names = ("same_class_cosine", "plane_residual", "slope", "slope_free", "calibration_error")
    return {name: float(run.callback_metrics[f"mixup_geometry/{name}/{label}"]) for name in names}


@torch.no_grad()
def definition(module, data, num_pairs, seed):
    """Pair by pair, at the weights of the end."""
    module.eval()
    x, y = data.tensors
    h, z = module.net.body(x), module.net(x)
    centre = torch.stack([h[y == c].mean(0) for c in range(3)]).mean(0)
    row = module.net.fc.weight - module.net.fc.weight.mean(0)
    cosine, margin, outside, top, bottom = [], [], [], 0.0, 0.0
    for a, b in draw_pairs(y, num_pairs, torch.Generator().manual_seed(seed)).tolist():
        for share in SHARES:
            mixed = (share * x[a] + (1 - share) * x[b])[None]
            feature, logits = module.net.body(mixed)[0] - centre, module.net(mixed)[0]
            i, j = int(y[a]), int(y[b])
            if i == j:
                cosine.append(cosine_similarity(feature, row[i], dim=0))
                margin.append(logits[i] - (logits.sum() - logits[i]) / 2)
            else:
                outside.append(plane_residual(feature[None], row[i][None], row[j][None])[0])
                difference = torch.tensor(share / (1 - share)).log()
                top, bottom = top + difference * (logits[i] - logits[j]), bottom + difference**2
    mean_margin = torch.stack(margin).mean()
    return {
        "same_class_cosine": float(torch.stack(cosine).mean()),
        "plane_residual": float(torch.stack(outside).mean()),
        "slope": float(top / bottom),
        "slope_free": float(free_slope(mean_margin, torch.tensor(SHARES), 3)),
        "calibration_error": float(multiclass_calibration_error(z.softmax(1), y, 3, n_bins=15)),
    }


@pytest.mark.parametrize(("data", "num_samples"), [("val", 41), ("train", 64)])
def test_what_is_logged_is_the_definition_at_the_weights_of_the_end(tmp_path, data, num_samples):
    monitor = MixupGeometryMonitor(data=data, shares=SHARES, num_pairs=30, seed=3)
    run, module = fit(tmp_path, monitor, max_epochs=2)
    expected = definition(module, points(num_samples), 30, 3)
    # float32 networks in batches of another size; the margin enters the slope of free features by its exponential.
    assert logged(run) == pytest.approx(expected, rel=2e-5, abs=1e-6, nan_ok=True)


def test_pairs_are_found_where_every_batch_holds_one_class(tmp_path):
    x, y = points(40).tensors
    order = y.argsort()
    run, _ = fit(tmp_path, MixupGeometryMonitor(), val=DataLoader(TensorDataset(x[order], y[order]), 5))
    assert logged(run)["plane_residual"] > 0


def test_the_training_is_bit_for_bit_what_it_is_without_the_monitor(tmp_path):
    _, plain = fit(tmp_path, None, max_epochs=2)
    _, watched = fit(tmp_path, MixupGeometryMonitor(), max_epochs=2)
    assert equal(weights(plain), weights(watched))
    assert equal([*plain.buffers()], [*watched.buffers()])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in watched.modules())


def test_hooks_are_gone_after_an_error(tmp_path):
    class Fails(Disturbed):
        def on_train_epoch_end(self):
            raise KeyError("on the way")

    module = Fails()
    with pytest.raises(KeyError):
        fit(tmp_path, MixupGeometryMonitor(), module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_chosen_epochs_and_the_last(tmp_path):
    monitor = MixupGeometryMonitor(every_n_epochs=3, num_pairs=2)
    calls = []
    monitor._measure, measure = (
        (lambda *args: calls.append(args[0].current_epoch + 1) or measure(*args)),
        monitor._measure,
    )
    fit(tmp_path, monitor, max_epochs=5)
    assert calls == [1, 3, 5]


def test_a_simplex_head_lends_its_prototypes(tmp_path):
    run = trainer(tmp_path, callbacks=[SimplexETFHead(layer="net.fc"), MixupGeometryMonitor(layer="net.fc")])
    run.fit(Plain(), loader(64), loader(41))
    assert -1 <= logged(run, "net.fc.input")["same_class_cosine"] <= 1


class Mixes(Plain):
    def __init__(self, mixes):
        super().__init__()
        self.mixes = mixes
        self.net.body = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 8))

    def training_step(self, batch, batch_idx):
        x, y = batch
        y = nn.functional.one_hot(y, 3).float()
        share, other = torch.rand(len(x), 1) if self.mixes else torch.ones(len(x), 1), torch.randperm(len(x))
        mixed = self(share * x + (1 - share) * x[other])
        return nn.functional.cross_entropy(mixed, share * y + (1 - share) * y[other])


def test_a_network_trained_with_mixup_is_as_sure_as_the_shares_and_one_without_jumps(tmp_path):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = 2 * torch.eye(3, 4)[y] + 0.1 * torch.randn(90, 4, generator=generator)
    data = DataLoader(TensorDataset(x, y), 18, shuffle=True)
    values = []
    for mixes in (True, False):
        pl.seed_everything(0)
        monitor = MixupGeometryMonitor(data="train", every_n_epochs=99)
        values.append(logged(fit(tmp_path, monitor, Mixes(mixes), data, data, max_epochs=30)[0]))
    mixed, plain = values
    assert 1 < mixed["slope"] < 0.75 * plain["slope"]  # and further apart the longer one trains
    assert mixed["same_class_cosine"] > 0.9


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"data": "test"}, "choose 'train' or 'val'"),
        ({"shares": (0.5, 1.0)}, "strictly between 0 and 1"),
        ({"shares": ()}, "at least one"),
        ({"num_pairs": 0}, "at least 1"),
    ],
)
def test_arguments_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        MixupGeometryMonitor(**arguments)


def test_a_classifier_without_rows_is_refused(tmp_path):
    run = trainer(tmp_path, callbacks=[GrassmannHead(2, layer="net.fc"), MixupGeometryMonitor(layer="net.fc")])
    with pytest.raises(ValueError, match="GrassmannLinear, without one vector for each class"):
        run.fit(Plain(), loader(), loader())


def test_inputs_that_cannot_be_mixed_are_refused_in_the_first_batch(tmp_path):
    class Takes(Plain):
        def training_step(self, batch, batch_idx):
            raise AssertionError("not reached")

    with pytest.raises(ValueError, match="must begin with a floating tensor"):
        fit(tmp_path, MixupGeometryMonitor(data="train"), Takes(), DataLoader(DictBatches(points()), 8))


def test_without_validation_data_the_argument_is_named(tmp_path):
    run = trainer(tmp_path, callbacks=[MixupGeometryMonitor()])
    with pytest.raises(ValueError, match="set data='train'"):
        run.fit(Plain(), loader())
