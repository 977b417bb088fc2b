from collections import namedtuple

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_feat.joints.features.batches import TargetKey, class_indices, inputs_of, targets_of
from tests.helpers import Example

X, Y = torch.zeros(4, 2), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y, torch.arange(4)),
        {"image": X, "label": Y},
        {"image": X, "targets": Y},
        Example(X, Y),
        namedtuple("Sample", "image y")(X, Y),
    ],
)
def test_targets_are_found_in_every_usual_form(batch):
    assert targets_of(batch) is Y


def test_masks_of_segmentation_are_targets_where_nothing_else_is():
    maps = torch.zeros(4, 5, 5, dtype=torch.long)
    assert targets_of({"image": X, "mask": maps}) is maps
    assert targets_of(namedtuple("Sample", "image masks")(X, maps)) is maps
    assert targets_of({"image": X, "mask": maps, "label": Y}) is Y
    for padding in (torch.ones(4, 5, dtype=torch.long), maps.bool(), maps.float()):  # of tokens, or no classes
        with pytest.raises(ValueError, match="found no targets"):
            targets_of({"image": X, "mask": padding})


@pytest.mark.parametrize(
    ("batch", "key"),
    [((Y, X), 0), ({"fine": Y, "label": X}, "fine"), (Example(X, Y), "target"), ((X, {"a": Y}), lambda b: b[1]["a"])],
)
def test_target_key_leads_to_the_targets(batch, key):
    assert targets_of(batch, key) is Y


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (X, "found no targets in a batch of Tensor"),
        ({"image": X}, r"found no targets in a batch of dict\(image: Tensor\(4, 2\) float32\)"),
        ({"label": Y, "target": Y}, "several entries that could be the targets"),
        ([(X, Y), torch.arange(4)], "found no targets"),  # an indexed data set: the second entry is no target
        ((X,), "found no targets"),
    ],
)
def test_what_cannot_be_told_is_an_error_that_shows_the_batch(batch, text):
    with pytest.raises(ValueError, match=text):
        targets_of(batch)


def test_a_key_that_leads_nowhere_is_named():
    with pytest.raises(ValueError, match=r"target_key='klass' leads nowhere in a batch of dict\(image"):
        targets_of({"image": X}, "klass")


def test_targets_that_are_no_tensor_are_refused():
    with pytest.raises(ValueError, match="the targets are list"):
        targets_of((X, ["cat", "dog"]))


def test_inputs_are_the_first_entry_or_the_batch():
    assert inputs_of((X, Y)) is X
    assert inputs_of({"image": X})["image"] is X


def test_class_indices_of_tokens_and_of_several_views():
    per_token = torch.tensor([[0, 1], [2, -100]])
    assert class_indices(per_token, 4).tolist() == [0, 1, 2, -100]
    assert class_indices(Y, 8).tolist() == [*Y.tolist(), *Y.tolist()]


@pytest.mark.parametrize("targets", [Y.float(), torch.rand(4, 3), Y > 0])
def test_targets_that_are_not_integers_are_refused(targets):
    with pytest.raises(ValueError, match="integer class indices are needed"):
        class_indices(targets, 4)


def test_targets_that_do_not_fit_the_features_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4,\), which does not fit 6 samples"):
        class_indices(Y, 6)


def test_tokens_need_a_target_each():
    with pytest.raises(ValueError, match="does not fit 6 samples"):
        class_indices(torch.tensor([0, 1]), 6, views=False)
    assert class_indices(torch.tensor([[0, 1], [1, 1]]), 4, views=False).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("targets", "num_samples", "said"),
    [
        (torch.eye(3), 3, "one-hot labels"),
        (torch.eye(3).bool(), 3, "one-hot labels"),
        (torch.eye(3).long(), 3, "they look like one-hot labels"),
        (torch.ones(4, 3), 4, "several classes at once"),
        (torch.ones(4, 3).long(), 4, "several classes at once"),
        (torch.full((4, 2), 0.5), 4, "soft labels"),
        (torch.ones(4, 3).long(), 8, "choose a pooling"),  # of tokens, perhaps
        (torch.tensor([[0, 2], [1, 2]]), 2, "choose a pooling"),
    ],
)
def test_labels_of_another_kind_are_called_what_they_are(targets, num_samples, said):
    with pytest.raises(ValueError, match=said):
        class_indices(targets, num_samples)


def test_a_batch_is_shown_in_a_line_however_many_samples_it_names():
    with pytest.raises(ValueError, match=r"in a batch of tuple\(Tensor\(64, 2\) float32, list of 64 str\)"):
        targets_of((torch.zeros(64, 2), ["cat"] * 64))


def test_a_key_of_something_else_is_called_by_its_own_name():
    with pytest.raises(ValueError, match="mask_key='mask' leads nowhere"):
        targets_of({"x": torch.zeros(2)}, "mask", "mask_key")


def second(batch):
    return batch["b.c"]


def test_a_function_may_be_named_by_its_dotted_path_and_a_key_may_hold_a_dot():
    y = torch.tensor([1, 0])
    assert targets_of({"b.c": y}, f"{__name__}.second") is y
    assert targets_of({"b.c": y}, "b.c") is y


@pytest.mark.parametrize("value", ["label", 1, "tests.joints.features.test_batches.second"])
def test_a_key_is_written_into_a_configuration_as_it_was_read(value):
    def settings(target_key: TargetKey = None):
        pass

    parser = ArgumentParser()
    parser.add_function_arguments(settings)
    parsed = parser.parse_object({"target_key": value})
    assert parsed.target_key == value
    assert parser.parse_string(parser.dump(parsed)).target_key == value
