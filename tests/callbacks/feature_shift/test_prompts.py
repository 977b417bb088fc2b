import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks.feature_shift.prompts import PromptLearner
from lightning_feat.joints.clip.towers import find_clip_towers
from lightning_feat.layers.feature_shift.prompt_hooks import insert_prompts
from lightning_feat.layers.feature_shift.prompts import DeepPrompts
from lightning_feat.layers.feature_shift.surgery import SurgeryBlock, attach_surgery
from tests.helpers import EMAWeightAveraging, equal, trainer, weights
from tests.joints.clip import models as clip_models


def tokenizer(texts):
    return clip_models.texts(len(texts), seed=3)


class Clip(pl.LightningModule):
    """A user's own: knows nothing of prompts."""

    def __init__(self, library="small"):
        super().__init__()
        self.clip = clip_models.make(library).requires_grad_(False)
        self.tokenizer = tokenizer
        self.classes = clip_models.texts(3)

    def forward(self, images):
        image, text = self.clip.encode_image(images), self.clip.encode_text(self.classes)
        return 10 * normalize(image, dim=-1) @ normalize(text, dim=-1).T

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x), y)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": [p for p in self.parameters() if p.requires_grad]}], lr=1e-3, momentum=0.9)


class ByHand(Clip):
    """The same prompts, blocks and consistency, as a part of the module."""

    def __init__(self, weight, surgery=False):
        super().__init__()
        towers = find_clip_towers(self.clip)
        ids = tokenizer(["a photo of a"])[0]
        self.prompts = DeepPrompts.for_towers(towers, "maple", depth=3, length=2, template_ids=ids)
        insert_prompts(towers, self.prompts)
        self.weight = weight
        if surgery:
            self.blocks = nn.ModuleDict({"text": SurgeryBlock(12, 0.1), "image": SurgeryBlock(12, 0.2)})
            attach_surgery(towers, **self.blocks)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.weight * self.prompts.gram_consistency_loss()


def data(n=24):
    return DataLoader(TensorDataset(clip_models.images(n), torch.arange(n) % 3), batch_size=8)


def learner(**options):
    return PromptLearner(**{"depth": 3, "length": 2, "gram_weight": 0.1, **options})


def fit(root, module, *callbacks, ckpt_path=None, **kwargs):
    run = trainer(root, callbacks=list(callbacks), **{"max_epochs": 3, **kwargs})
    run.fit(module, data(), ckpt_path=ckpt_path)
    return run


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("surgery", [False, True])
def test_it_is_the_module_with_prompts_written_by_hand(tmp_path, surgery):
    ratios = {"text_surgery": 0.1, "image_surgery": 0.2} if surgery else {}
    callback = learner(strengthen=False, **ratios)
    module = Clip()
    before = weights(module)
    pl.seed_everything(1)
    run = fit(tmp_path, module, callback)
    by_hand, towers = ByHand(0.1, surgery), find_clip_towers(Clip().clip)
    pl.seed_everything(1)
    fresh = DeepPrompts.for_towers(towers, "maple", depth=3, length=2, template_ids=tokenizer([""])[0])
    by_hand.prompts.load_state_dict(fresh.state_dict())
    if surgery:
        for name, ratio in (("text", 0.1), ("image", 0.2)):
            by_hand.blocks[name].load_state_dict(SurgeryBlock(12, ratio).state_dict())
    fit(tmp_path, by_hand)
    assert torch.equal(flat(callback.prompts), flat(by_hand.prompts))
    assert not torch.equal(flat(callback.prompts), flat(fresh))
    assert equal(before, weights(module))
    assert run.callback_metrics["prompt_gram/loss"] > 0
    assert run.callback_metrics["prompts/discrepancy"] > 0
    for kind in ("text", "image"):
        torch.testing.assert_close(
            run.callback_metrics[f"prompts/gram_norm/{kind}"], by_hand.prompts.gram_norms(kind).detach().mean()
        )


def test_after_the_run_the_model_is_as_it_was(tmp_path):
    module = Clip()
    x = clip_models.images(4)
    before, keys = module(x), [*module.state_dict()]
    fit(tmp_path, module, learner(text_surgery=0.1))
    assert torch.equal(module(x), before)
    assert [*module.state_dict()] == keys
    assert "_feat_wraps" not in module.__dict__
    assert [name for name, _ in module.named_children()] == ["clip"]


def test_a_checkpoint_resumes_tests_and_loads_without_the_callback(tmp_path):
    class Save(pl.Callback):
        """Within the fit, as hooks and own parameters are gone when it returns."""

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    modules = [Clip() for _ in range(3)]
    pl.seed_everything(1)
    whole = learner(text_surgery=0.1)
    run = fit(tmp_path, modules[0], whole, Save(), max_epochs=4)
    rest = learner(text_surgery=0.1)
    fit(tmp_path, modules[1], rest, max_epochs=4, ckpt_path=tmp_path / "1.ckpt")
    assert torch.equal(flat(rest.learned), flat(whole.learned))
    assert torch.equal(rest.prompts.text_gram_start, whole.prompts.text_gram_start)

    path = tmp_path / "3.ckpt"
    again = learner(text_surgery=0.1)
    [measured] = trainer(tmp_path, callbacks=again).test(Clip(), data(), ckpt_path=path, verbose=False)
    [expected] = run.test(modules[0], data(), verbose=False)  # prompted again, with what it learned
    assert measured == expected
    [plain] = trainer(tmp_path).test(Clip(), data(), verbose=False)
    assert plain != measured
    Clip.load_from_checkpoint(path)
    torch.load(path, weights_only=True)


def test_the_consistency_is_zero_at_the_start_and_after_loading_what_it_was(tmp_path):
    callback = learner()
    fit(tmp_path, Clip(), callback, max_epochs=0)
    assert callback.prompts.gram_consistency_loss() == 0
    fit(tmp_path, Clip(), callback)
    other = learner()
    fit(tmp_path, Clip(), other, max_epochs=0)
    other.learned.load_state_dict(callback.learned.state_dict())
    assert other.prompts.gram_consistency_loss() == callback.prompts.gram_consistency_loss() > 0


def test_ratios_grow_once_after_a_third_of_the_epochs(tmp_path):
    class Watch(pl.Callback):
        ratios = ()

        def on_train_epoch_start(self, trainer, pl_module):
            self.ratios = (*self.ratios, float(callback.learned["text"].ratio))

    callback, watch = learner(text_surgery=0.1), Watch()
    fit(tmp_path, Clip(), callback, watch, max_epochs=6)
    assert watch.ratios[:3] == pytest.approx([0.1] * 3)
    assert len({*watch.ratios[3:]}) == 1
    assert watch.ratios[3] > 0.1


def test_prompts_can_be_switched_off_for_a_moment(tmp_path):
    x = clip_models.images(4)
    plain = Clip()(x)

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            with torch.no_grad():
                self.prompted = pl_module(x)
                with callback.without_prompts():
                    self.without = pl_module(x)
                self.again = pl_module(x)

    callback, look = learner(image_surgery=0.1), Look()
    fit(tmp_path, Clip(), callback, look, max_epochs=1)
    assert torch.equal(look.without, plain)
    assert torch.equal(look.again, look.prompted)
    assert not torch.equal(look.prompted, plain)
    assert (callback.prompt_length("text"), callback.prompt_length("image")) == (2, 2)


@pytest.mark.parametrize("coupling", ["text", "vision", "independent"])
def test_other_couplings_learn(tmp_path, coupling):
    callback = learner(coupling=coupling, gram_weight=0.1 if coupling == "independent" else 0.0)
    fit(tmp_path, Clip(), callback, max_epochs=0)
    before = flat(callback.prompts)
    fit(tmp_path, Clip(), other := learner(coupling=coupling, gram_weight=0.0), max_epochs=2)
    assert flat(other.prompts).shape == before.shape
    assert all(bool((p.grad is None) or p.grad.isfinite().all()) for p in other.prompts.parameters())
    assert all(bool(p.grad.abs().sum() > 0) for p in other.prompts.parameters())


@pytest.mark.skipif(EMAWeightAveraging is None, reason="this Lightning has none")
def test_averages_follow_the_prompts(tmp_path):
    callback = learner()
    fit(tmp_path, Clip(), callback, EMAWeightAveraging(decay=0.5))
    with pytest.raises(ValueError, match="put PromptLearner before it"):
        fit(tmp_path, Clip(), EMAWeightAveraging(decay=0.5), learner())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"coupling": "text"}, "choose 'maple' or 'independent'"),
        ({"depth": 1}, "a depth of 2 or more"),
        ({"depth": 9}, "lower the depth"),
        ({"layers": {"text_blocks": "nowhere"}}, "nowhere"),
    ],
)
def test_what_cannot_be_is_said_at_once(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, Clip(), learner(**options))


def test_a_template_needs_a_tokenizer(tmp_path):
    module = Clip()
    del module.tokenizer
    with pytest.raises(ValueError, match="set template=None for a random start"):
        fit(tmp_path, module, learner())
    fit(tmp_path, module, learner(template=None), max_epochs=1)


class Bert(nn.Module):
    """A text tower whose end token is not its largest id."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.layer = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

    def forward(self, ids):
        x = self.words(ids)
        for block in self.layer:
            x = block(x)
        return x[:, 0]


class Texts(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.text, self.scale = Bert(), nn.Parameter(torch.ones(()))
        self.tokenizer = lambda texts: torch.tensor([[2, 4, 9, 5, 4, 3]] * len(texts))

    def training_step(self, batch, batch_idx):
        return self.scale * self.text(batch[0])[:, 0].square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_tower_of_another_kind_can_be_described(tmp_path):
    layers = {"text_embedding": "text.words", "text_blocks": "text.layer", "text_features": "text"}
    described = {"layers": layers, "eos_token_id": 3, "batch_first": True}
    prompts = PromptLearner("text", depth=1, length=4, template="a photo of a", **described)
    torch.manual_seed(0)
    module = Texts()
    ids = torch.tensor([[2, 4, 9, 5, 4, 6, 3], [2, 4, 9, 5, 4, 7, 3]])
    trainer(tmp_path, callbacks=[prompts]).fit(module, DataLoader(TensorDataset(ids), 2))
    assert not torch.equal(prompts.prompts.text[0], module.text.words.weight[[4, 9, 5, 4]])  # it has moved
    with pytest.raises(ValueError, match="goes on after position 2"):  # 9 is the largest id, and no end
        trainer(tmp_path, callbacks=[PromptLearner("text", depth=1, length=2, template=None, layers=layers)]).fit(
            Texts(), DataLoader(TensorDataset(ids), 2)
        )


@pytest.mark.parametrize("other", [{"length": 3}, {"coupling": "independent"}, {"text_surgery": 0.2}])
def test_prompts_that_are_asked_for_otherwise_than_they_were_trained_are_refused(tmp_path, other):
    options = {"depth": 2, "length": 2, "template": None, "text_surgery": 0.1}
    fit(tmp_path, Clip(), PromptLearner(**options)).save_checkpoint(path := tmp_path / "a.ckpt")
    (name, value), *_ = other.items()
    with pytest.raises(ValueError, match=rf"asks for {name}={value!r}: ask for what was trained"):
        fit(tmp_path, Clip(), PromptLearner(**{**options, **other}), ckpt_path=path, max_epochs=4)
    fit(tmp_path, Clip(), PromptLearner(**options), ckpt_path=path, max_epochs=4)


def test_where_prompts_stand_is_kept_in_a_checkpoint(tmp_path):
    options = {"depth": 2, "length": 2, "template": None}
    module = Clip()
    module.classes = torch.tensor([[1, 7, 9, 39, *[0] * 6], [1, 8, 9, 39, *[0] * 6], [1, 6, 9, 39, *[0] * 6]])
    prompts = PromptLearner(**options)
    fit(tmp_path, module, prompts).save_checkpoint(path := tmp_path / "a.ckpt")
    assert prompts.prompts.words == [-1]  # names stand first: prompts stand before them
    other, again = Clip(), PromptLearner(**options)
    trainer(tmp_path, callbacks=[again]).test(other, data(), ckpt_path=path)
    assert again.prompts.words == [-1]  # though these texts begin with the same words
