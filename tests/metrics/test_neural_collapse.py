import itertools
import pickle
from copy import deepcopy

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_feat.functional import neural_collapse as nc
from lightning_feat.metrics import ClassDistanceNormalizedVariance, NeuralCollapse

C, D = 4, 6


def batch(size=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(size) % C
    means = torch.randn(C, D, generator=generator)
    return means[targets] + 0.3 * torch.randn(size, D, generator=generator), targets


def assert_same(first, second, rtol=1e-9, names=None):
    assert first.keys() == second.keys()
    for name in names or first:
        # atol: square roots of sums that cancel to about 1e-16
        torch.testing.assert_close(first[name], second[name], rtol=rtol, atol=2e-8, msg=f"{name} differs")


def run(metric, features, targets, logits=None, splits=(0, 7, 33, 50)):
    for start, stop in itertools.pairwise(splits):
        metric.update(features[start:stop], targets[start:stop])
    metric.start_second_pass()
    for start, stop in itertools.pairwise(splits):
        metric.update_second_pass(
            features[start:stop], targets[start:stop], None if logits is None else logits[start:stop]
        )
    return metric.compute()


def test_everything_over_unequal_batches_is_the_functions_over_all_samples():
    features, targets = batch()
    weight, bias = torch.randn(C + 2, D), torch.randn(C + 2)
    logits = features @ weight.T + bias
    metric = NeuralCollapse(C + 2, D, second_moment=True)  # the last two classes stay empty
    metric.set_classifier(weight, bias)
    values = run(metric, features, targets, logits)
    sums = nc.class_sums(features, targets, C + 2)
    expected = nc.collapse_measures(
        sums,
        moment=nc.second_moment(features),
        residuals=nc.center_sums(features, targets, logits, nc.class_centers(sums)),
        weight=weight,
        bias=bias,
    )
    assert values.pop("nonfinite_samples") == 0
    assert_same(values, expected)


def test_one_pass_gives_what_sums_give():
    metric = NeuralCollapse(C, D)
    metric.update(*batch())
    expected = nc.collapse_measures(nc.class_sums(*batch(), C))
    assert metric.compute().keys() == expected.keys() | {"nonfinite_samples"}


def test_repeated_and_non_finite_samples_are_left_out_of_both_passes():
    features, targets = batch()
    clean = run(NeuralCollapse(C, D, second_moment=True), features, targets, features[:, :C])
    dirty = torch.cat([features, features[:5], torch.full((2, D), torch.nan)])
    dirty[-1, 1:] = torch.inf
    labels = torch.cat([targets, targets[:5], torch.tensor([0, 1])])
    repeated = torch.arange(57).ge(50) & torch.arange(57).lt(55)
    metric = NeuralCollapse(C, D, second_moment=True)
    metric.update(dirty, labels, repeated)
    metric.start_second_pass()
    metric.update_second_pass(dirty, labels, dirty[:, :C], repeated)
    values = metric.compute()
    assert values.pop("nonfinite_samples") == 2
    clean.pop("nonfinite_samples")
    assert_same(values, clean)


def test_a_non_finite_sample_that_is_repeated_is_not_counted_again():
    metric = NeuralCollapse(C, D)
    features = torch.full((2, D), torch.nan)
    metric.update(features, torch.tensor([0, 0]), repeated=torch.tensor([False, True]))
    assert metric.compute()["nonfinite_samples"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_under_autocast(dtype):
    features, targets = batch()
    features = features.to(dtype)
    metric = NeuralCollapse(C, D, second_moment=True)
    with torch.autocast("cpu", torch.bfloat16):
        values = run(metric, features, targets)
    assert_same(values, run(NeuralCollapse(C, D, second_moment=True), features.double(), targets), rtol=1e-12)


def test_soft_targets():
    features, targets = batch()
    soft = torch.full((50, C), 0.1 / C) + 0.9 * torch.eye(C)[targets]
    metric = NeuralCollapse(C, D)
    metric.update(features, soft)
    value = nc.class_distance_normalized_variance(nc.class_sums(features, soft, C))
    torch.testing.assert_close(metric.compute()["cdnv"], value)


def test_converting_the_module_leaves_the_sums_in_float64():
    metric = NeuralCollapse(C, D).half()
    metric.update(*batch())
    assert metric.sums.dtype == torch.float64


def test_a_move_to_a_device_without_float64_leaves_the_sums_on_the_cpu():
    class OnMps:
        device = torch.device("mps")

    metric = NeuralCollapse(C, D)
    assert metric._apply(lambda tensor: OnMps()) is metric
    metric.update(*batch())
    assert metric.sums.device.type == "cpu"


def test_reset_within_inference_mode_does_not_stop_training_later():
    metric = NeuralCollapse(C, D)
    with torch.inference_mode():
        metric.reset()
        metric.update(*batch())
    metric.update(*batch())
    assert metric.counts.sum() == 100


def test_nothing_is_held_of_the_graph():
    features, targets = batch()
    metric = NeuralCollapse(C, D, second_moment=True)
    metric(features.requires_grad_(), targets)  # forward lets torchmetrics switch gradients on
    assert not any(getattr(metric, name).requires_grad for name in metric._defaults)


def test_the_classifier_is_seen_as_it_is_at_compute_and_never_becomes_a_parameter():
    metric, head = NeuralCollapse(C, D), torch.nn.Linear(D, C)
    metric.update(*batch())
    metric.set_classifier(head.weight, head.bias)
    assert not list(metric.parameters())
    with torch.no_grad():
        head.weight.copy_(torch.ones(C, D))
    assert metric.compute()["nc0"] == C**2 * D


def test_compute_takes_up_what_changed_without_an_update():
    metric = NeuralCollapse(C, D)
    metric.update(*batch())
    assert "nc0" not in metric.compute()
    metric.set_classifier(torch.ones(C, D))
    assert metric.compute()["nc0"] == C**2 * D


def test_grassmann_basis():
    basis = torch.linalg.qr(torch.randn(C, D, 2))[0].mT
    metric = NeuralCollapse(C, D)
    metric.set_classifier(basis=basis)
    metric.update(*batch())
    assert {"nc2_subspace_chordal_cv", "nc2_subspace_spread", "nc3_subspace_angle"} <= metric.compute().keys()


def test_reset_forgets_samples_and_centers():
    metric = NeuralCollapse(C, D, second_moment=True)
    run(metric, *batch(seed=1))
    metric.reset()
    assert "ncc_accuracy" not in _once(metric)
    fresh = NeuralCollapse(C, D, second_moment=True)
    assert_same(metric.compute(), _once(fresh), rtol=1e-12)


def _once(metric):
    metric.update(*batch())
    return metric.compute()


def test_a_collection_adds_its_prefix_and_the_two_metrics_agree():
    metrics = MetricCollection(
        {"all": NeuralCollapse(C, D), "pairs": ClassDistanceNormalizedVariance(C, D)}, prefix="train/"
    )
    metrics.update(*batch())
    values = metrics.compute()
    assert values["train/cdnv"] == values["train/pairs"]
    assert values["train/nc1_quotient"] > 0


def test_pickle_and_copy_go_on_where_the_original_was():
    metric = NeuralCollapse(C, D)
    metric.update(*batch())
    for other in (pickle.loads(pickle.dumps(metric)), deepcopy(metric)):
        other.update(*batch())
        assert other.counts.sum() == 100
    assert metric.counts.sum() == 50


def test_a_thousand_classes_of_two_thousand_features_take_less_than_60_mb():
    metric = NeuralCollapse(1000, 2048)
    held = sum(getattr(metric, name).nbytes + default.nbytes for name, default in metric._defaults.items())
    assert held < 34e6  # the state and what reset restores
    metric.update(torch.randn(64, 2048).bfloat16(), torch.arange(64) % 32)
    assert 0.4 < metric.compute()["cdnv"] < 0.6  # two of noise in a class: variance D / 2, squared distance D


@pytest.mark.parametrize(
    ("features", "targets", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), "num_features=6 but features are"),
        (torch.zeros(2, D), torch.tensor([0, 9]), "a target is 9 but num_classes=4: set num_classes to at least 10"),
        (torch.zeros(2, D), torch.tensor([-1, 0]), "a target is -1"),
        (torch.zeros(2, D), torch.zeros(2), "integer class indices"),
    ],
)
def test_what_does_not_fit_is_named(features, targets, message):
    with pytest.raises(ValueError, match=message):
        NeuralCollapse(C, D).update(features, targets)


def test_on_an_accelerator_later_targets_out_of_range_are_left_out_and_reported_by_compute(monkeypatch):
    monkeypatch.setattr("lightning_feat.metrics.common.values_are_at_hand", lambda values: False)
    features, targets = batch()
    metric, whole = NeuralCollapse(C, D, second_moment=True), NeuralCollapse(C, D, second_moment=True)
    with pytest.raises(ValueError, match="a target is 7"):
        metric.update(features, targets + 4)
    metric.reset()
    metric.update(features, targets)
    assert_same(metric.compute(), _once(whole), rtol=1e-12)
    metric.update(features[:3], torch.tensor([C, -1, 0]))
    assert metric.counts.sum() == 51
    with pytest.raises(ValueError, match=r"2 targets lay outside \[0, 4\)"):
        metric.compute()


@pytest.mark.gpu
def test_an_accelerator_gives_what_the_cpu_gives():
    features, targets = batch()
    values = run(
        NeuralCollapse(C, D, second_moment=True).cuda(), features.cuda(), targets.cuda(), features[:, :C].cuda()
    )
    expected = run(NeuralCollapse(C, D, second_moment=True), features, targets, features[:, :C])
    assert_same({name: value.cpu() for name, value in values.items()}, expected)


def test_the_order_of_the_passes_is_enforced():
    metric = NeuralCollapse(C, D)
    with pytest.raises(RuntimeError, match=r"call start_second_pass\(\) first"):
        metric.update_second_pass(*batch())
    metric.update(*batch())
    metric.start_second_pass()
    with pytest.raises(RuntimeError, match=r"call reset\(\) before"):
        metric.update(*batch())


def test_arguments_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="global_mean='median': choose 'classes' or 'samples'"):
        NeuralCollapse(C, D, global_mean="median")
    with pytest.raises(ValueError, match="num_classes=0"):
        NeuralCollapse(0, D)
    with pytest.raises(ValueError, match=r"repeated must be \(50,\)"):
        NeuralCollapse(C, D).update(*batch(), repeated=torch.zeros(3))
