import copy
import io
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks.feature_shift.regularizer import PENALTIES, FeatureShiftRegularizer
from lightning_feat.data import IndexedDataset
from lightning_feat.functional.feature_shift import l2_sp, relative_shift
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.loss.terms import WeightSchedule
from tests.callbacks.feature_shift.monitor_ddp_cases import Prompted
from tests.helpers import DictBatches, EMAWeightAveraging, Plain, equal, loader, points, trainer, weights

LAYERS = ["net.body.0", "net.body"]


class Decayed(Plain):
    """Momentum, so that a wrong gradient shows in all later steps."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ByHand(Decayed):
    """The penalty of both layers written into training_step, with its own copy of the start."""

    def __init__(self, form, weight, **kwargs):
        super().__init__(**kwargs)
        self.form, self.weight, self.start = form, weight, [copy.deepcopy(self.net)]

    def training_step(self, batch, batch_idx):
        x, y = batch
        first = self.net.body[0](x)
        second = self.net.body[1](first)
        with torch.no_grad():
            first_start = self.start[0].body[0](x)
            second_start = self.start[0].body[1](first_start)
        loss = cross_entropy(self.net.fc(second), y)
        with torch.autocast("cpu", enabled=False):
            if self.form == "l2_sp":
                extra = l2_sp([*self.net.parameters()], [*self.start[0].parameters()])
            else:
                pairs = (first, first_start), (second, second_start)
                extra = sum(PENALTIES[self.form](a, b, None) for a, b in pairs) / 2
            loss = loss + self.weight * extra
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None


class Stemmed(pl.LightningModule):
    """A body behind a stem, with dropout; its batches are dicts."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
        self.fc = nn.Linear(8, 3)

    def features(self, batch):
        return self.body(self.stem(batch["image"]))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.fc(self.features(batch)), batch["label"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, module, *callbacks, data=None, ckpt_path=None, **kwargs):
    run = trainer(tmp_path, callbacks=list(callbacks), **{"max_epochs": 3, **kwargs})
    run.fit(module, loader(64) if data is None else data, ckpt_path=ckpt_path)
    return run


def seeded(cls, *args, **kwargs):
    pl.seed_everything(0)
    return cls(*args, **kwargs)


def regularizer(form="relative", weight=0.7, **kwargs):
    layers = None if form == "l2_sp" else LAYERS
    return FeatureShiftRegularizer(layers, form, weight, **kwargs)


@pytest.mark.parametrize("form", ["relative", "distillation", "cosine", "l2_sp"])
@pytest.mark.parametrize(
    ("precision", "accumulate", "manual"),
    [("32-true", 3, False), ("32-true", 1, True), ("bf16-mixed", 1, False), ("16-mixed", 3, False)],
)
def test_it_equals_the_loss_written_by_hand(tmp_path, form, precision, accumulate, manual):
    plugin = {} if precision == "32-true" else {"plugins": [MixedPrecision(precision, "cpu")]}
    kwargs = {"accumulate_grad_batches": accumulate, **plugin}
    ours, by_hand, without = (
        seeded(cls, *args, manual=manual) for cls, args in ((Decayed, ()), (ByHand, (form, 0.7)), (Decayed, ()))
    )
    fit(tmp_path, ours, regularizer(form), **kwargs)
    fit(tmp_path, by_hand, **kwargs)
    fit(tmp_path, without, **kwargs)
    for a, b in zip(weights(ours), weights(by_hand), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32, 24 steps, terms added in another order
    assert not equal(weights(ours), weights(without))


@pytest.mark.parametrize("form", ["relative", "distillation", "cosine", "l2_sp"])
def test_at_the_start_the_penalty_is_zero(tmp_path, form):
    module = Plain(lr=0.0)
    run = fit(tmp_path, module, regularizer(form))
    assert run.callback_metrics[f"feature_shift/loss/{form}"] == 0
    assert run.callback_metrics[f"feature_shift/share/{form}"] == 0


def test_a_large_weight_keeps_the_features_where_they_were(tmp_path):
    x = points(64).tensors[0]
    moved = []
    for weight in (0.0, 1.0, 30.0):
        module = seeded(Plain, lr=0.02)
        start = module.net.body(x).detach()
        fit(tmp_path, module, FeatureShiftRegularizer("net.body", "distillation", weight), max_epochs=10)
        moved.append(relative_shift(module.net.body(x).detach(), start).item())
    assert moved[0] > 1.5 * moved[1] > 1.5 * 1.5 * moved[2]


@pytest.mark.parametrize("form", ["relative", "l2_sp", "cached"])
def test_a_resumed_run_ends_bit_for_bit_as_one_in_one_go(tmp_path, form):
    def made():
        if form == "cached":
            return FeatureShiftRegularizer(LAYERS, "relative", 0.7, "cached", index_key=lambda batch: batch[1])
        return regularizer(form)

    class Pairs(Decayed):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0] if form == "cached" else batch, batch_idx)

        def forward(self, batch):
            return super().forward(batch[0] if isinstance(batch, list) else batch)

    def data():
        return DataLoader(IndexedDataset(points(64)), batch_size=8) if form == "cached" else loader(64)

    whole = seeded(Pairs)
    fit(tmp_path, whole, made(), data=data(), max_epochs=4)
    half = seeded(Pairs)
    run = fit(tmp_path, half, made(), data=data(), max_epochs=2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed = Pairs()  # other weights: those of the checkpoint, and its start, must replace them
    fit(tmp_path, resumed, made(), data=data(), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert equal(weights(resumed), weights(whole))


def test_a_checkpoint_without_a_start_is_warned_of(tmp_path):
    run = fit(tmp_path, Plain(), max_epochs=1)
    run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="has no reference for FeatureShiftRegularizer"):
        fit(tmp_path, Plain(), regularizer(), ckpt_path=tmp_path / "plain.ckpt", max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(tmp_path, callbacks=[regularizer()])
        run.test(Plain(), loader(16), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    assert not [warning for warning in caught if "reference" in str(warning.message)]


def test_the_start_can_be_a_file_and_then_the_checkpoint_has_none(tmp_path):
    other = seeded(Plain)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    torch.save({"state_dict": other.net.state_dict()}, tmp_path / "trunk.ckpt")
    x = points(64).tensors[0]
    ends = []
    for name in ("other.pt", "trunk.ckpt"):
        pl.seed_everything(1)
        module = Plain(lr=0.05)
        held = FeatureShiftRegularizer("net.body", "distillation", 2.0, start=str(tmp_path / name))
        before = relative_shift(module.net.body(x), other.net.body(x))
        run = fit(tmp_path, module, held, max_epochs=30)
        assert relative_shift(module.net.body(x), other.net.body(x)) < 0.5 * before
        run.save_checkpoint(tmp_path / "last.ckpt")
        assert not torch.load(tmp_path / "last.ckpt", weights_only=True)[held.state_key]
        ends.append(weights(module))
    assert equal(*ends)


def test_a_second_fit_of_the_same_trainer_keeps_the_start_and_a_new_one_takes_another(tmp_path):
    held, module = regularizer(), seeded(Plain)
    first = weights(module.net)
    run = fit(tmp_path, module, held, max_epochs=1)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(64))
    assert equal([*held.reference.state()["weights"].values()], first)
    second = weights(module.net)
    fit(tmp_path, module, held, max_epochs=1)
    assert equal([*held.reference.state()["weights"].values()], second)


def left_on(module):
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())
    return hooks, sorted(module.__dict__), [name for name, _ in module.named_modules()]


@pytest.mark.parametrize("form", ["relative", "l2_sp"])
@pytest.mark.parametrize("breaks", [False, True])
def test_nothing_is_left_behind_not_even_by_an_error(tmp_path, form, breaks):
    class Breaks(Plain):
        def on_train_epoch_end(self):
            if breaks:
                raise RuntimeError("broken")

    module = Breaks()
    before = left_on(module)
    names = list(module.state_dict())
    try:
        fit(tmp_path, module, regularizer(form))
    except RuntimeError:
        assert breaks
    after = left_on(module)
    assert after[0] == before[0]
    assert after[2] == before[2]
    assert not [name for name in after[1] if name.startswith("_feat") or name in ("training_step", "manual_backward")]
    assert list(module.state_dict()) == names


def test_the_copy_is_in_no_optimizer_checkpoint_or_average_and_stays_in_eval(tmp_path):
    seen = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.train()
            net = held.reference._frozen.net
            seen["training"] = any(part.training for part in net.modules())
            seen["trained"] = any(p.requires_grad for p in net.parameters())
            seen["optimized"] = len([p for group in trainer.optimizers[0].param_groups for p in group["params"]])
            seen["state"] = len(pl_module.state_dict())

    held = FeatureShiftRegularizer("body", trunk="", forward=lambda module, batch: module.features(batch))
    module = Stemmed()
    averages = [EMAWeightAveraging()] if EMAWeightAveraging is not None else []
    fit(tmp_path, module, held, Watch(), *averages, data=DataLoader(DictBatches(points(64)), batch_size=8))
    assert seen == {"training": False, "trained": False, "optimized": 8, "state": 8}


def test_a_copy_of_the_module_shares_the_frozen_network_and_hears_its_own(tmp_path):
    copies = []

    class Copy(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                twin = copy.deepcopy(pl_module)
                with torch.no_grad():
                    for p in twin.parameters():
                        p.add_(1.0)
                pl_module.zero_grad()
                twin.training_step(batch, batch_idx).backward()
                copies.append((twin.net.body[0].weight.grad is not None, pl_module.net.body[0].weight.grad is None))
                pickled = io.BytesIO()
                torch.save(pl_module.net, pickled)

    fit(tmp_path, Plain(), regularizer(), Copy(), max_epochs=1)
    assert copies == [(True, True)]


@pytest.mark.parametrize("how", ["net", "in place"])
def test_compiled_networks_are_held_as_plain_ones(tmp_path, how):
    ours, plain = seeded(Plain), seeded(Plain)
    if how == "net":
        ours.net = torch.compile(ours.net, backend="eager")
    else:
        ours.net.compile(backend="eager")
    fit(tmp_path, ours, regularizer(), max_epochs=2)
    fit(tmp_path, plain, regularizer(), max_epochs=2)
    assert equal(weights(ours), weights(plain))


def test_the_rate_finder_sees_the_penalty(tmp_path):
    held, module = regularizer(weight=5.0), seeded(Plain)
    run = trainer(tmp_path, callbacks=[held], max_epochs=2)
    seen = []
    value = held.term.value
    held.term.value = lambda *args: seen.append(1) or value(*args)
    Tuner(run).lr_find(module, loader(256), num_training=20, update_attr=False)
    assert len(seen) >= 20


def test_a_schedule_that_begins_late_still_knows_the_start(tmp_path):
    module = seeded(Plain)
    start = weights(module.net)
    held = regularizer(weight=WeightSchedule(1.0, start_epoch=2))
    fit(tmp_path, module, held)
    assert equal([*held.reference.state()["weights"].values()], start)


def test_dict_batches_and_layers_behind_a_trained_one(tmp_path):
    data = DataLoader(DictBatches(points(64)), batch_size=8)
    with pytest.raises(RuntimeError, match="'body' gets what trained layers put out"):
        fit(tmp_path, Stemmed(), FeatureShiftRegularizer("body.0"), data=data)
    module = Stemmed()
    module.stem.requires_grad_(False)  # now nothing before the body is trained
    run = fit(tmp_path, module, FeatureShiftRegularizer("body.0"), data=data)
    assert run.callback_metrics["feature_shift/loss/relative"] > 0


def test_new_layers_are_left_out_of_l2_sp_and_pulled_to_zero(tmp_path):
    module = seeded(Plain, lr=0.5)
    start = weights(module.net)
    held = FeatureShiftRegularizer(form="l2_sp", weight=1.0, new_layers=["net.fc"], new_weight=0.5)
    run = trainer(tmp_path, callbacks=[held], max_epochs=1, limit_train_batches=1)
    x, y = next(iter(loader(8)))
    grads = torch.autograd.grad(cross_entropy(module(x), y), [*module.net.parameters()])
    run.fit(module, loader(8))
    pulls = [0.0, 0.0, 0.5 * start[2], 0.5 * start[3]]
    for after, before, grad, pull in zip(weights(module.net), start, grads, pulls, strict=True):
        torch.testing.assert_close(after, before - 0.5 * (grad + pull))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cached_features_hold_as_live_ones_do(tmp_path, dtype):
    class Indexed(Decayed):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx)

        def forward(self, batch):
            return super().forward(batch[0] if isinstance(batch, list) else batch)

    data = DataLoader(IndexedDataset(points(60)), batch_size=8, shuffle=True)
    cached = FeatureShiftRegularizer(LAYERS, "distillation", 0.7, "cached", index_key=1, cache_dtype=dtype)
    ends = []
    for held in (cached, regularizer("distillation")):
        module = seeded(Indexed)
        pl.seed_everything(1)
        fit(tmp_path, module, held, data=data)
        ends.append(weights(module))
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-2, "atol": 1e-3}  # rounding 5e-4
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, **near)
    rows = cached.reference.cache.rows
    assert {label: tuple(h.shape) for label, h in rows.items()} == dict.fromkeys(LAYERS, (60, 1, 8))


def test_cached_features_are_those_of_the_statistics_at_the_start(tmp_path):
    """A forward in training moves BatchNorm's statistics, which must not be taken for augmentation."""

    class Normed(Plain):
        def __init__(self):
            super().__init__()
            self.net.body.append(nn.BatchNorm1d(8, momentum=0.5))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx)

        def forward(self, batch):
            return super().forward(batch[0] if isinstance(batch, list) else batch)

    held = FeatureShiftRegularizer("net.body", reference="cached", index_key=1)
    module = seeded(Normed)
    expected = module.eval().net.body(points(64).tensors[0])
    module.train()
    fit(tmp_path, module, held, data=DataLoader(IndexedDataset(points(64)), batch_size=8, shuffle=True), max_epochs=1)
    torch.testing.assert_close(held.reference.cache.rows["net.body"][:, 0], expected.detach())


def test_cached_features_refuse_augmentation_and_wrong_indices(tmp_path):
    class Noisy(IndexedDataset):
        def __getitem__(self, index):
            (x, y), i = super().__getitem__(index)
            return (x + 0.1 * torch.randn(4), y), i

        __getitems__ = None

    class Indexed(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx)

        def forward(self, batch):
            return super().forward(batch[0] if isinstance(batch, list) else batch)

    held = FeatureShiftRegularizer(LAYERS, reference="cached", index_key=1)
    with pytest.raises(ValueError, match="augmented, or index_key is wrong"):
        fit(tmp_path, Indexed(), held, data=DataLoader(Noisy(points(64)), batch_size=8, shuffle=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "l1"}, "form='l1': choose"),
        ({"reference": "teacher"}, "reference='teacher': choose"),
        ({"weight": -1.0}, "neither can be negative"),
        ({"layers": ["a", "a"]}, "name each layer once"),
        ({"layers": []}, "at least one"),
        ({"reference": "cached"}, "set index_key"),
        ({"reference": "cached", "index_key": 1, "cache_dtype": "int8"}, "choose 'float16' or 'float32'"),
        ({"new_layers": ["fc"]}, "belong to form='l2_sp'"),
        ({"form": "l2_sp", "start": "a.pt"}, "belong to a live reference"),
        ({"layers": "a", "form": "consistency"}, "give text_layers and image_layers"),
        ({"trunk": "net", "forward": lambda m, b: m(b)}, "leave out forward"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureShiftRegularizer(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "net.boody"}, "no layer 'net.boody'. Nearest: net.body"),
        ({"layers": "net.body", "trunk": "net.fc"}, "'net.body' is not inside trunk='net.fc'"),
        ({"layers": "nothing", "form": "l2_sp"}, "no layer 'nothing'"),
        ({"layers": "net.body", "start": "FILE"}, "has no weights 'body.0.weight' and 3 more of net"),
    ],
)
def test_what_does_not_fit_the_module_is_said_before_the_first_batch(tmp_path, arguments, message):
    torch.save({"other": torch.zeros(1)}, tmp_path / "file.pt")
    arguments = {key: str(tmp_path / "file.pt") if value == "FILE" else value for key, value in arguments.items()}
    module = Plain()
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, FeatureShiftRegularizer(**arguments))
    assert equal(weights(module), before)


def test_twins_are_refused_and_other_forms_stand_beside_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"FeatureShiftRegularizer\[relative\] twice"):
        fit(tmp_path, Plain(), regularizer(), regularizer())
    run = fit(tmp_path, Plain(), regularizer(), regularizer("l2_sp"))
    assert {"feature_shift/loss/relative", "feature_shift/loss/l2_sp"} <= set(run.callback_metrics)


def images(size=16):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(size, 3, 16, 16, generator=generator), torch.arange(size) % 3)


class ConsistencyByHand(Prompted):
    """The loss of ``FeatureShiftRegularizer(form="consistency", reference="without_prompts")``, written out."""

    def blocks(self, kind, run):
        heard = []
        tower = getattr(self.towers[0], kind)
        handles = [block.register_forward_hook(lambda _, __, out: heard.append(out)) for block in tower.blocks]
        run()
        for handle in handles:
            handle.remove()
        return heard

    def loss(self, batch):
        text, image = [], []
        for kind, into, run in (
            ("text", text, lambda: self.clip.encode_text(self.ids)),
            ("image", image, lambda: self.clip.encode_image(batch[0])),
        ):
            prompted = self.blocks(kind, run)
            with torch.no_grad(), self.without_prompts():
                plain = self.blocks(kind, run)
            slots = self.prompt_length(kind)
            for z, z0 in zip(prompted, plain, strict=True):
                if kind == "text":  # SOS, the words after the prompts, EOS
                    ends = self.ids.argmax(1).tolist()
                    rows = [(n, t) for n, end in enumerate(ends) for t in [0, *range(1 + slots, end + 1)]]
                else:
                    rows = [(n, t) for n in range(len(batch[0])) for t in range(z0.shape[1])]
                distance = sum((z[row] - z0[row]).norm() for row in rows) / len(rows)
                into.append(distance / (sum(z0[row].norm() for row in rows) / len(rows)))
        return super().loss(batch) + 0.5 * sum((t - v) ** 2 for t, v in zip(text, image, strict=True))


@pytest.mark.parametrize("coupling", ["maple", "independent", "vision"])
def test_consistency_of_two_towers_equals_the_loss_written_by_hand(tmp_path, coupling):
    ours, by_hand, without = (seeded(cls, coupling) for cls in (Prompted, ConsistencyByHand, Prompted))
    held = FeatureShiftRegularizer(form="consistency", weight=0.5, reference="without_prompts")
    data = DataLoader(images(), batch_size=4)
    run = fit(tmp_path, ours, held, data=data, max_epochs=2)
    fit(tmp_path, by_hand, data=data, max_epochs=2)
    fit(tmp_path, without, data=data, max_epochs=2)
    assert run.callback_metrics["feature_shift/loss/consistency"] > 0
    for a, b in zip(weights(ours.prompts), weights(by_hand.prompts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32, 8 steps
    assert not equal(weights(ours.prompts), weights(without.prompts))


def test_the_text_tower_runs_once_without_prompts_and_again_for_other_classes(tmp_path):
    module = seeded(Prompted)
    held = FeatureShiftRegularizer(form="consistency", reference="without_prompts")

    class Change(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.ids[0, 3] = 9

    fit(tmp_path, module, held, Change(), data=DataLoader(images(), batch_size=4), max_epochs=2)
    assert module.passes == {"text": 8 + 2, "image": 8 + 8}


@pytest.mark.parametrize("form", ["relative", "cosine"])
def test_towers_can_be_held_near_themselves_without_prompts(tmp_path, form):
    ends = []
    for weight in (0.0, 5.0):
        module = seeded(Prompted, lr=0.1)
        held = FeatureShiftRegularizer(form=form, weight=weight or 1e-9, reference="without_prompts")
        run = fit(tmp_path, module, held, data=DataLoader(images(), batch_size=4), max_epochs=4)
        ends.append(run.callback_metrics[f"feature_shift/loss/{form}"])
    assert ends[1] < 0.9 * ends[0]


def test_towers_that_are_trained_themselves_are_compared_with_their_start(tmp_path):
    class Tuned(Prompted):
        def __init__(self):
            super().__init__(coupling=None, lr=0.01)
            self.clip.requires_grad_(True)

    held = FeatureShiftRegularizer(form="consistency", forward=lambda module, batch: module.loss(batch))
    run = fit(tmp_path, seeded(Tuned), held, data=DataLoader(images(), batch_size=4))
    assert 0 < run.callback_metrics["feature_shift/loss/consistency"] < 1
    once = {"limit_train_batches": 1, "max_epochs": 1}
    still = fit(tmp_path, seeded(Tuned), held, data=DataLoader(images(), batch_size=4), **once)
    # Not zero: in eval mode without gradient, nn.MultiheadAttention takes another kernel. Its rounding, squared.
    assert still.callback_metrics["feature_shift/loss/consistency"] < 1e-11


def test_prompts_that_nobody_can_switch_off_are_an_error_at_once(tmp_path):
    module = Plain()
    module.words = nn.Embedding(3, 3)
    held = FeatureShiftRegularizer(text_layers=["net.body"], image_layers=["net.fc"], reference="without_prompts")
    with pytest.raises(ValueError, match="neither the module nor a callback has without_prompts"):
        fit(tmp_path, module, held)


def test_towers_are_compared_block_by_block(tmp_path):
    one = ["clip.transformer.resblocks.0"]
    held = FeatureShiftRegularizer(text_layers=one, form="consistency", reference="without_prompts")
    with pytest.raises(ValueError, match="1 text_layers and 3 image_layers: name as many"):
        fit(tmp_path, Prompted(), held, data=DataLoader(images(), batch_size=4))


def test_the_pass_without_prompts_is_heard_by_no_other_tap(tmp_path):
    class Listen(pl.Callback):
        heard = ()

        def on_fit_start(self, trainer, pl_module):
            tap.attach(pl_module)

        def on_train_batch_start(self, *_):
            tap.listen()

        def on_train_batch_end(self, *_):
            self.heard += (len(tap.take()),)

    tap, listen = FeatureTap("clip.visual"), Listen()
    held = FeatureShiftRegularizer(form="consistency", reference="without_prompts")
    fit(tmp_path, seeded(Prompted), held, listen, data=DataLoader(images(), batch_size=4), max_epochs=1)
    assert listen.heard == (4, 4, 4, 4)
