from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import FeatureRelianceMonitor
from lightning_feat.data import ShortcutDataModule, SlabBlocksDataModule
from lightning_feat.functional.simplicity_bias import accuracy, binary_auc, block_randomized
from tests.helpers import DictBatches, Disturbed, Plain, equal, loader, points, trainer, weights


class Reads(pl.LightningModule):
    """Knows one rule for ever: its logits are ``(-score, score)``."""

    def __init__(self, score):
        super().__init__()
        self.score, self.head = score, nn.Linear(2, 2, bias=False)
        self.head.weight.data = torch.eye(2)

    def forward(self, x):
        score = self.score(x)
        return self.head(torch.stack([-score, score], dim=1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(tmp_path, monitor, module, *data, **options):
    pl.seed_everything(0)
    run = trainer(tmp_path, callbacks=[monitor] if monitor else [], **options)
    run.fit(module, *data)
    prefix = "feature_reliance/"
    return {k.removeprefix(prefix): float(v) for k, v in run.callback_metrics.items() if k.startswith(prefix)}


def two_features(n=1000, share=0.5):
    """Two numbers, each of which tells the class by its sign."""
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(n, generator=generator) < share).long()
    x = (2.0 * y[:, None] - 1) * (0.1 + torch.rand(n, 2, generator=generator))
    return DataLoader(TensorDataset(x, y), 100)


BLOCKS = {"used": 0, "unused": "1:"}


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_network_that_provably_uses_one_feature(tmp_path, share):
    data = two_features(share=share)
    found = fit(tmp_path, FeatureRelianceMonitor(BLOCKS, repeats=3), Reads(lambda x: x[:, 0]), data, data)
    assert found["accuracy/all"] == found["auc/all"] == 1.0
    assert found["randomised_accuracy/unused"] == found["randomised_auc/unused"] == 1.0
    assert found["reliance/used"] == 1.0
    # by chance: five standard errors over 3 permutations of 1000 samples
    assert found["randomised_accuracy/used"] == pytest.approx(share**2 + (1 - share) ** 2, abs=0.045)
    assert found["randomised_auc/used"] == pytest.approx(0.5, abs=0.09)
    assert found["reliance/unused"] == pytest.approx(0.0, abs=0.15)


def test_what_is_logged_is_the_definition(tmp_path):
    x, y = points(41).tensors
    y = y.clamp(max=1)
    data = DataLoader(TensorDataset(x, y), 8)
    module = Reads(lambda x: x[:, 0] + 0.5 * x[:, 1] * x[:, 2])
    blocks = {"pair": torch.tensor([True, True, False, False])}
    found = fit(tmp_path, FeatureRelianceMonitor(blocks, seed=3), module, data, data)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(3))
    expected = [block_randomized(module, x, y, blocks["pair"], m, seed=3) for m in (accuracy, binary_auc)]
    assert found["randomised_accuracy/pair"] == pytest.approx(float(expected[0]), abs=1e-6)
    assert found["randomised_auc/pair"] == pytest.approx(float(expected[1]), abs=1e-6)
    mixed = torch.where(blocks["pair"], x[order], x)
    agrees = (module(mixed).argmax(1) == y[order]).double()
    reliance = agrees[y[order] == 0].mean() + agrees[y[order] == 1].mean() - 1
    assert found["reliance/pair"] == pytest.approx(float(reliance), abs=1e-6)


def test_blocks_of_every_form_are_the_same(tmp_path):
    mask = torch.tensor([False, True, True, False])
    forms = {
        "slice": slice(1, 3),
        "text": "1:3",
        "mask": mask,
        "tuple": ([1, 2],),
        "function": lambda x, others: torch.where(mask, others, x),
    }
    found = fit(tmp_path, FeatureRelianceMonitor(forms), Plain(), loader(64), loader(40))
    for measure in ("randomised_accuracy", "reliance"):
        assert len({found[f"{measure}/{form}"] for form in forms}) == 1


def test_blocks_of_images(tmp_path):
    class Looks(Reads):
        def __init__(self):
            super().__init__(lambda x: x[:, 0, :, 2:].sum((1, 2)))

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    x = torch.randn(200, 1, 2, 4, generator=generator) + (2.0 * y - 1)[:, None, None, None]
    data = DataLoader(TensorDataset(x, y), 50)
    found = fit(tmp_path, FeatureRelianceMonitor({"left": "..., :2", "right": ":, :, 2:"}), Looks(), data, data)
    assert found["randomised_accuracy/left"] == found["accuracy/all"]
    assert found["randomised_accuracy/right"] < 0.65


@pytest.mark.parametrize("rotate", [False, True])
def test_a_block_that_a_rotation_hides(tmp_path, rotate):
    data = SlabBlocksDataModule(num_train=100, num_val=1000, slabs=(2, 3), rotate=rotate)
    axis = torch.eye(2)[0] if data.rotation is None else data.rotation[:, 0]
    blocks = {"linear": data.exchange(0), "slabs": data.exchange(1)}
    found = fit(tmp_path, FeatureRelianceMonitor(blocks), Reads(lambda x: x @ axis), data)
    assert found["randomised_accuracy/slabs"] == 1.0
    assert found["randomised_accuracy/linear"] == pytest.approx(0.5, abs=0.08)


def exchanged(axis, inputs, others):
    return inputs + ((others - inputs) @ axis)[:, None] * axis


def shortcut_run(tmp_path, score, **options):
    data = ShortcutDataModule(num_train=3000, num_val=4000, num_features=8, **options)
    along = [partial(exchanged, q) for q in data.mixing.T]
    blocks = dict(zip(("core", "shortcut"), along, strict=True))
    own = FeatureRelianceMonitor(blocks, best=data.best_rule)
    fitted = FeatureRelianceMonitor({"core ": along[0], "shortcut ": along[1]}, best="linear")
    pl.seed_everything(0)
    run = trainer(tmp_path, callbacks=[own, fitted])
    run.fit(Reads(lambda x: score(x, data.mixing)), data)
    return {k.removeprefix("feature_reliance/"): float(v) for k, v in run.callback_metrics.items()}


def test_the_best_rule_has_no_shortcut_bias_and_the_linear_one_is_that(tmp_path):
    ratio = 0.6744897501960817 / 1.2815515655446004  # of the means for 0.75 and 0.9

    def best(x, q):
        return x @ q[:, 0] + ratio * (x @ q[:, 1]) / 4

    found = shortcut_run(tmp_path, best)
    for name in ("core", "shortcut"):
        assert found[f"shortcut_bias/{name}"] == pytest.approx(0.0, abs=1e-3)  # rounding decides at the border
        assert found[f"shortcut_bias/{name} "] == pytest.approx(0.0, abs=0.03)  # fitted to 2000 examples
    assert found["reliance/shortcut"] > 0.05  # which a rule without bias has, too


def test_a_network_that_follows_what_is_loud_is_biased(tmp_path):
    found = shortcut_run(tmp_path, lambda x, q: x @ q.sum(1))
    for end in ("", " "):
        assert found[f"shortcut_bias/shortcut{end}"] > 0.1
        assert found[f"shortcut_bias/core{end}"] < -0.1


def test_the_training_is_bit_for_bit_what_it_is_without_the_monitor(tmp_path):
    runs = []
    for callbacks in ([], [FeatureRelianceMonitor({"first": 0}, best="linear")]):
        pl.seed_everything(0)
        module = Disturbed()
        trainer(tmp_path, callbacks=callbacks, max_epochs=2).fit(module, loader(64, shuffle=True), loader(41))
        runs.append((weights(module), [*module.buffers()], torch.get_rng_state()))
    assert all(equal(a, b) for a, b in zip(runs[0][:2], runs[1][:2], strict=True))
    assert torch.equal(runs[0][2], runs[1][2])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_dict_batches_by_names_and_by_a_key(tmp_path):
    class Step(Plain):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

        def validation_step(self, batch, batch_idx):
            self(batch["image"])

    data = DataLoader(DictBatches(points(40)), 8)
    expected = fit(tmp_path, FeatureRelianceMonitor({"first": 0}), Plain(), loader(40), loader(40))
    for key in (None, "image"):
        found = fit(tmp_path, FeatureRelianceMonitor({"first": 0}, input_key=key), Step(), data, data)
        assert found.keys() == expected.keys()


def test_samples_without_a_class_count_nowhere(tmp_path):
    data = two_features(200)
    _, y = data.dataset.tensors
    y[::3] = -100
    monitor = FeatureRelianceMonitor(BLOCKS)

    class Ignores(Reads):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1], ignore_index=-100)

    found = fit(tmp_path, monitor, Ignores(lambda x: x[:, 0]), data, data)
    assert found["accuracy/all"] == found["randomised_accuracy/unused"] == found["reliance/used"] == 1.0


def test_diverged_logits_are_nan_and_no_end(tmp_path):
    data = two_features(50)
    monitor = FeatureRelianceMonitor({"first": 0}, repeats=2)
    found = fit(tmp_path, monitor, Reads(lambda x: x[:, 0] * torch.nan), data, data)
    assert all(value != value for value in found.values())


def test_chosen_epochs_and_the_last(tmp_path):
    monitor, seen = FeatureRelianceMonitor({"first": 0}, every_n_epochs=3), []
    measure = monitor._measure
    monitor._measure = lambda *args: seen.append(args[0].current_epoch + 1) or measure(*args)
    fit(tmp_path, monitor, Plain(), loader(16), loader(16), max_epochs=5)
    assert seen == [1, 3, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": {}}, "name at least one block"),
        ({"blocks": {"a": 0}, "repeats": 0}, "must be at least 1"),
        ({"blocks": {"a": 0}, "num_fit": 0}, "must be at least 1"),
        ({"blocks": {"a": 0}, "every_n_epochs": 0}, "must be at least 1"),
        ({"blocks": {"a": 0}, "best": "bayes"}, "'linear'"),
        ({"blocks": {"a": 0}, "data": "test"}, "choose 'train' or 'val'"),
    ],
)
def test_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureRelianceMonitor(**arguments)


class NeverSteps(Plain):
    def training_step(self, batch, batch_idx):
        raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": {"a": 4}}, "block 4 does not fit an input of shape"),
        ({"blocks": {"a": "2:2"}}, "holds nothing"),
        ({"blocks": {"a": "left"}}, "is no index"),
        ({"blocks": {"a": torch.ones(3, dtype=torch.bool)}}, "does not fit"),
        ({"blocks": {"a": torch.ones(4)}}, "block must be bool"),
        ({"blocks": {"a": lambda x, others: others[:, :2]}}, r"gives \(8, 2\) for inputs \(8, 4\)"),
        ({"blocks": {"a": 0}, "best": lambda x: x}, "return a class index for each"),
        ({"blocks": {"a": 0}, "input_key": 1}, "int64.*set input_key|Set input_key"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_training(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, FeatureRelianceMonitor(**arguments), NeverSteps(), loader(), loader())


def test_without_validation_data_the_argument_is_named(tmp_path):
    with pytest.raises(ValueError, match="set data='train'"):
        fit(tmp_path, FeatureRelianceMonitor({"a": 0}), NeverSteps(), loader())
