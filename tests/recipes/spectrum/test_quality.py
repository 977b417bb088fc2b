"""The comparison of trainings by label-free numbers runs, and its parts are what they say."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from lightning_feat.__main__ import recipe_folder

SCRIPT = recipe_folder() / "spectrum" / "quality.py"


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("spectrum_quality", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_view_stays_close_to_its_image_and_two_differ(quality):
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(50, 1, 3, 3), size=8, mode="bilinear")
    views = quality.view(images)
    assert views.shape == images.shape
    assert (views - images).square().mean() < (views - images.flip(0)).square().mean() / 2
    assert not torch.equal(views, quality.view(images))


def test_the_correlation_is_of_ranks(quality):
    runs = {
        (setting.name, 0): {"accuracy": 0.5 + 0.01 * place, "rankme": float(place) ** 3, "decay": -float(place)}
        for place, setting in enumerate(quality.SETTINGS)
    }
    assert quality.correlation(runs, 0, "rankme") == pytest.approx(1)
    assert quality.correlation(runs, 0, "decay") == pytest.approx(-1)


@pytest.mark.slow
def test_the_script_prints_its_tables_and_draws(tmp_path):
    command = [sys.executable, str(SCRIPT), "--fast", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in done.stdout
    assert len(table.splitlines()) == 2 + 16 + 1 + 2 + 6
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + 16 * 2
    assert (tmp_path / "quality.png").stat().st_size > 10000
