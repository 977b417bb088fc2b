import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.baselines import TimmClassifier


class Batches(Callback):
    """Keeps what callbacks get to see in training and validation."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train.append(batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val.append(batch)


def trainer(tmp_path, callback):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    no_files = {"enable_checkpointing": False, "default_root_dir": tmp_path}
    return Trainer(max_epochs=1, num_sanity_val_steps=0, callbacks=callback, **quiet, **no_files)


def batches_of(tmp_path, sizes=(4,), **arguments):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # timm draws from the global generator
    images, targets = torch.randn(sum(sizes), 1, 32, 32), torch.arange(sum(sizes)) % 3
    loader = DataLoader(TensorDataset(images, targets), sizes[0])
    seen, module = Batches(), TimmClassifier("test_resnet", 3, in_chans=1, **arguments)
    run = trainer(tmp_path, seen)
    run.fit(module, loader, loader)
    assert torch.isfinite(run.callback_metrics["train/loss"])
    return images, targets, seen


def test_network_and_its_classifier_have_the_width_asked_for():
    module = TimmClassifier(
        "test_resnet", num_classes=7, in_chans=1, model_kwargs={"global_pool": "max"}, drop_rate=0.1
    )
    assert module.network.get_classifier().out_features == 7
    assert module.network.drop_rate == 0.1
    assert module.network.global_pool.pool_type == "max"


def test_mixup_mixes_mirror_places_and_their_targets_alike(tmp_path):
    images, targets, seen = batches_of(tmp_path, mixup_alpha=1.0)
    mixed, soft = seen.train[0]
    member = torch.eye(3)[targets]
    share = soft[1, 1]  # targets are 0, 1, 2, 0: image 1 of class 1 met image 2 of class 2
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
    torch.testing.assert_close(soft, share * member + (1 - share) * member.flip(0))


def test_cutmix_pastes_a_rectangle_and_shares_the_targets_by_its_area(tmp_path):
    images, targets, seen = batches_of(tmp_path, cutmix_alpha=1.0)
    mixed, soft = seen.train[0]
    own = (mixed == images).float().mean((1, 2, 3))
    assert ((mixed == images) | (mixed == images.flip(0))).all()
    member = torch.eye(3)[targets]
    torch.testing.assert_close(soft, own[:, None] * member + (1 - own[:, None]) * member.flip(0))


def test_last_image_of_an_odd_batch_stays_as_it_is(tmp_path):
    images, targets, seen = batches_of(tmp_path, sizes=(6, 3), mixup_alpha=1.0)
    mixed, soft = seen.train[1]
    assert torch.equal(mixed[-1], images[-1])
    assert torch.equal(soft[-1], torch.eye(3)[targets[-1]])
    assert not torch.equal(mixed[0], images[6])


def test_a_batch_of_one_image_is_not_mixed():
    module, image = TimmClassifier("test_resnet", 3, in_chans=1, cutmix_alpha=1.0), torch.randn(1, 1, 8, 8)
    mixed, soft = module._mix(image, torch.tensor([2]))
    assert torch.equal(mixed, image)
    assert soft.tolist() == [[0, 0, 1]]


class Twelve(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(12, 1, 32, 32), torch.arange(12) % 3), 4)


class OwnTransfer(Twelve):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


def test_mixing_a_datamodule_says_nothing(tmp_path):
    module, seen = TimmClassifier("test_resnet", 3, in_chans=1, mixup_alpha=1.0), Batches()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*on_after_batch_transfer.*")
        trainer(tmp_path, seen).fit(module, datamodule=Twelve())
    assert all(targets.shape == (4, 3) for _, targets in seen.train)


def test_a_datamodule_that_would_undo_the_mixing_is_refused(tmp_path):
    module = TimmClassifier("test_resnet", 3, in_chans=1, mixup_alpha=1.0)
    with pytest.raises(RuntimeError, match="the datamodule has its own on_after_batch_transfer"):
        trainer(tmp_path, Batches()).fit(module, datamodule=OwnTransfer())


def test_soft_targets_cannot_be_mixed(tmp_path):
    module = TimmClassifier("test_resnet", 3, in_chans=1, mixup_alpha=1.0)
    with pytest.raises(ValueError, match=r"need class indices .* got torch.float32 of shape \(2, 3\)"):
        trainer(tmp_path, Batches()).fit(
            module, DataLoader(TensorDataset(torch.randn(4, 1, 32, 32), torch.rand(4, 3)), 2)
        )


def test_validation_is_not_mixed(tmp_path):
    images, targets, seen = batches_of(tmp_path, mixup_alpha=1.0, cutmix_alpha=1.0)
    assert torch.equal(seen.val[0][0], images)
    assert torch.equal(seen.val[0][1], targets)


def test_mixing_leaves_the_batches_of_the_loader_alone():
    module = TimmClassifier("test_resnet", 3, in_chans=1, mixup_alpha=1.0)
    images = torch.randn(4, 1, 8, 8)
    before = images.clone()
    module._mix(images, torch.tensor([0, 1, 2, 0]))
    assert torch.equal(images, before)


def test_unknown_name_brings_the_nearest():
    with pytest.raises(ValueError, match=r"no model 'resnet_18'.*did you mean .*resnet18"):
        TimmClassifier("resnet_18", num_classes=3)


def test_cifar_stem_keeps_small_images_large():
    module = TimmClassifier("resnet18", num_classes=10, cifar_stem=True).eval()
    images = torch.zeros(1, 3, 32, 32)
    assert module.network.conv1(images).shape == (1, 64, 32, 32)
    assert module.network.forward_features(images).shape == (1, 512, 4, 4)
    assert module(images).shape == (1, 10)
    # The published count of a ResNet18 with this stem and ten classes.
    assert sum(p.numel() for p in module.parameters()) == 11_173_962


def test_cifar_stem_follows_the_channels_and_is_in_the_hyperparameters():
    module = TimmClassifier("resnet18", num_classes=3, in_chans=1, cifar_stem=True)
    assert module.network.conv1.in_channels == 1
    assert module.hparams.cifar_stem


@pytest.mark.parametrize("name", ["test_resnet", "resnet18d", "test_vit"])
def test_cifar_stem_of_a_network_that_begins_otherwise_is_refused(name):
    with pytest.raises(ValueError, match=f"{name!r} does not begin with these"):
        TimmClassifier(name, num_classes=3, cifar_stem=True)


def test_negative_alpha_is_refused():
    with pytest.raises(ValueError, match=r"mixup_alpha=-1\.0"):
        TimmClassifier("test_resnet", num_classes=3, mixup_alpha=-1.0)


def test_importing_the_room_does_not_import_timm():
    code = "import sys, lightning_feat.baselines; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
