import torch
from torch import nn

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
