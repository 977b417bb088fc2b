import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_feat.functional.transfer.probe import fit_logistic_regression, hold_out, linear_probe

PENALTIES = (1e-4, 1e-2, 1.0)


def blobs(size=150, width=6, classes=4, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(size) % classes
    means = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return means[targets] + noise * torch.randn(size, width, generator=generator), targets


def three_parts(**kwargs):
    return [entry for seed in range(3) for entry in blobs(seed=seed, **kwargs)]


@pytest.mark.parametrize(("size", "width"), [(150, 6), (30, 60)])  # more samples than features, and fewer
@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_the_fit_is_that_of_scikit_learn(size, width, penalty):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, targets = blobs(size, width)
    features = features.double() * torch.logspace(0, -1.5, width) + 3  # unequal spreads, off the origin
    fitted = fit_logistic_regression(features, targets, 4, penalty)
    # Newton: the L-BFGS of scikit-learn 1.3 stops early here, whatever the tolerance.
    options = {"C": 1 / (penalty * size), "solver": "newton-cg", "tol": 1e-10, "max_iter": 20_000}
    theirs = linear_model.LogisticRegression(**options)
    theirs.fit(features.numpy(), targets.numpy())
    # Ours stops at a gradient of 1e-5 in scaled coordinates; where the classes are separable the loss is nearly flat.
    torch.testing.assert_close(fitted.weight, torch.as_tensor(theirs.coef_), rtol=1e-3, atol=2e-3)
    log_odds = (
        features @ (fitted.weight - torch.as_tensor(theirs.coef_)).T + fitted.bias - torch.as_tensor(theirs.intercept_)
    )
    assert (log_odds - log_odds.mean(1, keepdim=True)).abs().max() < 2e-2  # log odds up to 10


def objective(features, targets, weight, bias, penalty):
    logits = features.double() @ weight.T + bias
    return float(cross_entropy(logits, targets) + penalty / 2 * weight.square().sum())


@pytest.mark.parametrize(
    ("size", "width", "noise"), [(150, 6, 1.0), (120, 40, 0.5), (40, 60, 1.0)]
)  # two can be told apart
def test_at_every_penalty_down_to_the_weakest_the_loss_is_the_least_there_is(size, width, noise):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, targets = blobs(size, width, noise=noise)
    for penalty in (1e-6, 1e-4, 1e-2, 1.0):
        options = {"C": 1 / (penalty * size), "solver": "newton-cg", "tol": 1e-10, "max_iter": 20_000}
        theirs = linear_model.LogisticRegression(**options).fit(features.double().numpy(), targets.numpy())
        least = objective(features, targets, torch.tensor(theirs.coef_), torch.tensor(theirs.intercept_), penalty)
        ours = objective(features, targets, *fit_logistic_regression(features, targets, 4, penalty), penalty)
        assert ours <= least * (1 + 1e-6), penalty


class Looks(TorchDispatchMode):
    """Counts the values that are fetched from the device, each of which would make a GPU wait."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "_unique2", "tolist")
        return func(*args, **(kwargs or {}))


def test_all_penalties_are_fitted_side_by_side_with_few_looks_at_the_device():
    parts = three_parts(size=400, width=20)
    with Looks() as looks:
        together = linear_probe(*parts)
    assert len(together.penalties) == 8
    assert looks.count <= 60
    for penalty, accuracy in zip(together.penalties.tolist(), together.val_accuracies, strict=True):
        assert linear_probe(*parts, penalties=[penalty]).val_accuracies[0] == accuracy


def test_the_fit_ends_where_the_gradient_of_the_stated_loss_vanishes():
    features, targets = blobs()
    weight, bias = (value.requires_grad_() for value in fit_logistic_regression(features, targets, 4, 1e-2))
    loss = cross_entropy(features.double() @ weight.T + bias, targets) + 0.5e-2 * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 2e-5  # the tolerance, times the deviation of a feature, about 1.5
    assert bias.grad.abs().max() < 2e-5


def test_the_accuracies_are_those_of_scikit_learn_on_standardised_features():
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, train_targets, val, val_targets, test, test_targets = three_parts()
    train = train * torch.logspace(0, 3, 6)
    val, test = val * torch.logspace(0, 3, 6), test * torch.logspace(0, 3, 6)
    result = linear_probe(train, train_targets, val, val_targets, test, test_targets, penalties=PENALTIES)
    mean, std = train.double().mean(0), train.double().std(0, correction=0)
    scores, tests = [], []
    for penalty in PENALTIES:
        theirs = linear_model.LogisticRegression(C=1 / (penalty * len(train)), tol=1e-8, max_iter=5000)
        theirs.fit(((train.double() - mean) / std).numpy(), train_targets.numpy())
        scores.append(theirs.score(((val.double() - mean) / std).numpy(), val_targets.numpy()))
        tests.append(theirs.score(((test.double() - mean) / std).numpy(), test_targets.numpy()))
    assert result.val_accuracies.tolist() == pytest.approx(scores, abs=1e-12)
    best = max(range(3), key=lambda i: (scores[i], PENALTIES[i]))
    assert result.penalty == PENALTIES[best]
    assert float(result.accuracy) == pytest.approx(tests[best], abs=1e-12)
    assert 0.3 < result.accuracy < 1  # neither chance nor trivial


def test_the_penalty_is_chosen_on_the_validation_part_alone():
    parts = three_parts()
    first = linear_probe(*parts, penalties=PENALTIES)
    parts[5] = parts[5].roll(1)  # other test targets
    second = linear_probe(*parts, penalties=PENALTIES)
    assert second.penalty == first.penalty
    assert second.val_accuracies.equal(first.val_accuracies)
    assert second.accuracy != first.accuracy


def test_of_equal_accuracies_the_stronger_penalty_is_chosen_whatever_the_order():
    parts = three_parts(noise=0.0)
    result = linear_probe(*parts, penalties=(1e-1, 1e-4, 1e-2))
    assert result.penalties.tolist() == [1e-4, 1e-2, 1e-1]
    assert result.val_accuracies.tolist() == [1, 1, 1]
    assert result.penalty == 1e-1


def test_twice_is_bit_for_bit_the_same_and_random_numbers_stay():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = (linear_probe(*three_parts(), penalties=PENALTIES) for _ in range(2))
    assert first.accuracy.equal(second.accuracy)
    assert first.val_accuracies.equal(second.val_accuracies)
    assert torch.get_rng_state().equal(state)


def test_classes_may_have_any_numbers_and_one_not_trained_is_never_right():
    parts = three_parts()
    plain = linear_probe(*parts, penalties=PENALTIES)
    renamed = [part if part.ndim == 2 else torch.tensor([90, -3, 17, 4])[part] for part in parts]
    assert linear_probe(*renamed, penalties=PENALTIES).accuracy.equal(plain.accuracy)
    parts[5] = torch.full_like(parts[5], 77)
    assert linear_probe(*parts, penalties=PENALTIES).accuracy == 0


def test_standardised_features_may_be_scaled_and_shifted_and_hold_constants():
    parts = three_parts()
    plain = linear_probe(*parts, penalties=PENALTIES)
    other = [
        torch.cat([part.double() * 1e3 - 7, torch.full((len(part), 2), 0.1)], 1) if part.ndim == 2 else part
        for part in parts
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no trouble to converge either
        assert linear_probe(*other, penalties=PENALTIES).val_accuracies.equal(plain.val_accuracies)


def test_unit_scaling_looks_at_directions():
    parts = three_parts()
    plain = linear_probe(*parts, scaling="unit", penalties=PENALTIES)
    longer = [part * torch.linspace(1, 9, len(part))[:, None] if part.ndim == 2 else part for part in parts]
    assert linear_probe(*longer, scaling="unit", penalties=PENALTIES).val_accuracies.equal(plain.val_accuracies)
    assert not linear_probe(*longer, scaling="none", penalties=PENALTIES).val_accuracies.equal(plain.val_accuracies)


def test_hold_out_takes_a_share_of_each_class_and_leaves_one():
    targets = torch.tensor([3] * 10 + [5] * 4 + [8])
    held = hold_out(targets, 0.25)
    assert [int(held[targets == c].sum()) for c in (3, 5, 8)] == [2, 1, 0]
    assert hold_out(targets, 0.25).equal(held)
    assert not hold_out(torch.zeros(2, dtype=torch.long), 0.9).all()
    with pytest.raises(ValueError, match=r"share=1\.0"):
        hold_out(targets, 1.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: torch.zeros(150, 2, 3)}, r"the train features must be \(N, 3\)"),
        ({2: torch.zeros(150, 5)}, r"the val features must be \(N, 6\)"),
        ({4: torch.zeros(0, 6), 5: torch.zeros(0, dtype=torch.long)}, "the test part is empty"),
        ({3: torch.zeros(150)}, r"the val targets are torch.float32: give integer class indices"),
        ({1: torch.zeros(150, dtype=torch.long)}, "the train targets hold 1 class"),
        ({4: torch.full((150, 6), torch.nan)}, "150 of 150 test features are NaN or inf"),
    ],
)
def test_impossible_parts_are_refused(change, text):
    parts = three_parts()
    for place, value in change.items():
        parts[place] = value
    with pytest.raises(ValueError, match=text):
        linear_probe(*parts)


@pytest.mark.parametrize("kwargs", [{"penalties": ()}, {"penalties": (0.0, 1.0)}, {"scaling": "whiten"}], ids=str)
def test_impossible_arguments_are_refused(kwargs):
    with pytest.raises(ValueError, match=str(next(iter(kwargs)))):
        linear_probe(*three_parts(), **kwargs)
