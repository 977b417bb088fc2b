"""The CIFAR recipes, on a few generated images."""

import subprocess
import sys

import pytest
import torch
import yaml

from lightning_feat.__main__ import find_recipe
from lightning_feat.data import Selection, write_example_cifar

RECIPES = {"cifar10": "simplicity_bias/cifar10", "cifar100": "simplicity_bias/cifar100"}
SEPARATING = {"cifar10": 0.04, "cifar100": 0.1}  # of 200 epochs: 8 and 20


def settings(name):
    with open(find_recipe(RECIPES[name])) as file:
        return yaml.safe_load(file)


def lightning_feat(folder, *arguments):
    command = [sys.executable, "-m", "lightning_feat", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_the_protocol(name):
    """200 epochs, batches of 128, SGD at 0.1, a tenth at half and at three quarters; slow examples twice."""
    recipe = settings(name)
    assert recipe["trainer"]["max_epochs"] == 200
    assert recipe["data"]["init_args"]["batch_size"] == 128
    assert recipe["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    assert recipe["lr_scheduler"]["init_args"] == {"milestones": [100, 150], "gamma": 0.1}
    assert recipe["trainer"]["callbacks"][0]["init_args"] == {"separating_epoch": SEPARATING[name], "factor": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_chooses_starts_again_and_is_tested(name, tmp_path):
    """Two epochs after one: all as configured but for numbers, and the narrowest ResNet of the kind."""
    write_example_cifar(tmp_path / "images", name, train_images=8 if name == "cifar10" else 40, test_images=8)
    recipe = settings(name)
    recipe["trainer"].update(max_epochs=2, accelerator="cpu")
    recipe["trainer"]["callbacks"][0]["init_args"]["separating_epoch"] = 0.5
    recipe["model"]["init_args"]["model_kwargs"]["channels"] = [8, 8, 8, 8]
    recipe["data"]["init_args"].update(root=str(tmp_path / "images"), batch_size=16, num_workers=0)
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(recipe))
    lightning_feat(tmp_path, "fit", "--config", "short.yaml")

    run = tmp_path / "runs" / f"simplicity_bias_{name}" / "version_0"
    selection = Selection.load(run / "selection.pt")
    assert (len(selection.slow), selection.epoch, selection.factor) == (40, 1, 2)
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    shown = 40 + int(selection.slow.sum())
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2 * -(-shown // 16)  # the second part alone
    tested = lightning_feat(tmp_path, "test", "--config", "short.yaml", "--ckpt_path", str(checkpoint))
    assert "test/accuracy" in tested


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", ["", "null"])
def test_recipe_as_it_stands_runs_for_a_moment(callbacks, tmp_path):
    """With and without the callback."""
    write_example_cifar(tmp_path, train_images=2, test_images=2)
    command = ["fit", "--config", RECIPES["cifar10"], "--data.root", str(tmp_path), "--trainer.fast_dev_run", "true"]
    command += ["--data.num_workers", "0", "--data.batch_size", "2", "--trainer.accelerator", "cpu"]
    lightning_feat(tmp_path, *command, *(["--trainer.callbacks", callbacks] if callbacks else []))
