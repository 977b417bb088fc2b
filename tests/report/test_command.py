"""``lightning-feat report`` from a configuration and checkpoints."""

import sys

import lightning.pytorch as pl
import pytest
import torch

from lightning_feat.baselines import MLPClassifier
from lightning_feat.data import DigitsDataModule
from lightning_feat.report.collecting.checkpoints import _ages
from lightning_feat.report.command import run_report
from lightning_feat.report.features_file import load_features
from tests.report.pages import body_of, data_of

CONFIG = """
seed_everything: 0
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_model_summary: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_feat.callbacks.GrassmannHead
      init_args: {subspace_dim: 2, layer: head}
model:
  class_path: lightning_feat.baselines.MLPClassifier
  init_args: {in_features: 64, num_classes: 10, hidden: [16]}
data:
  class_path: lightning_feat.data.DigitsDataModule
  init_args: {batch_size: 64}
"""
PLAIN = CONFIG.replace(
    """  callbacks:
    - class_path: lightning_feat.callbacks.GrassmannHead
      init_args: {subspace_dim: 2, layer: head}
""",
    "",
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of two moments of one training."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    module = MLPClassifier(in_features=64, num_classes=10, hidden=[16])
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    for name, epochs in (("first", 1), ("last", 4)):
        run = pl.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=folder, num_sanity_val_steps=0, **quiet)
        run.fit(module, datamodule=DigitsDataModule(batch_size=64))
        run.save_checkpoint(folder / f"{name}.ckpt")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(PLAIN)
    (tmp_path / "subspaces.yaml").write_text(CONFIG)
    return tmp_path


def test_the_page_is_about_the_weights_in_the_checkpoint(checkpoints, here, capsys):
    command = ["--config", "run.yaml", "--ckpt_path", str(checkpoints / "last.ckpt"), "--save", "f.safetensors"]
    assert run_report([*command, "--out", "page.html", "--title", "Mine"]) == 0
    module = MLPClassifier.load_from_checkpoint(checkpoints / "last.ckpt").eval()
    data = DigitsDataModule(batch_size=64)
    data.setup("fit")
    x, y = (torch.cat(part) for part in zip(*data.val_dataloader(), strict=True))
    with torch.no_grad():
        logits = module(x)
    kept = load_features("f.safetensors")
    assert torch.allclose(kept.logits, logits, atol=1e-6)
    assert torch.equal(kept.targets, y)
    assert f"accuracy{'':33}{float((logits.argmax(1) == y).double().mean()):.4g}" in capsys.readouterr().out
    assert "last.ckpt, val data" in body_of(here / "page.html")
    assert data_of(here / "page.html")["sheet"]["tiles"] == len(y)
    assert {path.name for path in here.iterdir()} == {"run.yaml", "subspaces.yaml", "page.html", "f.safetensors"}


def test_two_checkpoints_show_movement_and_what_was_learned_last(checkpoints, here):
    paths = [part for name in ("last", "first") for part in ("--ckpt_path", str(checkpoints / f"{name}.ckpt"))]
    assert run_report(["--config", "run.yaml", *paths, "--out", "page.html"]) == 0
    body, data = body_of(here / "page.html"), data_of(here / "page.html")
    assert "Between first.ckpt, val data and last.ckpt, val data" in body
    assert "were right from first.ckpt on" in body
    assert len(data["panels"]["movement-all"]["charts"][0]["data"]["values"]) == 11


def test_the_training_data_and_a_head_of_subspaces(here):
    assert (
        run_report(["--config", "subspaces.yaml", "--data", "train", "--out", "page.html", "--max_samples", "200"]) == 0
    )
    panels = data_of(here / "page.html")["panels"]
    assert len(panels["subspaces-all"]["charts"][0]["data"]["values"]) == 100
    assert "200 of 1,079 samples, drawn with seed 0" in body_of(here / "page.html")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layer", "hed"], "no layer 'hed'"),
        (["--model.init_args.hiden", "[3]"], "cannot be built"),
    ],
)
def test_what_cannot_be_is_said_without_a_traceback(arguments, said, here, capsys):
    assert run_report(["--config", "run.yaml", "--out", "page.html", *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (here / "page.html").exists()


def test_data_that_the_run_does_not_have_are_named(here, capsys):
    (here / "mine.py").write_text(
        "from lightning.pytorch import LightningDataModule\nfrom lightning_feat.data import DigitsDataModule\n"
        "class NoTest(DigitsDataModule):\n"
        "    def test_dataloader(self):\n        return LightningDataModule.test_dataloader(self)\n"
    )
    config = PLAIN.replace("lightning_feat.data.DigitsDataModule", "mine.NoTest")
    (here / "run.yaml").write_text(config)
    sys.path.insert(0, str(here))
    try:
        assert run_report(["--config", "run.yaml", "--out", "page.html", "--data", "test"]) == 2
    finally:
        sys.path.remove(str(here))
    assert "the run has no test data" in capsys.readouterr().err.splitlines()[-1]


class Thing:
    """An object of a user's in a checkpoint."""


@pytest.mark.parametrize("given", [["last", "first"], ["first", "last"]])
def test_checkpoints_are_ordered_by_their_steps_and_as_given_where_one_does_not_say(checkpoints, tmp_path, given):
    paths = [str(checkpoints / f"{name}.ckpt") for name in given]
    ages = _ages(paths)
    assert (ages[0] > ages[1]) == (given[0] == "last")
    content = torch.load(paths[0], weights_only=False)
    content["thing"] = Thing()
    torch.save(content, tmp_path / "with_thing.ckpt")
    with pytest.warns(UserWarning, match="with_thing.ckpt has behind it cannot be read.*from the latest"):
        assert _ages([str(tmp_path / "with_thing.ckpt"), paths[1]]) == [0, -1]
    assert _ages([None, paths[1]])[0] == -1
