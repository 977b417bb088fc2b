"""Heads in other places than the usual ones: what the last layer is, and what is asked about."""

import pytest
import timm
import torch
from torch import nn

from lightning_feat.joints.features.heads import find_classifier
from tests.helpers import Net


class Holder(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Cosine(nn.Module):
    """A head of the user's own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))


def backbone():
    return timm.create_model("test_resnet", num_classes=16)


def perceptron(width=8):
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 3))


ASKED = {
    "perceptron on a model": (lambda: Holder(backbone=backbone(), top=perceptron(16)), ["backbone.fc", "top.2"]),
    "list": (lambda: Holder(backbone=backbone(), tops=nn.ModuleList([nn.Linear(16, 3)])), ["backbone.fc", "tops.0"]),
    "dict": (
        lambda: Holder(backbone=backbone(), tops=nn.ModuleDict({"a": nn.Linear(16, 3)})),
        ["backbone.fc", "tops.a"],
    ),
    "made before": (lambda: Holder(out=nn.Linear(16, 3), backbone=backbone()), ["backbone.fc", "out"]),
    "by name, list": (lambda: Holder(net=Net(), tops=nn.ModuleList([nn.Linear(3, 3)])), ["net.fc", "tops.0"]),
    "tasks": (
        lambda: Holder(body=nn.Linear(4, 8), heads=nn.ModuleDict({"a": nn.Linear(8, 3), "b": nn.Linear(8, 2)})),
        ["heads.a", "heads.b"],
    ),
    "several": (lambda: Holder(heads=nn.ModuleList(nn.Linear(8, 3) for _ in range(2))), ["heads.0", "heads.1"]),
    "gate": (
        lambda: Holder(classifier=Holder(out=nn.Linear(8, 3), gate=nn.Linear(8, 3))),
        ["classifier.out", "classifier.gate"],
    ),
    "skip": (
        lambda: Holder(classifier=Holder(a=nn.Linear(8, 5), b=nn.Linear(5, 3), skip=nn.Linear(8, 3))),
        ["classifier.b", "classifier.skip"],
    ),
    "projection": (
        lambda: Holder(body=nn.Linear(4, 8), head=perceptron(), linear=nn.Linear(8, 3)),
        ["head.2", "linear"],
    ),
    "own kind": (lambda: Holder(body=nn.Linear(4, 8), cosine=Cosine()), ["body", "cosine"]),
}
FOUND = {
    "model in a Sequential": (lambda: Holder(net=nn.Sequential(backbone(), nn.ReLU(), nn.Linear(16, 3))), "net.2"),
    "parts in a Sequential": (
        lambda: Holder(net=nn.Sequential(Net(), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3)))),
        "net.1.1",
    ),
    "made in another order": (
        lambda: Holder(classifier=nn.ModuleDict({"out": nn.Linear(5, 3), "hidden": nn.Linear(8, 5)})),
        "classifier.out",
    ),
    "one width": (
        lambda: Holder(classifier=nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])),
        "classifier.1",
    ),
    "own kind before": (lambda: Holder(cosine=Cosine(), out=nn.Linear(4, 3)), "out"),
    "adaptive softmax": (
        lambda: Holder(body=nn.Linear(4, 8), classifier=nn.AdaptiveLogSoftmaxWithLoss(8, 5, [2])),
        "classifier",
    ),
    "convolution in front": (
        lambda: Holder(stem=nn.Conv2d(3, 3, 1), net=timm.create_model("test_resnet", num_classes=3)),
        "net.fc",
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_two_layers_could_be_is_asked(name):
    make, candidates = ASKED[name]
    with pytest.raises(ValueError, match="several layers") as error:
        find_classifier(make())
    assert all(f"{candidate} (" in str(error.value) for candidate in candidates)


@pytest.mark.parametrize("name", FOUND)
def test_what_one_layer_alone_can_be_is_found(name):
    make, found = FOUND[name]
    assert find_classifier(make())[0] == found


def test_adapters_in_a_row_are_no_blocks():
    def adapted(width, out):
        layer = Holder(base_layer=nn.Linear(width, out), lora_A=nn.Linear(width, 1), lora_B=nn.Linear(1, out))
        layer.in_features, layer.out_features = width, out
        return layer

    net = nn.Sequential(adapted(4, 8), nn.ReLU(), nn.Linear(8, 8), adapted(8, 3))
    assert find_classifier(Holder(net=net))[0] == "net.3"


def test_what_no_part_makes_is_asked_though_there_is_an_example():
    class Prototypes(Holder):
        def forward(self, x):
            return -torch.cdist(self.b(self.a(x)), self.prototypes)

    module = Prototypes(a=nn.Linear(4, 8), b=nn.Linear(8, 8))
    module.prototypes = nn.Parameter(torch.randn(3, 8))
    module.example_input_array = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="several layers"):
        find_classifier(module)
