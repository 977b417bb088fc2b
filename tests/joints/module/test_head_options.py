"""A head that is there already is what the callback asks for, or that is said; and heads are loaded without one."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning

from lightning_feat.callbacks import GrassmannHead, SimplexETFHead
from lightning_feat.layers import GrassmannLinear, SimplexETF
from tests.helpers import Plain, loader, trainer


def fit(tmp_path, module, *callbacks, epochs=1, checkpoint=None, **kwargs):
    run = trainer(tmp_path, callbacks=[*callbacks], max_epochs=epochs, **kwargs)
    run.fit(module, loader(), ckpt_path=checkpoint)
    return run


HEADS = {"grassmann": (GrassmannHead, {"subspace_dim": 2}), "simplex": (SimplexETFHead, {})}
OTHERS = [
    *(("grassmann", {"subspace_dim": 3}), ("grassmann", {"scale": 5.0}), ("grassmann", {"learn_scale": True})),
    *(("simplex", {"scale": 5.0}), ("simplex", {"seed": 1}), ("simplex", {"sparsity": 0.25})),
]


@pytest.mark.parametrize(("kind", "other"), OTHERS)
def test_other_options_for_a_head_that_was_put_in_are_refused(tmp_path, kind, other):
    callback, options = HEADS[kind]
    module = Plain()
    fit(tmp_path, module, callback(**options))
    fit(tmp_path, module, callback(**options))  # the same are no matter
    (name, value), *_ = other.items()
    with pytest.raises(ValueError, match=rf"net.fc is a \w+ already, with .* asks for {name}={value!r}: make a new"):
        fit(tmp_path, module, callback(**{**options, **other}))


def built(head):
    module = Plain()
    module.net.fc = head
    return module


def test_of_a_head_that_is_the_modules_own_stated_options_must_be_those_it_has(tmp_path):
    fit(tmp_path, built(GrassmannLinear(8, 3, 2, scale=10.0)), GrassmannHead())
    fit(tmp_path, built(GrassmannLinear(8, 3, 2, scale=10.0)), GrassmannHead(2, scale=10.0))
    fit(tmp_path, built(SimplexETF(8, 3, scale=9.0, seed=4)), SimplexETFHead())
    for head, callback in [
        (GrassmannLinear(8, 3, 2), GrassmannHead(3)),
        (GrassmannLinear(8, 3, 2), GrassmannHead(2, learn_scale=True)),
        (SimplexETF(8, 3, seed=4), SimplexETFHead(seed=5)),
        (SimplexETF(8, 3), SimplexETFHead(sparsity=0.25)),
    ]:
        with pytest.raises(ValueError, match="already, with"):
            fit(tmp_path, built(head), callback)


@pytest.mark.parametrize("kind", HEADS)
def test_a_run_that_resumes_at_another_scale_is_refused_and_a_test_takes_the_trained_one(tmp_path, kind):
    callback, options = HEADS[kind]
    fit(tmp_path, Plain(), callback(**options, scale=9.0)).save_checkpoint(path := tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"has a \w+ with scale=9.0 at net.fc, .* scale=5.0: set scale=9.0 to resume"):
        fit(tmp_path, Plain(), callback(**options, scale=5.0), epochs=2, checkpoint=path)
    module = Plain()
    trainer(tmp_path, callbacks=[callback(**options)]).test(module, loader(), ckpt_path=path, verbose=False)
    assert float(module.net.fc.scale) == 9.0


@pytest.mark.parametrize("kind", HEADS)
def test_fresh_head_counts_for_a_head_that_is_there_too(tmp_path, kind):
    callback, options = HEADS[kind]
    fit(tmp_path, Plain()).save_checkpoint(path := tmp_path / "plain.ckpt")
    own = GrassmannLinear(8, 3, 2) if kind == "grassmann" else SimplexETF(8, 3)
    used = Plain()
    fit(tmp_path, used, callback(**options))
    for module in (used, built(own)):
        with pytest.warns(UserWarning, match="start afresh|starts afresh"):
            fit(tmp_path, module, callback(**options, fresh_head=True), epochs=2, checkpoint=path)


class Tuned(Plain):
    """Has a ``backbone``, as fine-tuning callbacks want it."""

    def __init__(self):
        super().__init__()
        self.backbone, self.net.body = self.net.body, torch.nn.Identity()

    def forward(self, x):
        return self.net(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("saved_in", [1, 3])
def test_a_fresh_head_joins_a_run_of_fine_tuning(tmp_path, saved_in):
    pl.seed_everything(0, verbose=False)
    fit(tmp_path, Tuned(), BackboneFinetuning(2), epochs=saved_in).save_checkpoint(path := tmp_path / "half.ckpt")
    module, head = Tuned(), GrassmannHead(2, fresh_head=True)
    run = fit(tmp_path, module, head, BackboneFinetuning(2), epochs=5, checkpoint=path)
    first, second = run.optimizers[0].param_groups
    assert [p is module.net.fc.basis for p in first["params"]] == [True]
    assert len(second["params"]) == 2
