"""The page of ``compare`` says what works."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_feat.compare.command import _parser, run_compare
from tests.compare.test_command import BASE, RATE

PAGE = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_first_command_and_its_arm_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("base", BASE), ("head", blocks("yaml")[0]), ("rate", RATE)):
        Path(f"{name}.yaml").write_text(text)
    command = shlex.split(blocks("")[0])
    assert command[:2] == ["lightning-feat", "compare"]
    assert run_compare([*command[2:], "--seeds", "2", "--executor", "inline"]) == 0
    assert {path.name for path in Path("comparison").iterdir()} >= {"table.md", "cost.md", "runs.csv", "comparison.pdf"}
    assert "head, val/accuracy: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    (tmp_path / "script.py").write_text(blocks("python")[0])
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "head, val/loss:min: " in done.stdout


def test_the_options_it_names_are_there():
    ours = {option for action in _parser()._actions for option in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert named - ours == {"--trainer", "--seed"}  # of fit: --trainer.max_epochs, --seed_everything
