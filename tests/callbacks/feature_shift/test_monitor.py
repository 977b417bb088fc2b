import copy

import lightning.pytorch as pl
import matplotlib.image
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks.feature_shift.figures import draw_shifts
from lightning_feat.callbacks.feature_shift.monitor import FeatureShiftMonitor
from lightning_feat.callbacks.feature_shift.regularizer import FeatureShiftRegularizer
from lightning_feat.functional.feature_shift import cosine_shift, relative_shift
from tests.callbacks.feature_shift.monitor_ddp_cases import Prompted
from tests.helpers import Plain, equal, loader, points, trainer, weights

LAYERS = ["net.body.0", "net.body"]


class Remembers(Plain):
    """Keeps the features of every training batch, with those of its start."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.start, self.seen = [copy.deepcopy(self.net)], []

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.seen.append((self.net.body(batch[0]), self.start[0].body(batch[0])))
        return super().training_step(batch, batch_idx)


class Noisy(Plain):
    """With dropout, and a second network that teaches it."""

    def __init__(self):
        super().__init__()
        self.net.body.append(nn.Dropout(0.5))

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            taught = self(batch[0])  # a pass that is no pass of training
        return super().training_step(batch, batch_idx) + 0.1 * cross_entropy(self(batch[0]), taught.softmax(1))


def fit(tmp_path, module, *callbacks, data=None, val=None, ckpt_path=None, **kwargs):
    run = trainer(tmp_path, callbacks=list(callbacks), **{"max_epochs": 3, **kwargs})
    run.fit(module, loader(64) if data is None else data, val, ckpt_path=ckpt_path)
    return run


def seeded(cls, *args, **kwargs):
    pl.seed_everything(0)
    return cls(*args, **kwargs)


def test_it_logs_the_shift_of_all_samples_of_an_epoch(tmp_path):
    """60 samples in batches of 8: the last one is smaller, and a mean of batches would be another value."""
    module, monitor = seeded(Remembers), FeatureShiftMonitor(LAYERS, every_n_batches=1)
    run = fit(tmp_path, module, monitor, data=loader(60), max_epochs=2)
    now, start = (torch.cat(column) for column in zip(*module.seen[8:], strict=True))
    logged = run.callback_metrics
    torch.testing.assert_close(logged["feature_shift/relative/net.body"], relative_shift(now, start))
    torch.testing.assert_close(logged["feature_shift/cosine/net.body"], cosine_shift(now, start))
    assert [epochs for epochs, _ in monitor.history["net.body.0"]] == [1.0, 2.0]
    assert monitor.history["net.body"][1][1] == pytest.approx(float(relative_shift(now, start)))


def test_validation_data_are_compared_in_eval_mode(tmp_path):
    module = seeded(Noisy)
    start = copy.deepcopy(module).eval()
    monitor = FeatureShiftMonitor("net.body", data="val")
    run = fit(tmp_path, module, monitor, val=loader(20), num_sanity_val_steps=2)
    x = points(20).tensors[0]
    module.eval()
    expected = relative_shift(module.net.body(x).detach(), start.net.body(x).detach())
    torch.testing.assert_close(run.callback_metrics["feature_shift_val/relative/net.body"], expected)
    assert len(monitor.history["net.body"]) == 3
    before = monitor.history["net.body"]
    run.validate(module, loader(20), verbose=False)
    assert monitor.history["net.body"] == before


@pytest.mark.parametrize("data", ["train", "val"])
def test_it_changes_nothing_and_leaves_nothing(tmp_path, data):
    watched, alone = seeded(Noisy), seeded(Noisy)
    pl.seed_everything(1)
    fit(tmp_path, watched, FeatureShiftMonitor(LAYERS, data=data), val=loader(16))
    pl.seed_everything(1)
    fit(tmp_path, alone, val=loader(16))
    assert equal(weights(watched), weights(alone))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in watched.modules())


def test_nothing_is_left_by_an_error(tmp_path):
    class Breaks(Plain):
        def on_train_epoch_end(self):
            raise RuntimeError("broken")

    module = Breaks()
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, module, FeatureShiftMonitor(LAYERS))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_still_network_has_no_shift(tmp_path):
    run = fit(tmp_path, Plain(lr=0.0), FeatureShiftMonitor(LAYERS))
    assert all(run.callback_metrics[f"feature_shift/{m}/net.body"] == 0 for m in ("relative", "cosine"))


def test_dropout_counts_as_shift_in_training_and_not_in_validation(tmp_path):
    class Still(Noisy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    both = FeatureShiftMonitor("net.body"), FeatureShiftMonitor("net.body", data="val")
    run = fit(tmp_path, Still(), *both, val=loader(16))
    assert run.callback_metrics["feature_shift/relative/net.body"] > 0.1
    assert run.callback_metrics["feature_shift_val/relative/net.body"] == 0


def test_a_resumed_run_has_the_whole_history_of_the_same_start(tmp_path):
    whole = FeatureShiftMonitor(LAYERS)
    fit(tmp_path, seeded(Plain), whole, max_epochs=4)
    run = fit(tmp_path, seeded(Plain), FeatureShiftMonitor(LAYERS), max_epochs=2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed = FeatureShiftMonitor(LAYERS)
    fit(tmp_path, Plain(), resumed, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.history == whole.history


def test_a_regularizer_lends_its_copy_and_its_pass(tmp_path):
    class Count(pl.Callback):
        calls = 0

        def on_train_start(self, trainer, pl_module):
            assert monitor.comparison.reference._frozen.net is held.reference._frozen.net
            held.reference._frozen.net.register_forward_hook(self.count)

        def count(self, *_):
            self.calls += 1

    held, monitor, count = FeatureShiftRegularizer(LAYERS), FeatureShiftMonitor(LAYERS, every_n_batches=1), Count()
    run = fit(tmp_path, seeded(Plain), held, monitor, count, max_epochs=1)
    assert count.calls == 8  # one for each batch
    values = [run.callback_metrics[f"feature_shift/relative/{layer}"] for layer in LAYERS]
    alone = fit(tmp_path, seeded(Plain), FeatureShiftRegularizer(LAYERS), max_epochs=1)
    # The mean of batches of one size, each of the mean of its layers; lengths of the start differ by batch.
    assert float(sum(values)) / 2 == pytest.approx(
        float(alone.callback_metrics["feature_shift/loss/relative"]), rel=0.05
    )


def test_a_batch_whose_step_runs_twice_is_heard_once_at_its_own_weights(tmp_path):
    class Sharp(torch.optim.SGD):
        """Takes its gradient at other weights, as SAM does."""

        def step(self, closure):
            with torch.enable_grad():
                closure()
            kept = [p.detach().clone() for group in self.param_groups for p in group["params"]]
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(0.3)
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                for p, value in zip(self.param_groups[0]["params"], kept, strict=True):
                    p.copy_(value)
            super().step()
            return loss

    class Twice(Remembers):
        def configure_optimizers(self):
            return Sharp(self.parameters(), lr=0.1)

    for beside in ([], [FeatureShiftRegularizer("net.body", weight=1e-9)]):  # one that runs the reference twice, too
        module = seeded(Twice)
        run = fit(tmp_path, module, *beside, FeatureShiftMonitor("net.body", every_n_batches=1), max_epochs=1)
        now, start = (torch.cat(column) for column in zip(*module.seen[::2], strict=True))
        torch.testing.assert_close(run.callback_metrics["feature_shift/relative/net.body"], relative_shift(now, start))


def test_every_nth_batch_is_looked_at(tmp_path):
    module, monitor = seeded(Remembers), FeatureShiftMonitor("net.body", every_n_batches=3)
    run = fit(tmp_path, module, monitor, max_epochs=1)
    now, start = (torch.cat(column) for column in zip(*module.seen[::3], strict=True))
    torch.testing.assert_close(run.callback_metrics["feature_shift/relative/net.body"], relative_shift(now, start))


@pytest.mark.parametrize(("batches", "seen"), [(4, [3]), (10, [9]), (25, [9, 19])])
def test_by_default_every_tenth_batch_is_looked_at_and_the_last_of_a_shorter_epoch(tmp_path, batches, seen):
    module, monitor = seeded(Remembers), FeatureShiftMonitor("net.body")
    run = fit(tmp_path, module, monitor, data=loader(8 * batches), max_epochs=1)
    assert len(module.seen) == batches
    now, start = (torch.cat(column) for column in zip(*(module.seen[place] for place in seen), strict=True))
    torch.testing.assert_close(run.callback_metrics["feature_shift/relative/net.body"], relative_shift(now, start))


def test_tokens_that_do_not_count_are_left_out(tmp_path):
    class Tokens(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def training_step(self, batch, batch_idx):
            x, y, mask = batch
            h = self.body(x)
            mean = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return cross_entropy(self.head(mean), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(8, 6, 4, generator=generator), torch.arange(6) < torch.arange(1, 9).clamp(max=6)[:, None]
    data = DataLoader(TensorDataset(x, torch.arange(8) % 3, mask.long()), batch_size=8)
    x[~mask] = torch.nan
    values = []
    for key in (2, None):
        module = seeded(Tokens)
        start = copy.deepcopy(module.body)
        monitor = FeatureShiftMonitor("body", mask_key=key)
        spoilt = torch.where(mask[..., None], x, 0.0)
        data.dataset.tensors = (spoilt, *data.dataset.tensors[1:])
        run = fit(tmp_path, module, monitor, data=data, max_epochs=2, limit_train_batches=1)
        values.append(run.callback_metrics["feature_shift/relative/body"])
        first = seeded(Tokens)
        fit(tmp_path, first, data=data, max_epochs=1)
        if key is not None:
            expected = relative_shift(first.body(spoilt)[mask], start(spoilt)[mask]).detach()
            torch.testing.assert_close(values[0], expected)
    assert values[0] != values[1]


def images(size=16):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(size, 3, 16, 16, generator=generator), torch.arange(size) % 3)


@pytest.mark.parametrize("data", ["train", "val"])
def test_two_towers_are_compared_with_themselves_without_prompts(tmp_path, data):
    module, monitor = seeded(Prompted), FeatureShiftMonitor(data=data, reference="without_prompts")
    sets = DataLoader(images(), batch_size=4)
    run = fit(tmp_path, module, monitor, data=sets, val=sets, max_epochs=1)
    method = "feature_shift" if data == "train" else "feature_shift_val"
    logged = run.callback_metrics
    pairs = [(f"clip.transformer.resblocks.{j}", f"clip.visual.transformer.resblocks.{j}") for j in range(3)]
    for j, (text, image) in enumerate(pairs):
        difference = logged[f"{method}/relative/{text}"] - logged[f"{method}/relative/{image}"]
        torch.testing.assert_close(logged[f"{method}/discrepancy/{j}"], difference.abs())
        assert difference != 0
    mean = sum(logged[f"{method}/discrepancy/{j}"] for j in range(3)) / 3
    torch.testing.assert_close(logged[f"{method}/discrepancy/mean"], mean)
    assert not any(part._forward_pre_hooks for part in module.clip.visual.transformer.resblocks[2].modules())


def test_texts_whose_words_move_on_are_compared_word_by_word(tmp_path):
    module, monitor = seeded(Prompted, lr=0.0), FeatureShiftMonitor(reference="without_prompts")
    module.ids = torch.tensor([[1, 7, 18, 0, 0, 0, 0], [1, 8, 9, 18, 0, 0, 0], [1, 6, 8, 9, 18, 0, 0]])
    counted, heard = [2 + 1, 3 + 1, 4 + 1], {}  # start, words and end of each
    layer = module.clip.transformer.resblocks[0]
    layer.register_forward_hook(lambda _, args, output: heard.setdefault(output.shape[-2], []).append(output))
    run = fit(tmp_path, module, monitor, data=DataLoader(images(), batch_size=16), max_epochs=1)
    now, start = next(iter(heard.values()))[:2]
    rows = [(i, [0, *range(3, n + 2)], [*range(n)]) for i, n in enumerate(counted)]
    now, start = (torch.cat([x[i][places[k]] for i, *places in rows]) for k, x in enumerate((now, start)))
    expected = relative_shift(now, start)
    torch.testing.assert_close(run.callback_metrics["feature_shift/relative/clip.transformer.resblocks.0"], expected)


def test_the_reference_pass_of_a_regularizer_is_not_heard(tmp_path):
    """Both switch the prompts off in each batch; the monitor must not take that pass for training."""
    alone, beside = (FeatureShiftMonitor(reference="without_prompts") for _ in range(2))
    data = DataLoader(images(), batch_size=4)
    fit(tmp_path, seeded(Prompted, lr=0.0), alone, data=data, max_epochs=1)
    held = FeatureShiftRegularizer(form="consistency", reference="without_prompts")
    fit(tmp_path, seeded(Prompted, lr=0.0), held, beside, data=data, max_epochs=1)
    assert beside.history == alone.history


def test_a_tower_without_prompts_has_no_shift(tmp_path):
    module, monitor = seeded(Prompted, "vision"), FeatureShiftMonitor(reference="without_prompts")
    fit(tmp_path, module, monitor, data=DataLoader(images(), batch_size=4), max_epochs=1)
    shifts = {name: line[0][1] for name, line in monitor.history.items()}
    assert all((value < 1e-6) == ("visual" not in name) for name, value in shifts.items())  # rounding of another kernel


def test_the_figure_is_written_and_layers_differ_in_it(tmp_path):
    monitor = FeatureShiftMonitor(LAYERS, figure=True)
    fit(tmp_path, seeded(Plain), monitor)
    picture = matplotlib.image.imread(tmp_path / "feature_shift.png")
    assert picture.shape[0] > 400
    figure = draw_shifts(monitor.history)
    curves, heat = figure.axes[:2]
    assert [line.get_label() for line in curves.lines] == LAYERS
    rows = heat.images[0].get_array()
    assert rows.shape == (2, 3)
    assert rows[1].tolist() == pytest.approx([value for _, value in monitor.history["net.body"]])


def test_a_figure_of_many_layers_shows_some_curves_and_all_in_the_map():
    points_ = {f"blocks.{i}": [(1.0, 0.1 * i), (2.0, 0.2 * i)] for i in range(40)}
    curves, heat = draw_shifts(points_).axes[:2]
    labels = [line.get_label() for line in curves.lines]
    assert len(labels) == 7
    assert (labels[0], labels[-1]) == ("blocks.0", "blocks.39")
    assert heat.images[0].get_array().shape == (40, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "test"}, "choose 'train' or 'val'"),
        ({"reference": "live"}, "'start' or 'without_prompts'"),
        ({"every_n_batches": 0}, "must be at least 1"),
        ({"layers": ["a", "a"]}, "name each layer once"),
        ({"layers": "a", "reference": "without_prompts"}, "beside two towers"),
        ({"reference": "without_prompts", "start": "a.pt"}, "belong to reference='start'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureShiftMonitor(**arguments)


def test_twins_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"FeatureShiftMonitor\[train\] twice"):
        fit(tmp_path, Plain(), FeatureShiftMonitor(LAYERS), FeatureShiftMonitor("net.body"))
