"""What recipes/simplicity_bias/spurious_digits.py measures, on models whose answers are known."""

import argparse
import importlib.util
import sys

import pytest
import torch
from torch.nn.functional import one_hot

from lightning_feat.__main__ import recipe_folder
from lightning_feat.data.spurious_digits import NO_PATCH

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def recipe():
    path = recipe_folder() / "simplicity_bias" / "spurious_digits.py"
    spec = importlib.util.spec_from_file_location("spurious_digits_recipe", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def data(recipe):
    return recipe.data_of(recipe.SETTINGS["other"], seed=0)


@pytest.fixture(scope="module")
def probe(recipe, data):
    return recipe.Probe.of(data, "test")


def images_at(probe, pairs):
    return torch.cat([probe.digits[pairs[:, 0]], probe.patches[pairs[:, 1]]], dim=3)


def test_pairs_are_the_variants_of_the_data(recipe, data, probe):
    size = len(data.test_set)
    own = images_at(probe, probe.beside(torch.arange(size)))
    assert torch.equal(own, recipe.images_of(data.test_set))
    assert torch.equal(images_at(probe, probe.beside(size)), recipe.images_of(data.variant("digit")))
    assert torch.equal(images_at(probe, probe.beside(probe.conflict)), recipe.images_of(data.variant("conflict")))


def test_every_digit_meets_every_patch_once(probe):
    pairs = probe.crossed()
    met = torch.stack([pairs[:, 0], probe.patch_classes[pairs[:, 1]]], dim=1)
    assert len(met) == len(met.unique(dim=0)) == 10 * len(probe.digits)


def test_a_reader_of_digits(recipe, data, probe):
    found = recipe.measure(lambda pairs: one_hot(probe.targets[pairs[:, 0]], 10), probe, data.test_set.agrees)
    assert found == pytest.approx(
        {"error": 0, "slow": 1, "digit": 1, "conflict": 1, "drop": 0, "reliance": 0}, abs=1e-9
    )


def test_a_reader_of_patches(recipe, data, probe):
    def model(pairs):
        classes = probe.patch_classes[pairs[:, 1]]
        return one_hot(classes.clamp(min=0), 10) * (classes != NO_PATCH)[:, None]

    found = recipe.measure(model, probe, data.test_set.agrees)
    share = float(data.test_set.agrees.double().mean())
    assert found["error"] == pytest.approx(1 - share)
    assert (found["slow"], found["conflict"], found["reliance"]) == (0, 0, pytest.approx(1))
    assert found["drop"] == pytest.approx(share - 0.1, abs=0.02)  # by chance a tenth is right; ten permutations of 719


def test_the_reference_follows_bayes_rule(recipe, data, probe):
    posterior = torch.full((len(probe.digits), 10), 0.02)
    posterior[:, 4] = 0.82
    model = recipe.best_on(probe, posterior.log(), recipe.SETTINGS["other"])
    size = len(probe.digits)
    for number in (0, size, size + 1 + 7 * size):  # its own patch, none, that of class 7
        patch = int(probe.patch_classes[number])
        by_hand = posterior[0].clone()
        if patch != NO_PATCH:
            by_hand *= torch.tensor([0.9 if c == patch else 0.1 / 9 for c in range(10)])
        found = model(torch.tensor([[0, number]])).softmax(1)[0]
        torch.testing.assert_close(found, by_hand / by_hand.sum())
    proof = recipe.best_on(probe, posterior.log(), recipe.SETTINGS["main"])
    assert int(proof(torch.tensor([[0, size + 1 + 7 * size]])).argmax()) == 7


def test_what_a_method_costs(recipe):
    row = {"epoch": 5, "share": 0.2}

    def shown(**arguments):
        callback = recipe.SimplicityBiasUpsampler(**arguments)
        return recipe.examples_shown(callback, row, 100)

    assert shown() == pytest.approx(0.05 + 1.2)
    assert shown(show="weights") == pytest.approx(1.05)
    assert shown(restart=False) == pytest.approx(0.05 + 0.95 * 1.2)
    assert recipe.examples_shown(recipe.DataPlan([1] * 10), {}, 100) == 1
    assert recipe.examples_shown(recipe.DataPlan([1] * 9 + [2]), {}, 100) == pytest.approx(1.1)


def test_a_seed_decides_everything_and_methods_share_its_beginning(recipe, tmp_path):
    options = argparse.Namespace(epochs=2, lr=0.05, split="val", out=tmp_path)
    first, again = (recipe.run_seed(recipe.SETTINGS["main"], ["sgd", "useful", "oracle"], 3, options) for _ in range(2))
    for name, row in first.items():
        assert {k: v for k, v in row.items() if k != "seconds"} == {
            k: v for k, v in again[name].items() if k != "seconds"
        }
    assert set(recipe.SELECTION) <= first["useful"].keys()
    assert first["useful"]["epoch"] == 1


def test_differences_are_paired(recipe):
    measures = dict.fromkeys(recipe.MEASURES, 0.5)
    rows = [{**measures, "error": 0.1 * seed} for seed in (1, 2, 3)]
    better = [{**row, "error": row["error"] - 0.05 - 0.01 * i} for i, row in enumerate(rows)]
    mean, half = recipe.differences({"sgd": rows, "useful": better}, "useful", "error")
    assert mean == pytest.approx(-6)
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)  # quantile of Student's t with 2 degrees of freedom
