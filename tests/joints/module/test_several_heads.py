"""Models that average the logits of several heads: all are replaced together, and only where they are averaged."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_feat.callbacks import GrassmannHead, SimplexETFHead
from lightning_feat.functional.grassmann import orthonormality_error
from tests.helpers import Plain, loader, trainer


def fit(tmp_path, module, *callbacks):
    trainer(tmp_path, callbacks=list(callbacks)).fit(module, loader())


class Several(Plain):
    """Lists its heads as timm's distilled networks do, and makes its logits of them by ``of``."""

    def __init__(self, of=lambda a, b: (a + b) / 2):
        super().__init__()
        self.of = of
        self.net.fc_dist = nn.Linear(8, 3)
        self.net.get_classifier = lambda: (self.net.fc, self.net.fc_dist)

    def forward(self, x):
        h = self.net.body(x)
        return self.of(self.net.fc(h), self.net.fc_dist(h.roll(1, 1)))

    def test_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("layer", [None, ["net.fc", "net.fc_dist"]])
@pytest.mark.parametrize("make", [SimplexETFHead, lambda **kwargs: GrassmannHead(2, **kwargs)])
def test_heads_that_are_averaged_are_replaced_together(tmp_path, make, layer):
    module, callback = Several(), make(layer=layer)
    kinds = []
    for _ in range(2):
        run = trainer(tmp_path, callbacks=[callback])
        run.fit(module, loader())
        run.test(module, loader(), verbose=False)
        kinds.append([type(module.net.fc).__name__, type(module.net.fc_dist).__name__])
    assert kinds == [["SimplexETF"] * 2] * 2 or kinds == [["GrassmannLinear"] * 2] * 2
    assert isinstance(module.net.body[0], nn.Linear)
    again = Several()
    path = tmp_path / "averaged.ckpt"
    run.save_checkpoint(path)
    trainer(tmp_path, callbacks=[make(layer=layer)]).test(
        again, loader(), ckpt_path=path, verbose=False, weights_only=False
    )
    x = loader().dataset.tensors[0]
    assert torch.equal(again(x), module(x))
    if isinstance(callback, GrassmannHead):
        assert all(orthonormality_error(h.basis).max() < 1e-5 for _, h in callback.heads(module))


@pytest.mark.parametrize("of", [torch.add, lambda a, b: (a + b).log_softmax(1)])
def test_a_factor_and_a_number_for_each_sample_are_averages_too(tmp_path, of):
    fit(tmp_path, Several(of), SimplexETFHead())


@pytest.mark.parametrize("of", [lambda a, b: a + 0.5 * b, lambda a, b: a - b, torch.maximum])
def test_heads_that_are_not_averaged_are_refused(tmp_path, of):
    module = Several(of)
    with pytest.raises(ValueError, match=r"made of net.fc and net.fc_dist otherwise than by their mean"):
        fit(tmp_path, module, SimplexETFHead())


def test_heads_with_a_loss_each_are_replaced_together(tmp_path):
    class Each(Several):
        def training_step(self, batch, batch_idx):
            h = self.net.body(batch[0])
            return F.cross_entropy(self.net.fc(h), batch[1]) + F.cross_entropy(self.net.fc_dist(h), batch[1])

    fit(tmp_path, Each(), SimplexETFHead())


def test_a_list_of_heads_is_checked_before_one_is_replaced(tmp_path):
    module = Several()
    module.net.fc_dist = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"other numbers of classes .*net.fc \(3\), net.fc_dist \(4\)"):
        fit(tmp_path, module, SimplexETFHead(layer=["net.fc", "net.fc_dist"]))
    assert type(module.net.fc) is nn.Linear
    with pytest.raises(ValueError, match="at least one"):
        SimplexETFHead(layer=[])
    with pytest.raises(ValueError, match="name them all, in a list"):
        fit(tmp_path, module, SimplexETFHead())
