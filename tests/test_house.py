"""The arrows between the rooms point one way, and importing the package costs next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_feat"
BELOW = {  # what of ours each room may import
    "functional": {"functional"},
    "metrics": {"metrics", "functional"},
    "manifolds": {"manifolds", "functional"},
    "layers": {"layers", "manifolds", "functional"},
    "optim": {"optim", "layers", "manifolds", "functional"},
    "data": {"data"},
    "baselines": {"baselines"},
    "wraps": set(),
    "batches": set(),
    "heads": set(),
    "head_swap": {"heads", "taps", "wraps"},
    "own_parameters": set(),
    "taps": {"heads"},
    "labelled_taps": {"batches", "heads", "taps"},
    "passes": {"batches"},
    "processes": {"functional"},
    "train_loader": set(),
    "restart": {"train_loader"},
    "clip_hooks": {"heads"},
    "clip_tower": {"clip_hooks"},
    "clip_towers": {"clip_hooks", "clip_tower", "taps"},
    "reference": {"reference", "batches", "clip_towers", "functional", "heads", "passes", "taps"},
    "loss_terms": {"batches", "taps"},
    "loss_engine": {"loss_terms", "own_parameters", "wraps"},
    "doctor": {"doctor", "callbacks", "batches", "heads", "loss_engine", "loss_terms", "taps", "wraps"},
    "__main__": {"doctor"},
    "__init__": set(),
}
JOINTS = {"wraps", "batches", "heads", "head_swap", "own_parameters", "taps", "labelled_taps", "loss_terms"}
JOINTS |= {"loss_engine"}
JOINTS |= {"passes", "processes", "restart", "train_loader", "clip_hooks", "clip_tower", "clip_towers", "reference"}
BELOW["callbacks"] = {"callbacks", "metrics", "data", *BELOW["optim"], *JOINTS}
BELOW["mixins"] = {"mixins", "metrics", *BELOW["optim"], *JOINTS}
FOREIGN = {  # what of others, beside the standard library, a room may import at the top of a file
    "functional": {"torch"},
    "metrics": {"torch", "torchmetrics"},
    "manifolds": {"torch", "geoopt"},
    "layers": {"torch"},
    "optim": {"torch"},
}


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "lightning_feat"
                else [node.module]
            )


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    for name in imports(path):
        if name.startswith("lightning_feat."):
            assert name.split(".")[1] in BELOW[room(path)], f"{room(path)} may not import {name}"
    allowed = FOREIGN.get(room(path))
    if allowed is not None:
        for name in imports(path, top_level_only=True):
            first = name.split(".")[0]
            assert first in allowed | {"lightning_feat"} | sys.stdlib_module_names, (
                f"{room(path)} may not import {name}"
            )


def loaded(imported):
    """The heavy modules in memory after the imports."""
    heavy = ("torch", "lightning", "timm", "geoopt", "matplotlib", "sklearn", "rich", "tensorboard")
    code = f"import sys, {imported}; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    assert loaded("lightning_feat") == set()


def test_the_callbacks_import_nothing_heavy_that_lightning_does_not():
    assert loaded("lightning_feat.callbacks") <= loaded("lightning.pytorch, torchmetrics")
