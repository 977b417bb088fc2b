"""FeatureReport: the page at the end of a fit is about the network as it is then."""

import re

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import FeatureReport, FewShotMonitor
from lightning_feat.mixins import CallbacksMixin
from tests.helpers import Disturbed, Plain, equal, loader, points, trainer, weights
from tests.report.pages import body_of, data_of


def fit(tmp_path, module, callbacks, train=None, val=None, **options):
    torch.manual_seed(0)
    run = trainer(tmp_path, callbacks=callbacks, **{"max_epochs": 2, **options})
    run.fit(module, train or loader(), val or loader(24))
    return run


def features_of(module):
    x, y = points(24).tensors
    module.eval()
    with torch.no_grad():
        return module.net.body(x), y, module(x)


def test_the_page_is_about_the_last_weights_and_all_validation_data(tmp_path):
    torch.manual_seed(1)
    module, report = Plain(), FeatureReport(save="features.npz")
    fit(tmp_path, module, [report])
    features, targets, logits = features_of(module)
    from lightning_feat.report.features_file import load_features

    kept = load_features(str(tmp_path / "features.npz"))
    assert torch.allclose(kept.features["penultimate"], features)
    assert torch.equal(kept.targets, targets)
    assert torch.allclose(kept.logits, logits)
    assert report.page.numbers["accuracy"] == float((logits.argmax(1) == targets).double().mean())
    assert report.page.path == tmp_path / "features.html"
    assert "val data after epoch 2" in body_of(report.page.path)
    assert "movement" in report.page.panels


def test_movement_is_from_the_start(tmp_path):
    module, report = Plain(lr=0.0), FeatureReport()
    fit(tmp_path, module, [report])
    chart = data_of(report.page.path)["panels"]["movement-all"]["charts"][0]
    assert {value["v"] for value in chart["data"]["values"]} == {0.0}


def test_the_training_is_the_same_with_it(tmp_path):
    runs = []
    for callbacks in ([], [FeatureReport(every_n_epochs=1)]):
        torch.manual_seed(3)
        module = Disturbed()
        fit(tmp_path, module, callbacks, train=loader(shuffle=True))
        runs.append([*weights(module), *(b.clone() for b in module.buffers())])
    assert equal(*runs)


def test_it_shares_its_pass_and_gives_the_same_numbers(tmp_path):
    def numbers(*others):
        torch.manual_seed(1)
        report = FeatureReport()
        fit(tmp_path, Plain(), [*others, report])
        return report.page.numbers

    assert numbers(FewShotMonitor(shots=[1], episodes=2, every_n_epochs=1)) == numbers()


def test_early_stopping_still_gives_a_page(tmp_path):
    from lightning.pytorch.callbacks import EarlyStopping

    report = FeatureReport()
    fit(tmp_path, Plain(lr=0.0), [report, EarlyStopping("val/loss", patience=1)], max_epochs=9)
    assert "val data after epoch 2" in body_of(report.page.path)


def test_when_examples_were_learned(tmp_path):
    report = FeatureReport(every_n_epochs=1)
    fit(tmp_path, Plain(lr=1.0), [report], max_epochs=4)
    assert report._learned.times == ["the start", "epoch 1", "epoch 2", "epoch 3", "epoch 4"]
    right = torch.tensor(
        [t == p for t, p in zip(*(data_of(report.page.path)["rows"][k] for k in ("target", "predicted")), strict=True)]
    )
    assert torch.equal(report._learned.since >= 0, right)
    assert "latest" in report.page.panels


def test_brought_by_a_module(tmp_path):
    class Mine(CallbacksMixin, Plain):
        def __init__(self):
            super().__init__()
            self.bring(FeatureReport(filename="mine.html"))

    run = fit(tmp_path, Mine(), [])
    assert (tmp_path / "mine.html").is_file()
    assert sum(isinstance(callback, FeatureReport) for callback in run.callbacks) == 1


class Pixels(Plain):
    """Pictures of four pixels a side."""

    def forward(self, x):
        return self.net(x.flatten(1)[:, :4])


def test_samples_that_are_pictures_are_shown(tmp_path):
    x, y = torch.rand(24, 1, 4, 4), torch.arange(24) % 3
    data = DataLoader(TensorDataset(x, y), batch_size=5)
    report = FeatureReport()
    fit(tmp_path, Pixels(), [report], data, data)
    made = data_of(report.page.path)
    assert made["rows"]["picture"] == [*range(24)]
    assert (made["sheet"]["width"], made["sheet"]["height"], made["sheet"]["tiles"]) == (4, 4, 24)


def test_more_samples_than_fit_are_drawn_and_said(tmp_path):
    torch.manual_seed(1)
    module, report = Plain(), FeatureReport(max_samples=10, save="f.npz")
    fit(tmp_path, module, [report])
    from lightning_feat.report.features_file import load_features

    kept = load_features(str(tmp_path / "f.npz"))
    features, _, _ = features_of(module)
    assert len(kept) == 10
    assert torch.allclose(kept.features["penultimate"], features[kept.indices])
    assert any(re.search("10 of 24 samples, drawn with seed 0", note) for note in report.page.notes)


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("lightning_feat.callbacks.reports.features.write_report", full)
    with pytest.warns(UserWarning, match="could not write its page: OSError: no space"):
        run = fit(tmp_path, Plain(), [FeatureReport()])
    assert run.current_epoch == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"filename": "a/b.html"}, "filename='a/b.html': give a name without a folder"),
        ({"filename": "b.pdf"}, "ends in .html"),
        ({"layers": []}, "give at least one"),
        ({"layers": ["a", "a"]}, "each once"),
        ({"data": "test"}, "choose 'val' or 'train'"),
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be at least 1"),
        ({"max_samples": 1}, "max_samples=1: give 2 to 20000"),
        ({"megabytes": 0}, "give some memory"),
        ({"save": "f.pt"}, "save f.pt"),
    ],
)
def test_mistakes_are_refused_by_the_constructor(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        FeatureReport(**arguments)


def test_a_layer_that_is_not_there_and_data_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match=r"net\.boddy"):
        fit(tmp_path, Plain(), [FeatureReport(layers=["net.boddy"])])
    run = trainer(tmp_path, callbacks=[FeatureReport()])
    with pytest.raises(ValueError, match=r"no validation data: give the Trainer some, or take data='train'"):
        run.fit(Plain(), loader())
