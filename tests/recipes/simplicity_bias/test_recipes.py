"""The scripts of the simplicity-bias method: what they compute by hand, and that they run."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_feat.__main__ import recipe_folder
from lightning_feat.baselines.cubic_cnn import CubicCNN

SCRIPT = recipe_folder() / "simplicity_bias" / "theory.py"


@pytest.fixture(scope="module")
def theory():
    spec = importlib.util.spec_from_file_location("simplicity_bias_theory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_gradient_by_hand_is_that_of_autograd_with_copies(theory):
    setting = theory.PAPER._replace(iterations=30, every=30, lr=1.0, slow_strength=0.5)
    task = theory.draw_task(0, setting, num_examples=200)
    counts = 1 + torch.arange(200) % 3
    run = theory.descend(task, setting, counts)

    torch.manual_seed(0)
    module = CubicCNN()
    assert torch.equal(module.backbone.weight, task.weight)
    copies = torch.arange(200).repeat_interleave(counts)
    optimizer = torch.optim.SGD([module.backbone.weight], lr=1.0)
    for _ in range(30):
        optimizer.zero_grad()
        cross_entropy(module(task.train.patches[copies]), task.train.targets[copies]).backward()
        optimizer.step()
    loss = cross_entropy(module(task.train.patches), task.train.targets).detach()
    found = module.backbone.weight.detach()
    # 30 steps in float32, sums in another order
    assert run.fast[-1] == pytest.approx(float(found[:, theory.FAST_AXIS].max()), rel=1e-4)
    assert run.slow[-1] == pytest.approx(float(found[:, theory.SLOW_AXIS].max()), rel=1e-4)
    assert run.loss[-1] == pytest.approx(float(loss), rel=1e-5)
    assert run.error[-1] == pytest.approx(
        float((module(task.train.patches).argmax(1) != task.train.targets).float().mean())
    )


def test_the_fast_feature_is_learned_when_predicted_and_separates_the_rest(theory):
    setting = theory.PAPER._replace(iterations=500)
    task = theory.draw_task(0, setting, num_examples=1000)
    run = theory.descend(task, setting, select=True)
    fast, _ = theory.predicted(task, setting, factor=1)
    # The growth is that of one filter without noise; full batches take a little longer.
    assert theory.learned(run.fast, setting) == pytest.approx(fast, rel=0.1)
    assert run.slow[-1] == pytest.approx(run.slow[0], rel=0.05)
    found = run.selections[theory.chosen(run, setting, theory.KNEE_OF_LOSS)]
    assert min(found.precision, found.recall) >= 0.95
    # the error is at its knee before the outputs are apart
    early = run.selections[theory.chosen(run, setting, theory.KNEE_OF_ERROR)]
    assert early.precision < 0.8


def test_a_plain_slow_drop(theory):
    values = [1.0, 0.8, 0.5, 0.45, 0.44, 0.3]
    assert theory.first_slow_drop(values, 100, bounded=False) == 4  # the drop of 0.05 is less than a quarter of 0.3
    assert theory.first_slow_drop(values, 100, bounded=True) == 4
    assert theory.first_slow_drop(values, 20, bounded=True) == 2  # at most a tenth


@pytest.mark.slow
def test_the_script_prints_its_tables_and_draws(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.strip() in done.stdout
    per_seed = table.split("| all |")[0]  # the first table, without its last line
    assert len(re.findall(r"^\| \d \|", per_seed, flags=re.MULTILINE)) == 2  # a line for each seed
    assert (tmp_path / "out" / "theory.png").stat().st_size > 10000
