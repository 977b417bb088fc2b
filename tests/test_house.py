"""The arrows between the rooms point one way, families keep to themselves, and importing the package costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_feat"
FAMILIES = {"neural_collapse", "grassmann", "simplicity_bias", "feature_shift", "transfer", "spectrum"}
BY_FAMILY = ("callbacks", "functional")  # the kinds that have a room for each family
SHARED = {  # what stands beside the families in a kind
    "callbacks": {"reports", "data_plan", "feature_regularizer", "after_training"},
    "functional": {"common"},
    "metrics": {"common"},
    "manifolds": set(),
    "layers": set(),
    "optim": set(),
    "mixins": {"loss_terms", "callbacks"},
}
EVERYWHERE = "joints/arguments"  # what every room may import: a file of the standard library alone
BELOW = {  # what of ours each room may import, beside itself
    "functional": set(),
    "metrics": {"functional"},
    "manifolds": {"functional"},
    "layers": {"functional", "manifolds"},
    "optim": {"functional", "manifolds", "layers"},
    "data": set(),
    "baselines": set(),
    EVERYWHERE: set(),
    "joints/run": set(),
    "joints/features": set(),
    "joints/module": {"joints/features", "joints/run"},
    "joints/loss": {"joints/features", "joints/module"},
    "joints/data": {"joints/features", "joints/module", "joints/run", "functional"},
    "joints/clip": {"joints/features"},
    "joints/reference": {"joints/features", "joints/data", "joints/clip", "functional"},
    "report": {"functional", "joints"},
    "callbacks": {"functional", "metrics", "layers", "optim", "data", "joints", "report"},
    "mixins": {"callbacks", "joints"},
    "doctor": {"callbacks", "functional", "joints"},
    "compare": {"callbacks"},
    "__main__": {"doctor", "compare", "report"},
}
ACROSS = {  # which family's callbacks use those of another
    "simplicity_bias": {"data_plan"},
}
FOREIGN = {  # what of others, beside the standard library, a room may import at the top of a file
    EVERYWHERE: set(),
    "functional": {"torch"},
    "metrics": {"torch", "torchmetrics"},
    "manifolds": {"torch", "geoopt"},
    "layers": {"torch"},
    "optim": {"torch"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name == "__main__.py")


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module


def ours(path):
    """The places of ours that a file imports, as parts of a path."""
    names = (name.split(".") for name in imports(path))
    return [name[1:] for name in names if name[0] == "lightning_feat" and len(name) > 1]


def place(path):
    return path.relative_to(PACKAGE).with_suffix("").parts


def room(parts):
    return "/".join(parts[: 2 if parts[0] == "joints" else 1])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    here = room(place(path))
    for target in ours(path):
        there = room(target)
        allowed = BELOW[here] | {here, EVERYWHERE}
        assert {there, target[0]} & allowed, f"{here} may not import {'.'.join(target)}"
    allowed = FOREIGN.get(here)
    for name in imports(path, top_level_only=True) if allowed is not None else ():
        first = name.split(".")[0]
        assert first in allowed | {"lightning_feat"} | sys.stdlib_module_names, f"{here} may not import {name}"


@pytest.mark.parametrize("kind", BY_FAMILY)
def test_a_family_imports_no_other(kind):
    for path in (PACKAGE / kind).glob("*/*.py"):
        family = path.parent.name
        free = SHARED[kind] - {"data_plan", "feature_regularizer"} | {family} | ACROSS.get(family, set())
        for target in ours(path):
            assert target[0] != kind or target[1] in free, f"{path} may not import {'.'.join(target)}"


def test_a_family_has_one_name_everywhere():
    for kind, shared in SHARED.items():
        rooms = {path.stem for path in (PACKAGE / kind).iterdir() if path.suffix in ("", ".py")}
        assert rooms - {"__init__", "__pycache__"} <= FAMILIES | shared, kind
    assert {path.name for path in (ROOT / "recipes").iterdir() if path.is_dir()} <= FAMILIES
    for kind in BY_FAMILY:
        rooms = {path.name for path in (ROOT / "tests" / kind).iterdir() if path.is_dir()}
        assert rooms - {"__pycache__"} <= FAMILIES | SHARED[kind], kind


def test_no_room_is_full():
    for folder in (PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__")):
        entries = [path for path in folder.iterdir() if path.name not in ("__pycache__", "py.typed")]
        assert len(entries) <= 15, f"{folder} holds {len(entries)} files and folders: a family that wants a room?"


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
