"""Everything that we save loads with ``torch.load(weights_only=True)``, which runs no code of the file."""

import pytest
import torch

from lightning_feat.callbacks import (
    CollapseThreshold,
    CurvePlotter,
    DataPlan,
    DotRegressionRegularizer,
    FeatureRegularizer,
    FeatureReport,
    GrassmannHead,
    GrassmannMonitor,
    LinearProbe,
    MetricHistory,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
    NeuralCollapseRegularizer,
    SimplexETFHead,
    SimplicityBiasUpsampler,
    SummaryTable,
)
from lightning_feat.callbacks.feature_shift.monitor import FeatureShiftMonitor
from lightning_feat.callbacks.feature_shift.regularizer import FeatureShiftRegularizer
from lightning_feat.callbacks.neural_collapse.report import CollapseReport
from lightning_feat.data import Selection
from tests.faults.runs import At
from tests.helpers import Plain, loader, trainer

SHIFT = {"layers": ["net.body"]}


def common():
    return [
        NeuralCollapseMonitor(measures=["*"], figures=True, thresholds=[CollapseThreshold("cdnv", 0.0)]),
        NeuralCollapseMonitor(mode="exact", data="val"),
        NeuralCollapseRegularizer(),
        FeatureRegularizer(_norm, "norm", weight=0.01),
        LinearProbe(penalties=[0.1]),
        FeatureReport(every_n_epochs=1),
        MetricHistory(),
        CurvePlotter(),
        SummaryTable(),
        FeatureShiftMonitor(**SHIFT),
        FeatureShiftRegularizer(**SHIFT),
    ]


def _norm(features):
    return features.square().mean()


SUITES = {
    "subspaces, searching": lambda: [GrassmannHead(2), GrassmannMonitor(), SimplicityBiasUpsampler(separating_epoch=2)],
    "subspaces, going on": lambda: [GrassmannHead(2), SimplicityBiasUpsampler(separating_epoch=1, restart=False)],
    "simplex": lambda: [
        SimplexETFHead(),
        DotRegressionRegularizer(),
        MixupGeometryMonitor(num_pairs=8),
        DataPlan([2] * 4 + [1] * 28),
    ],
    "knee": lambda: [SimplicityBiasUpsampler(separating_epoch="knee")],
}


slow = pytest.mark.slow


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=slow)])
@pytest.mark.parametrize("name", ["subspaces, searching", *(pytest.param(name, marks=slow) for name in [*SUITES][1:])])
def test_a_checkpoint_of_a_run_with_all_callbacks(tmp_path, monkeypatch, name, batch):
    monkeypatch.setattr(CollapseReport, "_draw", lambda *_: None)  # they take most of the time, and are not saved
    monkeypatch.setattr(CurvePlotter, "report", lambda *_: None)
    path = tmp_path / "run.ckpt"
    run = trainer(tmp_path, callbacks=[*common(), *SUITES[name]()], max_epochs=3)
    save = At("on_train_batch_end", 1, batch, 1, lambda: run.save_checkpoint(path))
    run.callbacks.append(save)
    run.fit(Plain(), loader(), loader())
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["epoch"] == 1
    run = trainer(tmp_path, callbacks=[*common(), *SUITES[name]()], max_epochs=3)
    run.fit(Plain(), loader(), loader(), ckpt_path=path)  # and Lightning can go on from it
    assert run.current_epoch == 3


def test_a_selection(tmp_path):
    upsampler = SimplicityBiasUpsampler(separating_epoch=1)
    trainer(tmp_path, callbacks=upsampler, max_epochs=2).fit(Plain(), loader())
    upsampler.selection.save(str(tmp_path / "selection.pt"))
    state = torch.load(tmp_path / "selection.pt", weights_only=True)
    assert Selection.from_state_dict(state).slow.equal(upsampler.selection.slow)


@pytest.mark.parametrize("options", [{}, {"form": "l2_sp"}], ids=["features", "weights"])
def test_the_start_that_a_shift_is_measured_from(tmp_path, options):
    path = tmp_path / "run.ckpt"
    run = trainer(tmp_path, callbacks=FeatureShiftRegularizer(**SHIFT, **options))
    module = Plain()
    first = module.net.body[0].weight.detach().clone()
    run.fit(module, loader())
    run.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)[f"FeatureShiftRegularizer[{options.get('form', 'relative')}]"]
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(stored) if isinstance(leaf, torch.Tensor)]
    assert any(tensor.shape == first.shape and tensor.equal(first) for tensor in tensors)
