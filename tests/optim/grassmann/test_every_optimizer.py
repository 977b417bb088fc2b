"""Every optimizer that a user may have: it follows the subspaces, is refused by name, or cannot be tried here.

``docs/optimizers.md`` is written by this test (``WRITE_OPTIMIZERS=1``), and each later run holds what it finds against
it. Packages that are not installed are left out of the comparison.
"""

import importlib
import importlib.metadata
import inspect
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_feat.functional.grassmann import orthonormality_error
from lightning_feat.layers import GrassmannLinear
from lightning_feat.optim import follow_subspaces

PAGE = Path(__file__).parents[3] / "docs" / "optimizers.md"
WRITING = os.environ.get("WRITE_OPTIMIZERS") == "1"
STEPS, WIDTH, CLASSES, DIMENSIONS = 8, 16, 5, 3
HEAD = """# Optimizers

What `follow_subspaces`, and with it the `GrassmannHead` callback, does with each optimizer of five packages, as
`tests/optim/grassmann/test_every_optimizer.py` found it in eight steps (`WRITE_OPTIMIZERS=1` writes this page).

- **follows**: with the default rule the bases stay orthonormal to 1e-5 and move, and a weight decay of 0.3 changes the
  subspaces by less than 1e-5.
- **refused**: an error says why before the first step.
- **cannot be tried**: it is not made, or takes no step, from parameters and gradients alone, with or without class
  subspaces; the reason follows.
"""


def classes_of(module):
    found = [value for value in vars(module).values() if inspect.isclass(value)]
    return {cls.__name__: cls for cls in found if issubclass(cls, torch.optim.Optimizer)}


def makers():
    """By package and name, functions of parameters, learning rate and weight decay."""
    found = {}
    for package in ("torch.optim", "timm.optim", "pytorch_optimizer", "schedulefree", "torchao.optim"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(package)
        except ImportError:
            continue
        known = classes_of(module)
        if package == "pytorch_optimizer":
            known |= {cls.__name__: cls for cls in getattr(module, "OPTIMIZERS", {}).values() if inspect.isclass(cls)}
        for name, cls in sorted(known.items()):
            if name != "Optimizer" and (package == "torch.optim" or not cls.__module__.startswith("torch.optim")):
                found[package, name] = cls
    return found


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, WIDTH), GrassmannLinear(WIDTH, CLASSES, DIMENSIONS))


def make(cls, parameters, decay):
    options = inspect.signature(cls.__init__).parameters
    optimizer = cls(parameters, **({"lr": 1e-2} if "lr" in options else {}))
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = decay
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    return optimizer


def steps(cls, net, optimizer):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):

        def closure():
            for p in net.parameters():
                p.grad = 0.05 * torch.randn(p.shape, generator=generator)
            return torch.tensor(1.0, requires_grad=True)

        closure()
        optimizer.step()


def outcome(cls):
    """The word of the table, and the reason."""
    try:
        net = nn.Sequential(nn.Linear(20, WIDTH), nn.Linear(WIDTH, 3))
        net.register_parameter("stack", nn.Parameter(torch.randn(CLASSES, DIMENSIONS, WIDTH)))  # of that shape, plain
        steps(cls, net, make(cls, net.parameters(), 0.0))
        plain = ""
    except Exception as error:
        plain = reason(error)
    ends = []
    for decay in (0.0, 0.3):
        net = model()
        start = net[1].basis.detach().clone()
        try:
            optimizer = make(cls, net.parameters(), decay)
        except Exception as error:
            return "cannot be tried", reason(error)
        try:
            follow_subspaces(optimizer, net)
        except ValueError as error:
            return "refused", reason(error)
        try:
            steps(cls, net, optimizer)
        except Exception as error:
            if not plain:
                raise AssertionError(f"{cls.__name__} fails with subspaces alone: {reason(error)}") from error
            return "cannot be tried", plain
        basis = net[1].basis.detach()
        off = float(orthonormality_error(basis).max())
        assert off < 1e-5, f"{cls.__name__} leaves the manifold: {off:.1e}"
        moved = float((basis.mT @ basis - start.mT @ start).abs().max())
        assert moved > 1e-4, f"{cls.__name__} does not move the subspaces: {moved:.1e}"
        ends.append(basis.mT @ basis)
    apart = float((ends[0] - ends[1]).abs().max())
    assert apart < 1e-5, f"weight decay of {cls.__name__} acts on subspaces: {apart:.1e}"
    return "follows", ""


def reason(error):
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) < 160 else f"{said[:160].rsplit(' ', 1)[0]} ..."


def rows(found):
    for package in dict.fromkeys(package for package, _ in found):
        version = importlib.metadata.version(package.partition(".")[0]).split("+")[0]
        of = {name: value for (p, name), value in found.items() if p == package}
        yield f"\n## {package.partition('.')[0]} {version}\n"
        followed = [name for name, (word, _) in of.items() if word == "follows"]
        yield f"**follows** ({len(followed)}): {', '.join(followed)}\n"
        for word in ("refused", "cannot be tried"):
            for name, (said, why) in of.items():
                if said == word:
                    yield f"- {name}, **{word}**: {why}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
def test_every_optimizer_follows_is_refused_or_cannot_be_tried():
    found, failed = {}, []
    for key, cls in makers().items():
        try:
            found[key] = outcome(cls)
        except AssertionError as error:
            failed.append(str(error).splitlines()[0])
    assert not failed, "\n".join(failed)
    page = HEAD + "\n".join(rows(found)) + "\n"
    if WRITING:
        PAGE.write_text(page)
    written = PAGE.read_text()
    for package, part in [(p, part) for p in dict.fromkeys(k[0] for k in found) for part in page.split("\n## ")[1:]]:
        title = part.splitlines()[0]
        if title.startswith(package.partition(".")[0]) and f"\n## {title}" in written:  # of this version
            assert part.strip() in written, f"docs/optimizers.md says otherwise of {title}"
