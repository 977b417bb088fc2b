import copy

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningCLI

from lightning_feat.baselines import UnconstrainedFeatures
from lightning_feat.callbacks import NeuralCollapseMonitor
from lightning_feat.functional.neural_collapse import geometry as geometry
from lightning_feat.functional.neural_collapse import kept_features_optimum
from lightning_feat.functional.neural_collapse.regression import regression_optimum


def train(tmp_path, callbacks=(), max_epochs=400, **arguments):
    seed_everything(0, verbose=False)
    module = UnconstrainedFeatures(**arguments)
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[EarlyStopping("train/gradient", stopping_threshold=1e-9, patience=max_epochs), *callbacks],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return module, trainer


def class_means(module):
    features = module.features.all().detach()
    return torch.stack([features[module.targets == c].mean(0) for c in range(module.num_outputs)])


def same(found, expected):
    # 1e-5 of the largest entry: a gradient of 1e-9 over the smallest curvature, a decay of 1e-4
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_cross_entropy_reaches_the_predicted_frame(tmp_path):
    module, _ = train(tmp_path, counts=[12, 12, 5])
    frame = geometry.ce_frame(torch.tensor([12, 12, 5]), 2e-3, 2e-4)
    means = class_means(module)
    same(module.weight @ module.weight.T, frame.weights)
    same(means @ means.T, frame.means)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_squared_error_reaches_the_orthogonal_frame_for_any_depth(num_layers, tmp_path):
    counts, weight_decay = torch.tensor([12, 8, 5]), 0.02 * num_layers
    module, _ = train(
        tmp_path,
        counts=counts.tolist(),
        loss="mse",
        num_layers=num_layers,
        weight_decay=weight_decay,
        feature_decay=1e-3,
        init_scale=1.5,
    )
    frame = geometry.mse_orthogonal_frame(counts, weight_decay, 1e-3, num_layers)
    assert (frame.weights > 0).all()
    means = class_means(module)
    same(module.weight @ module.weight.T, torch.diag(frame.weights))
    same(means @ means.T, torch.diag(frame.means))
    same(module(torch.tensor([0, 12, 20])), torch.diag(frame.logits))


def test_nonnegative_features_reach_their_frame(tmp_path):
    module, _ = train(tmp_path, counts=[40, 20, 10, 4], nonnegative=True)
    frame = geometry.ce_nonnegative_frame(torch.tensor([40, 20, 10, 4]), 2e-3, 2e-4)
    assert module.features.all().min() == 0
    means = class_means(module)
    same(means @ means.T, torch.diag(frame.means))
    same(module.weight @ module.weight.T, frame.weight_gram)


def test_regression_reaches_its_optimum(tmp_path):
    outputs = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([3.0, 2.0, 1.0])
    module, _ = train(
        tmp_path, outputs=outputs.tolist(), loss="mse", bias=True, weight_decay=0.1, feature_decay=0.1 / 30
    )
    optimum = regression_optimum(outputs, 0.1, 0.1)  # its feature decay is that of the mean over samples
    same(module.weight @ module.weight.T, optimum.weight_gram)
    same(module.bias, optimum.bias)
    same(module(torch.arange(30)), optimum.predictions)


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_objective_is_the_formula(loss):
    module = UnconstrainedFeatures(
        counts=[3, 2], num_features=4, loss=loss, num_layers=2, bias=True, bias_decay=0.3, nonnegative=True
    )
    torch.nn.init.normal_(module.head[1].bias)
    first, last = module.head[0].weight, module.head[1].weight
    features = module.features.free.clamp(min=0)
    logits = features @ first.T @ last.T + module.head[1].bias
    one_hot = torch.tensor([[1, 0]] * 3 + [[0, 1]] * 2).double()
    errors = {"ce": -(one_hot * logits.log_softmax(1)).sum() / 5, "mse": (logits - one_hot).square().sum() / 10}
    expected = errors[loss] + 1e-3 * (first.square().sum() + last.square().sum()) + 1e-4 * features.square().sum()
    expected = expected + 0.15 * module.head[1].bias.square().sum()
    batch = next(iter(module.train_dataloader()))
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def test_regularised_bias_stays_near_zero_and_a_free_one_does_not(tmp_path):
    # With unequal classes and the squared error the bias takes the means of the targets, unless it has a price.
    arguments = {"counts": [12, 3], "loss": "mse", "bias": True, "weight_decay": 0.1, "feature_decay": 1e-2}
    free, _ = train(tmp_path, **arguments)
    dear, _ = train(tmp_path, bias_decay=10.0, **arguments)
    same(free.bias, torch.tensor([0.8, 0.2], dtype=torch.float64))
    assert dear.bias.abs().max() < 0.1


def test_gradient_and_objective_are_logged_for_the_weights_after_the_step(tmp_path):
    module, trainer = train(tmp_path, counts=[3, 3], max_epochs=2)
    batch = next(iter(module.train_dataloader()))
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in module.parameters())
    assert float(trainer.callback_metrics["train/objective"]) == pytest.approx(float(loss.detach()), rel=1e-12)
    assert float(trainer.callback_metrics["train/gradient"]) == pytest.approx(largest, rel=1e-9)


def test_monitor_sees_the_collapse_without_being_told_anything(tmp_path):
    monitor = NeuralCollapseMonitor(mode="exact", measures=["*"])
    _, trainer = train(tmp_path, [monitor], counts=[10] * 4, bias=True)
    values = {
        name.split("/")[1]: float(value) for name, value in trainer.callback_metrics.items() if "collapse" in name
    }
    # the squares of relative errors of about 1e-6, and the errors themselves
    assert values["nc1_pinv_over_k"] < 1e-10
    assert max(values[name] for name in ("nc2_etf_error", "nc2_weight_etf_error", "nc3", "nc4_mismatch")) < 1e-5


def test_command_line_trains_it_without_data_of_its_own(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr("sys.argv", ["lightning-feat"])
    trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": "false", "enable_progress_bar": "false"}
    options = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    options += [f"--trainer.default_root_dir={tmp_path}", "--model.counts=[3,2]"]
    run = LightningCLI(
        args=["fit", "--model=lightning_feat.baselines.UnconstrainedFeatures", *options], save_config_callback=None
    )
    assert type(run.trainer.optimizers[0]) is torch.optim.LBFGS
    loaded = UnconstrainedFeatures.load_from_checkpoint(run.trainer.checkpoint_callback.best_model_path)
    torch.testing.assert_close(loaded.features.free, run.model.features.free, rtol=0, atol=0)


def test_a_copy_trains_its_own_features(tmp_path):
    original = UnconstrainedFeatures(counts=[3, 2])
    start = original.features.free.detach().clone()
    twin = copy.deepcopy(original)
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_checkpointing=False,
    ).fit(twin)
    assert torch.equal(original.features.free, start)
    assert not torch.equal(twin.features.free, start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either counts"),
        ({"counts": [3, 2], "outputs": [[1.0]], "loss": "mse"}, "either counts"),
        ({"outputs": [[1.0]]}, "outputs need loss='mse'"),
        ({"outputs": [1.0, 2.0], "loss": "mse"}, "give a list of lists of numbers or None"),
        ({"counts": [3, 2], "loss": "hinge"}, "loss='hinge': choose 'ce' or 'mse'"),
        ({"counts": [3]}, r"counts=\[3\]: give at least two classes"),
        ({"counts": [3, 0]}, r"counts=\[3, 0\]"),
        ({"counts": [3, 2], "num_layers": 0}, "num_layers=0"),
        ({"counts": [3, 2], "feature_decay": -1.0}, "feature_decay=-1.0"),
        ({"counts": [3, 2], "init_scale": 0.0}, "init_scale=0.0"),
        ({"counts": [3, 2], "bias_decay": 1.0}, "bias_decay=1.0, but there is no bias"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnconstrainedFeatures(**arguments)


def test_features_kept_near_given_ones_reach_the_reference_solution(tmp_path):
    given = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    decays = {"weight_decay": 0.02, "feature_decay": 1e-3, "keep_weight": 5e-3}
    module, _ = train(tmp_path, counts=[5, 4, 3], num_features=4, loss="mse", given=given.tolist(), **decays)
    found = kept_features_optimum(given, module.targets, *decays.values())
    same(module.features.all(), found.features)
    same(module.weight, found.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"given": [[1.0, 2.0]], "keep_weight": 1.0}, r"given must be finite numbers of shape \(4, 2\)"),
        ({"given": [[1.0, 2.0]] * 4}, "keep_weight=0.0: with given features it must be above zero"),
        ({"keep_weight": 1.0}, "nothing to stay near to"),
        ({"given": [[1.0, -2.0]] * 4, "keep_weight": 1.0, "nonnegative": True}, "numbers below zero"),
    ],
)
def test_given_features_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnconstrainedFeatures(counts=[2, 2], num_features=2, **arguments)
