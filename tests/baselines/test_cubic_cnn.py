import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.nn.functional import cross_entropy

from lightning_feat.baselines.cubic_cnn import CubicCNN
from lightning_feat.callbacks import NeuralCollapseMonitor
from lightning_feat.data.synthetic.two_feature_patches import FAST_AXIS, SLOW_AXIS, TwoFeaturePatchesDataModule
from lightning_feat.joints.features.heads import find_classifier
from tests.helpers import trainer


def by_definition(module, patches):
    """The sum over filters and patches of the cubes, one after the other."""
    weight = module.backbone.weight
    return torch.stack([sum((w @ patch) ** 3 for w in weight for patch in example) for example in patches])


def example(seed=0):
    torch.manual_seed(seed)
    return CubicCNN(patch_size=6, num_filters=4, init_scale=0.5), torch.randn(5, 3, 6)


def test_logits_are_half_the_sum_of_cubes_and_its_negative():
    module, patches = example()
    output = by_definition(module, patches)
    torch.testing.assert_close(module(patches), torch.stack([-output / 2, output / 2], dim=1))


def test_cross_entropy_of_the_logits_is_the_logistic_loss_with_its_gradient():
    module, patches = example()
    targets = torch.tensor([0, 1, 1, 0, 1])
    sign = 2.0 * targets - 1
    logistic = (1 + (-sign * by_definition(module, patches)).exp()).log().mean()
    entropy = cross_entropy(module(patches), targets)
    torch.testing.assert_close(entropy, logistic)
    slopes = [torch.autograd.grad(loss, module.backbone.weight)[0] for loss in (entropy, logistic)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)  # float32: sums in another order


def test_the_order_of_the_patches_does_not_matter():
    module, patches = example()
    torch.testing.assert_close(module(patches), module(patches[:, [2, 0, 1]]))


def test_default_training_is_gradient_descent_on_the_filters_alone(tmp_path):
    data = TwoFeaturePatchesDataModule(batch_size=100, num_train=100, num_val=10)
    torch.manual_seed(0)
    module = CubicCNN(init_scale=0.3, lr=0.2)
    start = module.backbone.weight.detach().clone().requires_grad_()
    data.setup()
    output = (data.train_set.patches @ start.T).pow(3).sum((1, 2))
    sign = 2.0 * data.train_set.targets - 1
    slope = torch.autograd.grad((1 + (-sign * output).exp()).log().mean(), start)[0]
    trainer(tmp_path, max_epochs=1).fit(module, data)
    torch.testing.assert_close(module.backbone.weight, start - 0.2 * slope)
    assert torch.equal(module.head.weight, torch.tensor([[-0.5], [0.5]]).expand(2, 40))


def test_the_fast_feature_is_learned_before_the_slow_one(tmp_path):
    data = TwoFeaturePatchesDataModule(batch_size=500, num_train=500, num_val=10)
    torch.manual_seed(0)
    module = CubicCNN(lr=1.0)
    start = module.backbone.weight.detach().clone()
    run = trainer(tmp_path, max_epochs=60)
    run.fit(module, data)
    grown = (module.backbone.weight.detach().amax(0) / start.amax(0))[[FAST_AXIS, SLOW_AXIS]]
    assert grown[0] > 50
    assert grown[1] < 1.1
    assert run.callback_metrics["train/loss"] < 0.2


def test_monitors_find_features_and_classifier(tmp_path):
    module = CubicCNN()
    assert find_classifier(module) == ("head", module.head)
    assert module.backbone(torch.zeros(7, 3, 50)).shape == (7, 40)
    run = trainer(tmp_path, max_epochs=2, callbacks=NeuralCollapseMonitor(mode="exact"))
    run.fit(module, TwoFeaturePatchesDataModule(num_train=200, num_val=10))
    assert any(name.startswith("neural_collapse/nc1") for name in run.callback_metrics)


def test_command_line_trains_it(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr("sys.argv", ["lightning-feat"])
    options = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false", "--model.lr=0.3"]
    options += [f"--trainer.default_root_dir={tmp_path}", "--data.num_train=100", "--data.slow_strength=0.5"]
    options += ["--trainer.enable_progress_bar=false"]
    names = ["--model=lightning_feat.baselines.cubic_cnn.CubicCNN"]
    names += ["--data=lightning_feat.data.synthetic.two_feature_patches.TwoFeaturePatchesDataModule"]
    run = LightningCLI(args=["fit", *names, *options], save_config_callback=None)
    assert type(run.trainer.optimizers[0]) is torch.optim.SGD
    loaded = CubicCNN.load_from_checkpoint(run.trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert torch.equal(loaded.backbone.weight, run.model.backbone.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 0}, "patch_size=0"),
        ({"num_filters": 0}, "num_filters=0"),
        ({"init_scale": 0.0}, "init_scale=0.0: at zero weights the gradient is zero"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        CubicCNN(**arguments)
