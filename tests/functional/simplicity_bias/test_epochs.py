import math

import pytest
import torch

from lightning_feat.functional.simplicity_bias.epochs import knee_reached, separating_epoch

EPOCHS = range(200)
EXPONENTIAL = [0.9 * math.exp(-epoch / 20) + 0.02 for epoch in EPOCHS]
LATE = [0.9 / (1 + math.exp((epoch - 60) / 5)) + 0.03 for epoch in EPOCHS]  # a plateau, then a fall around epoch 60
# Measured: the training loss of MLPClassifier on the digits, SGD at 0.05, batches of 64.
DIGITS = [2.104, 0.835, 0.331, 0.19, 0.112, 0.066, 0.038, 0.022, 0.017, 0.015, 0.012, 0.011, 0.009, 0.007]


def noisy(values, deviation, seed=0):
    noise = torch.randn(len(values), generator=torch.Generator().manual_seed(seed))
    return [value + deviation * float(draw) for value, draw in zip(values, noise, strict=True)]


def by_definition(values, window, share=0.25, fall=0.1):
    """The formula of the docstring, each epoch on its own."""
    lowest = [min(values[: t + 1]) for t in range(len(values))]
    decrease = [lowest[max(t - window, 0)] - lowest[t] for t in range(len(values))]
    for t in range(window, len(values)):
        fallen = max(values[: t + 1]) - lowest[t] >= fall * max(values[: t + 1])
        if fallen and decrease[t] < share * max(decrease[: t + 1]):
            return t + 1
    return None


@pytest.mark.parametrize("values", [EXPONENTIAL, LATE, DIGITS, *(noisy(LATE, 0.02, seed) for seed in range(5))])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_it_is_the_formula(values, window):
    assert separating_epoch(values, 200, window=window) == by_definition(values, window)


def test_of_an_exponential_it_is_where_the_slope_is_a_quarter():
    # The fastest decrease is that of the first window, so the slope counts from its end: 20 log 4 epochs later.
    assert separating_epoch(EXPONENTIAL, 200) == math.ceil(20 * math.log(4) + 4) + 1


def test_on_real_digits_it_is_where_the_loss_levels_off():
    assert separating_epoch(DIGITS, max_epochs=50) == 5


@pytest.mark.parametrize("seed", range(10))
def test_noise_moves_it_little(seed):
    assert separating_epoch(noisy(EXPONENTIAL, 0.01, seed), 200) == pytest.approx(33, abs=8)
    assert separating_epoch(noisy(LATE, 0.01, seed), 200) == pytest.approx(77, abs=6)


@pytest.mark.parametrize("seed", range(10))
def test_a_plateau_before_learning_is_no_knee(seed):
    assert not knee_reached(noisy(LATE, 0.01, seed)[:55], 200)


@pytest.mark.parametrize("values", [[0.9] * 200, [0.9 - 0.004 * epoch for epoch in EPOCHS], [], [0.7]])
def test_what_never_falls_or_never_slows_has_none(values):
    assert separating_epoch(values, 200) is None


@pytest.mark.parametrize("seed", range(10))
def test_noise_alone_has_none(seed):
    assert separating_epoch(noisy([0.9] * 200, 0.01, seed), 200) is None


def test_what_falls_at_once_needs_the_start():
    assert separating_epoch([0.02] * 200, 200) is None
    assert separating_epoch([0.02] * 200, 200, start=0.9) == 5  # one more than the window
    assert separating_epoch([0.02, *[0.02] * 9], 10, start=0.9) == 3
    assert separating_epoch([0.9] * 200, 200, start=0.9) is None
    assert separating_epoch([0.9, *[0.02] * 199], 200) == 6


@pytest.mark.parametrize("start", [None, 0.95])
@pytest.mark.parametrize("values", [EXPONENTIAL, noisy(LATE, 0.02), DIGITS])
def test_online_is_offline(values, start):
    told = [knee_reached(values[:epochs], 200, start=start) for epochs in range(len(values) + 1)]
    first = separating_epoch(values, 200, start=start)
    assert told == [epochs >= first for epochs in range(len(values) + 1)]


def test_the_scale_does_not_matter():
    assert separating_epoch([7.0 * value for value in LATE], 200) == separating_epoch(LATE, 200)


def test_what_is_not_finite_is_passed_over():
    broken = [math.nan, *EXPONENTIAL[:10], math.inf, math.nan, *EXPONENTIAL[10:]]
    assert separating_epoch(broken, 200) == separating_epoch(EXPONENTIAL, 200) + 3
    assert separating_epoch([math.nan] * 50, 200) is None
    flat = noisy([0.9] * 200, 0.01)
    assert separating_epoch([*flat[:50], math.inf, *flat[50:]], 200) is None  # no fall from infinity


def test_a_longer_plan_takes_a_longer_window():
    assert separating_epoch(LATE, 1000) == separating_epoch(LATE, 200, window=20)
    assert separating_epoch(LATE, 10) == separating_epoch(LATE, 200, window=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.0}, "share=0.0"),
        ({"share": 1.0}, "share=1.0"),
        ({"fall": 1.0}, "fall=1.0"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"window": 0}, "window=0"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        knee_reached(DIGITS, **{"max_epochs": 50, **arguments})
