import torch
from torch import nn
from torch.nn import functional as F

from lightning_feat.doctor import doctor
from tests.helpers import Plain, loader, trainer


def note(tmp_path, module):
    found = [f for f in doctor(trainer(tmp_path), module, loader(), seconds=0.1) if f.check == "classifier"]
    assert len(found) == 1
    assert found[0].severity == "note"
    return f"{found[0].where}: {found[0].what}"


def test_the_classifier_is_said_in_a_line(tmp_path):
    assert note(tmp_path, Plain()) == (
        "net.fc: Linear, 8 features wide, 3 classes; nothing with weights runs after it, before the loss; features are "
        "its input (8, 8)."
    )


def test_what_runs_after_it_is_said(tmp_path):
    class After(Plain):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.net(x))

    assert "before the loss norm runs after it, beside it or in its place" in note(tmp_path, After())


def test_where_none_is_found_the_layer_that_ran_last_is_said(tmp_path):
    class Unnamed(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleDict({"one": nn.Linear(4, 8), "two": nn.Linear(8, 3)})

        def forward(self, x):
            return self.net["two"](torch.relu(self.net["one"](x)))

    said = note(tmp_path, Unnamed())
    assert "no classifier is found by its name" in said
    assert "ran last before the loss: net.two" in said


class Head(Plain):
    """``of`` takes the module, its features and the class indices."""

    def __init__(self, of, outputs=3):
        super().__init__()
        self.of, self.net.fc, self.other = of, nn.Linear(8, outputs), nn.Bilinear(8, 8, 3)

    def training_step(self, batch, batch_idx):
        return self.of(self, self.net.body(batch[0]), batch[1])


def test_a_loss_of_another_head_that_comes_first_says_nothing_of_it(tmp_path):
    def of(m, h, y):
        return F.cross_entropy(m.other(h, h), y) + F.cross_entropy(m.net.fc(h), y)

    assert "nothing with weights runs after it, before the loss" in note(tmp_path, Head(of))


def test_outputs_that_are_no_classes_of_the_loss_are_not_called_so(tmp_path):
    said = note(tmp_path, Head(lambda m, h, y: F.cross_entropy(m.net.fc(h)[:, :3], y), 5))
    assert "8 features wide, 5 outputs, 3 classes in the loss;" in said


def test_a_weight_that_is_used_without_its_layer_is_said(tmp_path):
    said = note(tmp_path, Head(lambda m, h, y: F.cross_entropy(F.linear(h, m.net.fc.weight), y)))
    assert "its weight is used without a call of it" in said
