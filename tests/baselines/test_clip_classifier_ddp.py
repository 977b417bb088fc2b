"""Two processes tune and test as one does."""

import ddp_cases_clip
import pytest
from pairs import run_pair


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_tune_prompts_and_measure_as_one(tmp_path, monkeypatch):
    first, second = (found["tuned"] for found in run_pair(ddp_cases_clip.__file__, tmp_path))
    monkeypatch.chdir(tmp_path)
    alone = ddp_cases_clip.tuned(1)
    assert isinstance(first, dict), first
    assert first["prompts"] == second["prompts"] == pytest.approx(alone["prompts"], rel=1e-4, abs=1e-6)
    for name in ("test/base", "test/novel", "test/harmonic_mean", "train/loss", "prompt_gram/loss"):
        assert first[name] == second[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-9), name
    assert first["val/accuracy"] == second["val/accuracy"]
