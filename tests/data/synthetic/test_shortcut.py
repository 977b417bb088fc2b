import math
from statistics import NormalDist

import pytest
import torch

from lightning_feat.baselines import MLPClassifier
from lightning_feat.data.synthetic.shortcut import ShortcutDataModule, shortcut_examples
from lightning_feat.functional.simplicity_bias import feature_reliance
from tests.helpers import trainer

N = 20_000
ERROR = 5 * (0.25 / N) ** 0.5  # five standard errors of a share
MIXING = torch.eye(4)[:, 1:3]


def ready(**arguments):
    data = ShortcutDataModule(**{"num_train": 200, "num_val": 100, "num_test": 100, **arguments})
    data.setup()
    return data


def test_each_latent_alone_tells_the_class_as_often_as_its_predictivity():
    _, targets, latents = shortcut_examples(N, MIXING, core_predictivity=0.9, shortcut_predictivity=0.7)
    right = ((latents > 0).long() == targets[:, None]).double().mean(0)
    assert right[0] == pytest.approx(0.9, abs=ERROR)
    assert right[1] == pytest.approx(0.7, abs=ERROR)


def test_given_the_class_latents_are_independent_and_of_variance_one():
    _, targets, latents = shortcut_examples(N, MIXING)
    for label in (0, 1):
        torch.testing.assert_close(torch.cov(latents[targets == label].T), torch.eye(2), atol=0.08, rtol=0)


def test_availability_is_the_size_in_the_input_and_noise_lies_beside_both_features():
    drawn = {"core_availability": 0.5, "shortcut_availability": 3.0, "noise": 0.2}
    inputs, _, latents = shortcut_examples(N, MIXING, **drawn)
    torch.testing.assert_close(inputs @ MIXING, latents * torch.tensor([0.5, 3.0]))
    rest = inputs[:, [0, 3]]
    assert float(rest.std()) == pytest.approx(0.2, rel=0.03)


@pytest.mark.parametrize("shortcut_availability", [0.1, 1.0, 10.0])
def test_the_best_rule_is_as_right_as_stated_whatever_the_availability(shortcut_availability):
    data = ready(num_test=N, shortcut_availability=shortcut_availability, noise=0.1)
    means = [NormalDist().inv_cdf(p) for p in (0.9, 0.75)]
    right = (data.best_rule(data.test_set.inputs) == data.test_set.targets).double().mean()
    assert right == pytest.approx(NormalDist().cdf(math.hypot(*means)), abs=ERROR)


def test_no_linear_rule_beats_the_best_rule():
    data = ready(num_train=N, num_features=6)
    x, y = data.train_set.inputs, data.train_set.targets
    best = (data.best_rule(x) == y).double().mean()
    means = [x[y == label].double().mean(0) for label in (0, 1)]
    within = torch.cov((x.double() - torch.stack(means)[y]).T)
    direction = torch.linalg.pinv(within, hermitian=True) @ (means[1] - means[0])
    fitted = ((x.double() @ direction > (means[0] + means[1]) @ direction / 2).long() == y).double().mean()
    assert best == pytest.approx(float(fitted), abs=0.005)


@pytest.mark.parametrize(("core", "shortcut"), [(0.9, 0.75), (0.9, 0.9), (0.8, 0.55)])
def test_the_best_rule_relies_on_the_features_as_stated(core, shortcut):
    data = ready(core_predictivity=core, shortcut_predictivity=shortcut)
    probe = data.probe(side=200)
    ratio = NormalDist().inv_cdf(shortcut) / NormalDist().inv_cdf(core)
    chosen = data.best_rule(probe.inputs)
    # 400 values a side; on the diagonal of equal means ties go one way
    assert float(feature_reliance(chosen, probe.shortcut, 2)) == pytest.approx(ratio / 2, abs=0.01)
    assert float(feature_reliance(chosen, probe.core, 2)) == pytest.approx(1 - ratio / 2, abs=0.01)


def test_the_probe_crosses_every_value_and_is_balanced():
    probe = ready(num_features=5).probe(side=6)
    assert len(probe.inputs) == 36
    pairs = 2 * probe.core + probe.shortcut
    assert pairs.bincount().tolist() == [9, 9, 9, 9]


def test_a_seed_draws_the_same_again_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second, other = (shortcut_examples(50, MIXING, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.inputs, other.inputs)


def test_parts_are_drawn_apart_in_one_mixing():
    data = ready()
    assert not torch.equal(data.val_set.inputs, data.test_set.inputs)
    for part in (data.train_set, data.val_set):
        torch.testing.assert_close(part.inputs @ data.mixing / torch.tensor([1.0, 4.0]), part.latents)


def test_batches_have_the_index_asked_for():
    data = ready(return_index=True)
    inputs, targets, indices = next(iter(data.train_dataloader()))
    assert torch.equal(inputs, data.train_set.inputs[indices])
    assert torch.equal(targets, data.train_set.targets[indices])


def test_a_trainer_trains_on_it(tmp_path):
    run = trainer(tmp_path)
    run.fit(MLPClassifier(50, 2), ShortcutDataModule(num_train=128, num_val=64))
    assert run.global_step == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"core_predictivity": 1.0}, "must lie in"),
        ({"shortcut_predictivity": 0.4}, "must lie in"),
        ({"shortcut_predictivity": 0.95}, "must not be above the core"),
        ({"core_availability": 0.0}, "must be above zero"),
        ({"noise": -1.0}, "noise=-1.0 not below"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    for make in (lambda: shortcut_examples(10, MIXING, **arguments), lambda: ShortcutDataModule(**arguments)):
        with pytest.raises(ValueError, match=message):
            make()


def test_sizes_mixings_and_grids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"must be .D, 2."):
        shortcut_examples(10, torch.eye(3))
    with pytest.raises(ValueError, match="num_features=1"):
        ShortcutDataModule(num_features=1)
    with pytest.raises(ValueError, match="an even number of values"):
        ready().probe(side=3)
