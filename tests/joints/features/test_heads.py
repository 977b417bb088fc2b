import pytest
import timm
import torch
from torch import nn

from lightning_feat.joints.features.heads import find_classifier, find_heads, replace_layer
from lightning_feat.layers import GrassmannLinear, SimplexETF
from tests.helpers import Plain


class Holder(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


@pytest.mark.parametrize(("model", "name"), [("test_resnet", "fc"), ("test_vit", "head"), ("test_convnext", "head.fc")])
def test_timm_tells_its_classifier(model, name):
    network = timm.create_model(model, num_classes=7)
    found, layer = find_classifier(Holder(network=network))
    assert found == f"network.{name}"
    assert layer is network.get_classifier()


@pytest.mark.parametrize("name", ["fc", "classifier", "head"])
def test_a_layer_called_like_a_classifier_is_one(name):
    head = nn.Linear(4, 3)
    module = Holder(net=Holder(**{"body": nn.Linear(4, 4), name: head}))
    assert find_classifier(module) == (f"net.{name}", head)


def test_of_a_container_it_is_the_last_linear():
    last = nn.Linear(5, 3)
    module = Holder(features=nn.Linear(4, 4), classifier=nn.Sequential(nn.Dropout(), nn.Linear(4, 5), nn.ReLU(), last))
    assert find_classifier(module) == ("classifier.3", last)


def test_the_only_linear_is_the_classifier():
    module = Holder(conv=nn.Conv2d(1, 2, 3), out=nn.Linear(2, 3))
    assert find_classifier(module)[0] == "out"


@pytest.mark.parametrize("head", [GrassmannLinear(2, 3, 1), SimplexETF(2, 3)])
def test_a_head_of_its_own_kind_is_found_by_that(head):
    module = Holder(body=nn.Linear(2, 2), out=head)
    assert find_classifier(module) == ("out", head)


def test_it_is_found_through_a_compiled_network():
    module = Holder(net=torch.compile(Holder(body=nn.Linear(4, 4), fc=nn.Linear(4, 3)), backend="eager"))
    assert find_classifier(module)[0] == "net.fc"


def test_two_candidates_are_asked_about():
    module = Holder(student=Holder(fc=nn.Linear(4, 3)), teacher=Holder(fc=nn.Linear(4, 3)))
    with pytest.raises(
        ValueError, match=r"several layers that could be the classifier: student.fc \(Linear\), teacher.fc"
    ):
        find_classifier(module)


def test_timm_models_with_two_heads_are_asked_about():
    module = Holder(network=timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3))
    with pytest.raises(ValueError, match=r"network.head \(Linear\), network.head_dist \(Linear\)"):
        find_classifier(module)


def test_no_candidate_is_an_error():
    with pytest.raises(ValueError, match="no layer that is plainly the classifier"):
        find_classifier(Holder(conv=nn.Conv2d(1, 2, 3)))


def test_a_layer_is_replaced_wherever_it_is_registered():
    module = Plain()
    module.alias = old = module.net.fc
    new = nn.Linear(8, 3)
    replace_layer(module, old, new)
    assert module.alias is module.net.fc is new


@pytest.mark.parametrize(
    ("model", "name"), [("resnet18", "fc"), ("vgg11", "classifier.6"), ("mobilenet_v3_small", "classifier.3")]
)
def test_torchvision_models(model, name):
    network = pytest.importorskip("torchvision").models.get_model(model, num_classes=3)
    assert find_classifier(Holder(net=network))[0] == f"net.{name}"


def test_a_head_above_a_backbone_that_keeps_one_is_it_by_name_and_else_asked_about():
    backbone = timm.create_model("test_resnet", num_classes=16)
    assert find_classifier(Holder(backbone=backbone, classifier=nn.Linear(16, 4)))[0] == "classifier"
    with pytest.raises(ValueError, match=r"backbone.fc \(Linear\), out \(Linear\)"):
        find_classifier(Holder(backbone=backbone, out=nn.Linear(16, 4)))
    assert find_classifier(Holder(backbone=backbone, projector=nn.Linear(96, 4)))[0] == "backbone.fc"  # beside it


def test_the_gate_of_a_unit_is_not_taken_for_its_name():
    module = Holder(gate=Holder(fc=nn.Linear(8, 16)), output_layer=nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"gate.fc \(Linear\), output_layer \(Linear\)"):
        find_classifier(module)


def test_a_backbone_without_classes_has_no_classifier():
    class Raises(nn.Module):
        def get_classifier(self):
            return self.head.linear

    for backbone in (timm.create_model("test_resnet", num_classes=0), Raises()):
        assert find_classifier(Holder(backbone=backbone, out=nn.Linear(96, 4)))[0] == "out"


@pytest.mark.parametrize("name", ["score", "classification_head"])
def test_names_of_text_models_are_known(name):
    assert find_classifier(Holder(net=Holder(**{"head": nn.Identity(), "a": nn.Linear(4, 4), name: nn.Linear(4, 3)})))[
        0
    ] == (f"net.{name}")


def test_an_adapter_around_the_classifier_is_it_as_a_whole():
    adapted = Holder(base_layer=nn.Linear(4, 3), lora_A=nn.Linear(4, 1), lora_B=nn.Linear(1, 3))
    adapted.in_features, adapted.out_features = 4, 3
    assert find_classifier(Holder(body=nn.Linear(4, 4), classifier=adapted)) == ("classifier", adapted)


def test_of_layers_one_after_the_other_the_last_is_it():
    assert find_classifier(Holder(net=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))))[0] == "net.2"


def test_the_last_layer_of_a_perceptron_in_pieces_is_possible():
    pieces = nn.Sequential(nn.Sequential(nn.Linear(4, 8)), nn.Sequential(nn.ReLU(), nn.Linear(8, 3)))
    assert find_classifier(Holder(net=pieces))[0] == "net.1.1"
    with pytest.raises(ValueError, match=r"embed \(Linear\), net.1.1 \(Linear\)"):
        find_classifier(Holder(embed=nn.Linear(5, 4), net=pieces))
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
    assert find_classifier(Holder(net=blocks, out=nn.Linear(4, 3)))[0] == "out"


def test_the_question_names_the_argument_and_convolutions():
    with pytest.raises(ValueError, match=r"a \(Conv2d\), b \(Conv2d\). .* \(argument `classifier`\)"):
        find_classifier(Holder(a=nn.Conv2d(1, 2, 3), b=nn.Conv2d(2, 3, 3)), "classifier")


class Both(nn.Module):
    """A container of two heads beside each other, as RepViT's, or of two of which one reads the other."""

    def __init__(self, width=8, hidden=3):
        super().__init__()
        self.head, self.head_dist = nn.Linear(width, hidden), nn.Linear(hidden if hidden != 3 else width, 3)


class ByTimm(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.body, self.out = nn.Linear(4, 8), Both(**sizes)

    def get_classifier(self):
        return self.out


def test_heads_beside_each_other_in_one_container_are_found_together():
    assert [name for name, _ in find_heads(ByTimm())] == ["out.head", "out.head_dist"]
    with pytest.raises(ValueError, match="several layers"):
        find_classifier(ByTimm())
    assert find_classifier(ByTimm(hidden=5))[0] == "out.head_dist"


def test_what_embeds_the_inputs_of_blocks_is_no_classifier_though_it_is_the_only_linear():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 8))

    class Encoder(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.project, self.blocks = nn.Linear(4, 8), nn.ModuleList(blocks)

    with pytest.raises(ValueError, match="no layer that is plainly the classifier"):
        find_classifier(Encoder([Own(), Own()]))
    assert find_classifier(Encoder([nn.ReLU(), nn.ReLU()]))[0] == "project"
