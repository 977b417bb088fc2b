import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from lightning_feat.layers import SimplexETF, SparseETF

HEADS = [SimplexETF, SparseETF]


def head(cls=SimplexETF, **kwargs):
    return cls(**{"in_features": 24, "num_classes": 5, **kwargs})


def features(n=4, width=24):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("sizes", [(24, 5), (128, 10)])
def test_prototypes_are_a_simplex_in_float32(cls, sizes):
    e = cls(*sizes).prototypes
    assert e.dtype == torch.float32
    expected = torch.full((sizes[1], sizes[1]), -1 / (sizes[1] - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close(e @ e.T, expected, rtol=0, atol=1e-6)


def test_one_dimension_less_than_classes_is_enough():
    e = SimplexETF(4, 5).prototypes
    torch.testing.assert_close(e @ e.T, torch.full((5, 5), -0.25).fill_diagonal_(1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cls", HEADS)
def test_logits_are_scaled_cosines(cls):
    module = head(cls, scale=7.0)
    expected = 7 * cosine_similarity(features()[:, None], module.prototypes[None], dim=2)
    torch.testing.assert_close(module(features()), expected)
    assert module(torch.zeros(1, 24)).abs().max() == 0


def test_there_is_nothing_to_learn_and_features_get_a_gradient():
    module, h = head(), features().requires_grad_()
    module(h).square().sum().backward()
    assert list(module.parameters()) == []
    assert h.grad.abs().min() > 0


def test_features_of_any_leading_shape():
    h = features(6).reshape(2, 3, 24)
    torch.testing.assert_close(head()(h)[1, 2], head()(h[1, 2][None])[0])


def test_a_saved_head_is_read_with_any_seed_and_scale():
    saved, other = head(SparseETF, seed=0, scale=3.0), head(seed=1)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(features()), saved(features()))
    assert set(saved.state_dict()) == {"prototypes", "scale"}


def test_the_seed_is_all_that_decides_and_no_random_number_is_used_up():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = head(SparseETF)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.prototypes, head(SparseETF).prototypes)
    assert not torch.equal(first.prototypes, head(SparseETF, seed=1).prototypes)


def test_half_of_the_entries_are_zero_where_that_is_asked():
    assert (head(SparseETF, sparsity=0.5).prototypes == 0).float().mean() == 0.5


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"in_features": 3}, "3 features have no room for a simplex of 5 classes, which needs at least 4"),
        ({"num_classes": 1}, "a simplex has at least two corners"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"cls": SparseETF, "sparsity": 0.9}, "with sparsity=0.9: lower it"),
    ],
)
def test_impossible_heads_are_refused(kwargs, text):
    with pytest.raises(ValueError, match=text):
        head(**kwargs)


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match="the features are 11 wide, but in_features=24"):
        head()(torch.randn(2, 11))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prototypes_stay_in_float32_where_the_module_goes_to_half_precision(dtype):
    module = nn.Sequential(nn.Linear(24, 24), head()).to(dtype)
    assert module[0].weight.dtype == dtype
    assert module[1].prototypes.dtype == torch.float32
    assert module(features().to(dtype)).dtype == torch.float32
    assert module.double()[1].prototypes.dtype == torch.float64


def test_it_is_made_in_float32_where_half_precision_is_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert head().prototypes.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_under_autocast_the_logits_are_those_without_bit_for_bit():
    module = head()
    with torch.autocast("cpu", torch.bfloat16):
        logits = module(features())
    assert torch.equal(logits, module(features()))


def test_compile_takes_it_in_one_graph():
    module = head()
    torch.testing.assert_close(
        torch.compile(module, backend="aot_eager", fullgraph=True)(features()), module(features())
    )


def test_export():
    module = head()
    program = torch.export.export(module, (features(),), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},))
    torch.testing.assert_close(program.module()(features(7)), module(features(7)))


def test_copies_and_names():
    module = head(SparseETF)
    assert torch.equal(copy.deepcopy(module).prototypes, module.prototypes)
    assert "24, num_classes=5, scale=25, seed=0, sparsity=0.6" in repr(module)
    assert (module.in_features, module.out_features, module.num_classes) == (24, 5, 5)


@pytest.mark.parametrize("make", [lambda: SimplexETF(12, 4, scale=9.0, seed=3), lambda: SparseETF(12, 4, scale=9.0)])
@pytest.mark.parametrize("inside", [True, False])
def test_a_head_that_was_built_on_the_meta_device_comes_to_be_what_it_should_be(make, inside):
    with torch.device("meta" if inside else "cpu"):
        head = make() if inside else make().to("meta")
    head.to_empty(device="cpu").apply(lambda part: part.reset_parameters())
    there = make()
    assert torch.equal(head.prototypes, there.prototypes)
    assert torch.equal(head.scale, there.scale)
