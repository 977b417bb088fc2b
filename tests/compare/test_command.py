"""``lightning-feat compare`` with arms from YAML."""

import subprocess
import sys

import pytest
import yaml

from lightning_feat.compare import YamlArm
from lightning_feat.compare.command import run_compare

BASE = """
trainer:
  max_epochs: 1
  limit_train_batches: 3
  limit_val_batches: 2
  accelerator: cpu
  logger: false
  num_sanity_val_steps: 0
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_feat.callbacks.NeuralCollapseMonitor
      init_args: {mode: exact, data: val}
model:
  class_path: lightning_feat.baselines.MLPClassifier
  init_args: {in_features: 64, num_classes: 10, hidden: [16]}
data:
  class_path: lightning_feat.data.DigitsDataModule
  init_args: {batch_size: 32}
"""
HEAD = """
trainer:
  callbacks+:
    - class_path: lightning_feat.callbacks.GrassmannHead
      init_args: {subspace_dim: 2, layer: head}
"""
RATE = "model: {init_args: {lr: 0.5}}\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("base", BASE), ("head", HEAD), ("rate", RATE), ("wrong", "model: {init_args: {rl: 0.5}}\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def callbacks(trainer):
    return [type(callback).__name__ for callback in trainer.callbacks if "Lightning" not in type(callback).__name__]


def test_an_arm_appends_callbacks_and_changes_options(files):
    built = YamlArm("both", ("base.yaml", "head.yaml", "rate.yaml"), ("--trainer.max_epochs", "7")).build(3)
    assert callbacks(built.trainer)[:2] == ["NeuralCollapseMonitor", "GrassmannHead"]
    assert built.module.hparams.lr == 0.5
    assert built.trainer.max_epochs == 7
    assert yaml.safe_load(built.config)["seed_everything"] == 3


def test_options_are_the_same_for_all_seeds_of_an_arm(files):
    arm = YamlArm("base", ("base.yaml",), seed_options=("data.init_args.seed",))
    built = [arm.build(seed) for seed in (0, 1)]
    assert [part.data.seed for part in built] == [0, 1]
    assert built[0].options == built[1].options
    assert (
        built[0].options != YamlArm("rate", ("base.yaml", "rate.yaml"), seed_options=arm.seed_options).build(0).options
    )


def test_the_digest_follows_what_the_files_say_and_not_their_layout(files):
    arm = YamlArm("rate", ("base.yaml", "rate.yaml"))
    before = arm.digest()
    (files / "rate.yaml").write_text("# a comment\nmodel:\n  init_args:\n    lr: 0.5\n")
    assert arm.digest() == before
    (files / "rate.yaml").write_text("model: {init_args: {lr: 0.4}}\n")
    assert arm.digest() != before


def test_a_wrong_option_is_told_by_its_name(files):
    with pytest.raises(ValueError, match="rl"):
        YamlArm("wrong", ("base.yaml", "wrong.yaml")).build(0)


def test_from_yaml_to_the_answer(files, capsys):
    command = ["--config", "base.yaml", "--arm", "head=head.yaml", "--seeds", "2", "--executor", "inline"]
    assert run_compare([*command, "--folder", "out", "--metric", "val/loss", "--trainer.max_epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert "head, val/loss: " in said
    assert (
        "head shares with base at the start, seed by seed: first weights (2 tensors; 2 of base alone, 1 of head alone)"
        in said
    )
    assert said.count("| head | 2 |") == 1
    table = (files / "out" / "table.md").read_text()
    config = files / "out" / "runs" / "head" / "seed_1" / "config.yaml"
    assert yaml.safe_load(config.read_text())["trainer"]["max_epochs"] == 2
    assert run_compare(["--report", "out"]) == 0
    assert table in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give the base by --config FILE, or finished runs by --report FOLDER"),
        (["--config", "base.yaml"], "give an arm to compare with the base"),
        (["--config", "base.yaml", "--arm", "head.yaml"], "'head.yaml': give NAME=VALUE"),
        (["--config", "base.yaml", "--arm", "head=haed.yaml"], "there is no file 'haed.yaml'"),
        (["--config", "base.yaml", "--arm", "a=head.yaml", "--arm", "a=rate.yaml"], "two arms of the name 'a'"),
        (["--config", "base.yaml", "--arm", "a=head.yaml", "--seeds", "ten"], "--seeds ten: give how many"),
        (["--config", "base.yaml", "--arm", "a=head.yaml", "--bounds", "x=1"], "--bounds 1: give LOW,HIGH"),
        (["--config", "base.yaml", "--arm", "a=wrong.yaml", "--executor", "inline"], "arm 'a' cannot be built: "),
        (["--config", "base.yaml", "--arm", "a=rate.yaml", "--executor", "inline", "--metric", "acc"], "no run logged"),
        (
            ["--config", "base.yaml", "--arm", "a=rate.yaml", "--executor", "inline", "--metric", "val/acuracy"],
            "one batch of training and validation logged no 'val/acuracy'; nearest: val/accuracy",
        ),
        (["--report", "out", "--metrc", "val/loss"], "--report takes finished runs: leave out --metrc val/loss"),
        (["--report", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_mistakes_end_with_a_sentence_and_no_traceback(arguments, said, files, capsys):
    assert run_compare(arguments) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("lightning-feat compare: ")
    assert said in err.splitlines()[-1]


def test_the_help_and_waiting_need_neither_torch_nor_lightning():
    code = "import sys, lightning_feat.compare.command; sys.exit(bool({'torch', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_the_command_in_processes(files):
    command = [sys.executable, "-m", "lightning_feat", "compare", "--config", "base.yaml", "--arm", "rate=rate.yaml"]
    done = subprocess.run([*command, "--seeds", "2", "--jobs", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rate, val/accuracy: " in done.stdout
    assert (files / "comparison" / "comparison.png").is_file()
