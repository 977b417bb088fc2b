import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, nll_loss, one_hot

from lightning_feat.doctor.checks.labels import TargetEar, differ, num_mixed

TARGETS = torch.tensor([0, 1, 2, 3, 1, 2])


def heard(loss):
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ear = TargetEar()
    with ear:
        loss(logits)
    return ear


def soft(shares, other=None):
    other = TARGETS.roll(1) if other is None else other
    share = torch.as_tensor(shares)[:, None]
    return share * one_hot(TARGETS, 4) + (1 - share) * one_hot(other, 4)


@pytest.mark.parametrize(
    ("loss", "mixed"),
    [
        (lambda z: cross_entropy(z, TARGETS), 0),
        (lambda z: nll_loss(z.log_softmax(1), TARGETS.roll(1)), 0),  # of another task: never the labels themselves
        (lambda z: cross_entropy(z, soft([1.0] * 6)), 0),
        (lambda z: cross_entropy(z, soft([0.7] * 6)), 6),
        (lambda z: cross_entropy(z, soft([0.7, 1.0, 0.2, 1.0, 0.4, 0.9])), 4),
        (lambda z: cross_entropy(z, 0.9 * soft([0.7] * 6) + 0.025), 6),  # mixed and smoothed
        (lambda z: cross_entropy(z, 0.9 * soft([1.0] * 6) + 0.025), 0),
        (lambda z: kl_div(z.log_softmax(1), (2 * z).softmax(1).detach(), reduction="batchmean"), 0),
        (lambda z: 0.6 * cross_entropy(z, TARGETS) + 0.4 * cross_entropy(z, TARGETS.flip(0)), 4),
    ],
)
def test_how_many_samples_were_mixed(loss, mixed):
    assert num_mixed(TARGETS, heard(loss)) == mixed


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_two_classes(share):
    targets = torch.tensor([0, 1, 1, 0])
    mixed = share * one_hot(targets, 2) + (1 - share) * one_hot(targets.roll(1), 2)
    ear = TargetEar()
    with ear:
        cross_entropy(torch.zeros(4, 2, requires_grad=True), mixed)
    assert num_mixed(targets, ear) == (2 if share < 1 else 0)


def test_other_labels():
    assert differ(TARGETS, heard(lambda z: cross_entropy(z, TARGETS // 2)))
    assert not differ(TARGETS, heard(lambda z: cross_entropy(z, TARGETS // 2) + cross_entropy(z, TARGETS)))
    assert not differ(TARGETS, heard(lambda z: z.sum()))
