import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler, SubsetRandomSampler

from lightning_feat.data import PlanSampler
from lightning_feat.joints.data.passes import clean_loader
from lightning_feat.joints.data.samplers import batch_size_of, sampler_of, takes_all, with_sampler
from tests.helpers import points, trainer

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
    with pytest.raises(ValueError, match=r"which examples a EverySecond leaves out: give the (Stateful|)DataLoader"):
        looked_at(sampler=EverySecond())


@pytest.mark.parametrize("kind", [DataLoader, stateful])
def test_a_loader_keeps_its_class_and_its_batches(kind):
    loader = kind(DATA, 3, shuffle=True, drop_last=True)
    changed = with_sampler(loader, plan := PlanSampler([1] * 10))
    assert type(changed) is type(loader)
    assert (changed.sampler, sampler_of(changed), batch_size_of(changed)) == (plan, plan, 3)
    assert [len(batch[0]) for batch in changed] == [3, 3, 3]


@pytest.mark.parametrize("kind", [DataLoader, stateful])
def test_which_loaders_show_each_example_once(kind):
    assert takes_all(kind(DATA))
    assert takes_all(kind(DATA, shuffle=True))
    few = [RandomSampler(DATA, num_samples=3), RandomSampler(DATA, replacement=True), SequentialSampler(range(3))]
    assert not any(takes_all(kind(DATA, sampler=sampler)) for sampler in [*few, EverySecond()])
