import math

import pytest
import torch

from lightning_feat.functional.neural_collapse import prior_shift, realigned_lengths

ROWS = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]])  # of lengths 5, 1 and 2


def lengths(factor):
    return (ROWS * factor[:, None]).norm(dim=1).tolist()


def test_all_of_the_length_is_taken_back_and_the_mean_stays():
    assert lengths(realigned_lengths(ROWS)) == pytest.approx([8 / 3] * 3)


def test_half_of_it_in_the_exponent():
    found = lengths(realigned_lengths(ROWS, 0.5))
    assert [value / found[1] for value in found] == pytest.approx([math.sqrt(5), 1, math.sqrt(2)])
    assert sum(found) == pytest.approx(8)


def test_none_of_it_changes_nothing():
    assert realigned_lengths(ROWS, 0.0).tolist() == pytest.approx([1, 1, 1])


def test_rows_take_the_pattern_of_others():
    assert lengths(realigned_lengths(ROWS, 1.0, torch.tensor([1.0, 2.0, 1.0]))) == pytest.approx([2, 4, 2])


def test_a_row_of_zeros_stays_one():
    rows = torch.cat([ROWS, torch.zeros(1, 2)])
    factor = realigned_lengths(rows)
    assert factor[3] == 1
    assert factor[:3].tolist() == pytest.approx(realigned_lengths(ROWS).tolist())


def test_another_prior_gives_the_posterior_of_bayes():
    generator = torch.Generator().manual_seed(0)
    likelihood = torch.rand(7, 3, generator=generator, dtype=torch.float64)
    old, new = torch.tensor([60.0, 30.0, 10.0]), torch.tensor([1.0, 1.0, 2.0])
    posterior = likelihood * old
    expected = likelihood * new / (likelihood * new).sum(1, keepdim=True)
    logits = posterior.log() + 5
    torch.testing.assert_close((logits + prior_shift(new, old)).softmax(1), expected, rtol=1e-12, atol=0)


def test_a_class_that_does_not_occur_is_never_chosen():
    assert prior_shift(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 5.0])).tolist() == [-math.inf, math.log(2)]


@pytest.mark.parametrize(
    ("new", "old"), [([-1.0, 1.0], [1.0, 1.0]), ([1.0, 1.0], [0.0, 1.0]), ([0.0, 0.0], [1.0, 1.0])]
)
def test_numbers_that_are_no_frequencies_are_refused(new, old):
    with pytest.raises(ValueError, match="frequencies"):
        prior_shift(torch.tensor(new), torch.tensor(old))


def test_lengths_of_zero_are_refused():
    with pytest.raises(ValueError, match="above zero"):
        realigned_lengths(ROWS, 1.0, torch.tensor([1.0, 0.0, 1.0]))
