import pytest
import torch
from lightning import seed_everything
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.baselines import UnconstrainedFeatures
from lightning_feat.callbacks.neural_collapse.regression import RegressionCollapseMonitor
from lightning_feat.functional.neural_collapse.regression import nrc1, nrc2, nrc3, nrc3_best_gamma, target_covariance
from tests.helpers import Plain, equal, loader, trainer, weights


class Regression(Plain):
    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass


def data(size, seed=0, outputs=3):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 4, generator=generator)
    mix = torch.randn(4, outputs, generator=generator)
    return TensorDataset(inputs, inputs @ mix + 0.1 * torch.randn(size, outputs, generator=generator))


def fit(tmp_path, *callbacks, epochs=2):
    seed_everything(0, verbose=False)
    module = Regression()
    run = trainer(tmp_path, callbacks=list(callbacks), max_epochs=epochs)
    run.fit(module, DataLoader(data(50), 16, shuffle=True, drop_last=True), DataLoader(data(20, seed=1), 8))
    return run, module


@pytest.mark.parametrize("part", ["train", "val"])
def test_measures_are_those_of_all_samples_at_the_weights_of_the_end(part, tmp_path):
    run, module = fit(tmp_path, RegressionCollapseMonitor(data=part))
    inputs, targets = (data(50) if part == "train" else data(20, seed=1)).tensors
    features, weight = module.net.body(inputs).detach(), module.net.fc.weight.detach()
    covariance = target_covariance(targets)
    gamma = nrc3_best_gamma(weight, covariance)
    expected = {
        "nrc1": nrc1(features, 3),
        "nrc2": nrc2(features, weight),
        "nrc3": nrc3(weight, covariance, gamma),
        "nrc3_gamma": gamma,
    }
    method = "regression_collapse" if part == "train" else "regression_collapse_val"
    for name, value in expected.items():
        # float32 features from batches of another size: the last bits of the forward differ
        assert float(run.callback_metrics[f"{method}/{name}/penultimate"]) == pytest.approx(float(value), rel=1e-5)


def test_free_features_collapse(tmp_path):
    seed_everything(0, verbose=False)
    outputs = data(40).tensors[1].tolist()
    module = UnconstrainedFeatures(
        outputs=outputs, loss="mse", bias=True, weight_decay=0.1, feature_decay=0.1 / 40, iterations=50
    )
    run = trainer(tmp_path, callbacks=[RegressionCollapseMonitor(centered=False)], max_epochs=20)
    run.fit(module)
    for name in ("nrc1", "nrc2", "nrc3"):
        assert run.callback_metrics[f"regression_collapse/{name}/penultimate"] < 1e-6


def test_training_is_bit_for_bit_what_it_is_without(tmp_path):
    _, watched = fit(tmp_path, RegressionCollapseMonitor())
    _, alone = fit(tmp_path)
    assert equal(weights(watched), weights(alone))
    assert not watched.net.fc._forward_pre_hooks


def test_hooks_go_when_the_run_breaks_off(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("broken off")

    monkeypatch.setattr(Regression, "on_train_epoch_start", fail)
    module = Regression()
    with pytest.raises(RuntimeError, match="broken off"):
        trainer(tmp_path, callbacks=[RegressionCollapseMonitor()]).fit(module, DataLoader(data(8)))
    assert not module.net.fc._forward_pre_hooks


def test_a_single_output_has_no_third_measure(tmp_path):
    class Single(Regression):
        def training_step(self, batch, batch_idx):
            return (self(batch[0])[:, 0] - batch[1]).square().mean()

    module = Single()
    module.net.fc = torch.nn.Linear(8, 1)
    inputs, targets = data(20, outputs=1).tensors
    run = trainer(tmp_path, callbacks=[RegressionCollapseMonitor()], max_epochs=1)
    run.fit(module, DataLoader(TensorDataset(inputs, targets[:, 0]), 20))
    assert {name.split("/")[1] for name in run.callback_metrics if "collapse" in name} == {"nrc1", "nrc2"}


def test_a_run_that_diverged_goes_on_and_its_measures_are_nan(tmp_path):
    module = Regression(lr=float("inf"))
    run = trainer(tmp_path, callbacks=[RegressionCollapseMonitor()], max_epochs=2)
    run.fit(module, DataLoader(data(20), 20))
    assert run.current_epoch == 2
    assert all(run.callback_metrics[f"regression_collapse/{name}/penultimate"].isnan() for name in ("nrc1", "nrc3"))


def test_class_indices_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"floating targets .* got \(8, 1\) torch.int64: .*NeuralCollapseMonitor"):
        trainer(tmp_path, callbacks=[RegressionCollapseMonitor()], max_epochs=1).fit(Plain(), loader(16))


def test_more_outputs_than_features_are_refused_at_the_start(tmp_path):
    module = Regression()
    module.net.fc = torch.nn.Linear(8, 9)
    with pytest.raises(ValueError, match="8 features into 9 outputs"):
        trainer(tmp_path, callbacks=[RegressionCollapseMonitor()]).fit(module, DataLoader(data(8)))


def test_a_head_that_is_not_linear_is_refused_at_the_start(tmp_path):
    with pytest.raises(
        ValueError, match=r"the last layer is a Sequential, but must be an nn\.Linear: name it \(argument `head`\)"
    ):
        trainer(tmp_path, callbacks=[RegressionCollapseMonitor(head="net.body")]).fit(Regression(), DataLoader(data(8)))


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="data='test'"):
        RegressionCollapseMonitor(data="test")
    with pytest.raises(ValueError, match="every_n_epochs=0"):
        RegressionCollapseMonitor(every_n_epochs=0)
