"""Every python block in a README and on a page of docs/ runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "recipes").rglob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SLOW = {"docs/compare.md"}  # a study of six runs
BLOCKS = [
    pytest.param(
        block,
        id=f"{path.relative_to(ROOT)}-{i}",
        marks=[pytest.mark.slow, pytest.mark.timeout(1200)] if str(path.relative_to(ROOT)) in SLOW else [],
    )
    for path in READMES
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, tmp_path):
    (tmp_path / "block.py").write_text(block)  # a file: what a block starts in processes of its own is found there
    done = subprocess.run([sys.executable, "-W", "ignore", "block.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_blocks():
    assert len(BLOCKS) >= 2
