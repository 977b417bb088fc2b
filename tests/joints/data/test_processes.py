"""A process may have no sample of a small data set."""

import json
import os
import warnings

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_feat.callbacks import (
    DistributionalSimplicityMonitor,
    FeatureRelianceMonitor,
    FeatureReport,
    FewShotMonitor,
    LinearProbe,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
    SharpnessMonitor,
)
from lightning_feat.joints.data.processes import gather_on_first, gather_samples
from tests.helpers import Plain, points, trainer
from tests.pairs import two_processes

READERS = {
    "mixup_geometry/calibration_error": lambda: MixupGeometryMonitor(num_pairs=4),
    "linear_probe/accuracy": lambda: LinearProbe(every_n_epochs=1, penalties=[0.1]),
    "few_shot/cdnv": lambda: FewShotMonitor(shots=[1], episodes=2, every_n_epochs=1),
    "feature_reliance/accuracy": lambda: FeatureRelianceMonitor({"first": 0}),
    "distributional_simplicity/accuracy_real": lambda: DistributionalSimplicityMonitor(data="val"),
    "sharpness/": lambda: SharpnessMonitor(data="val", max_products=3),
    "neural_collapse": lambda: NeuralCollapseMonitor(mode="exact", data="val"),
    "report": lambda: FeatureReport(every_n_epochs=1),
}


class Gathers(Plain):
    """At the start of training, with samples in the first process alone."""

    def on_train_start(self):
        mine = self.global_rank == 0
        index = torch.arange(2) if mine else torch.zeros(0, dtype=torch.long)
        rows = torch.tensor([[1.5, 2.0, -3.0], [0.25, 0.0, 7.0]]).bfloat16() if mine else torch.zeros(0, 1)
        features, targets, _ = gather_samples(rows, index, index)
        # As little as a process can know of rows that it has none of.
        on_first = gather_on_first(self.trainer, rows.half() if mine else torch.zeros(0, 0), index)
        self.found = {"samples": [features.tolist(), str(features.dtype), targets.tolist()]}
        self.found["on first"] = None if on_first is None else [on_first[0].tolist(), str(on_first[0].dtype)]


def worker(process, port, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ.update(where, LOCAL_RANK=str(process))
    module = Gathers()
    run = trainer(
        folder,
        # All look at the validation data, which the second process has none of.
        callbacks=[make() for make in READERS.values()],
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=2,
        plugins=[MixedPrecision("bf16-mixed", "cpu")],
    )
    run.fit(module, DataLoader(points(8), batch_size=4), DataLoader(points(1), batch_size=4))
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    with open(f"{folder}/{process}.json", "w") as file:
        json.dump({**module.found, "logged": logged}, file)


def test_a_process_without_samples(tmp_path):
    two_processes(worker, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2))
    rows = [[1.5, 2.0, -3.0], [0.25, 0.0, 7.0]]
    assert first["samples"] == second["samples"] == [rows, "torch.bfloat16", [0, 1]]
    assert (first["on first"], second["on first"]) == ([rows, "torch.float16"], None)
    assert first["logged"]["linear_probe/accuracy/penultimate"] in (0.0, 1.0)  # of one sample
    assert 0 <= first["logged"]["mixup_geometry/calibration_error/penultimate"] <= 1
    assert first["logged"].keys() == second["logged"].keys()
    for name, value in first["logged"].items():
        assert second["logged"][name] == pytest.approx(value, nan_ok=True), name
    for prefix in READERS.keys() - {"report"}:
        assert any(name.startswith(prefix) for name in first["logged"]), prefix
