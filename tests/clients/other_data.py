"""Clients whose data are no images and no words: series, tables, molecules, images with defects."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tests.clients.client import NUM_CLASSES, SAMPLES, TARGETS, Client, Samples, images


def forecasting() -> tuple[Any, Dataset]:
    """One step ahead in series that differ in their slope; the class of a window is its series."""
    package = pytest.importorskip("pytorch_forecasting")
    import pandas as pd

    windows, past = SAMPLES // NUM_CLASSES, 4
    rows = [
        {"time": time, "series": str(series), "value": series * time / 10 + float(torch.rand(()))}
        for series in range(NUM_CLASSES)
        for time in range(windows + past)
    ]
    series = package.TimeSeriesDataSet(
        pd.DataFrame(rows),
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=past,
        min_encoder_length=past,
        max_prediction_length=1,
        static_categoricals=["series"],
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
    )
    module = package.DecoderMLP.from_dataset(series, hidden_size=16, n_hidden_layers=1, optimizer="adam")
    mixed = [series[c * windows + w] for w in range(windows) for c in range(NUM_CLASSES)]
    return module, Samples(mixed, series._collate_fn)


def hidden_of_forecast(module: Any, batch: Any) -> Tensor:
    x = batch[0]
    reals = x["decoder_cont"][..., module.decoder_reals_positions]
    inputs = torch.cat([reals, *module.input_embeddings(x["decoder_cat"]).values()], -1)
    return module.mlp.sequential[:8](inputs.flatten(0, 1))


def tabular() -> tuple[Any, Dataset]:
    """Rows of numbers and categories, as the package's own datamodule gives them."""
    pytest.importorskip("pytorch_tabular")
    from omegaconf import OmegaConf
    from pytorch_tabular.config import InferredConfig, OptimizerConfig
    from pytorch_tabular.models import CategoryEmbeddingModel, CategoryEmbeddingModelConfig

    found = InferredConfig(
        categorical_dim=1,
        continuous_dim=4,
        output_dim=NUM_CLASSES,
        output_cardinality=[NUM_CLASSES],
        categorical_cardinality=[5],
        embedding_dims=[(5, 3)],
    )
    chosen = CategoryEmbeddingModelConfig(task="classification", layers="16-8", learning_rate=1e-2)
    config = OmegaConf.create({**vars(OptimizerConfig()), **vars(chosen)})
    module = CategoryEmbeddingModel(config, inferred_config=OmegaConf.structured(found))
    numbers = torch.randn(SAMPLES, 4) + TARGETS[:, None]
    rows = zip(numbers, torch.randint(0, 5, (SAMPLES, 1)), TARGETS[:, None], strict=True)
    return module, Samples([{"continuous": x, "categorical": c, "target": y} for x, c, y in rows])


def molecules() -> tuple[Any, Dataset]:
    """Graphs of molecules; the class is their functional group."""
    chemprop = pytest.importorskip("chemprop")
    from chemprop.data import MoleculeDatapoint, MoleculeDataset, collate_batch

    groups = ("{}", "{}O", "{}N")
    chains = ["C" * (length + 1) for length in range(SAMPLES // NUM_CLASSES)]
    smiles = [groups[int(y)].format(chains[i // NUM_CLASSES]) for i, y in enumerate(TARGETS)]
    points = [MoleculeDatapoint.from_smi(text, [float(y)]) for text, y in zip(smiles, TARGETS, strict=True)]
    head = chemprop.nn.MulticlassClassificationFFN(n_classes=NUM_CLASSES, input_dim=16, hidden_dim=8)
    module = chemprop.models.MPNN(
        chemprop.nn.BondMessagePassing(d_h=16, depth=2), chemprop.nn.MeanAggregation(), head, warmup_epochs=1
    )
    data = MoleculeDataset(points)
    return module, Samples([data[i] for i in range(len(data))], collate_batch)


def defects() -> tuple[Any, Dataset]:
    """A student that reverses a teacher's maps; its batches are data classes, and it is trained on no label."""
    pytest.importorskip("anomalib")
    from anomalib.data import ImageBatch, ImageItem
    from anomalib.models import ReverseDistillation

    size = ReverseDistillation.configure_pre_processor((32, 32))
    module = ReverseDistillation("resnet18", pre_trained=False, pre_processor=size, evaluator=False, visualizer=False)
    rows = zip(images(), TARGETS, strict=True)
    items = [ImageItem(image=x, gt_label=y == 0, explanation=str(int(y))) for x, y in rows]
    return module, Samples(items, ImageBatch.collate)


def reversed_map(module: Any, batch: Any) -> Tensor:
    model = module.model
    return model.bottleneck([*model.encoder(batch.image).values()]).mean((2, 3))


OTHERS = {
    "forecasting": Client(
        "pytorch_forecasting",
        forecasting,
        hidden_of_forecast,
        layer="mlp.sequential.7",
        labels=lambda b: b[0]["groups"][:, 0],
        shift={"trunk": ""},
    ),
    "tabular": Client(
        "pytorch_tabular",
        tabular,
        lambda m, b: m.backbone(m.embedding_layer(b)),
        labels=lambda b: b["target"][:, 0],
        shift={"trunk": ""},
        root="pytorch_lightning",
    ),
    "molecules": Client(
        "chemprop",
        molecules,
        lambda m, b: m.predictor.ffn[1][:-1](m.predictor.ffn[0](m.fingerprint(*b[:3]))),
        head="predictor.ffn.1.2",
        labels=lambda b: b.Y[:, 0].long(),
    ),
    "anomaly detection": Client(
        "anomalib",
        defects,
        reversed_map,
        layer="model.bottleneck",
        pooling="mean",
        labels=lambda b: torch.tensor([int(text) for text in b.explanation]),
    ),
}
