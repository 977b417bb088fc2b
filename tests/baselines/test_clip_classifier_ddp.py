"""Two processes tune and test as one does."""

import pytest

from tests.baselines import clip_classifier_ddp_cases
from tests.pairs import run_pair


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_tune_prompts_and_measure_as_one(tmp_path, monkeypatch):
    first, second = (found["tuned"] for found in run_pair(clip_classifier_ddp_cases, tmp_path))
    monkeypatch.chdir(tmp_path)
    alone = clip_classifier_ddp_cases.tuned(1)
    assert isinstance(first, dict), first
    assert first["prompts"] == second["prompts"] == pytest.approx(alone["prompts"], rel=1e-4, abs=1e-6)
    for name in ("test/base", "test/novel", "test/harmonic_mean", "train/loss", "prompt_gram/loss"):
        assert first[name] == second[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-9), name
    assert first["val/accuracy"] == second["val/accuracy"]
