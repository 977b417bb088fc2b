"""A head is put in once, and found again in every stage, whatever stands beside it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_feat.callbacks import GrassmannHead, SimplexETFHead
from lightning_feat.joints.features.heads import find_classifier
from lightning_feat.joints.module.head_swap import HeadSwap
from lightning_feat.layers import GrassmannLinear, SimplexETF
from tests.helpers import Plain, loader, trainer


class Dense(nn.Module):
    """The head of RoBERTa and its like: a hidden layer, and the projection under a name of its own."""

    def __init__(self):
        super().__init__()
        self.dense, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out_proj(torch.tanh(self.dense(x)))


class Saved(nn.Module):
    """What peft makes of a layer in ``modules_to_save``: the layer as it was, and the copy that is trained."""

    def __init__(self, layer):
        super().__init__()
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(layer)})
        self.original_module = layer.requires_grad_(False)

    def forward(self, x):
        return self.modules_to_save["default"](x)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"hidden": nn.Linear(8, 8), "out": nn.Linear(8, 3)})

    def forward(self, x):
        return self.parts["out"](self.parts["hidden"](x).relu())


def sequential():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 3))


HEADS = {
    "sequential": (sequential, "3"),
    "dense": (Dense, "out_proj"),
    "parts": (Parts, "parts.out"),
    "saved": (lambda: Saved(sequential()), "modules_to_save.default.3"),
}
CALLBACKS = {"simplex": SimplexETFHead, "grassmann": lambda: GrassmannHead(subspace_dim=2)}


def module_with(make):
    module = Plain()
    module.net.fc = make()
    return module


def swapped(module):
    return [name for name, part in module.named_modules() if isinstance(part, (SimplexETF, GrassmannLinear))]


@pytest.mark.parametrize("callback", CALLBACKS.values(), ids=CALLBACKS)
@pytest.mark.parametrize(("make", "name"), HEADS.values(), ids=HEADS)
def test_of_a_container_the_last_layer_alone_is_replaced_and_once(tmp_path, make, name, callback):
    module, head = module_with(make), callback()
    linear = sum(isinstance(part, nn.Linear) for part in module.modules())
    for stage in ("fit", "validate", "test", "fit"):
        getattr(trainer(tmp_path, callbacks=[head]), stage)(module, loader())
        assert swapped(module) == [f"net.fc.{name}"]
        assert sum(isinstance(part, nn.Linear) for part in module.modules()) == linear - 1


@pytest.mark.parametrize("callback", CALLBACKS.values(), ids=CALLBACKS)
def test_a_checkpoint_comes_back_into_a_head_in_a_container(tmp_path, callback):
    first, again = module_with(sequential), module_with(sequential)
    run = trainer(tmp_path, callbacks=[callback()], enable_checkpointing=True)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    trainer(tmp_path, callbacks=[callback()], max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert swapped(again) == ["net.fc.3"]
    result = [trainer(tmp_path, callbacks=[callback()]).test(m, loader(), verbose=False) for m in (again, again)]
    assert result[0] == result[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_know_their_head_too(tmp_path, copied):
    module = module_with(sequential)
    trainer(tmp_path, callbacks=[SimplexETFHead()]).fit(module, loader())
    twin = copied(module)
    assert find_classifier(twin)[1] is twin.net.fc[3]


def test_a_head_that_was_named_is_no_answer_to_where_the_classifier_is():
    module = Plain()
    module.aux = nn.Sequential(nn.Linear(8, 3))
    HeadSwap("aux.0", SimplexETF, lambda old: SimplexETF(8, 3), {}, SimplexETFHead, False).swap(module)
    assert swapped(module) == ["aux.0"]
    assert find_classifier(module)[0] == "net.fc"


@pytest.mark.parametrize("head", [SimplexETF(8, 3), GrassmannLinear(8, 3, 2)])
def test_a_head_of_its_own_kind_at_the_end_of_a_container_is_found(head):
    module = module_with(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), head))
    assert find_classifier(module) == ("net.fc.2", head)
