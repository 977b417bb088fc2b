"""A checkpoint of a head that a callback put in loads into the user's own class in one line."""

import pytest
import torch

from lightning_feat.callbacks import GrassmannHead, SimplexETFHead, load_with_head
from tests.helpers import Plain, loader, trainer

HEADS = [
    lambda: GrassmannHead(2, scale=9.0),
    lambda: GrassmannHead(2, learn_scale=True),
    lambda: SimplexETFHead(scale=9.0, seed=3),
    lambda: SimplexETFHead(sparsity=0.25),
]


@pytest.mark.parametrize("make", HEADS)
def test_a_module_is_loaded_with_its_head(tmp_path, make):
    module, x = Plain(), torch.randn(4, 4)
    run = trainer(tmp_path, callbacks=[make()])
    run.fit(module, loader())
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match=r"net\.fc\.weight"):
        Plain.load_from_checkpoint(path)
    found = load_with_head(Plain, path)
    assert type(found.net.fc) is type(module.net.fc)
    assert torch.equal(found.eval()(x), module.eval()(x))


def test_other_checkpoints_are_refused(tmp_path):
    run = trainer(tmp_path)
    run.fit(Plain(), loader())
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"use Plain.load_from_checkpoint"):
        load_with_head(Plain, path)

    class More(Plain):
        def __init__(self):
            super().__init__()
            self.more = torch.nn.Linear(2, 2)

    run = trainer(tmp_path, callbacks=[SimplexETFHead()])
    run.fit(Plain(), loader())
    run.save_checkpoint(path)
    with pytest.raises(RuntimeError, match=r"other weights beside the head: \['more"):
        load_with_head(More, path)
