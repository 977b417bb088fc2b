"""What a user has to set is said at once, and for words and maps it is little."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_feat.callbacks import FeatureRegularizer, GrassmannMonitor, NeuralCollapseMonitor
from lightning_feat.joints.features.at_once import try_all
from lightning_feat.layers import GrassmannLinear
from tests.helpers import trainer


def test_all_errors_are_said_or_the_one():
    def wrong(what):
        raise ValueError(what)

    assert try_all(lambda: 1, lambda: None) == [1, None]
    with pytest.raises(ValueError, match=r"^one$"):
        try_all(lambda: 1, lambda: wrong("one"))
    with pytest.raises(ValueError, match=r"one\n- other$"):
        try_all(lambda: wrong("one"), lambda: 1, lambda: wrong("other"))


class Words(pl.LightningModule):
    """Classifies each token, and reads the last that counts, as language models do."""

    def __init__(self):
        super().__init__()
        self.body, self.score = nn.Embedding(9, 4), nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        logits = self.score(self.body(batch["ids"]).relu())
        last = batch["attention_mask"].sum(1) - 1
        self.seen = self.body(batch["ids"]).relu()[torch.arange(len(last)), last].detach(), batch["genre"]
        return F.cross_entropy(logits[torch.arange(len(last)), last], batch["genre"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def texts():
    torch.manual_seed(0)
    return DataLoader(
        [
            {"ids": torch.randint(0, 9, (5,)), "attention_mask": (torch.arange(5) < 2 + i % 3).long(), "genre": i % 3}
            for i in range(12)
        ],
        12,
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: NeuralCollapseMonitor(mask_key="mask"),
        lambda: GrassmannMonitor(mask_key="mask"),
        lambda: FeatureRegularizer(lambda h, t: h.mean(), "small", mask_key="mask"),
    ],
)
def test_pooling_targets_and_mask_are_asked_for_together(tmp_path, make):
    callback, module = make(), Words()
    if isinstance(callback, GrassmannMonitor):
        module.score = GrassmannLinear(4, 3, 2)
    said = r"(?s)(?=.*set pooling to)(?=.*set target_key)(?=.*mask_key='mask' leads nowhere)"
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, callbacks=[callback]).fit(module, texts())


def test_a_monitor_of_the_last_token_that_counts_has_all_measures(tmp_path):
    module = Words()
    monitor = NeuralCollapseMonitor(pooling="last", mask_key="attention_mask", target_key="genre", measures=["*"])
    run = trainer(tmp_path, callbacks=[monitor])
    run.fit(module, texts())
    features, targets = module.seen
    means = torch.stack([features[targets == c].mean(0) for c in range(3)])
    values = run.callback_metrics
    lengths = (means - means.mean(0)).norm(dim=1)
    by_hand = lengths.std() / lengths.mean()
    torch.testing.assert_close(values["neural_collapse/nc2_equinorm/penultimate"], by_hand)
    assert any("nc3" in name for name in values)


class Segments(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.down, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.out(self.down(batch["image"]).relu()), batch["mask"], ignore_index=255)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def maps():
    masks = torch.randint(0, 3, (4, 6, 6))
    masks[:, 0] = 255
    return DataLoader([{"image": torch.randn(3, 6, 6), "mask": mask} for mask in masks], 2)


def test_a_segmentation_network_asks_twice_and_names_its_convolutions(tmp_path):
    def run(**kwargs):
        trainer(tmp_path, callbacks=[NeuralCollapseMonitor(**kwargs)]).fit(Segments(), maps())

    asked = r"down \(Conv2d\), out \(Conv2d\).*argument `classifier`.*pooling, too; 'tokens' .* ignore_index"
    with pytest.raises(ValueError, match=asked):
        run()
    with pytest.raises(ValueError, match=r"if 255 marks what has no label, leave such samples out .*ignore_index=255"):
        run(classifier="out", pooling="tokens")
    run(classifier="out", pooling="tokens", ignore_index=255)
