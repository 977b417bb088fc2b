"""A run that resumes with other options of a head than its checkpoint's is refused, whatever the option."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_feat.callbacks import GrassmannHead, SimplexETFHead
from tests.helpers import Plain, loader, trainer


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (SimplexETFHead(scale=25.0), SimplexETFHead(scale=5.0), r"SimplexETF with scale=25.0 at .* set scale=25.0"),
        (SimplexETFHead(), SimplexETFHead(sparsity=0.25), r"with sparsity=0.0 at .* asks for sparsity=0.25"),
        (GrassmannHead(2, scale=25.0), GrassmannHead(2, scale=5.0), r"GrassmannLinear with scale=25.0 at"),
        (GrassmannHead(2), GrassmannHead(2, learn_scale=True), r"with learn_scale=False at .* set learn_scale=False"),
        (GrassmannHead(2, learn_scale=True), GrassmannHead(2), r"with learn_scale=True at"),
    ],
)
def test_another_option_at_resume_is_refused(tmp_path, first, then, message):
    saved = ModelCheckpoint(tmp_path, filename="first")
    trainer(tmp_path, callbacks=[first, saved], enable_checkpointing=True).fit(Plain(), loader())
    run = trainer(tmp_path, callbacks=[then], max_epochs=2)
    with pytest.raises(ValueError, match=message):
        run.fit(Plain(), loader(), ckpt_path=saved.best_model_path, weights_only=False)


@pytest.mark.parametrize("make", [lambda: SimplexETFHead(seed=3), lambda: GrassmannHead(2, learn_scale=True)])
def test_the_same_options_resume(tmp_path, make):
    saved = ModelCheckpoint(tmp_path, filename="first")
    trainer(tmp_path, callbacks=[make(), saved], enable_checkpointing=True).fit(Plain(), loader())
    torch.manual_seed(1)
    run = trainer(tmp_path, callbacks=[make()], max_epochs=2)
    run.fit(Plain(), loader(), ckpt_path=saved.best_model_path, weights_only=False)
    assert run.global_step == 8


HEADS = {"GrassmannLinear": lambda **kwargs: GrassmannHead(2, **kwargs), "SimplexETF": SimplexETFHead}


@pytest.mark.parametrize("first", HEADS)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_checkpoint_with_a_head_of_another_kind(tmp_path, first, stage):
    (then,) = HEADS.keys() - {first}
    saved = ModelCheckpoint(tmp_path, filename="first")
    module = Plain()
    trainer(tmp_path, callbacks=[HEADS[first](), saved], enable_checkpointing=True).fit(module, loader())

    def go_on(**kwargs):
        run, other = trainer(tmp_path, callbacks=[HEADS[then](**kwargs)], max_epochs=2), Plain()
        data = {"ckpt_path": saved.best_model_path, "weights_only": False}
        if stage == "fit":
            run.fit(other, loader(), **data)
        else:
            run.test(other, loader(), verbose=False, **data)
        return run, other

    kinds = f"the checkpoint has a {first} at net.fc, where this module has a {then}"
    with pytest.raises(RuntimeError, match=rf"{kinds}: set .*fresh_head=True.* or take {first[:7]}\w* in its place"):
        go_on()
    run, other = go_on(fresh_head=True)
    assert type(other.net.fc).__name__ == then
    if stage == "test":
        assert torch.equal(other.net.body[0].weight, module.net.body[0].weight)
    else:
        assert run.global_step == 8
