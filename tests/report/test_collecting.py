"""Features of networks of several kinds, in one process and in two."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_feat.callbacks import FeatureReport
from lightning_feat.report.features_file import load_features
from tests.helpers import Plain, points, trainer
from tests.pairs import two_processes
from tests.report.pages import data_of


class Tokens(pl.LightningModule):
    """A class for each token; padding has none."""

    def __init__(self):
        super().__init__()
        self.embed, self.classifier = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, ids):
        return self.classifier(self.embed(ids))

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sentences(Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, i):
        ids = (torch.arange(5) + i) % 9
        labels = ids % 4
        labels[5 - i % 3 :] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": (labels >= 0).long()}


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x):
        return self.head(self.body(x).relu())

    def training_step(self, batch, batch_idx):
        return (self(batch[0])[:, 0] - batch[1]).square().mean()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Unlabelled(Regression):
    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    validation_step = training_step


def fit(folder, module, data, **options):
    report = FeatureReport(save="f.npz", **options)
    batches = DataLoader(data, batch_size=4)
    trainer(folder, callbacks=[report]).fit(module, batches, batches)
    return report, load_features(str(folder / "f.npz"))


@pytest.mark.parametrize("mask", [None, "attention_mask"])
def test_each_token_is_a_sample_and_padding_is_none(tmp_path, mask):
    module = Tokens()
    report, kept = fit(tmp_path, module, Sentences(), pooling="tokens", mask_key=mask)
    rows = [(i, t) for i in range(11) for t in range(5 - i % 3)]
    assert list(zip(kept.indices.tolist(), kept.tokens.tolist(), strict=True)) == rows
    ids = torch.tensor([(t + i) % 9 for i, t in rows])
    assert torch.allclose(kept.features["penultimate"], module.embed(ids))
    assert torch.equal(kept.targets, ids % 4)
    assert "confusion" in report.page.panels
    assert data_of(report.page.path)["rows"]["name"][1] == "#0, token 1"


def test_a_budget_of_rows_keeps_the_same_rows_for_any_batch_size(tmp_path):
    kept = []
    for size in (1, 3, 11):
        (tmp_path / str(size)).mkdir()
        report = FeatureReport(save="f.npz", pooling="tokens", max_samples=11, megabytes=0.0012)
        batches = DataLoader(Sentences(), batch_size=size)
        torch.manual_seed(0)
        trainer(tmp_path / str(size), callbacks=[report], limit_train_batches=1).fit(Tokens(), batches, batches)
        rows = load_features(str(tmp_path / str(size) / "f.npz"))
        kept.append(list(zip(rows.indices.tolist(), rows.tokens.tolist(), strict=True)))
        assert any("Of 45 rows of features" in note for note in report.page.notes)
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0]) < 45


def test_a_regression_keeps_its_values(tmp_path):
    x = points(20).tensors[0]
    report, kept = fit(tmp_path, Regression(), TensorDataset(x, x[:, 0]))
    assert torch.equal(kept.targets[:, 0], x[:, 0])
    assert "r2" in report.page.numbers
    assert "confusion" not in report.page.panels


def test_without_labels_the_page_says_so(tmp_path):
    report, kept = fit(tmp_path, Unlabelled(), TensorDataset(points(20).tensors[0]))
    assert kept.targets is None
    assert any(note.startswith("No labels: ") for note in report.page.notes)
    assert report.page.panels == ["map/penultimate", "spectra/penultimate", "movement"]


def test_several_layers(tmp_path):
    x = points(20).tensors[0]
    report, kept = fit(tmp_path, Regression(), TensorDataset(x, x[:, 0]), layers=["body", "head"])
    assert kept.layers == ["body", "head"]
    assert kept.features["body"].shape == (20, 6)
    assert "map/head" in report.page.panels


def in_two(process, port, folder, samples):
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(process))
    torch.manual_seed(0)
    report = FeatureReport(save="f.npz", max_samples=samples, every_n_epochs=1)
    options = {"devices": 2, "strategy": "ddp", "callbacks": [report]}
    batches = DataLoader(points(25), batch_size=4)
    trainer(folder, **options).fit(Plain(lr=0.0), batches, batches)
    assert (report.page is not None) == (process == 0)


@pytest.mark.parametrize("samples", [100, 10])
def test_two_processes_write_one_page_of_the_same_samples(tmp_path, samples):
    (tmp_path / "two").mkdir()
    two_processes(in_two, tmp_path / "two", samples)
    torch.manual_seed(0)
    report = FeatureReport(save="f.npz", max_samples=samples)
    batches = DataLoader(points(25), batch_size=4)
    trainer(tmp_path, callbacks=[report]).fit(Plain(lr=0.0), batches, batches)
    one, two = (load_features(str(folder / "f.npz")) for folder in (tmp_path, tmp_path / "two"))
    assert [path.name for path in (tmp_path / "two").glob("*.html")] == ["features.html"]
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(one.targets, two.targets)
    assert torch.allclose(one.features["penultimate"], two.features["penultimate"])
    assert torch.allclose(one.logits, two.logits)
    assert one.total == two.total == 25
    assert one.notes == two.notes
