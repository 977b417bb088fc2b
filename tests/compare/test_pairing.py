"""What runs of one seed share, by construction and as it is told."""

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from lightning_feat.baselines import MLPClassifier
from lightning_feat.callbacks import SimplicityBiasUpsampler
from lightning_feat.compare import compare
from lightning_feat.compare.running.pairing import Witness, give_generators, hash_of
from lightning_feat.compare.shared import unpaired
from lightning_feat.data import SpuriousDigitsDataModule
from tests.compare import cases


def fingerprints(tmp_path, **options):
    made = compare(
        {"base": cases.base, **options.pop("arms")},
        seeds=1,
        metrics="val/loss",
        folder=tmp_path,
        executor="inline",
        quiet=True,
        **options,
    )
    prints = {record.arm: record.status["fingerprint"] for record in made.records}
    base = prints.pop("base")
    return made, {arm: unpaired(base, print) for arm, print in prints.items()}


def test_an_arm_that_draws_a_number_more_sees_the_same_batches(tmp_path):
    made, found = fingerprints(tmp_path, arms={"draws": cases.draws})
    assert found == {"draws": {}}
    first = made.pairing[0]
    assert first.startswith(
        "draws shares with base at the start, seed by seed: first weights (2 tensors; 0 of base alone, 0 of draws"
    )
    assert "Not paired" not in first
    assert made.effects[0].difference == 0  # the runs are the same to the last bit


def test_in_an_order_of_their_own_it_sees_others(tmp_path):
    made, found = fingerprints(tmp_path, arms={"draws": cases.draws}, share_order=False)
    assert found["draws"].keys() == {"batches", "random numbers in training"}
    assert "neither their order nor augmentation is shared" in made.pairing[0]


def test_what_cannot_be_paired_is_told(tmp_path):
    arms = {"weights": cases.other_weights, "fewer": cases.fewer, "always": cases.draws_always}
    made, found = fingerprints(tmp_path, arms=arms)
    assert found["weights"] == {"first weights": "2 of 2 tensors that both have differ (network.weight, ...)"}
    assert found["fewer"].keys() == {"batches", "amount of training data", "validation data"}
    assert found["always"].keys() == {"random numbers in training"}
    sentence = next(line for line in made.pairing if line.startswith("weights"))
    assert "Not paired: first weights: 2 of 2 tensors that both have differ" in sentence


def test_an_arm_that_begins_again_is_judged_by_its_first_beginning(tmp_path):
    """As with SimplicityBiasUpsampler, which looks at the first epochs and then restarts the training."""

    def plain(*callbacks):
        data = SpuriousDigitsDataModule(batch_size=64, val_fraction=0.1, test_fraction=0.7)
        return cases.trainer(*callbacks, epochs=3), MLPClassifier(384, 10, (16,)), data

    def useful():
        return plain(SimplicityBiasUpsampler(separating_epoch=1))

    made = compare({"base": plain, "useful": useful}, 1, "val/loss", folder=tmp_path, executor="inline", quiet=True)
    prints = {record.arm: record.status["fingerprint"] for record in made.records}
    assert "first weights" not in unpaired(prints["base"], prints["useful"])
    assert [len(found["batches"]) for found in prints.values()] == [3, 3]
    assert made.records[1].status["steps"] > made.records[0].status["steps"]  # it was shown more


def test_each_epoch_has_an_order_of_its_own_and_each_seed(tmp_path, monkeypatch):
    seen = {}

    def start(self, trainer, pl_module, batch, batch_idx):
        seen.setdefault((pl_module.seed, trainer.current_epoch), []).append(hash_of(batch[0]))

    def base(seed):
        trainer, module, data = cases.base()
        module.seed = seed
        return trainer, module, data

    monkeypatch.setattr(Witness, "on_train_batch_start", start)
    compare({"base": base, "same": base}, 2, "val/loss", folder=tmp_path, executor="inline", trial=False, quiet=True)
    assert len(seen) == 4
    orders = [tuple(batches[:6]) for batches in seen.values()]
    assert len(set(orders)) == 4
    again = [tuple(batches[6:]) for batches in seen.values()]  # of the other arm
    assert again == orders


def test_what_shuffles_gets_a_generator_and_what_the_user_gave_stays():
    data = TensorDataset(torch.arange(10))
    given = torch.Generator().manual_seed(3)
    loader = DataLoader(data, sampler=RandomSampler(data, generator=given), generator=given)
    give_generators(loader, 1)
    assert loader.sampler.generator is loader.generator is given
    weighted = DataLoader(data, sampler=WeightedRandomSampler([1.0] * 10, 10))
    orders = []
    for seed in (1, 1, 2):
        weighted.sampler.generator = weighted.generator = None
        give_generators(weighted, seed)
        orders.append([int(batch[0]) for batch in weighted])
    assert orders[0] == orders[1] != orders[2]


def test_augmentation_that_differs_is_told_from_an_order_that_differs():
    base = {"weights": {"w": "1"}, "batches": ["a", "b"], "targets": ["t", "u"], "generators": ["g"]}
    assert "the order is shared, the augmentation is not" in unpaired(base, base | {"batches": ["a", "c"]})["batches"]
    other = unpaired(base, base | {"batches": ["a", "c"], "targets": ["t", "v"]})
    assert "neither" in other["batches"]


@pytest.mark.parametrize("value", [torch.zeros(3, dtype=torch.bfloat16), torch.tensor(True), torch.zeros(0), "text"])
def test_everything_has_a_hash(value):
    assert len(hash_of(value)) == 16


def test_hashes_tell_shapes_dtypes_and_values_apart():
    values = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.ones(4)]
    assert len({hash_of(value) for value in values}) == 4
    assert hash_of(torch.zeros(4, 2).T) == hash_of(torch.zeros(2, 4))
