import itertools
import random

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_feat.callbacks import FeatureReport, FewShotMonitor, LinearProbe
from lightning_feat.data import PlanSampler
from lightning_feat.joints.data.passes import clean_loader
from lightning_feat.joints.data.samplers import batch_size_of, sampler_of, takes_all, with_sampler
from tests.helpers import Plain, loader, points, trainer

DATA = points(10)


def stateful(*args, **kwargs):
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader(*args, **kwargs)


class EverySecond(Sampler):
    def __iter__(self):
        return iter(range(0, 10, 2))

    def __len__(self):
        return 5


@pytest.mark.parametrize("kind", [DataLoader, stateful])
def test_what_a_pass_looks_at_is_what_the_loader_draws_from(tmp_path, kind):
    def looked_at(**kwargs):
        clean = clean_loader(trainer(tmp_path), kind(DATA, 3, **kwargs), "training")
        return torch.cat([batch[0] for batch in clean])

    for whole in ({}, {"shuffle": True}, {"sampler": RandomSampler(DATA, num_samples=4)}):
        assert torch.equal(looked_at(**whole), DATA.tensors[0])
    for sampler in (SequentialSampler(range(4)), RandomSampler(range(4)), SubsetRandomSampler([3, 0, 2, 1])):
        assert torch.equal(looked_at(sampler=sampler), DATA.tensors[0][:4])
    weighted = WeightedRandomSampler([1.0, 0.0, 2.0, 0.0], 30)  # never draws what weighs nothing, or has no weight
    assert torch.equal(looked_at(sampler=weighted), DATA.tensors[0][[0, 2]])
    with pytest.raises(ValueError, match=r"which examples a EverySecond leaves out: give the (Stateful|)DataLoader"):
        looked_at(sampler=EverySecond())


class Shuffles(Sampler):
    """Every example, by a generator of its own, in its own list; each iteration begins with another one."""

    def __init__(self, size):
        self.order, self.generator, self.epoch = list(range(size)), random.Random(3), 0

    def __iter__(self):
        self.epoch += 1
        self.generator.shuffle(self.order)
        return iter(self.order)

    def __len__(self):
        return len(self.order)


class InPairs(Shuffles):
    """The same as a batch sampler."""

    def __iter__(self):
        order = [*super().__iter__()]
        return iter([order[i : i + 2] for i in range(0, len(order), 2)])

    def __len__(self):
        return len(self.order) // 2


class WithoutEnd(Sampler):
    def __iter__(self):
        return itertools.cycle(range(5))


@pytest.mark.parametrize(
    ("name", "kind"), [("sampler", Shuffles), ("batch_sampler", InPairs)], ids=["samples", "batches"]
)
def test_a_sampler_of_ones_own_is_asked_what_it_draws_and_draws_the_same_afterwards(tmp_path, name, kind):
    def looked_at(sampler):
        clean = clean_loader(trainer(tmp_path), DataLoader(DATA, **{name: sampler}), "training")
        return torch.cat([batch[0] for batch in clean])

    asked, other = kind(10), kind(10)
    assert torch.equal(looked_at(asked), DATA.tensors[0])
    assert asked.epoch == 0
    assert [*asked] == [*other]
    for odd in (kind(8), [[0, 1], [4]] if name == "batch_sampler" else [0, 1, 4], WithoutEnd()):
        with pytest.raises(ValueError, match=f"which examples a {type(odd).__name__} leaves out"):
            looked_at(odd)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([DATA[i] for i in range(len(DATA))])


@pytest.mark.parametrize("monitor", [FeatureReport, FewShotMonitor, LinearProbe])
def test_validation_data_without_a_length_are_refused_by_name_not_for_their_length(tmp_path, monitor):
    with pytest.raises(ValueError, match=r"got a DataLoader over an IterableDataset"):
        trainer(tmp_path, callbacks=[monitor()]).fit(Plain(), loader(), DataLoader(Stream(), 4))


@pytest.mark.parametrize("kind", [DataLoader, stateful])
def test_a_loader_keeps_its_class_and_its_batches(kind):
    given = kind(DATA, 3, shuffle=True, drop_last=True)
    changed = with_sampler(given, plan := PlanSampler([1] * 10))
    assert type(changed) is type(given)
    assert (changed.sampler, sampler_of(changed), batch_size_of(changed)) == (plan, plan, 3)
    assert [len(batch[0]) for batch in changed] == [3, 3, 3]


@pytest.mark.parametrize("kind", [DataLoader, stateful])
def test_which_loaders_show_each_example_once(kind):
    assert takes_all(kind(DATA))
    assert takes_all(kind(DATA, shuffle=True))
    few = [RandomSampler(DATA, num_samples=3), RandomSampler(DATA, replacement=True), SequentialSampler(range(3))]
    assert not any(takes_all(kind(DATA, sampler=sampler)) for sampler in [*few, EverySecond()])
