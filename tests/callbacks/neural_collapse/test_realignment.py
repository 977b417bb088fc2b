import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_feat.callbacks import ClassNormRealignment, GrassmannHead, realign_classifier
from lightning_feat.functional.neural_collapse import prior_shift, realigned_lengths
from tests.helpers import BuiltLate, EMAWeightAveraging, Plain, equal, loader, points, trainer, weights

COUNTS = [50.0, 30.0, 5.0]


class Tested(Plain):
    """Keeps the logits of each loader."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.net.fc.weight *= torch.tensor([[3.0], [1.0], [0.3]])
        self.heard = {}

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.heard.setdefault(dataloader_idx, []).append(self(batch[0]))

    def validation_step(self, batch, batch_idx):
        self.heard.setdefault("val", []).append(self(batch[0]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def seeded(cls=Tested):
    pl.seed_everything(0)
    return cls()


def logits_heard(tmp_path, module, callback, loaders=1):
    run = trainer(tmp_path, callbacks=[callback])
    run.test(module, [loader(16)] * loaders, verbose=False)
    return {key: torch.cat(value) for key, value in module.heard.items()}


def plain(module):
    with torch.no_grad():
        return module.net.body(points(16).tensors[0]), module.net.fc.weight.double(), module.net.fc.bias


def test_tests_run_on_rows_of_other_lengths_and_weights_stay(tmp_path):
    module = seeded()
    before, names = copy.deepcopy(weights(module)), [*module.state_dict()]
    heard = logits_heard(tmp_path, module, ClassNormRealignment(power=0.7))[0]
    h, w, b = plain(module)
    expected = h @ (w * realigned_lengths(w, 0.7)[:, None]).float().T + b
    torch.testing.assert_close(heard, expected, rtol=0, atol=1e-5)
    assert equal(before, weights(module))
    assert names == [*module.state_dict()]
    assert not module.net.fc._forward_hooks
    torch.testing.assert_close(module(points(16).tensors[0]), h @ w.float().T + b)


def test_each_loader_has_its_own_frequencies_and_lengths(tmp_path):
    module = seeded()
    own = [[1.0, 1.0, 1.0], [1.0, 0.0, 3.0]]
    lengths = [[1.0, 2.0, 1.0], [2.0, 1.0, 1.0]]
    callback = ClassNormRealignment(lengths=lengths, frequencies=own, train_frequencies=COUNTS)
    heard = logits_heard(tmp_path, module, callback, loaders=2)
    h, w, b = plain(module)
    for i in range(2):
        factor = realigned_lengths(w, 1.0, torch.tensor(lengths[i]))
        shift = prior_shift(torch.tensor(own[i]), torch.tensor(COUNTS)).float()
        torch.testing.assert_close(heard[i], h @ (w * factor[:, None]).float().T + b + shift, rtol=0, atol=1e-5)
    assert heard[1][:, 1].isneginf().all()


def test_one_list_is_for_all_loaders_and_too_few_are_refused(tmp_path):
    module = seeded()
    heard = logits_heard(tmp_path, module, ClassNormRealignment(frequencies=[1, 1, 1], train_frequencies=COUNTS), 2)
    assert heard[0].equal(heard[1])
    two = ClassNormRealignment(lengths=[[1, 1, 1], [1, 2, 3]])
    module = seeded()
    with pytest.raises(ValueError, match="a loader number 2, but lengths or frequencies are given for 2"):
        logits_heard(tmp_path, module, two, 3)
    assert not module.net.fc._forward_hooks


def test_predictions_too_and_validation_only_where_asked(tmp_path):
    module = seeded()
    with torch.no_grad():
        before = module(points(16).tensors[0])
    run = trainer(tmp_path, callbacks=[ClassNormRealignment()])
    predicted = torch.cat(run.predict(module, loader(16)))
    assert not predicted.allclose(before)
    run.validate(module, loader(16), verbose=False)
    assert torch.cat(module.heard["val"]).equal(before)
    module.heard.clear()
    asked = trainer(tmp_path, callbacks=[ClassNormRealignment(stages=["validate"])])
    asked.validate(module, loader(16), verbose=False)
    torch.testing.assert_close(torch.cat(module.heard["val"]), predicted)


@pytest.mark.parametrize("stages", [["test"], ["validate"]])
def test_training_is_what_it_is_without_it(tmp_path, stages):
    runs = []
    for callbacks in ([], [ClassNormRealignment(stages=stages)]):
        module = seeded(Plain)
        trainer(tmp_path, callbacks=callbacks, max_epochs=2).fit(module, loader(32), loader(16))
        assert not module.net.fc._forward_hooks
        runs.append(weights(module))
    assert equal(*runs)


def test_for_good_it_is_the_same(tmp_path):
    options = {"power": 0.5, "frequencies": [1.0, 2.0, 3.0], "train_frequencies": COUNTS}
    module = seeded()
    heard = logits_heard(tmp_path, module, ClassNormRealignment(**options))[0]
    realign_classifier(module, **options)
    torch.testing.assert_close(module(points(16).tensors[0]), heard, rtol=0, atol=1e-5)


class Maps(Plain):
    """Classes for each position, by a convolution."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0][:, :, None, None]), batch[1][:, None, None])

    def test_step(self, batch, batch_idx):
        self.maps = self(batch[0][:, :, None, None].expand(-1, -1, 2, 2))


def test_a_convolution_of_one_position(tmp_path):
    module = seeded(Maps)
    options = {"classifier": "net.2", "frequencies": [1.0, 2.0, 3.0], "train_frequencies": COUNTS}
    trainer(tmp_path, callbacks=[ClassNormRealignment(**options)]).test(module, loader(8), verbose=False)
    heard = module.maps
    realign_classifier(module, **options)
    torch.testing.assert_close(module(points(8).tensors[0][:, :, None, None].expand(-1, -1, 2, 2)), heard)


def test_a_compiled_network_hears_it(tmp_path):
    module = seeded()
    module.net = torch.compile(module.net, backend="eager")
    module(points(16).tensors[0])
    heard = logits_heard(tmp_path, module, ClassNormRealignment())[0]
    h, w, b = plain(module)
    torch.testing.assert_close(heard, h @ (w * realigned_lengths(w)[:, None]).float().T + b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"frequencies": [1, 1, 1]}, "give both, or neither"),
        ({"stages": []}, "at least one of"),
        ({"stages": ["fit"]}, "stages="),
        ({"lengths": "a"}, "lengths='a'"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ClassNormRealignment(**kwargs)


def test_what_does_not_fit_the_classifier_is_refused_before_the_first_batch(tmp_path):
    for callbacks, message in (
        ([ClassNormRealignment(lengths=[1.0, 2.0])], r"lengths: \[2\] numbers, but the classifier has 3 classes"),
        ([GrassmannHead(2), ClassNormRealignment()], "is a GrassmannLinear, whose logits are not products"),
    ):
        module = seeded()
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, callbacks=callbacks).test(module, loader(8), verbose=False)
        assert not module.heard
    bare = nn.Sequential(nn.Linear(4, 3, bias=False))
    with pytest.raises(ValueError, match="0 has no bias, which is to hold the prior"):
        realign_classifier(bare, frequencies=[1.0, 1.0, 1.0], train_frequencies=COUNTS)


def test_lengths_are_those_of_the_weights_that_are_validated(tmp_path):
    class Both(Tested):
        def validation_step(self, batch, batch_idx):
            h = self.net.body(batch[0])
            w = self.net.fc.weight.double()
            expected = h @ (w * realigned_lengths(w)[:, None]).float().T + self.net.fc.bias
            torch.testing.assert_close(self.net.fc(h), expected, rtol=0, atol=1e-5)
            self.heard["val"] = w

    if EMAWeightAveraging is None:
        pytest.skip("this Lightning has no EMAWeightAveraging")
    module = seeded(Both)
    callbacks = [EMAWeightAveraging(decay=0.5), ClassNormRealignment(stages=["validate"])]
    trainer(tmp_path, callbacks=callbacks).fit(module, loader(32), loader(16))
    assert module.heard


def test_lengths_are_those_of_the_checkpoint(tmp_path):
    trained, module = seeded(), Tested()
    run = trainer(tmp_path)
    run.fit(trained, loader(32))
    run.save_checkpoint(tmp_path / "trained.ckpt")
    run = trainer(tmp_path, callbacks=[ClassNormRealignment()])
    run.test(module, loader(16), ckpt_path=tmp_path / "trained.ckpt", verbose=False)
    h, w, b = plain(trained)
    expected = h @ (w * realigned_lengths(w)[:, None]).float().T + b
    torch.testing.assert_close(torch.cat(module.heard[0]), expected, rtol=0, atol=1e-5)


def test_a_module_that_is_built_late(tmp_path):
    class Late(BuiltLate, Tested):
        pass

    module = seeded(Late)
    with torch.no_grad():
        before = module.built[0](points(16).tensors[0])
    assert not logits_heard(tmp_path, module, ClassNormRealignment())[0].allclose(before)
    module = seeded(Late)
    asks = ClassNormRealignment(stages=["validate"], lengths=[1.0, 2.0])
    with pytest.raises(ValueError, match="the classifier has 3 classes"):
        trainer(tmp_path, callbacks=[asks]).fit(module, loader(16), loader(16))


def test_more_loaders_than_a_compiler_traces_anew(tmp_path):
    module = seeded()
    module.net = torch.compile(module.net, backend="eager", fullgraph=True)
    own = [[1.0, 1.0, float(i + 1)] for i in range(12)]
    heard = logits_heard(tmp_path, module, ClassNormRealignment(frequencies=own, train_frequencies=COUNTS), 12)
    h, w, b = plain(module)
    for i in (0, 11):
        shift = prior_shift(torch.tensor(own[i]), torch.tensor(COUNTS)).float()
        expected = h @ (w * realigned_lengths(w)[:, None]).float().T + b + shift
        torch.testing.assert_close(heard[i], expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module(points(16).tensors[0]), h @ w.float().T + b)


def test_a_weight_used_functionally_is_told(tmp_path):
    class Functional(Tested):
        def forward(self, x):
            return nn.functional.linear(self.net.body(x), self.net.fc.weight, self.net.fc.bias)

    with pytest.warns(UserWarning, match="net.fc did not run in the first batch, whose logits stay as they were"):
        logits_heard(tmp_path, seeded(Functional), ClassNormRealignment())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ClassNormRealignment")
        logits_heard(tmp_path, seeded(), ClassNormRealignment())


class Cosines(nn.Linear):
    def forward(self, x):
        return nn.functional.normalize(x) @ nn.functional.normalize(self.weight).T


def test_a_linear_with_a_forward_of_its_own_is_refused():
    module = nn.Sequential(nn.Linear(4, 8), Cosines(8, 3))
    with pytest.raises(ValueError, match="1 is a Cosines, with a forward of its own"):
        realign_classifier(module, "1")


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_weight_that_is_computed_cannot_be_written_but_tested_with(tmp_path, norm):
    module = seeded()
    module.net.fc = norm(module.net.fc).eval()
    with pytest.raises(ValueError, match=r"the weight of net.fc is computed when it is read"):
        realign_classifier(module)
    heard = logits_heard(tmp_path, module, ClassNormRealignment())[0]
    h, w, b = plain(module)
    expected = h @ (w * realigned_lengths(w)[:, None]).float().T + b
    torch.testing.assert_close(heard, expected.detach(), rtol=0, atol=1e-5)


def test_lists_that_do_not_fit_each_other_or_the_loaders_are_refused_before_the_first_batch(tmp_path):
    each = {"train_frequencies": COUNTS}
    many = CombinedLoader([loader(8), loader(8)], "min_size")
    for options, loaders, message in (
        ({"lengths": [[1, 1, 1]] * 2, "frequencies": [[1, 1, 1]] * 3}, [loader(8)] * 3, "for 2 loaders, but .* for 3"),
        ({"frequencies": [[1, 1, 1]] * 2}, [loader(8)] * 3, "a loader number 2"),
        ({"frequencies": [[1, 1, 1]] * 2}, many, "mode 'min_size' puts the batches of all together"),
        ({"frequencies": [1, 1, float("inf")]}, loader(8), "give finite numbers"),
    ):
        module = seeded()
        run = trainer(tmp_path, callbacks=[ClassNormRealignment(**each, **options)])
        with pytest.raises(ValueError, match=message):
            run.test(module, loaders, verbose=False)
        assert not module.heard
        assert not module.net.fc._forward_hooks


def test_half_precision_takes_back_the_bias_that_was_added(tmp_path):
    module = seeded()
    with torch.no_grad():
        module.net.fc.bias += 50.3
    run = trainer(tmp_path, callbacks=[ClassNormRealignment()], precision="bf16-mixed")
    run.test(module, loader(16), verbose=False)
    h, w, b = plain(module)
    factor = realigned_lengths(w).float()
    expected = h @ (w.float() * factor[:, None]).T + b
    # Logits near 50 are rounded by 1/8 at most, which the factors enlarge, and once more in the end.
    assert ((torch.cat(module.heard[0]).float() - expected).abs() <= 0.26 + 0.126 * factor).all()
