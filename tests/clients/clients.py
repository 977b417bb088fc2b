"""LightningModules of published packages, as small as they go, each with data of its own kind."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot
from torch.utils.data import Dataset, TensorDataset

from tests.clients.client import NUM_CLASSES, SAMPLES, TARGETS, Client, Samples, images
from tests.clients.other_data import OTHERS


def remote_sensing() -> tuple[Any, Dataset]:
    trainers = pytest.importorskip("torchgeo.trainers")
    module = trainers.ClassificationTask(model="test_resnet", in_channels=3, num_classes=NUM_CLASSES, lr=1e-3)
    return module, Samples([{"image": x, "label": y} for x, y in zip(images(), TARGETS, strict=True)])


def uncertainty() -> tuple[Any, Dataset]:
    routines = pytest.importorskip("torch_uncertainty.routines")
    body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Dropout(0.2))
    model = nn.Sequential(body, nn.Linear(16, NUM_CLASSES))
    module = routines.ClassificationRoutine(
        model, NUM_CLASSES, nn.CrossEntropyLoss(), optim_recipe=torch.optim.SGD(model.parameters(), 0.05)
    )
    return module, TensorDataset(images(8), TARGETS)


class TwoViews(nn.Module):
    """What lightly's embedding trains: one call for both views."""

    def __init__(self) -> None:
        super().__init__()
        from lightly.models.modules import SimCLRProjectionHead

        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU())
        self.projection = SimCLRProjectionHead(16, 16, 8)

    def forward(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        return self.projection(self.backbone(x0)), self.projection(self.backbone(x1))


def self_supervision() -> tuple[Any, Dataset]:
    embedding = pytest.importorskip("lightly.embedding")
    from lightly.loss import NTXentLoss

    model = TwoViews()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    module = embedding.SelfSupervisedEmbedding(model, NTXentLoss(), optimizer, None)
    views = zip(images(8), images(8, seed=2), TARGETS, strict=True)
    return module, Samples([((x0, x1), y, "name") for x0, x1, y in views])


class Text(pl.LightningModule):
    """Fine-tunes a classifier of Hugging Face, as its users write it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=NUM_CLASSES,
        )
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def words() -> tuple[Tensor, Tensor]:
    """Token ids and which of them are no padding; the class is in the first tokens."""
    ids = torch.randint(10, 40, (SAMPLES, 8))
    ids[:, 1] = TARGETS + 1
    mask = (torch.arange(8) < torch.randint(3, 9, (SAMPLES, 1))).long()
    return ids * mask, mask


def text() -> tuple[Any, Dataset]:
    pytest.importorskip("transformers")
    rows = zip(*words(), TARGETS, strict=True)
    return Text(), Samples([{"input_ids": ids, "attention_mask": mask, "labels": y} for ids, mask, y in rows])


class Clip(pl.LightningModule):
    """Contrastive training of a CLIP of Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        words = {**small, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 39, "bos_token_id": 38}
        pixels = {**small, "image_size": 16, "patch_size": 8}
        self.clip = CLIPModel(CLIPConfig(text_config=words, vision_config=pixels, projection_dim=8))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        return self.clip(**inputs, return_loss=True).loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def clip() -> tuple[Any, Dataset]:
    pytest.importorskip("transformers")
    ids, mask = words()
    ids[:, -1], mask[:, -1] = 39, 1
    rows = zip(ids, mask, images(16), TARGETS, strict=True)
    names = ("input_ids", "attention_mask", "pixel_values", "label")
    return Clip(), Samples([dict(zip(names, row, strict=True)) for row in rows])


class Gan(pl.LightningModule):
    """Two optimizers by hand, and a step that gives nothing back."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4 + NUM_CLASSES, 16), nn.ReLU(), nn.Linear(16, 3 * 8 * 8))
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.LeakyReLU(0.2))
        self.judge = nn.Linear(16, 1)
        self.unused = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.judge(self.trunk(x))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for_generator, for_judge = self.optimizers()
        made = self.generator(torch.cat([torch.randn(len(x), 4), one_hot(y, NUM_CLASSES).float()], 1))
        judged = torch.cat([self(x), self(made.detach().view_as(x))])
        real = torch.cat([torch.ones(len(x), 1), torch.zeros(len(x), 1)])
        for_judge.zero_grad()
        self.manual_backward(binary_cross_entropy_with_logits(judged, real))
        for_judge.step()
        for_generator.zero_grad()
        fooled = self(made.view_as(x))
        self.manual_backward(binary_cross_entropy_with_logits(fooled, torch.ones_like(fooled)))
        for_generator.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/real", self(batch[0]).sigmoid().mean())

    def configure_optimizers(self) -> Any:
        judge = [*self.trunk.parameters(), *self.judge.parameters()]
        return torch.optim.Adam(self.generator.parameters(), 1e-3), torch.optim.Adam(judge, 1e-3)


def gan() -> tuple[Any, Dataset]:
    return Gan(), TensorDataset(images(8), TARGETS)


_CLIP = "clip.vision_model.post_layernorm"

CLIENTS = {
    "remote sensing": Client(
        "torchgeo", remote_sensing, lambda m, b: m.model.forward_head(m.model.forward_features(b["image"]), True)
    ),
    "uncertainty": Client("torch_uncertainty", uncertainty, lambda m, b: m.model[0](b[0])),
    "self-supervision": Client(
        "lightly",
        self_supervision,
        lambda m, b: torch.cat([m.model.backbone(x) for x in b[0]]),
        layer="model.backbone",
        labels=lambda b: b[1],
        eval_step=False,
        root="pytorch_lightning",
    ),
    "text": Client(
        "transformers",
        text,
        lambda m, b: m.model.bert(b["input_ids"], attention_mask=b["attention_mask"]).pooler_output,
    ),
    "CLIP": Client(
        "transformers", clip, lambda m, b: m.clip.vision_model(b["pixel_values"]).pooler_output, layer=_CLIP
    ),
    "GAN": Client("torch", gan, lambda m, b: m.trunk(b[0]), layer="trunk"),
    **OTHERS,
}
