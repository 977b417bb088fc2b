from itertools import pairwise

import pytest
import torch

from lightning_feat.functional.simplicity_bias import learning_times, no_looks, with_look

RIGHT = torch.rand(9, 40, generator=torch.Generator().manual_seed(0)) > 0.5


def test_it_is_the_definition():
    found = learning_times(RIGHT)
    for i in range(40):
        column = RIGHT[:, i].tolist()
        pairs = pairwise(column)
        assert found.forgetting[i] == sum(before and not after for before, after in pairs)
        assert found.first_learned[i] == (column.index(True) + 1 if any(column) else 0)
        always = [t for t in range(1, 10) if all(column[t - 1 :])]
        assert found.always_learned[i] == (always[0] if always else 0)
        assert found.last_right[i] == column[-1]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([1, 1, 1], (0, 1, 1)),
        ([0, 0, 0], (0, 0, 0)),
        ([0, 1, 0], (1, 2, 0)),
        ([1, 0, 1], (1, 1, 3)),
        ([1, 0, 1, 0], (2, 1, 0)),
    ],
)
def test_known_cases(column, expected):
    found = learning_times(torch.tensor(column).bool()[:, None])
    assert tuple(int(entry) for entry in found[:3]) == expected


def test_what_is_not_looked_at_stays_and_looks_may_be_left_out():
    times = with_look(no_looks(3), torch.tensor([True, True, False]), 2)
    times = with_look(times, torch.tensor([False, False, True]), 5, torch.tensor([False, True, True]))
    assert times.forgetting.tolist() == [0, 1, 0]
    assert times.first_learned.tolist() == [2, 2, 5]
    assert times.always_learned.tolist() == [2, 0, 5]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="right must be"):
        learning_times(RIGHT.float())
    with pytest.raises(ValueError, match="forgetting must be"):
        with_look(no_looks(3), torch.ones(4).bool(), 1)
    with pytest.raises(ValueError, match="look=0"):
        with_look(no_looks(3), torch.ones(3).bool(), 0)
