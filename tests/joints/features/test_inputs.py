from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from lightning_feat.joints.features.inputs import every_other, floating_inputs, with_inputs

X, Y = torch.randn(6, 2), torch.arange(6)
Named = namedtuple("Named", ["x", "y"])


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    target: torch.Tensor


FORMS = {
    "tensor": X,
    "tuple": (X, Y),
    "list": [X, Y],
    "named": Named(X, Y),
    "dict": {"image": X, "label": Y},
    "mapping": UserDict({"image": X, "label": Y}),
    "dataclass": Frozen(X, Y),
}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_found_and_replaced_and_the_batch_stays(form):
    batch = FORMS[form]
    assert floating_inputs(batch) is X
    other = torch.zeros(6, 2)
    changed = with_inputs(batch, other)
    assert type(changed) is type(batch)
    assert floating_inputs(changed) is other
    assert floating_inputs(batch) is X
    if form != "tensor":
        entries = changed.__dict__.values() if form == "dataclass" else changed
        entries = changed.values() if form in ("dict", "mapping") else entries
        assert [*entries][1] is Y


@pytest.mark.parametrize("form", FORMS)
def test_every_other_sample(form):
    halved = every_other(FORMS[form], 6)
    assert type(halved) is type(FORMS[form])
    if form != "mapping":  # no tree to torch: it stays whole
        assert torch.equal(floating_inputs(halved), X[::2])


def test_what_is_no_sample_is_left():
    batch = {"image": X, "label": Y, "scale": torch.ones(3), "name": "a", "step": torch.tensor(6)}
    halved = every_other(batch, 6)
    assert [len(halved["image"]), len(halved["label"]), len(halved["scale"])] == [3, 3, 3]
    assert (halved["name"], int(halved["step"])) == ("a", 6)


def test_a_key_says_where():
    batch = {"left": X, "right": X + 1, "y": Y}
    assert floating_inputs(batch, "right") is batch["right"]
    assert with_inputs(batch, X, "right")["right"] is X
    assert floating_inputs((Y, X), 1) is X
    assert with_inputs((Y, X), X + 1, 1)[0] is Y


@pytest.mark.parametrize(
    ("batch", "key", "message"),
    [
        ((Y, X), None, r"the inputs are Tensor\(6,\) int64"),
        (((X, X), Y), None, "the inputs are tuple"),
        ({"tokens": Y, "label": Y}, None, "found no inputs"),
        ({"image": X, "x": X}, None, "several entries that could be the inputs"),
        ({"image": X}, "video", "input_key='video' leads nowhere"),
    ],
)
def test_what_cannot_be_told_is_said(batch, key, message):
    with pytest.raises(ValueError, match=message):
        floating_inputs(batch, key)
