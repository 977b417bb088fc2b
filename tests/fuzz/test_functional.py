"""Every public function, in worlds drawn at random: right, or a clear refusal. The registry says what is right."""

import importlib
import inspect
import os
import pkgutil
import traceback
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree

import lightning_feat.functional
from tests.fuzz.comparing import assert_close, copied, leaves, same_bits, tensors
from tests.fuzz.registry import CASES, STILL_FIT, Case
from tests.fuzz.worlds import EXTREME, FINITE, FLOATS, World, any_worlds, finite_worlds, regular_worlds

HOUSE = os.path.dirname(lightning_feat.functional.__file__)
EXAMPLES = 6
DEEP = 3  # times as many


def functions() -> dict[str, Any]:
    found = {}
    for module in pkgutil.walk_packages(lightning_feat.functional.__path__, "lightning_feat.functional."):
        contents, family = importlib.import_module(module.name), module.name.split(".")[2]
        for name, value in vars(contents).items():
            if inspect.isroutine(value) and value.__module__ == contents.__name__ and not name.startswith("_"):
                found[f"{family}.{name}"] = value
    return found


FUNCTIONS = functions()


def fuzzed(strategy, where=lambda case: True, share=1.0, but=frozenset()):
    """A test of a case and a world, over all cases that have what the test is about; deeper among the slow ones."""
    names = [name for name, case in CASES.items() if where(case) and name not in but]

    def decorate(test):
        @pytest.mark.parametrize(
            ("name", "examples"),
            [(name, max(1, round(EXAMPLES * share))) for name in names]
            + [pytest.param(name, round(DEEP * EXAMPLES * share), marks=pytest.mark.slow) for name in names],
        )
        def run(name, examples):
            quiet = [HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large]

            @settings(
                max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=quiet
            )
            @given(world=strategy)
            def check(world):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of torch, and of a fit that has not settled
                    test(name, CASES[name], world)

            check()

        run.__name__ = test.__name__
        return run

    return decorate


def refused(error: ValueError) -> bool:
    """Whether a refusal is ours: raised in a line of the functional room, and not inside torch."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(HOUSE)


def outcome(name: str, case: Case, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """The result, or the text of a refusal."""
    function = FUNCTIONS[name] if case.function is None else case.function
    try:
        return function(*arguments, **keywords)
    except ValueError as error:
        if not refused(error):
            raise
        return str(error)


def called(name: str, case: Case, world: World) -> Any:
    try:
        arguments, keywords = case.arguments(world), case.keywords(world)
    except ValueError as error:
        if not refused(error):
            raise
        assume(False)
    return outcome(name, case, arguments, keywords)


def wide(value: Any) -> Any:
    return _pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def degrees(case: Case, result: Any) -> list[float]:
    number = len(leaves(result))
    degree = 0 if case.degree is None else case.degree  # as good as without a unit, where nothing is scaled
    found = [degree] * number if isinstance(degree, (int, float)) else list(degree)
    assert len(found) == number
    return found


def test_every_public_function_is_in_the_registry():
    assert sorted(set(FUNCTIONS) - set(CASES)) == []
    assert sorted(set(CASES) - set(FUNCTIONS)) == []


def body_result(name, case, world):
    try:
        arguments, keywords = case.arguments(world), case.keywords(world)
    except ValueError as error:
        if not refused(error):
            raise
        return
    twins = copied((arguments, keywords))
    before = copied((arguments, keywords))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = outcome(name, case, arguments, keywords)
    assert torch.equal(torch.get_rng_state(), state), f"{name} draws from the global random numbers"
    kept = [entry for place, entry in enumerate(arguments) if place not in case.mutates]
    kept_before = [entry for place, entry in enumerate(before[0]) if place not in case.mutates]
    assert same_bits([kept, keywords], [kept_before, before[1]]), f"{name} changed what it was given"
    torch.manual_seed(2)
    if "generator" in keywords:
        twins = twins[0], case.keywords(world)
    assert same_bits(outcome(name, case, *twins), first), f"{name} gave another result the second time"


@fuzzed(any_worlds, share=3)
def test_a_result_or_a_refusal_and_no_trace(name, case, world):
    body_result(name, case, world)


@fuzzed(regular_worlds, share=0.5)
def test_an_ordinary_data_set_is_not_refused(name, case, world):
    result = called(name, case, world)
    assert not (isinstance(result, str) and result), result
    few = world.num_samples <= world.num_features + 1 and name in OF_MORE_SAMPLES_THAN_FEATURES
    finite = all(entry.isfinite().all() for entry in tensors(result) if entry.is_floating_point())
    assert finite or few or name in UNDEFINED


def spoiled(tensor: Tensor) -> dict[str, Tensor]:
    """What a slip makes of an argument: too few rows, a dimension too many or too few; of class indices also others
    than there are, and such that are no whole numbers.
    """
    worse = {"deep": tensor[..., None], "scalar": tensor.flatten()[0]}
    if tensor.ndim > 1:
        worse["flat"] = tensor.flatten()
    if not tensor.is_floating_point() and tensor.dtype != torch.bool:
        worse |= {"beyond": tensor + 100, "below": tensor - 105, "broken": tensor + 0.5}
    return worse


@fuzzed(regular_worlds, share=0.5)
def test_arguments_that_do_not_fit_are_refused(name, case, world):
    places = [place for place, argument in enumerate(case.arguments(world)) if isinstance(argument, Tensor)]
    for place in (place for place in places if case.arguments(world)[place].ndim):
        tensor = case.arguments(world)[place]
        worse = spoiled(tensor) | ({"short": tensor[:-1]} if len(places) > 1 else {})
        for how, instead in worse.items():
            arguments = [*case.arguments(world)]
            arguments[place] = instead
            found = outcome(name, case, tuple(arguments), case.keywords(world))
            allowed = how in STILL_FIT.get(name, {}).get(place, ())
            assert allowed or isinstance(found, str), f"argument {place}, {how}: took {tuple(instead.shape)}"


# By their docstrings: nan on the diagonal, where a margin is not above zero, and for no samples.
# Any few samples look collapsed to the VCI, which is then nan.
OF_MORE_SAMPLES_THAN_FEATURES = {
    "neural_collapse.collapse_measures",
    "neural_collapse.variability_collapse_index",
    "neural_collapse.vci_from_scatter",
}
UNDEFINED = {
    "neural_collapse.cdnv_matrix",
    "neural_collapse.mix_measures",
    "neural_collapse.strength_of_margin",
    "simplicity_bias.slow_feature_accuracy",
}


@fuzzed(
    st.tuples(
        regular_worlds, st.sampled_from([replace(World(), layout=layout) for layout in ("transposed", "strided")])
    ),
    share=0.5,
)
def test_the_layout_makes_no_difference(name, case, world):
    world, other = world
    # Another layout is another order of summation.
    expected = called(name, case, world)
    found = called(name, case, replace(world, layout=other.layout))
    assert_close(found, expected, case.tolerance, degrees(case, expected))


# Of two cuts with one inertia, rounding chooses, and which cluster is called 0.
CHOICES = {"simplicity_bias.two_means", "simplicity_bias.slow_examples"}


@fuzzed(st.tuples(regular_worlds, st.sampled_from(FLOATS[:3])), share=0.5, but=CHOICES)
def test_narrow_dtypes_are_those_numbers_in_float64(name, case, world):
    world, dtype = world
    world = replace(world, dtype=dtype)
    arguments, keywords = case.arguments(world), case.keywords(world)
    found = outcome(name, case, *copied((arguments, keywords)))
    expected = outcome(name, case, *wide(copied((arguments, keywords)))) if "generator" not in keywords else found
    for one, two in zip(leaves(found), leaves(expected), strict=True):
        if not isinstance(one, Tensor) or not one.is_floating_point():
            assert one == two if not isinstance(one, Tensor) else torch.equal(one, two)
            continue
        # What is computed in float32 loses some digits of it; what is computed in float64, none.
        tolerance = case.tolerance if case.exact else 1e-3 if name in ROOTS else 2e-5
        if one.dtype in FLOATS[:2]:
            tolerance = 8 * torch.finfo(one.dtype).eps
        assert_close(one, two, tolerance)


ROOTS = {"grassmann.principal_angles", "grassmann.geodesic_distance", "neural_collapse.between_class_push"}


@fuzzed(
    st.tuples(regular_worlds, st.sampled_from([-100, -70, -40, -15, 15, 40, 70, 100]), st.sampled_from(FLOATS[1:])),
    lambda case: case.degree is not None,
    share=1.5,
)
def test_a_factor_on_the_features(name, case, world):
    world, exponent, dtype = world
    world, scale = replace(world, dtype=dtype), 2.0 ** min(max(exponent, case.scales[0]), case.scales[1])
    expected = called(name, case, world)
    found = called(name, case, replace(world, scale=scale))
    # A power of two rounds nothing; LAPACK scales large and small matrices by others.
    narrow = any(entry.is_floating_point() and entry.dtype != torch.float64 for entry in tensors(expected))
    assert_close(
        found,
        expected,
        2e-2 if dtype == torch.bfloat16 and narrow else 1e-4 if narrow else 1e-6,
        degrees(case, expected),
        scale,
    )


@fuzzed(st.tuples(regular_worlds, st.integers(0, 100)), lambda case: case.samples is not None, share=0.5)
def test_another_order_of_the_samples(name, case, world):
    world, order = world
    moved = replace(world, order=order)
    expected = called(name, case, world)
    if case.samples == "along":
        expected = expected[moved.permutation()]
    assert_close(called(name, case, moved), expected, max(case.tolerance, 1e-8), degrees(case, expected))


@fuzzed(regular_worlds, lambda case: case.adds, share=0.5)
def test_two_parts_add_up_to_the_whole(name, case, world):
    whole, first, second = (leaves(called(name, case, replace(world, part=part))) for part in (None, 0, 1))
    assert_close([a + b for a, b in zip(first, second, strict=True)], whole, case.tolerance)


@fuzzed(finite_worlds, lambda case: case.definition is not None, share=3)
def test_the_definition(name, case, world):
    assume(world.kind in case.kinds)
    if case.scales[0] > -100 and world.scale < 1:
        world = replace(world, scale=2.0 ** case.scales[0])
    arguments = case.arguments(world)
    found = outcome(name, case, copied(arguments), {})
    assume(not (isinstance(found, str) and found))
    assert_close(found, case.definition(*arguments), max(case.tolerance, 1e-6), degrees(case, found))


def derivative(name: str, case: Case, world: World, undefined: bool = True) -> tuple[Tensor, float, list[Tensor]]:
    """A sum of all that a function gives, its derivative along the direction of the world, and its gradients."""
    world = replace(world, grad=True, tape=[])
    result = called(name, case, world)
    assume(not isinstance(result, str))
    parts = [leaf for leaf in tensors(result) if leaf.requires_grad]
    assume(parts)
    total = sum(
        (
            (part.double().nan_to_num() if undefined else part.double())
            * torch.randn(part.shape, generator=world.generator(f"{i}"), dtype=torch.float64)
        ).sum()
        for i, part in enumerate(parts)
    )
    gradients = torch.autograd.grad(total, world.tape, allow_unused=True)
    slope = 0.0
    for place, gradient in enumerate(gradients):
        if gradient is not None:
            slope += float((gradient * world.direction(place, gradient)).sum())
    return total.detach(), slope, [gradient for gradient in gradients if gradient is not None]


@fuzzed(regular_worlds, lambda case: case.gradient, share=0.5)
def test_the_gradient_is_that_of_differences(name, case, world):
    _, slope, _ = derivative(name, case, world)
    step = case.step
    ahead, behind = (derivative(name, case, replace(world, nudge=nudge))[0] for nudge in (step, -step))
    expected = float(ahead - behind) / (2 * step)
    assert abs(slope - expected) <= 10 * step * max(1.0, abs(expected)), f"{slope} and not {expected}"


# Where two means coincide the bound is infinite, and cut off at one: no gradient is defined there.
CUT_OFF = {"transfer.few_shot_error_bound"}


@fuzzed(st.tuples(finite_worlds, st.sampled_from(FINITE + EXTREME[:2])), lambda case: case.gradient, 1.5, CUT_OFF)
def test_the_gradient_is_finite_where_the_result_is(name, case, world):
    world = replace(world[0], kind=world[1], scale=1.0)
    total, _, gradients = derivative(name, case, world, undefined=False)
    assume(total.isfinite())
    assert all(gradient.isfinite().all() for gradient in gradients)
