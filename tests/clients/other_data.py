"""Clients whose data are no images and no words: series, tables, molecules, images with defects."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tests.clients.client import NUM_CLASSES, SAMPLES, TARGETS, Client, Samples


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
}
