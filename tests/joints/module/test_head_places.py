"""Classifiers that no new head can stand for are refused before anything is replaced."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_feat.callbacks import GrassmannHead, SimplexETFHead
from lightning_feat.joints.module.head_places import place_of
from lightning_feat.layers import SimplexETF
from tests.helpers import Plain, loader, trainer


class Margin(nn.Linear):
    def forward(self, features, labels=None):
        return super().forward(features)


class WithFeatures(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Noisy(nn.Linear):
    """A cosine classifier that draws numbers."""

    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight + torch.randn_like(self.weight)))


def with_head(head):
    module = Plain()
    module.net.fc = head
    return module


def tied():
    module = Plain()
    module.embedding = nn.Embedding(3, 8)
    module.embedding.weight = module.net.fc.weight
    return module


REFUSED = {
    "margin": (lambda: with_head(Margin(8, 3)), r"a Margin, whose forward takes \(features, labels\)"),
    "two outputs": (lambda: with_head(WithFeatures(8, 3)), "puts out a tuple"),
    "lazy": (lambda: with_head(nn.LazyLinear(3)), "a LazyLinear that has no weight before it has run"),
    "lazy convolution": (lambda: with_head(nn.LazyConv2d(3, 1)), "a LazyConv2d that has no weight before"),
    "adaptive softmax": (lambda: with_head(nn.AdaptiveLogSoftmaxWithLoss(8, 5, [2])), "a AdaptiveLogSoftmaxWithLoss"),
    "tied": (tied, r"shares its weight with embedding.weight, and \w+ would untie them"),
}


@pytest.mark.parametrize("make", [SimplexETFHead, lambda: GrassmannHead(2)])
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_and_stays(tmp_path, name, make):
    of, said = REFUSED[name]
    module = of()
    head = module.net.fc
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, callbacks=[make()]).fit(module, loader())
    assert module.net.fc is head


def test_a_linear_with_a_forward_of_its_own_is_tried_without_a_trace(tmp_path):
    head, called = Noisy(8, 3), []
    head.register_forward_hook(lambda *args: called.append(1))
    state = torch.get_rng_state()
    assert place_of(head).out_features == 3
    assert not called
    assert head.training
    assert torch.equal(torch.get_rng_state(), state)
    module = with_head(head)
    trainer(tmp_path, callbacks=[SimplexETFHead()]).fit(module, loader())
    assert type(module.net.fc) is SimplexETF


@pytest.mark.parametrize("make", [SimplexETFHead, lambda: SimplexETFHead(sparsity=0.5), lambda: GrassmannHead(2)])
def test_an_error_of_a_step_that_reads_the_old_weight_says_what_is_there_now(tmp_path, make):
    class Reads(Plain):
        def forward(self, x):
            return F.linear(self.net.body(x), self.net.fc.weight)

    with pytest.raises(AttributeError) as error:
        trainer(tmp_path, callbacks=[make()]).fit(Reads(), loader())
    if hasattr(error.value, "add_note"):
        assert "in the place of the classifier, which is called with features alone" in error.value.__notes__[-1]
