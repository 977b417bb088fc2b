import pytest
import torch
from torch.utils.data import DataLoader

from lightning_feat.data import PlanSampler
from tests.helpers import Plain, points, trainer

COUNTS = [1, 0, 3, 2, 1, 1]


def test_every_example_comes_as_often_as_planned():
    sampler = PlanSampler(COUNTS)
    assert torch.tensor(list(sampler)).bincount(minlength=6).tolist() == COUNTS
    assert len(sampler) == 8


def test_epochs_differ_and_repeat_themselves():
    sampler = PlanSampler(COUNTS, seed=1)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1]
    assert list(PlanSampler(COUNTS, seed=2)) != epochs[0]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_one_order(processes):
    whole = PlanSampler(COUNTS).order().tolist()
    shares = [list(PlanSampler(COUNTS, num_replicas=processes, rank=rank)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    dealt = [index for row in zip(*shares, strict=True) for index in row]
    assert dealt[:8] == whole
    assert dealt[8:] == whole[: len(dealt) - 8]  # filled up from the beginning


def test_more_processes_than_examples():
    shares = [list(PlanSampler([1, 1], num_replicas=5, rank=rank)) for rank in range(5)]
    assert [len(share) for share in shares] == [1] * 5
    assert {share[0] for share in shares} == {0, 1}


def test_what_was_had_is_skipped_once():
    whole = list(PlanSampler(COUNTS))
    sampler = PlanSampler(COUNTS, skip=3)
    assert list(sampler) == whole[3:]
    assert list(sampler) == whole


def test_what_was_had_of_an_epoch_is_not_taken_from_the_next():
    sampler = PlanSampler(COUNTS)
    sampler.set_epoch(1)
    sampler.resume(3)
    assert len(sampler) == 8
    sampler.set_epoch(2)  # nothing was left to draw in epoch 1
    whole = PlanSampler(COUNTS)
    whole.set_epoch(2)
    assert list(sampler) == list(whole)


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("had", [1, 2])
def test_what_is_left_of_an_epoch_is_dealt_out_among_other_processes(before, now, had):
    whole = PlanSampler(COUNTS).order().tolist()
    shares = [PlanSampler(COUNTS, num_replicas=now, rank=rank) for rank in range(now)]
    shown = PlanSampler(COUNTS, num_replicas=before).shown_after(had)
    assert shown == had * before
    for share in shares:
        share.resume(4, shown)
    left = [list(share) for share in shares]
    dealt = [index for row in zip(*left, strict=True) for index in row]
    assert dealt[: 8 - shown] == whole[shown:]
    assert dealt[8 - shown :] == whole[: len(dealt) - 8 + shown]
    assert all(len(share) == 4 + len(rest) for share, rest in zip(shares, left, strict=True))
    assert all(share.share().tolist()[4:] == rest for share, rest in zip(shares, left, strict=True))
    assert all(share.shown_after(5) == min(8, shown + now) for share in shares)


@pytest.mark.parametrize("processes", [1, 3])
def test_it_knows_what_it_shows_to_fill_up(processes):
    shares = [PlanSampler(COUNTS, num_replicas=processes, rank=rank) for rank in range(processes)]
    masks = torch.stack([torch.cat([share.repeats(0, 2), share.repeats(2, 8)]) for share in shares], dim=1)
    assert masks.flatten().tolist() == [False] * 8 + [True] * (len(shares[0]) * processes - 8)


@pytest.mark.parametrize("slow", [17_000, 17_013])  # sums of which float32 rounds the mean up
def test_an_epoch_that_keeps_its_length_ends_with_the_last_example(slow):
    counts = torch.ones(50_000, dtype=torch.long)
    counts[:slow] = 2
    sampler = PlanSampler(counts, "keep")
    for epoch in range(20):
        sampler.set_epoch(epoch)
        shown = sampler.order().bincount(minlength=50_000)
        assert len(shown) == 50_000
        assert shown[:slow].max() <= 2
        assert shown[slow:].max() <= 1


def test_an_epoch_that_keeps_its_length_takes_counts_as_weights():
    sampler = PlanSampler([1, 2, 1, 1], length="keep")
    shown = torch.zeros(4)
    for epoch in range(500):
        sampler.set_epoch(epoch)
        count = torch.tensor(list(sampler)).bincount(minlength=4)
        assert count.sum() == len(sampler) == 4
        assert ((count - torch.tensor([0.8, 1.6, 0.8, 0.8])).abs() < 1).all()  # rounded up or down
        shown += count
    # the share of epochs that round up has a deviation of at most 0.5 / sqrt(500)
    torch.testing.assert_close(shown / 500, torch.tensor([0.8, 1.6, 0.8, 0.8]), atol=0.08, rtol=0)


def test_zero_counts_never_come_also_when_the_length_is_kept():
    for epoch in range(50):
        sampler = PlanSampler([0, 1, 0, 1, 0], length="keep")
        sampler.set_epoch(epoch)
        assert set(sampler) <= {1, 3}


def test_new_counts_hold_from_the_next_iteration():
    sampler = PlanSampler([1, 1])
    sampler.set_counts([0, 4])
    assert list(sampler) == [1] * 4


class Seen(Plain):
    def on_train_epoch_start(self):
        self.seen = [*getattr(self, "seen", []), []]

    def training_step(self, batch, batch_idx):
        self.seen[-1] += batch[0].sum(1).tolist()
        return super().training_step(batch, batch_idx)


def test_lightning_leaves_it_in_place_and_tells_it_the_epoch(tmp_path):
    data = points(6)
    sampler, module = PlanSampler(COUNTS), Seen()
    trainer(tmp_path, max_epochs=2).fit(module, DataLoader(data, batch_size=2, sampler=sampler))
    for epoch, seen in enumerate(module.seen):
        sampler.set_epoch(epoch)
        assert seen == pytest.approx([float(data[index][0].sum()) for index in sampler])


def test_a_negative_past_is_refused():
    with pytest.raises(ValueError, match="skip=1 and shown=-1"):
        PlanSampler([1]).resume(1, -1)


@pytest.mark.parametrize(
    ("counts", "options", "text"),
    [
        ([0.5, 1.0], {}, "whole numbers"),
        ([[1, 2]], {}, "give a Tensor or a list of whole numbers"),
        ([1, -2], {}, "the least is -2"),
        ([0, 0], {}, "the least is 0"),
        ([], {}, "whole numbers"),  # an empty list is a float tensor to torch
        ([1], {"length": "shrink"}, "length='shrink'"),
        ([1], {"skip": -1}, "skip=-1"),
    ],
)
def test_impossible_plans_are_refused(counts, options, text):
    with pytest.raises(ValueError, match=text):
        PlanSampler(counts, **options)


def test_counts_for_other_examples_are_refused():
    with pytest.raises(ValueError, match="3 counts for 2 examples"):
        PlanSampler([1, 1]).set_counts([1, 1, 1])
