import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_feat.data import IndexedDataset


class WholeBatches(Dataset):
    """Squares, with a way to fetch many at once that says it was used."""

    def __getitem__(self, index):
        return {"square": index**2, "at_once": False}

    def __getitems__(self, indices):
        return [{"square": index**2, "at_once": True} for index in indices]

    def __len__(self):
        return 6


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_item_stays_whole_beside_its_index():
    images, targets = torch.randn(4, 2), torch.arange(4)
    indexed = IndexedDataset(TensorDataset(images, targets))
    (image, target), index = indexed[2]
    assert torch.equal(image, images[2])
    assert (target, index, len(indexed)) == (2, 2, 4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shuffled_batches_carry_the_indices_of_their_items(num_workers):
    images = torch.randn(23, 2)
    loader = DataLoader(IndexedDataset(TensorDataset(images)), 5, shuffle=True, num_workers=num_workers)
    seen = []
    for (batch,), indices in loader:
        assert torch.equal(batch, images[indices])
        seen += indices.tolist()
    assert sorted(seen) == list(range(23))


def test_whole_batches_are_fetched_at_once_where_the_data_set_can():
    batch, indices = next(iter(DataLoader(IndexedDataset(WholeBatches()), batch_size=3)))
    assert batch["square"].tolist() == [0, 1, 4]
    assert batch["at_once"].all()
    assert indices.tolist() == [0, 1, 2]


def test_negative_position_names_the_same_example():
    assert IndexedDataset(["a", "b", "c"])[-1] == ("c", 2)


def test_survives_pickling():
    assert pickle.loads(pickle.dumps(IndexedDataset(["a", "b"])))[1] == ("b", 1)


def test_a_stream_is_refused():
    with pytest.raises(ValueError, match="Stream is an IterableDataset, whose examples have no index"):
        IndexedDataset(Stream())


def test_what_is_no_data_set_is_refused():
    with pytest.raises(ValueError, match="DataLoader has no __getitem__"):
        IndexedDataset(DataLoader([1, 2, 3]))
