import pytest
import torch
from torch import nn

from lightning_feat.baselines import MLPClassifier


def test_backbone_puts_out_the_last_hidden_width_and_head_the_logits():
    module = MLPClassifier(in_features=64, num_classes=10, hidden=(32, 16))
    features = module.backbone(torch.randn(5, 1, 8, 8))
    assert features.shape == (5, 16)
    assert module.head(features).shape == (5, 10)


def test_layers_come_in_the_order_promised():
    module = MLPClassifier(4, 2, hidden=[3], dropout=0.5, batch_norm=True)
    assert [type(layer) for layer in module.backbone] == [nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]


def test_no_hidden_layer_is_a_linear_classifier():
    module, images = MLPClassifier(6, 2, hidden=()), torch.randn(3, 2, 3)
    assert torch.equal(module(images), module.head(images.flatten(1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": (8, 0)}, r"hidden=\[8, 0\]"),
        ({"in_features": 0}, "in_features=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLPClassifier(**{"in_features": 4, "num_classes": 3, **arguments})
