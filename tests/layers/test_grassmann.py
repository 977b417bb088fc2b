import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, linear

from lightning_feat.functional.grassmann import orthonormality_error
from lightning_feat.layers import GrassmannLinear
from lightning_feat.optim import follow_subspaces

GOLDEN = [Path(__file__).parents[1] / "data" / f"grassmann_rsgd{end}.npz" for end in ("", "_lines")]


def head(**kwargs):
    torch.manual_seed(0)
    return GrassmannLinear(**{"in_features": 12, "num_classes": 5, "subspace_dim": 3, **kwargs})


def golden_head(z):
    num_classes, k, width = z["initial_basis"].shape
    module = GrassmannLinear(width, num_classes, k, scale=float(z["gamma"])).double()
    module.load_state_dict({"basis": torch.tensor(z["initial_basis"])}, strict=False)
    return module


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_logits_and_gradients_are_the_authors(path):
    z = np.load(path)
    module, features = golden_head(z), torch.tensor(z["features"], requires_grad=True)
    logits = module(features)
    loss = cross_entropy(logits, torch.tensor(z["labels"]))
    loss.backward()
    for ours, theirs in (
        (logits, "logits_initial"),
        (loss, "loss"),
        (features.grad, "grad_features"),
        (module.basis.grad, "grad_basis"),
    ):
        torch.testing.assert_close(ours.detach(), torch.tensor(z[theirs]), rtol=0, atol=1e-10)


def test_features_of_any_leading_shape():
    module, features = head(), torch.randn(2, 3, 12)
    torch.testing.assert_close(module(features)[1, 2], module(features[1, 2][None])[0])


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"subspace_dim": 0}, "subspace_dim=0 must lie between 1 and the width of the features, 12"),
        ({"subspace_dim": 13}, "subspace_dim=13 must lie between"),
        ({"subspace_dim": [1, 2, 3, 1, 2]}, "give a whole number"),
        ({"num_classes": 0}, "at least one class"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
    ],
)
def test_impossible_heads_are_refused(kwargs, text):
    with pytest.raises(ValueError, match=text):
        head(**kwargs)


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match="the features are 11 wide, but in_features=12"):
        head()(torch.randn(2, 11))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_basis_stays_in_float32_where_the_module_goes_to_half_precision(dtype):
    module = torch.nn.Sequential(torch.nn.Linear(12, 12), head()).to(dtype)
    assert module[0].weight.dtype == dtype
    assert module[1].basis.dtype == torch.float32
    assert module(torch.randn(2, 12, dtype=dtype)).dtype == torch.float32
    assert module.double()[1].basis.dtype == torch.float64


def test_it_is_made_in_float32_where_half_precision_is_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert head().basis.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_under_autocast_the_logits_are_float32_and_near_those_without():
    module, features = head(), torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        logits = module(features)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, module(features), rtol=0, atol=0.2)  # 25 * 2^-8 and a margin for the sum


def test_a_basis_off_the_manifold_is_projected_when_loaded_and_said_so():
    module, state = head(), head().state_dict()
    off = {**state, "basis": state["basis"] * 1.5}
    with pytest.warns(UserWarning, match=r"off the manifold \(orthonormality error 1.3e\+00\)"):
        module.load_state_dict(off)
    torch.testing.assert_close(module.basis.detach(), state["basis"])
    assert off["basis"] is not state["basis"]  # what the user gave is left as it was
    torch.testing.assert_close(off["basis"], state["basis"] * 1.5)


def test_a_basis_on_the_manifold_is_loaded_bit_for_bit_and_in_silence():
    module, state = head(), GrassmannLinear(12, 5, 3).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.load_state_dict(state)
    assert torch.equal(module.basis, state["basis"])


def test_a_basis_of_another_shape_is_refused_with_a_sentence():
    with pytest.raises(
        RuntimeError, match=r"basis has shape \(5, 2, 12\), but this head holds 5 classes of 3 dimensions"
    ):
        head().load_state_dict(head(subspace_dim=2).state_dict())


def test_project_repairs_what_is_off_and_leaves_what_is_not():
    module = head()
    before = module.basis.detach().clone()
    assert module.project_() < 1e-5
    assert torch.equal(module.basis, before)
    with torch.no_grad():
        module.basis.mul_(1.1)
    assert module.project_() == pytest.approx(0.21, abs=1e-3)
    assert orthonormality_error(module.basis.detach()).max() < 1e-6


def test_the_scale_may_be_learned():
    module = head(learn_scale=True)
    module(torch.randn(3, 12)).sum().backward()
    assert module.scale.grad > 0
    assert "scale=learned" in repr(module)
    assert [name for name, _ in head().named_parameters()] == ["basis"]


def test_compile_takes_it_in_one_graph():
    module, features = head(), torch.randn(4, 12)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(features), module(features))


def test_export():
    module, features = head(), torch.randn(4, 12)
    program = torch.export.export(module, (features,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},))
    more = torch.randn(7, 12)
    torch.testing.assert_close(program.module()(more), module(more))


def test_a_saved_head_runs_without_this_package(tmp_path):
    module, features = head(), torch.randn(4, 12)
    save_file(module.state_dict(), tmp_path / "head.safetensors")  # refuses what is not contiguous
    saved = load_file(tmp_path / "head.safetensors")
    unit = features / features.norm(dim=1, keepdim=True)
    parts = linear(unit, saved["basis"].flatten(0, 1)).unflatten(1, saved["basis"].shape[:2])
    logits = saved["scale"] * parts.norm(dim=2)
    torch.testing.assert_close(logits, module(features))


def test_copies_are_heads():
    module = head()
    assert torch.equal(copy.deepcopy(module).basis, module.basis)
    assert "12, num_classes=5, subspace_dim=3, scale=25" in repr(module)


def test_onnx_gives_the_same_logits(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    module, features = head().eval(), torch.randn(4, 12)
    torch.onnx.export(module, (features,), tmp_path / "head.onnx", dynamo=True, verbose=False, optimize=False)
    model = onnx.load(tmp_path / "head.onnx")
    (logits,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: features.numpy()})
    torch.testing.assert_close(torch.tensor(logits), module(features).detach())


def drift(layer, steps=40, **follow):
    """Train the layer by an ordinary optimizer, followed or not; how often it spoke up."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    if follow:
        follow_subspaces(optimizer, layer)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(steps):
            torch.manual_seed(step)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(torch.randn(16, 12)), torch.arange(16) % 3).backward()
            optimizer.step()
    return [str(w.message) for w in said if "off their manifold" in str(w.message)]


def test_a_layer_that_nobody_follows_says_so_once():
    (said,) = drift(GrassmannLinear(12, 3, 2))
    assert "follow_subspaces(optimizer, module)" in said
    assert not drift(GrassmannLinear(12, 3, 2), followed=True)
    assert not drift(torch.nn.Sequential(GrassmannLinear(12, 3, 2).requires_grad_(False), torch.nn.Linear(3, 3)))


def test_looking_after_the_manifold_does_not_break_a_graph():
    layer = GrassmannLinear(12, 3, 2)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for _ in range(3):
        compiled(torch.randn(4, 12)).sum().backward()


@pytest.mark.parametrize("learn_scale", [True, False])
def test_a_head_that_was_built_on_the_meta_device_is_drawn_and_scaled_by_reset_parameters(learn_scale):
    with torch.device("meta"):
        layer = GrassmannLinear(12, 3, 2, scale=9.0, learn_scale=learn_scale)
    layer.to_empty(device="cpu").reset_parameters()
    assert float(layer.scale) == 9.0
    assert orthonormality_error(layer.basis.detach()).max() < 1e-5
