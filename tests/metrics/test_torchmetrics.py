"""What torchmetrics, and those who are used to it, expect of every metric."""

import multiprocessing
import pickle
from copy import deepcopy

import lightning
import numpy
import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import MetricTracker, MinMaxMetric, Running

from lightning_feat import metrics as ours
from lightning_feat.functional.grassmann import random_basis
from lightning_feat.functional.neural_collapse import known_measures

C, D = 3, 5


def samples(seed, size=24):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, D, generator=generator) + torch.eye(C, D)[torch.arange(size) % C]
    return features, torch.arange(size) % C


def features_of(seed, size=24):
    return samples(seed, size)[:1]


def basis(seed, size=C):
    return (random_basis(size, 2, D, generator=torch.Generator().manual_seed(seed)),)


MADE = {
    "cdnv": (lambda: ours.ClassDistanceNormalizedVariance(C, D), samples),
    "collapse": (lambda: ours.NeuralCollapse(C, D, second_moment=True), samples),
    "one measure": (lambda: ours.NeuralCollapse(C, D, measures="nc1_quotient"), samples),
    "separation": (lambda: ours.ClassSeparation(C, D), samples),
    "variability": (lambda: ours.WithinClassVariability(C, D), samples),
    "effective rank": (lambda: ours.EffectiveRank(D), features_of),
    "rankme": (lambda: ours.RankMe(D), features_of),
    "decay": (lambda: ours.SpectrumDecay(D), features_of),
    "uniformity": (lambda: ours.WassersteinUniformity(D), features_of),
    "angle": (lambda: ours.SubspaceAngle(), basis),
    "smallest angle": (lambda: ours.SubspaceAngle("smallest"), basis),
    "distance": (lambda: ours.SubspaceDistance(start=basis(9)[0]), basis),
    "largest distance": (lambda: ours.SubspaceDistance(basis(9)[0], "largest"), basis),
    "orthonormality": (lambda: ours.OrthonormalityError(), basis),
}
EXACT_SUMS = [name for name in MADE if name != "variability"]  # that one counts the pairs of a batch
every = pytest.mark.parametrize("name", MADE)


def numbers(value):
    values = value if isinstance(value, dict) else {"": value}
    return {name: float(number) for name, number in values.items()}


def assert_same(first, second, rel=1e-12):
    assert numbers(first) == pytest.approx(numbers(second), rel=rel, abs=1e-12, nan_ok=True)


def filled(name, seeds=(0, 1, 2)):
    make, draw = MADE[name]
    metric = make()
    for seed in seeds:
        metric.update(*draw(seed))
    return metric


def test_every_metric_is_looked_at_here():
    assert {type(make()).__name__ for make, _ in MADE.values()} == {*ours.__all__}


@every
def test_forward_gives_the_batch_and_keeps_the_whole(name):
    make, draw = MADE[name]
    metric = make()
    for seed in range(3):
        assert_same(metric(*draw(seed)), filled(name, [seed]).compute())
    assert_same(metric.compute(), filled(name).compute())
    assert metric.update_count == 3


@every
def test_a_value_is_kept_until_the_next_update_and_forgotten_by_reset(name):
    metric = filled(name)
    assert_same(metric.compute(), metric.compute())
    metric.update(*MADE[name][1](5))
    assert_same(metric.compute(), filled(name, (0, 1, 2, 5)).compute())
    metric.reset()
    assert metric.update_count == 0
    metric.update(*MADE[name][1](5))
    assert_same(metric.compute(), filled(name, [5]).compute())


@every
def test_class_constants_cannot_be_set(name):
    metric = MADE[name][0]()
    for constant in ("higher_is_better", "is_differentiable", "full_state_update", "plot_lower_bound"):
        with pytest.raises(RuntimeError, match="Can't change const"):
            setattr(metric, constant, True)
    assert metric.is_differentiable is False
    assert metric.full_state_update is False


@every
def test_clones_and_pickles_go_on_alone(name):
    metric, draw = filled(name), MADE[name][1]
    for twin in (metric.clone(), deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        twin.update(*draw(3))
        assert_same(twin.compute(), filled(name, (0, 1, 2, 3)).compute())
    assert_same(metric.compute(), filled(name).compute())


@every
def test_two_of_a_kind_hash_apart(name):
    make = MADE[name][0]
    first, second = make(), make()
    assert hash(first) != hash(second)
    assert len({first, second, first}) == 2


@every
def test_the_state_dict_holds_the_state_on_demand_alone(name):
    metric = filled(name)
    assert metric.state_dict() == {}
    metric.persistent(True)
    other = MADE[name][0]()
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other._update_count = 1
    assert_same(other.compute(), metric.compute())


def computed(metric):
    metric.persistent(True)
    return numbers(metric.compute()), {name: value.numpy() for name, value in metric.state_dict().items()}


@pytest.mark.slow  # starts two processes that import torch
def test_a_pool_of_processes_gives_the_same():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(computed, [filled(name) for name in MADE])
    for name, (value, state) in zip(MADE, found, strict=True):
        assert_same(value, filled(name).compute())
        assert {*state} == {*filled(name)._defaults}


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_cast_reaches_the_sums(name, dtype):
    expected = filled(name).compute()
    for cast in (
        lambda metric: nn.ModuleDict({"m": metric}).to(dtype),
        lambda metric: nn.ModuleDict({"m": metric}).half(),
        lambda metric: metric.set_dtype(dtype),
        lambda metric: metric.to(dtype),
        lambda metric: nn.Sequential(nn.Linear(1, 1), metric).to("cpu", dtype),
    ):
        metric = filled(name)
        cast(metric)
        assert {getattr(metric, state).dtype for state in metric._defaults} == {torch.float64}
        assert {default.dtype for default in metric._defaults.values()} == {torch.float64}
        assert_same(metric.compute(), expected, rel=0)
        metric.reset()
        assert {getattr(metric, state).dtype for state in metric._defaults} == {torch.float64}


@pytest.mark.parametrize("name", ["cdnv", "collapse", "separation", "variability"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_those_numbers(name, dtype):
    make, draw = MADE[name]
    features, targets = draw(0)
    half, whole = make(), make()
    half.update(features.to(dtype), targets)
    whole.update(features.to(dtype).double(), targets)
    assert_same(half.compute(), whole.compute())


@every
def test_merged_states_are_those_of_all_batches(name):
    metric, other = filled(name, [0]), filled(name, [1, 2])
    before = numbers(metric.compute())
    metric.merge_state(other)
    assert numbers(metric.compute()) != before  # and not what was kept
    assert_same(metric.compute(), filled(name).compute())
    assert metric.update_count == 3
    by_state = filled(name, [0])
    by_state.merge_state(other.metric_state)
    assert_same(by_state.compute(), metric.compute())


def test_states_of_other_shapes_or_names_are_not_merged():
    metric = filled("collapse")
    for other in (ours.NeuralCollapse(1, D, second_moment=True), ours.NeuralCollapse(C, D)):
        with pytest.raises(ValueError, match="give both metrics the same options"):
            metric.merge_state(other)
    with pytest.raises(ValueError, match="instance of NeuralCollapse"):
        metric.merge_state(filled("separation"))


@pytest.mark.parametrize("entry", ["forward", "update", "merge", "merged"])
def test_a_second_pass_refuses_what_it_would_spoil_and_stays_as_it_is(entry):
    features, targets = samples(0)
    metric, other = filled("collapse", [0]), filled("collapse", [1])
    metric.start_second_pass()
    metric.update_second_pass(features, targets)
    before = numbers(metric.compute())
    spoil = {
        "forward": lambda: metric(features * torch.nan, targets),
        "update": lambda: metric.update(features * torch.nan, targets),
        "merge": lambda: metric.merge_state(other),
        "merged": lambda: other.merge_state(metric),
    }
    with pytest.raises(RuntimeError, match=r"second pass has started: call reset\(\)"):
        spoil[entry]()
    assert_same(metric.compute(), before)
    metric.reset()
    metric(features, targets)
    assert "ncc_accuracy" not in metric.compute()


def test_a_second_pass_over_other_samples_is_nan_and_said():
    features, targets = samples(0)
    metric = filled("collapse", [0])
    metric.start_second_pass()
    metric.update_second_pass(features[:20], targets[:20])
    with pytest.warns(UserWarning, match="second pass has had 20 samples, the first 24"):
        values = metric.compute()
    assert values["nc1_pinv_over_k"].isnan()
    assert values["ncc_accuracy"].isnan()
    assert values["nc2_equinorm"].isfinite()


def test_a_state_that_is_loaded_ends_a_second_pass():
    metric, other = filled("collapse", [0]), filled("collapse", [1])
    other.persistent(True)
    metric.start_second_pass()
    metric.load_state_dict(other.state_dict())
    assert_same(metric.compute(), other.compute())


def test_a_second_pass_follows_to_another_device():
    metric = filled("collapse", [0])
    metric.start_second_pass()
    metric.to("meta")
    assert metric._centers.offsets.device.type == "meta"


def test_no_two_metrics_are_one_in_a_collection():
    zeros = torch.zeros(6, D)  # of which all sums are equal
    made = {name: make for name, (make, draw) in MADE.items() if draw is samples}
    alone, together = ({name: make() for name, make in made.items()} for _ in range(2))
    collection = MetricCollection(together)
    for features, targets in ((zeros, torch.arange(6) % C), samples(1), samples(2)):
        collection.update(features, targets)
        for metric in alone.values():
            metric.update(features, targets)
    found = numbers(collection.compute())
    for name in ("cdnv", "separation", "variability"):
        assert found[name] == float(alone[name].compute())
    of_bases = MetricCollection({name: MADE[name][0]() for name, (_, draw) in MADE.items() if draw is basis})
    for seed in (9, 1):
        of_bases.update(*basis(seed))
    assert numbers(of_bases.compute()) == {
        name: float(filled(name, (9, 1)).compute()) for name, (_, draw) in MADE.items() if draw is basis
    }


def test_measures_of_one_collection_share_their_sums_and_keep_their_second_pass():
    features, targets = samples(0)
    collection = MetricCollection({name: ours.NeuralCollapse(C, D, measures=name) for name in ("cdnv", "ncc_accuracy")})
    for part in (slice(0, 9), slice(9, 24)):
        collection.update(features[part], targets[part])
    assert len(collection.compute_groups) == 1
    nearest = collection["ncc_accuracy"]
    nearest.start_second_pass()
    nearest.update_second_pass(features, targets)
    whole = filled("collapse", [0])
    whole.start_second_pass()
    whole.update_second_pass(features, targets)
    assert_same(collection.compute(), {name: whole.compute()[name] for name in ("cdnv", "ncc_accuracy")})


def test_one_measure_is_a_number_for_wrappers():
    tracker = MetricTracker(ours.NeuralCollapse(C, D, measures="cdnv"))
    found = []
    for seed in range(3):
        tracker.increment()
        tracker.update(*samples(seed))
        found.append(float(tracker.compute()))
    assert float(tracker.best_metric()) == pytest.approx(min(found))
    best = MinMaxMetric(ours.NeuralCollapse(C, D, measures="nc1_quotient"))
    best.update(*samples(0))
    assert best.compute()["raw"] == best.compute()["min"]
    running = Running(ours.NeuralCollapse(C, D, measures="nc1_quotient"), window=2)
    for seed in range(3):
        running.update(*samples(seed))
    assert_same(running.compute(), filled("one measure", (1, 2)).compute())


def test_every_measure_alone_is_that_of_all():
    features, targets = samples(0)
    weight, bias, subspaces = torch.eye(C, D) + 0.1, torch.arange(float(C)), basis(1)[0]

    def metric(measures):
        made = ours.NeuralCollapse(C, D, second_moment=True, within_scatter=True, measures=measures)
        made.set_classifier(weight, bias, subspaces)
        made.update(features, targets)
        made.start_second_pass()
        made.update_second_pass(features, targets, features[:, :C])
        return made

    values = metric(None).compute()
    assert values.keys() - {"nonfinite_samples"} == {*known_measures()}
    for name in known_measures():
        alone = metric(name)
        assert_same(alone.compute(), values[name])
        assert alone.higher_is_better in (True, False)
    assert metric(["nc3", "cdnv"]).compute().keys() == {"nc3", "cdnv", "nonfinite_samples"}
    assert metric(None).higher_is_better is None


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("nc3", "set_classifier"),
        ("vci", "second_moment=True, or run a second pass with within_scatter=True"),
        ("ncc_accuracy", r"after start_second_pass\(\)"),
        ("nc4_mismatch", "with the logits"),
    ],
)
def test_a_measure_says_what_it_waits_for(name, needs):
    metric = ours.NeuralCollapse(C, D, measures=name)
    metric.update(*samples(0))
    with pytest.raises(RuntimeError, match=f"{name} is not known yet: .*{needs}"):
        metric.compute()


def test_unknown_measures_and_odd_numbers_are_refused():
    with pytest.raises(ValueError, match="measures='cndv': choose from nc1_quotient"):
        ours.NeuralCollapse(C, D, measures="cndv")
    for wrong in (2.5, "3", None):
        with pytest.raises(ValueError, match=f"num_classes={wrong!r}.* whole number"):
            ours.ClassSeparation(wrong, D)
    for statistic in (ours.SubspaceAngle, ours.SubspaceDistance):
        with pytest.raises(ValueError, match="statistic='median'"):
            statistic(statistic="median")


def test_numbers_of_numpy_are_plain_ones():
    metric = ours.NeuralCollapse(numpy.int64(C), numpy.int32(D), second_moment=True)
    assert type(metric.num_classes) is int
    assert type(metric.num_features) is int
    metric.update(*samples(0))
    assert_same(pickle.loads(pickle.dumps(metric)).compute(), filled("collapse", [0]).compute())


@every
def test_plots_have_bounds_and_take_several_values(name):
    pytest.importorskip("matplotlib").use("Agg")
    metric = filled(name)
    metric.plot()
    metric.plot([metric.compute(), metric.compute()])
    if not isinstance(metric.compute(), dict) and metric.plot_upper_bound is not None:
        assert metric.plot_lower_bound <= metric.compute() <= metric.plot_upper_bound


class Logs(LightningModule):
    """Logs metrics as its users do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, C)
        self.cdnv = ours.NeuralCollapse(C, D, measures="cdnv")
        self.several = MetricCollection(
            {"variance": ours.ClassDistanceNormalizedVariance(C, D), "separation": ours.ClassSeparation(C, D)}
        )

    def training_step(self, batch, batch_idx):
        self.cdnv.update(*batch)
        self.log("cdnv", self.cdnv, on_step=False, on_epoch=True)
        self.several.update(*batch)
        self.log_dict(self.several, on_step=False, on_epoch=True)
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_lightning_logs_them_over_an_epoch_in_any_precision(tmp_path, precision):
    lightning.seed_everything(0, verbose=False)
    loader = DataLoader(TensorDataset(*samples(0)), batch_size=7)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        precision=precision,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Logs(), loader)
    features, targets = samples(0)
    features = features.to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    for name, made in (
        ("cdnv", ours.ClassDistanceNormalizedVariance(C, D)),
        ("variance", ours.ClassDistanceNormalizedVariance(C, D)),
        ("separation", ours.ClassSeparation(C, D)),
    ):
        made.update(features, targets)
        assert float(trainer.callback_metrics[name]) == pytest.approx(float(made.compute()), rel=1e-6)


def test_a_metric_of_ones_own_may_hold_several():
    class Both(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ours.ClassSeparation(C, D)

        def update(self, features, targets):
            self.inner.update(features, targets)

        def compute(self):
            return self.inner.compute()

    both = Both().half()
    both.update(*samples(0))
    assert both.inner.direction_sums.dtype == torch.float64
    assert_same(both.compute(), filled("separation", [0]).compute())
