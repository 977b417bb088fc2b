"""The callbacks whose cost is measured. A new one joins with one line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_feat import callbacks as ours

Task = Literal["classes", "regression", "clip"]
Made = Callable[[int], list[Callback]]  # of the number of training examples
LAYERS = ["network.layer1", "network.layer2", "network.layer3", "network.layer4"]  # of a ResNet
INDEX = 2  # of the index in a batch


@dataclass(frozen=True)
class Entry:
    """A callback, or several, and what the bare run has without it.

    Args:
        name: in the table.
        make: what is measured.
        beside: callbacks of both runs.
        task: what the network learns.
    """

    name: str
    make: Made
    beside: Made = lambda _: []
    task: Task = "classes"


def spread(features: Tensor) -> Tensor:
    return (features - features.mean(0)).square().sum(1).mean()


def as_before(examples: int) -> Callable[[int], Tensor]:
    return lambda epoch: torch.ones(examples, dtype=torch.long)  # no more than there are: what it costs to plan at all


def subspaces(_: int) -> list[Callback]:
    return [ours.GrassmannHead(4)]


def prompts(_: int) -> list[Callback]:
    return [ours.PromptLearner(depth=3)]


CALLBACKS = [
    Entry("GrassmannHead", subspaces),
    Entry("GrassmannMonitor (online)", lambda _: [ours.GrassmannMonitor()], subspaces),
    Entry("GrassmannMonitor (exact)", lambda _: [ours.GrassmannMonitor(mode="exact")], subspaces),
    Entry("SimplexETFHead", lambda _: [ours.SimplexETFHead()]),
    Entry("DotRegressionRegularizer", lambda _: [ours.DotRegressionRegularizer()], lambda _: [ours.SimplexETFHead()]),
    Entry("NeuralCollapseMonitor (online)", lambda _: [ours.NeuralCollapseMonitor()]),
    Entry("NeuralCollapseMonitor (exact)", lambda _: [ours.NeuralCollapseMonitor(mode="exact")]),
    Entry("NeuralCollapseRegularizer", lambda _: [ours.NeuralCollapseRegularizer()]),
    Entry("RegressionCollapseMonitor", lambda _: [ours.RegressionCollapseMonitor()], task="regression"),
    Entry("MixupGeometryMonitor", lambda _: [ours.MixupGeometryMonitor(num_pairs=64)]),
    Entry("LinearProbe (every epoch)", lambda _: [ours.LinearProbe(every_n_epochs=1)]),
    Entry("SpectrumMonitor (4 layers)", lambda _: [ours.SpectrumMonitor(LAYERS, pooling="mean")]),
    Entry("UniformityRegularizer", lambda _: [ours.UniformityRegularizer()]),
    Entry("NeighbourProbe (every epoch)", lambda _: [ours.NeighbourProbe(every_n_epochs=1)]),
    Entry("NearestMeanProbe (every epoch)", lambda _: [ours.NearestMeanProbe(every_n_epochs=1)]),
    Entry("LinearSVMProbe (every epoch)", lambda _: [ours.LinearSVMProbe(every_n_epochs=1)]),
    Entry("ClassNormRealignment", lambda _: [ours.ClassNormRealignment()]),
    Entry("FewShotMonitor (every epoch)", lambda _: [ours.FewShotMonitor(every_n_epochs=1)]),
    Entry("FeatureReport (page)", lambda _: [ours.FeatureReport()]),
    Entry("FeatureRegularizer", lambda _: [ours.FeatureRegularizer(spread, "spread", 1e-3)]),
    Entry("FeatureShiftMonitor (4 layers)", lambda _: [ours.FeatureShiftMonitor(LAYERS)]),
    Entry("FeatureShiftRegularizer (live)", lambda _: [ours.FeatureShiftRegularizer(LAYERS)]),
    Entry(
        "FeatureShiftRegularizer (cached)",
        lambda _: [ours.FeatureShiftRegularizer(LAYERS, reference="cached", index_key=INDEX)],
    ),
    Entry("FeatureShiftRegularizer (L2-SP)", lambda _: [ours.FeatureShiftRegularizer(form="l2_sp")]),
    Entry("DataPlan", lambda n: [ours.DataPlan(as_before(n))]),
    Entry(
        "SimplicityBiasUpsampler (after one epoch)",
        lambda _: [ours.SimplicityBiasUpsampler(separating_epoch=1, restart=False, length="keep")],
    ),
    Entry("SharpnessAwareMinimization", lambda _: [ours.SharpnessAwareMinimization()]),
    Entry("SharpnessAwareMinimization (interval 5)", lambda _: [ours.SharpnessAwareMinimization(interval=5)]),
    Entry("DistributionalSimplicityMonitor", lambda _: [ours.DistributionalSimplicityMonitor(num_examples=256)]),
    Entry("FeatureRelianceMonitor (a block)", lambda _: [ours.FeatureRelianceMonitor({"left": "..., :16"})]),
    Entry("ForgettingMonitor", lambda _: [ours.ForgettingMonitor()]),
    Entry("SharpnessMonitor", lambda _: [ours.SharpnessMonitor(num_examples=128, max_products=10)]),
    Entry("SharpnessMonitor (rise alone)", lambda _: [ours.SharpnessMonitor(False, num_examples=128)]),
    Entry("CurvePlotter", lambda _: [ours.CurvePlotter()]),
    Entry("SummaryTable", lambda _: [ours.SummaryTable()]),
    Entry("PromptLearner", prompts, task="clip"),
    Entry("PromptLearner's Gram term", lambda _: [ours.PromptLearner(depth=3, gram_weight=1.0)], prompts, task="clip"),
]
