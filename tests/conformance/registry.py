"""The callbacks of the matrix. A new one joins with one entry here.

An entry says how the callback is made, what its author would have written instead, what it should log, and which
conditions it refuses (by a part of the message) or cannot meet (with the reason). All else must come out equal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from lightning_feat import callbacks as ours
from lightning_feat.callbacks import CollapseThreshold
from tests.conformance import expected, methods
from tests.conformance.expected import Values
from tests.conformance.methods import Method

Kind = Literal["monitor", "regularizer", "head", "data", "optimization", "plotter"]


@dataclass(frozen=True)
class Failure:
    """A function that the callback runs, by its dotted path, fails in its n-th call: at the end of the second batch or
    of an epoch (from 0), in the loss or after the optimizer step of the second batch.
    """

    path: str
    place: Literal["batch end", "epoch end", "loss", "step"]
    call: int = 2
    epoch: int = 0


@dataclass(frozen=True)
class Entry:
    """One row of callbacks under test.

    Args:
        name: in the table, and the class unless ``makes`` says otherwise.
        kind: what sort of callback it is; conditions ask for it.
        arguments: of the constructor, as LightningCLI reads them from YAML; a function by itself.
        written: the methods that its author would write into the module; none for a monitor.
        values: what it should have logged, from the written side.
        task: what the module learns.
        epochs: of a run, where the course does not say.
        makes: class name, where the entry has a name of its own.
        beside: entries whose callbacks come first; their methods and values are added.
        refuses: condition to a part of the message.
        lacks: condition to the reason for which there is nothing to be compared.
        naming: the argument that names the classifier, for callbacks that replace it.
        own: parameters of the callback, for those that have some.
        failure: where memory may run out inside the callback; None where it runs nothing of its own in the loop.
        resumes_exactly: in the middle of an epoch a resumed run sees what the undisturbed run would have seen.
    """

    name: str
    kind: Kind
    arguments: Mapping[str, Any] = field(default_factory=dict)
    written: Sequence[type[Method]] = ()
    values: Callable[[Any], Values] = expected.nothing
    task: Literal["classes", "regression", "clip"] = "classes"
    epochs: int = 2
    makes: str = ""
    beside: Sequence["Entry"] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    naming: Mapping[str, str] = field(default_factory=dict)
    own: Callable[[Any], list[Tensor]] = lambda callback: []
    failure: Failure | None = None
    resumes_exactly: bool = False

    def __str__(self) -> str:
        return self.name

    def family(self) -> list["Entry"]:
        """This entry and those beside it, in the order of the Trainer's callbacks."""
        members = [*(member for other in self.beside for member in other.family()), self]
        return list({member.name: member for member in members}.values())

    def build(self, named: bool = False) -> Any:
        """The callback of this entry alone."""
        return self.cls(**self.arguments, **(self.naming if named else {}))

    @property
    def cls(self) -> type:
        return getattr(ours, self.makes or self.name)

    def methods(self) -> list[Method]:
        return [method() for member in self.family() for method in member.written]


ONE_LOADER = "needs one DataLoader over a map-style data set"
INTEGERS = "are soft labels of shape .* target_key"
EXACT = {"several validation loaders": ONE_LOADER, "iterable data set": ONE_LOADER}
FLOATING_FIRST = "a batch must begin with a floating tensor"
TERM = {"bare loss.backward()": "LossTermsMixin"}
NO_FSDP2 = dict.fromkeys(("FSDP2", "FSDP2, classifier named"), "use DDP")
HEAD = {"plain checkpoint to suite": "fresh_head=True", "FSDP2": "name it .argument `layer`."}
OTHER_HEAD = "the head is another layer: build the module with it"
LEAVES_HEAD = {"suite checkpoint to plain": OTHER_HEAD, "load_from_checkpoint of the plain class": OTHER_HEAD}


GRASSMANN = Entry(
    "GrassmannHead",
    "head",
    {"subspace_dim": 2},
    naming={"layer": "net.fc"},
    written=[methods.Grassmann],
    values=expected.head_angles,
    refuses=HEAD,
    lacks=LEAVES_HEAD,
    failure=Failure("lightning_feat.optim.grassmann.step.geodesic_", "step"),
)
SIMPLEX = Entry(
    "SimplexETFHead",
    "head",
    naming={"layer": "net.fc"},
    written=[methods.Simplex],
    refuses=HEAD,
    lacks=LEAVES_HEAD,
)
EXACT_MONITOR = Entry(
    "NeuralCollapseMonitor (exact)",
    "monitor",
    {"mode": "exact"},
    makes="NeuralCollapseMonitor",
    values=expected.collapse_exact,
    refuses={"iterable data set": ONE_LOADER},
    failure=Failure("lightning_feat.metrics.neural_collapse.NeuralCollapse.update", "epoch end"),
)

CALLBACKS = [
    GRASSMANN,
    SIMPLEX,
    Entry(
        "DotRegressionRegularizer",
        "regularizer",
        written=[methods.DotRegression],
        values=expected.terms,
        beside=[SIMPLEX],
        refuses={**HEAD, **TERM},
        lacks=LEAVES_HEAD,
        failure=Failure("lightning_feat.callbacks.neural_collapse.simplex.dot_regression", "loss"),
    ),
    Entry(
        "FeatureRegularizer",
        "regularizer",
        {"loss": methods.spread, "name": "spread", "weight": methods.SPREAD_WEIGHT},
        written=[methods.Spread],
        values=expected.terms,
        refuses={**TERM, "soft labels": INTEGERS},
        failure=Failure("lightning_feat.joints.loss.terms.FeatureLossTerm.value", "loss"),
    ),
    Entry(
        "SpectrumMonitor",
        "monitor",
        values=expected.spectrum,
        refuses={"several validation loaders": ONE_LOADER},
        failure=Failure("lightning_feat.callbacks.spectrum.spectrum_pass.add_moment_sums_", "epoch end", call=5),
    ),
    Entry(
        "UniformityRegularizer",
        "regularizer",
        {"weight": methods.UNIFORMITY_WEIGHT},
        written=[methods.Uniformity],
        values=expected.terms,
        refuses=TERM,
        failure=Failure("lightning_feat.joints.loss.terms.FeatureLossTerm.value", "loss"),
    ),
    Entry(
        "NeuralCollapseRegularizer",
        "regularizer",
        {"pull_weight": methods.PULL_WEIGHT},
        written=[methods.CollapseLosses],
        values=expected.terms,
        refuses={**TERM, "soft labels": INTEGERS},
        own=lambda callback: [callback.means],
        failure=Failure("lightning_feat.callbacks.neural_collapse.regularizer.within_class_pull", "loss"),
    ),
    Entry(
        "NeuralCollapseMonitor (online)",
        "monitor",
        makes="NeuralCollapseMonitor",
        values=expected.collapse_online,
        failure=Failure("lightning_feat.metrics.neural_collapse.NeuralCollapse.update", "batch end"),
    ),
    EXACT_MONITOR,
    Entry(
        "CollapseThreshold",
        "monitor",
        {"thresholds": [CollapseThreshold("cdnv", 1e9, action="stop", from_epoch=2)]},
        epochs=3,
        written=[methods.Stop],
        makes="NeuralCollapseMonitor",
        values=expected.collapse_online,
        lacks={"resume after a validation": "no batch is left of the epoch that would pass the threshold"},
        failure=Failure(
            "lightning_feat.callbacks.neural_collapse.thresholds.ThresholdWatch.check", "epoch end", call=1
        ),
    ),
    Entry(
        "GrassmannMonitor",
        "monitor",
        values=expected.subspaces,
        beside=[GRASSMANN],
        refuses={**HEAD, "soft labels": INTEGERS},
        lacks=LEAVES_HEAD,
        failure=Failure("lightning_feat.metrics.transfer.WithinClassVariability.update", "batch end"),
    ),
    Entry(
        "MixupGeometryMonitor",
        "monitor",
        {"num_pairs": 16},
        values=expected.calibration,
        refuses={
            "several validation loaders": ONE_LOADER,
            "soft labels": INTEGERS,
            "batches as dict": FLOATING_FIRST,
            "batches as dataclass": FLOATING_FIRST,
        },
        failure=Failure("lightning_feat.callbacks.neural_collapse.mixup.mix_sums", "epoch end"),
    ),
    Entry(
        "RegressionCollapseMonitor",
        "monitor",
        values=expected.regression,
        task="regression",
        refuses={"iterable data set": ONE_LOADER},
        lacks={"soft labels": "regression has none"},
        failure=Failure("lightning_feat.callbacks.neural_collapse.regression.nrc1", "epoch end", call=1),
    ),
    Entry(
        "ClassNormRealignment",
        "monitor",
        lacks={"fit, validate, test, predict": "what is tested and predicted is meant to differ"},
    ),
    Entry(
        "LinearProbe",
        "monitor",
        {"penalties": [0.01, 0.1], "every_n_epochs": 1},
        values=expected.probe,
        refuses={**EXACT, "soft labels": INTEGERS},
        failure=Failure("lightning_feat.callbacks.transfer.linear_probe.linear_probe", "epoch end", call=1),
    ),
    Entry(
        "NeighbourProbe",
        "monitor",
        {"num_neighbours": 3, "every_n_epochs": 1},
        values=expected.neighbours,
        refuses={**EXACT, "soft labels": INTEGERS},
        failure=Failure("lightning_feat.callbacks.transfer.neighbour_probe.neighbour_votes", "epoch end", call=1),
    ),
    Entry(
        "NearestMeanProbe",
        "monitor",
        {"every_n_epochs": 1},
        values=expected.nearest_mean,
        refuses={**EXACT, "soft labels": INTEGERS},
        failure=Failure(
            "lightning_feat.callbacks.transfer.nearest_mean_probe.nearest_mean_scores", "epoch end", call=1
        ),
    ),
    Entry(
        "LinearSVMProbe",
        "monitor",
        {"penalties": [1.0], "every_n_epochs": 1},
        values=expected.support_vectors,
        refuses={**EXACT, "soft labels": INTEGERS},
        failure=Failure("lightning_feat.callbacks.transfer.svm_probe.normalize", "epoch end", call=1),
    ),
    Entry(
        "FewShotMonitor",
        "monitor",
        {"shots": [1], "episodes": 3, "every_n_epochs": 1},
        values=expected.few_shots,
        refuses={"several validation loaders": ONE_LOADER, "soft labels": INTEGERS},
        failure=Failure("lightning_feat.callbacks.transfer.few_shot.few_shot_error", "epoch end", call=1),
    ),
    Entry(
        "DataPlan",
        "data",
        {"plan": methods.plan},
        written=[methods.Plan],
        refuses={
            "iterable data set": "a sampler needs a DataLoader over a map-style data set",
            "overfit_batches": "overfit_batches=2 puts a sampler of its own",
        },
        lacks={"two processes, each with data of its own": "the plan here is of data that processes share"},
        failure=Failure("lightning_feat.callbacks.data_plan.make_train_loader_anew", "epoch end", call=1),
        resumes_exactly=True,
    ),
    Entry(
        "SimplicityBiasUpsampler",
        "data",
        {"separating_epoch": 1, "restart": False, "length": "keep"},
        written=[methods.Upsample],
        refuses={
            "iterable data set": "map-style data set",
            "soft labels": INTEGERS,
            "overfit_batches": "overfit_batches=2 puts a sampler of its own",
            "two processes, each with data of its own": "use_distributed_sampler=False",
        },
        lacks={"plain checkpoint to suite": "the plain run has passed the epoch at which examples are chosen"},
        failure=Failure("lightning_feat.callbacks.simplicity_bias.slow_pass.slow_examples", "epoch end", call=1),
        resumes_exactly=True,
    ),
    Entry(
        "SharpnessAwareMinimization",
        "optimization",
        written=[methods.WorstPoint],
        refuses={
            "accumulate 3 batches": "Accumulate nothing",
            **dict.fromkeys(
                (
                    "two optimizers, with schedulers",
                    "manual_backward",
                    "bare loss.backward()",
                    "LossTermsMixin",
                ),
                "optim.sharpness_aware",
            ),
            **dict.fromkeys(("FSDP2", "FSDP2, classifier named"), "Use DDP"),
        },
        lacks={"out of memory in the callback": "between its two passes the author would have nothing to fail in"},
    ),
    Entry(
        "DistributionalSimplicityMonitor",
        "monitor",
        values=expected.real_accuracy,
        refuses={"iterable data set": ONE_LOADER, "soft labels": INTEGERS},
        failure=Failure("lightning_feat.callbacks.simplicity_bias.distributional.right_and_all", "batch end", call=13),
    ),
    Entry(
        "FeatureRelianceMonitor",
        "monitor",
        {"blocks": {"first": ":2", "last": 3}},
        values=expected.clean_accuracy,
        refuses={"several validation loaders": ONE_LOADER, "soft labels": INTEGERS},
        failure=Failure(
            "lightning_feat.callbacks.simplicity_bias.reliance_pass.reliance_of_counts", "epoch end", call=1
        ),
    ),
    Entry(
        "ForgettingMonitor",
        "monitor",
        refuses={
            "iterable data set": ONE_LOADER,
            "soft labels": INTEGERS,
            "two processes, each with data of its own": "use_distributed_sampler=False",
        },
        failure=Failure("lightning_feat.callbacks.simplicity_bias.forgetting.with_look", "epoch end", call=1),
    ),
    Entry(
        "SharpnessMonitor",
        "monitor",
        {"max_products": 5},
        refuses={
            "iterable data set": ONE_LOADER,
            "soft labels": INTEGERS,
            **dict.fromkeys(("FSDP2", "FSDP2, classifier named"), "Use DDP"),
        },
        failure=Failure("lightning_feat.callbacks.simplicity_bias.curvature.top_eigenvalue", "epoch end", call=1),
    ),
    Entry(
        "FeatureShiftMonitor",
        "monitor",
        {"every_n_batches": 1},
        refuses=NO_FSDP2,
        failure=Failure("lightning_feat.callbacks.feature_shift.sums.shift_sums", "batch end"),
    ),
    Entry(
        "FeatureShiftRegularizer",
        "regularizer",
        {"form": "l2_sp", "weight": 0.1},
        written=[methods.StartingPoint],
        values=expected.terms,
        refuses={**TERM, **NO_FSDP2},
        failure=Failure("lightning_feat.callbacks.feature_shift.regularizer.l2_sp", "loss", call=3),
    ),
    Entry(
        "FeatureShiftRegularizer (features)",
        "regularizer",
        {"form": "distillation", "weight": 0.1},
        makes="FeatureShiftRegularizer",
        written=[methods.StartingFeatures],
        values=expected.terms,
        refuses={**TERM, **NO_FSDP2},
        failure=Failure("lightning_feat.callbacks.feature_shift.regularizer._penalty", "loss"),
    ),
    Entry(
        "PromptLearner",
        "head",
        {"depth": 2, "length": 2, "template": None, "gram_weight": methods.GRAM_WEIGHT},
        written=[methods.Prompts],
        values=expected.prompts,
        task="clip",
        refuses={**TERM, "FSDP2": "use DDP", "FSDP2, classifier named": "use DDP"},
        own=lambda callback: [*callback.learned.parameters(), *callback.learned.buffers()],
        failure=Failure("lightning_feat.layers.feature_shift.prompts.gram_consistency_loss", "loss"),
    ),
    Entry("CurvePlotter", "plotter", {"filename": "curves.svg"}),
    Entry("SummaryTable", "plotter"),
    Entry("FeatureReport", "plotter", {"every_n_epochs": 1}, refuses={"several validation loaders": ONE_LOADER}),
]


def company(entry: Entry) -> Entry:
    """An entry with everything that can go with it, of every method of the library; a regression and a CLIP go alone.

    There is one company for each head. Monitors of neural collapse log under one name, so each has one of them; that
    with a threshold is the online one.
    """
    if entry.task != "classes":
        return entry
    by_name = {member.name: member for member in CALLBACKS}
    simplex = ["SimplexETFHead", "DotRegressionRegularizer", "MixupGeometryMonitor", "CollapseThreshold"]
    grassmann = ["GrassmannHead", "GrassmannMonitor", "NeuralCollapseMonitor (exact)"]
    heads = simplex if entry.name in [*simplex, "NeuralCollapseMonitor (online)"] else grassmann
    others = ["FeatureRegularizer", "NeuralCollapseRegularizer", "LinearProbe", "FewShotMonitor"]
    others += ["DataPlan", "CurvePlotter", "FeatureReport"]
    members = [by_name[name] for name in [*heads, *others]]
    last = by_name["SummaryTable"]
    epochs = max(member.epochs for member in members)
    return replace(last, name=f"{heads[0]} with all others", makes=last.name, epochs=epochs, beside=members)
