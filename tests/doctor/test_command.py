import json
import sys

import pytest
import torch

from lightning_feat.__main__ import main
from lightning_feat.data import DigitsDataModule


def ask(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["doctor", *arguments])
    return end.value.code


QUICK = ("--config", "neural_collapse/digits", "--no-cost")


def test_a_recipe_in_which_nothing_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ask(*QUICK) == 0
    assert capsys.readouterr().out.endswith("0 errors, 0 warnings, 0 notes.\n")
    assert not [*tmp_path.iterdir()]


def test_a_recipe_in_which_something_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = list(sys.argv)
    wrong = "--trainer.callbacks=[{class_path: lightning_feat.callbacks.LinearProbe, init_args: {layer: bckbone}}]"
    assert ask(*QUICK, "--json", wrong) == 1
    out = capsys.readouterr().out
    (found,) = json.loads(out[out.index("[\n") :])  # before it Lightning says what devices there are
    assert found["check"] == "layer-not-found"
    assert found["where"] == "LinearProbe[bckbone]"
    assert sys.argv == before


def test_what_cannot_be_built_is_an_error_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def broken(self, *args, **kwargs):
        raise FileNotFoundError("no digits")

    monkeypatch.setattr(DigitsDataModule, "setup", broken)
    assert ask(*QUICK) == 1
    assert "error: DigitsDataModule (training)" in capsys.readouterr().out


def test_help_names_the_options(capsys):
    assert ask("--help") == 0
    assert "--no-cost" in capsys.readouterr().out


def test_weights_are_not_downloaded(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: asked.append(a))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ask(*QUICK, "--model.init_args.num_classes", "0") == 1
    assert not asked
    capsys.readouterr()
