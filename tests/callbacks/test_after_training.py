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


@pytest.mark.parametrize("make", HEADS[1:3])
def test_a_run_says_once_how_its_checkpoints_are_loaded(tmp_path, make, caplog):
    run, module = trainer(tmp_path, callbacks=[make()]), Plain()
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "a.ckpt")
        run.save_checkpoint(tmp_path / "b.ckpt")
    said = [text for text in caplog.messages if "load_with_head(Plain, path)" in text]
    assert len(said) == 1
    assert f"a {type(module.net.fc).__name__} at net.fc" in said[0]


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
