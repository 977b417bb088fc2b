"""The rows that are kept do not depend on how the data are cut."""

import pytest
import torch

from lightning_feat.functional.common.lots import lots, lowest_lots
from lightning_feat.report.collecting.budget import chosen_samples


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_the_choice_from_a_union_is_that_from_the_choices_of_its_parts(parts):
    ids = torch.arange(1000) * 2**20
    whole = ids[lowest_lots(ids, 50, seed=3)]
    kept = [ids[i::parts][lowest_lots(ids[i::parts], 50, seed=3)] for i in range(parts)]
    union = torch.cat(kept)
    assert torch.equal(union[lowest_lots(union, 50, seed=3)], whole)


def test_each_index_is_drawn_about_equally_often_and_seeds_differ():
    counts = torch.zeros(200)
    for seed in range(300):
        counts[torch.tensor(chosen_samples(200, 50, seed))] += 1
    expected, spread = 300 / 4, (300 / 4 * 3 / 4) ** 0.5
    assert (counts - expected).abs().max() < 4.5 * spread  # of 200 binomial counts
    assert abs(float(counts.std()) / spread - 1) < 0.25


def test_lots_of_different_indices_differ():
    assert len(lots(torch.arange(200_000), 0).unique()) == 200_000


def test_nothing_is_drawn_where_all_fit():
    assert chosen_samples(10, 10, 0) is None
    assert lowest_lots(torch.tensor([5, 1, 3]), 3, 0).tolist() == [1, 2, 0]
