"""What the scripts of recipes publish comes out again from arms."""

import functools
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from lightning import seed_everything

from lightning_feat.compare import YamlArm, compare
from tests.compare import cases

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.slow
def test_the_optimizers_of_neural_collapse(tmp_path):
    script = runpy.run_path(str(RECIPES / "neural_collapse" / "digits.py"))
    base, *arms = (str(RECIPES / "neural_collapse" / f"digits{name}.yaml") for name in ("", "_adam", "_adamw"))
    options = ("--trainer.max_epochs", "10", "--lr_scheduler.init_args.T_max", "10")
    made = compare(
        {
            "sgd": YamlArm("sgd", (base,), options),
            "adam": YamlArm("adam", (base, arms[0]), options),
            "adamw": YamlArm("adamw", (base, arms[1]), options),
        },
        seeds=1,
        metrics=[script["logged"]("nc1_pinv_over_k"), script["logged"]("nc3"), "val/accuracy"],
        folder=tmp_path / "out",
        executor="inline",
        threads=1,
        share_order=False,
        quiet=True,
    )
    for record in made.records:
        points = script["train"](record.arm, 0, 10).points
        for metric in made.question.metrics:
            assert record.value(metric) == points[metric][-1][1]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("neural_collapse/imbalanced.py", "| factor | arm, minus cross-entropy | all (%) |"),
        ("feature_shift/finetune.py", "before fine-tuning, old digits, head kept: "),
        ("grassmann/subspace_dim.py", "| Grassmann, k = 8 |"),
    ],
)
@pytest.mark.slow
def test_the_scripts_around_compare_run(script, said, tmp_path):
    command = [sys.executable, str(RECIPES / script), "--fast", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert said in done.stdout
    assert list(tmp_path.glob("out/*.png"))


@pytest.mark.slow
def test_the_error_of_simplicity_bias(tmp_path):
    script = runpy.run_path(str(RECIPES / "simplicity_bias" / "spurious_digits.py"))
    epochs, rate, setting = 20, 0.05, script["SETTINGS"]["main"]

    def arm(method, seed):
        data = script["data_of"](setting, seed)
        seed_everything(seed, verbose=False)
        module = script["Perceptron"](3 * 8 * 16, script["NUM_CLASSES"], script["HIDDEN"], lr=rate)
        trainer = cases.trainer(script["callback_for"](method, data, seed), epochs=epochs)
        trainer.limit_val_batches = 0
        return trainer, module, data

    made = compare(
        {method: functools.partial(arm, method) for method in ("sgd", "useful")},
        seeds=1,
        metrics="test/accuracy",
        folder=tmp_path / "out",
        executor="inline",
        threads=1,
        share_order=False,
        test=True,
        quiet=True,
    )
    for record in made.records:
        data = script["data_of"](setting, 0)
        callback = script["callback_for"](record.arm, data, 0)
        module, _ = script["train"](data, callback, 0, epochs, rate, tmp_path)
        probe, agrees = script["Probe"].of(data, "test"), data.variant("same", "test").agrees
        error = script["measure"](script["network_on"](probe, module), probe, agrees)["error"]
        assert 0 < error == pytest.approx(1 - record.value("test/accuracy"), abs=1e-6)  # one image is 1.4e-3
