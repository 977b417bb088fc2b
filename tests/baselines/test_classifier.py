"""What both baselines share: the optimizer nobody named, the command line, checkpoints, errors."""

import copy
import math
import pickle
import warnings
from functools import partial
from types import MethodType

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.baselines import CubicCNN, MLPClassifier, TimmClassifier, UnconstrainedFeatures
from lightning_feat.baselines.baseline import Baseline
from lightning_feat.baselines.classifier import Classifier


def loader(num_samples=24, batch_size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_samples, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(num_samples) % 3), batch_size)


def trainer(tmp_path, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(
        **{"default_root_dir": tmp_path, "enable_checkpointing": False, "max_epochs": 2, **quiet, **arguments}
    )


MODULES = [lambda: MLPClassifier(64, 3, hidden=(8,)), lambda: TimmClassifier("test_resnet", 3, in_chans=1)]


@pytest.mark.parametrize("make", MODULES)
def test_fits_validates_and_tests_in_a_plain_trainer(make, tmp_path):
    module, run = make(), trainer(tmp_path)
    run.fit(module, loader(), loader())
    assert {"train/loss", "val/loss", "val/accuracy"} <= set(run.callback_metrics)
    run.test(module, loader(), verbose=False)
    assert {"test/loss", "test/accuracy"} <= set(run.callback_metrics)


def test_logged_loss_and_accuracy_are_those_of_all_samples_together(tmp_path):
    module, run = MLPClassifier(64, 3), trainer(tmp_path)
    run.fit(module, loader(20, 8))  # so that it predicts several classes
    run.validate(module, loader(20, 8), verbose=False)  # batches of 8, 8 and 4
    images, targets = loader(20, 8).dataset.tensors
    logits = module.eval()(images)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(run.callback_metrics["val/loss"], expected)
    assert run.callback_metrics["val/accuracy"] == (logits.argmax(1) == targets).float().mean()


def test_label_smoothing_is_in_the_training_loss_only(tmp_path):
    module, run = MLPClassifier(64, 3, label_smoothing=0.3, lr=0.0), trainer(tmp_path, max_epochs=1)
    run.fit(module, loader(), loader())
    images, targets = loader().dataset.tensors
    logits = module.eval()(images)
    smooth = 0.7 * torch.eye(3)[targets] + 0.1
    by_hand = -(smooth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(run.callback_metrics["train/loss"], by_hand)
    torch.testing.assert_close(
        run.callback_metrics["val/loss"], torch.nn.functional.cross_entropy(logits, targets).detach()
    )


def test_predict_gives_logits(tmp_path):
    module, run = MLPClassifier(64, 3), trainer(tmp_path)
    images = loader().dataset.tensors[0]
    torch.testing.assert_close(torch.cat(run.predict(module, loader())), module.eval()(images).detach())


def test_default_optimizer_anneals_its_learning_rate_over_the_run(tmp_path):
    module, run = MLPClassifier(64, 3, lr=0.2, weight_decay=0.01), trainer(tmp_path, max_steps=4, max_epochs=-1)
    rates = []
    module.on_train_batch_start = lambda *_: rates.append(run.optimizers[0].param_groups[0]["lr"])
    run.fit(module, loader())
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])
    group = run.optimizers[0].param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 0.01)


def test_default_optimizer_keeps_its_rate_where_the_run_has_no_end(tmp_path):
    module, run = MLPClassifier(64, 3), trainer(tmp_path, max_epochs=-1, max_time={"seconds": 1})
    module.on_train_batch_end = lambda *_: setattr(run, "should_stop", True)
    run.fit(module, loader())
    assert run.lr_scheduler_configs == []


def test_default_optimizer_serves_without_a_trainer():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(MLPClassifier(64, 3).configure_optimizers()["optimizer"], torch.optim.SGD)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_default_optimizer_survives_copies(copied, tmp_path):
    original = MLPClassifier(64, 3, hidden=(4,))
    twin = copied(original)
    run = trainer(tmp_path)
    run.fit(twin, loader())
    assert {id(p) for p in run.optimizers[0].param_groups[0]["params"]} == {id(p) for p in twin.parameters()}


def test_own_configure_optimizers_of_a_subclass_is_seen_as_written():
    class Own(MLPClassifier):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    assert is_overridden("configure_optimizers", Own(64, 3))
    assert not is_overridden("configure_optimizers", MLPClassifier(64, 3))


MLP = ["--model=lightning_feat.baselines.MLPClassifier", "--model.in_features=256", "--model.num_classes=10"]
TIMM = ["--model=lightning_feat.baselines.TimmClassifier", "--model.model_name=test_resnet", "--model.in_chans=1"]
TIMM += ["--model.num_classes=10", "--model.model_kwargs={global_pool: max}"]
DATA = ["--data=lightning_feat.data.DigitsDataModule", "--data.train_per_class=4", "--data.image_size=16"]
ADAM = ["--optimizer=Adam", "--optimizer.lr=0.001", "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.9"]


def command_line(model, optimizer, tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr("sys.argv", ["lightning-feat"])
    pytest.importorskip("sklearn")
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]
    size = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*overridden.*")  # of configure_optimizers, or of a data hook
        return LightningCLI(args=["fit", *model, *DATA, *optimizer, *quiet, *size], save_config_callback=None)


@pytest.mark.parametrize("model", [MLP, TIMM])
def test_optimizer_of_the_command_line_replaces_the_default_without_a_warning(model, tmp_path, monkeypatch):
    run = command_line(model, ADAM, tmp_path, monkeypatch).trainer
    assert type(run.optimizers[0]) is torch.optim.Adam
    assert type(run.lr_scheduler_configs[0].scheduler) is torch.optim.lr_scheduler.ExponentialLR


@pytest.mark.parametrize("model", [MLP, TIMM])
def test_command_line_without_an_optimizer_trains_with_the_default(model, tmp_path, monkeypatch):
    run = command_line(model, [], tmp_path, monkeypatch).trainer
    assert type(run.optimizers[0]) is torch.optim.SGD
    assert type(run.lr_scheduler_configs[0].scheduler) is torch.optim.lr_scheduler.CosineAnnealingLR


@pytest.mark.parametrize("model", [MLP, TIMM])
@pytest.mark.parametrize("optimizer", [ADAM, []])
def test_checkpoint_of_the_command_line_loads_again(model, optimizer, tmp_path, monkeypatch):
    module = command_line(model, optimizer, tmp_path, monkeypatch).model
    (path,) = tmp_path.rglob("*.ckpt")
    torch.load(path, weights_only=True)
    again = type(module).load_from_checkpoint(path)
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(again.eval()(images), module.eval()(images))


@pytest.mark.parametrize("make", MODULES)
def test_checkpoint_loads_without_arguments_and_without_code(make, tmp_path):
    module, run = make(), trainer(tmp_path, max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    again = type(module).load_from_checkpoint(tmp_path / "last.ckpt")
    assert dict(again.hparams) == dict(module.hparams)
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(again.eval()(images), module.eval()(images))


def test_target_beyond_the_classes_is_named(tmp_path):
    with pytest.raises(ValueError, match="num_classes=2, but a target is 2"):
        trainer(tmp_path).fit(MLPClassifier(64, 2), loader())


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ({"image": torch.zeros(2, 64), "label": torch.zeros(2)}, r"a dict with keys \['image', 'label'\]"),
        (torch.zeros(2, 64), "a Tensor"),
        ([[torch.zeros(2, 64), torch.zeros(2)], torch.arange(2)], r"a list of \(list, Tensor\)"),
    ],
)
def test_batch_without_images_and_targets_is_described(batch, named):
    with pytest.raises(ValueError, match=f"begin with images and targets, got {named}"):
        MLPClassifier(64, 3).training_step(batch, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLPClassifier(**{"in_features": 4, "num_classes": 3, **arguments})


def test_base_is_a_plain_lightning_module():
    assert Classifier.__mro__[1:3] == (Baseline, LightningModule)


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: MLPClassifier(64, 3, lr=5.0), "lr=5.0"),
        (lambda: MLPClassifier(64, 3, weight_decay=0.0), "weight_decay=0.0"),
        (lambda: CubicCNN(momentum=0.5), "momentum=0.5"),
        (lambda: UnconstrainedFeatures(counts=[2, 2], iterations=5), "iterations=5"),
    ],
)
def test_an_option_of_an_optimizer_that_another_replaces_is_refused(make, option):
    module = make()
    replaced = partial(LightningCLI.configure_optimizers, optimizer=torch.optim.Adam(module.parameters()))
    with pytest.raises(ValueError, match=f"{option}: this belongs to the default optimizer.*Adam.*--optimizer"):
        module.configure_optimizers = MethodType(replaced, module)
    assert type(module.configure_optimizers) is partial  # still the default, before there is a Trainer


def test_an_optimizer_set_on_the_instance_is_taken_and_can_be_taken_away():
    module = MLPClassifier(64, 3, lr=5.0)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=module.lr)
    assert module.configure_optimizers().param_groups[0]["lr"] == 5.0
    del module.configure_optimizers
    assert type(module.configure_optimizers()) is dict


def test_without_options_another_optimizer_may_come():
    module = MLPClassifier(64, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module.configure_optimizers = MethodType(partial(LightningCLI.configure_optimizers, optimizer=optimizer), module)
    assert module.configure_optimizers() is optimizer
    assert module.hparams["lr"] is None
