import copy
import json
import math
import sys

import pytest
import torch
from lightning import Callback
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.baselines.clip_classifier import ClipClassifier
from lightning_feat.baselines.clip_pretraining import SmallClipPretraining
from lightning_feat.baselines.clip_sources import load_clip
from lightning_feat.callbacks import PromptLearner
from lightning_feat.joints.module.own_checkpoints import load, save
from lightning_feat.joints.module.own_parameters import adopt, append_to_optimizer, release
from lightning_feat.joints.module.wraps import add_link, remove_link
from tests.helpers import trainer

BASE, NOVEL = ["red one", "blue two", "red two"], ["blue one", "green one"]
SMALL = {"context_length": 16, "image_size": 16, "patch_size": 8, "embed_dim": 8, "width": 16, "layers": 2, "heads": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Path of a checkpoint of a small CLIP."""
    path = tmp_path_factory.mktemp("small") / "clip.ckpt"
    torch.manual_seed(0)
    module = SmallClipPretraining(["a photo of picture the . red blue green one two"], **SMALL)
    run = trainer(path.parent)
    run.strategy.connect(module)
    run.save_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def open_clip_name(tmp_path_factory):
    """Name of a small model that open_clip knows for the time of the tests."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    path = tmp_path_factory.mktemp("open_clip") / "small-for-tests.json"
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIPModel with a tokenizer that spells, as save_pretrained writes it."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("huggingface")
    pieces = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz." for end in ("", "</w>")]
    ids = {piece: place for place, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    start, end = ids["<|startoftext|>"], ids["<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps(ids))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    text = {**common, **special, "vocab_size": len(ids), "max_position_embeddings": 40}
    vision = {**common, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(path)
    return str(path)


def classifier(small, **arguments):
    return ClipClassifier(BASE, NOVEL, **{"source": "small", "model": small, **arguments})


def images_of(num=12, seed=0):
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def loader(num=12, num_classes=3, batch_size=4, seed=0):
    return DataLoader(TensorDataset(images_of(num, seed), torch.arange(num) % num_classes), batch_size)


def weights(module):
    return {name: p.detach().clone() for name, p in module.clip.named_parameters()}


class Adapter(Callback):
    """What a callback of the library does: a part of its own around the text features, trained by the optimizer."""

    def __init__(self):
        self.part = nn.Linear(8, 8)

    def setup(self, trainer, pl_module, stage):
        adopt(pl_module, "adapter", self.part)
        add_link(pl_module, "text_features", "adapter", self.around)
        if stage == "fit":
            add_link(pl_module, "configure_optimizers", "adapter", self.configure)

    def around(self, module, call, *args, **kwargs):
        return self.part(call(*args, **kwargs))

    def configure(self, module, call):
        configured = call()
        append_to_optimizer(self.part, configured, module.clip)
        return configured

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        save(trainer, checkpoint, "adapter", self.part)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        load(trainer, checkpoint, "adapter", self.part)

    def teardown(self, trainer, pl_module, stage):
        for method in ("text_features", "configure_optimizers"):
            remove_link(pl_module, method, "adapter")
        release(pl_module, "adapter")


def test_logits_are_cosines_with_the_names_in_the_template(small):
    module, images = classifier(small, template="a photo of a {}."), images_of()
    texts = module.clip.encode_text(module.tokenizer([f"a photo of a {name}." for name in BASE]))
    cosine = cosine_similarity(module.clip.encode_image(images)[:, None], texts[None], dim=2)
    torch.testing.assert_close(module(images), module.clip.logit_scale.exp() * cosine)


def test_several_templates_are_averaged_by_direction(small):
    templates = ["a photo of a {}.", "the {}", "picture of {}."]
    module = classifier(small, template=templates)
    by_hand = torch.stack(
        [
            sum(normalize(module.encode_text(module.tokenizer(each.format(name))), dim=1)[0] for each in templates) / 3
            for name in BASE
        ]
    )
    torch.testing.assert_close(module.text_features(), by_hand)
    assert module.tokens.shape == (9, 16)


def test_open_clip_gives_the_logits_of_its_own_forward(open_clip_name):
    module = ClipClassifier(BASE, model=open_clip_name)
    images, ids = images_of(2), module.tokenizer([f"a photo of a {name}." for name in BASE])
    image_features, text_features, scale = module.clip(images, ids)
    torch.testing.assert_close(module(images), scale * image_features @ text_features.T)
    assert module.tokens.shape == (3, 77)


def test_open_clip_loads_a_local_checkpoint(open_clip_name, tmp_path):
    first = ClipClassifier(BASE, model=open_clip_name)
    torch.save(first.clip.state_dict(), tmp_path / "weights.pt")
    again = ClipClassifier(BASE, model=open_clip_name, pretrained=str(tmp_path / "weights.pt"))
    torch.testing.assert_close(again(images_of(2)), first(images_of(2)))


def test_huggingface_gives_the_logits_of_its_own_forward(folder):
    module, images = ClipClassifier(BASE, source="huggingface", model=folder), images_of(2)
    expected = module.clip(input_ids=module.tokens, pixel_values=images).logits_per_image
    torch.testing.assert_close(module(images), expected)
    assert module.tokens.shape == (3, 40)
    end = module.clip.config.text_config.eos_token_id
    assert (module.tokens.argmax(1) == (module.tokens == end).int().argmax(1)).all()
    assert module.is_huggingface


@pytest.mark.parametrize("source", ["open_clip", "huggingface", "small"])
def test_an_adapter_trains_and_the_towers_do_not(source, request, tmp_path):
    names = {"open_clip": "open_clip_name", "huggingface": "folder", "small": "small"}
    module = ClipClassifier(BASE, source=source, model=request.getfixturevalue(names[source]), lr=0.1)
    adapter, before = Adapter(), weights(module)
    start = copy.deepcopy(adapter.part)
    trainer(tmp_path, max_epochs=2, callbacks=adapter).fit(module, loader(), loader())
    assert all(torch.equal(value, before[name]) for name, value in weights(module).items())
    assert not torch.equal(adapter.part.weight, start.weight)


def test_training_is_that_of_the_loop_written_by_hand(small, tmp_path):
    module = classifier(small, lr=0.1, momentum=0.9, weight_decay=0.01, warmup_epochs=1, warmup_lr=0.001)
    adapter = Adapter()
    part = copy.deepcopy(adapter.part)
    trainer(tmp_path, max_epochs=4, callbacks=adapter).fit(module, loader())

    other = classifier(small)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.0, momentum=0.9, weight_decay=0.01)
    for epoch in range(4):
        rate = 0.001 if epoch == 0 else 0.05 * (1 + math.cos(math.pi * (epoch - 1) / 4))
        optimizer.param_groups[0]["lr"] = rate
        for images, targets in loader():
            logits = other.logits_of(other.encode_image(images), part(other.encode_text(other.tokens)))
            optimizer.zero_grad()
            cross_entropy(logits, targets).backward()
            optimizer.step()
    torch.testing.assert_close(adapter.part.weight, part.weight)


def test_what_is_named_trains_and_is_alone_in_the_checkpoint(small, tmp_path):
    module = classifier(small, trainable=["visual.ln_post", "text_projection"], lr=0.1)
    before, run = weights(module), trainer(tmp_path, max_epochs=2)
    run.fit(module, loader())
    changed = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
    assert changed == {"visual.ln_post.weight", "visual.ln_post.bias", "text_projection"}
    run.save_checkpoint(tmp_path / "tuned.ckpt")
    stored = torch.load(tmp_path / "tuned.ckpt", weights_only=True)
    assert set(stored["state_dict"]) == {f"clip.{name}" for name in changed}
    again = ClipClassifier.load_from_checkpoint(tmp_path / "tuned.ckpt")
    torch.testing.assert_close(again.eval()(images_of()), module.eval()(images_of()))


def test_a_frozen_classifier_has_an_empty_state_dict_that_loads(small):
    module = classifier(small)
    assert not module.state_dict()
    module.load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict({"clip.nothing": torch.zeros(1)})


def test_a_missing_trained_weight_is_an_error(small):
    with pytest.raises(RuntimeError, match=r"Missing key.*clip\.visual\.ln_post\.weight"):
        classifier(small, trainable=["visual.ln_post"]).load_state_dict({})


def test_frozen_towers_stay_in_eval_mode(small):
    module = classifier(small, trainable=["visual.ln_post"]).train()
    training = {name for name, part in module.clip.named_modules() if part.training}
    assert training == {"visual.ln_post"}
    assert module.training
    assert not module.eval().clip.visual.ln_post.training


def test_checkpoint_names_the_classes_of_the_time(small, tmp_path):
    module, run = classifier(small), trainer(tmp_path, callbacks=Adapter())
    module.set_classes(["blue one", "red one", "red two"])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = ClipClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.class_names == ["blue one", "red one", "red two"]
    assert again.novel_class_names == NOVEL
    other = ClipClassifier.load_from_checkpoint(tmp_path / "last.ckpt", class_names=NOVEL)
    assert other.class_names == NOVEL


class SaveAndStop(Callback):
    def __init__(self, path, after):
        self.path, self.after = path, after

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.after:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_resumed_training_is_that_of_one_run(small, tmp_path):
    path, whole, parts = tmp_path / "half.ckpt", Adapter(), Adapter()
    parts.part.load_state_dict(whole.part.state_dict())
    trainer(tmp_path, max_epochs=4, callbacks=whole).fit(classifier(small, lr=0.1), loader())
    run = trainer(tmp_path, max_epochs=4, callbacks=[parts, SaveAndStop(path, after=2)])
    run.fit(classifier(small, lr=0.1), loader())
    half = parts.part.weight.detach().clone()
    parts.part.reset_parameters()
    trainer(tmp_path, max_epochs=4, callbacks=parts).fit(classifier(small, lr=0.1), loader(), ckpt_path=path)
    assert torch.equal(parts.part.weight, whole.part.weight)
    assert not torch.equal(parts.part.weight, half)


class Passes(Callback):
    """Counts how often the text tower runs in training, validation and test."""

    def __init__(self):
        self.counts = {}

    def setup(self, trainer, pl_module, stage):
        def count(*_):
            name = trainer.state.stage.value
            self.counts[name] = self.counts.get(name, 0) + 1

        pl_module.clip.ln_final.register_forward_hook(count)


def test_text_is_encoded_once_an_epoch_where_it_carries_no_gradient(small, tmp_path):
    passes = Passes()
    run = trainer(tmp_path, max_epochs=2, callbacks=[passes, Adapter()])
    run.fit(classifier(small), loader(), loader())  # 3 batches each
    assert passes.counts == {"train": 2, "validate": 2}


def test_text_is_encoded_in_each_step_where_it_carries_a_gradient(small, tmp_path):
    passes = Passes()
    run = trainer(tmp_path, max_epochs=2, callbacks=passes)
    run.fit(classifier(small, trainable=["token_embedding"]), loader(), loader())
    assert passes.counts == {"train": 6, "validate": 2}


def test_a_test_encodes_each_list_of_classes_once(small, tmp_path):
    passes = Passes()
    trainer(tmp_path, callbacks=passes).test(classifier(small), [loader(), loader(8, 2)], verbose=False)
    assert passes.counts == {"test": 2}


def test_fresh_features_are_not_those_kept(small, tmp_path):
    seen = []

    class Switch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            kept = pl_module.text_features()
            with torch.no_grad():
                pl_module.clip.text_projection.mul_(-1)
            seen.append((kept, pl_module.text_features(), pl_module.text_features(fresh=True)))

    trainer(tmp_path, callbacks=[Switch(), Adapter()], limit_train_batches=1).fit(classifier(small), loader())
    kept, again, fresh = (features.detach() for features in seen[0])
    assert torch.equal(kept, again)
    assert not torch.equal(kept, fresh)


def test_validation_within_an_epoch_sees_the_text_features_of_the_moment(small, tmp_path):
    module = classifier(small, trainable=["text_projection"], lr=1.0, warmup_epochs=0)
    run = trainer(tmp_path, val_check_interval=1)  # three times in the epoch, the last at its end
    run.fit(module, loader(), loader())
    images, targets = loader().dataset.tensors
    torch.testing.assert_close(run.callback_metrics["val/loss"], cross_entropy(module(images), targets).detach())


def test_base_novel_and_their_harmonic_mean(small, tmp_path):
    module, run = classifier(small), trainer(tmp_path)
    run.test(module, [loader(20, 3), loader(12, 2, seed=1)], verbose=False)
    shares = []
    for names, (images, targets) in (
        (BASE, loader(20, 3).dataset.tensors),
        (NOVEL, loader(12, 2, seed=1).dataset.tensors),
    ):
        module.set_classes(names)
        shares.append((module(images).argmax(1) == targets).float().mean())
    base, novel = shares
    assert run.callback_metrics["test/base"] == base
    assert run.callback_metrics["test/novel"] == novel
    torch.testing.assert_close(run.callback_metrics["test/harmonic_mean"], 2 / (1 / base + 1 / novel))


def test_classes_are_the_base_classes_again_after_the_test(small, tmp_path):
    module, run = classifier(small), trainer(tmp_path)
    run.test(module, [loader(), loader(8, 2)], verbose=False)
    assert module.class_names == BASE
    with pytest.raises(ValueError, match="there are 2 class names, but a target is 2"):
        run.test(module, [loader(), loader()], verbose=False)
    assert module.class_names == BASE


def test_one_test_loader_has_base_classes_alone(small, tmp_path):
    run = trainer(tmp_path)
    run.test(classifier(small), loader(), verbose=False)
    assert set(run.callback_metrics) == {"test/base"}


def test_a_second_loader_needs_novel_names(small, tmp_path):
    module = ClipClassifier(BASE, source="small", model=small)
    with pytest.raises(ValueError, match="2 test loaders and 0 novel_class_names"):
        trainer(tmp_path).test(module, [loader(), loader(8, 2)], verbose=False)


def test_names_come_from_the_datamodule(small, tmp_path):
    pytest.importorskip("sklearn")
    from lightning_feat.data.captioned_digits import CaptionedDigitsDataModule

    data = CaptionedDigitsDataModule(num_classes=4, shots=2, test_per_class=2, image_size=16)
    module = ClipClassifier(source="small", model=small)
    with pytest.raises(RuntimeError, match="there are no class names yet"):
        _ = module.class_names
    trainer(tmp_path, callbacks=Adapter()).fit(module, data)
    assert module.class_names == data.class_names
    assert module.novel_class_names == data.novel_class_names
    trainer(tmp_path).test(module, data, verbose=False)


def test_predict_gives_logits_and_classes_can_be_swapped(small, tmp_path):
    module = classifier(small)
    predicted = torch.cat(trainer(tmp_path).predict(module, loader()))
    torch.testing.assert_close(predicted, module.eval()(loader().dataset.tensors[0]).detach())
    with module.classes(NOVEL):
        assert module(images_of(3)).shape == (3, 2)
    module.set_classes(NOVEL)
    assert module(images_of(3)).shape == (3, 2)


def test_nothing_to_train_is_an_error_at_the_start(small, tmp_path):
    with pytest.raises(RuntimeError, match="nothing trains: both towers are frozen"):
        trainer(tmp_path).fit(classifier(small), loader())


def test_copies_carry_the_state_dict_that_shows_what_trains(small):
    module = classifier(small, trainable=["logit_scale"])
    again = copy.deepcopy(module)
    assert list(again.state_dict()) == ["clip.logit_scale"]
    with torch.no_grad():
        again.clip.logit_scale.add_(1)
    assert module.clip.logit_scale != again.clip.logit_scale


def test_bf16_keeps_the_logits_in_float32(small):
    module, images = classifier(small), images_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = module(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, module(images), atol=0.5, rtol=0)  # features of 8 bits, times 14


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_towers_learn_the_prompts_that_plain_ones_do(small, tmp_path, whole):
    ends = []
    for compiled in (False, True):
        torch._dynamo.reset()
        module = classifier(small, lr=0.05, warmup_epochs=0)
        torch.manual_seed(1)
        callback = PromptLearner(depth=2, gram_weight=0.01)
        target = module
        if compiled and whole:
            target = torch.compile(module, backend="eager")
        elif compiled:
            module.clip.visual = torch.compile(module.clip.visual, backend="eager")
        fit = trainer(tmp_path, callbacks=[callback], max_epochs=2)
        fit.fit(target, loader(), loader())
        tested = fit.test(target, [loader(), loader(num_classes=2)], verbose=False)
        ends.append((flat(callback.learned), {name: value for part in tested for name, value in part.items()}))
    torch.testing.assert_close(ends[0], ends[1])


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_checkpointed_blocks_train_alike(small, tmp_path):
    ends = []
    for enable in (False, True):
        module = classifier(small, trainable=["visual.class_embedding"], grad_checkpointing=enable, lr=0.1)
        trainer(tmp_path).fit(module, loader())
        ends.append(module.clip.visual.class_embedding.detach())
    torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "a photo"}, r"template=\['a photo'\]"),
        ({"template": []}, r"template=\[\]"),
        ({"class_names": ["one"]}, "two at least"),
        ({"class_names": ["one", "one"]}, "each another"),
        ({"class_names": "one two"}, "must be a list of strings"),
        ({"lr": -1.0}, "lr=-1.0"),
        (
            {"trainable": ["visual.ln"]},
            r"trainable='visual.ln' is neither a submodule nor a parameter of clip, which has visual",
        ),
        ({"model": "none.ckpt"}, "there is no checkpoint 'none.ckpt'"),
        ({"pretrained": "openai"}, "pretrained='openai' is for source='open_clip' alone"),
        ({"source": "clip"}, "source='clip'"),
        ({"source": "huggingface"}, "no folder with a config.json"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message, small):
    with pytest.raises(ValueError, match=message):
        ClipClassifier(**{"class_names": BASE, "source": "small", "model": small, **arguments})


def test_unknown_open_clip_model_is_refused():
    pytest.importorskip("open_clip")
    with pytest.raises(ValueError, match="open_clip has no model 'ViT-C-3'"):
        ClipClassifier(BASE, model="ViT-C-3")


def test_grad_checkpointing_is_not_for_huggingface(folder):
    with pytest.raises(ValueError, match="grad_checkpointing needs source='open_clip' or 'small'"):
        ClipClassifier(BASE, source="huggingface", model=folder, grad_checkpointing=True)


@pytest.mark.parametrize(("source", "missing"), [("open_clip", "open_clip"), ("huggingface", "transformers")])
def test_missing_extra_is_named(source, missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-feat\[clip\]"'):
        load_clip(source, str(tmp_path))


def test_batch_without_images_and_targets_is_described(small):
    with pytest.raises(ValueError, match="begin with images and targets, got a dict"):
        classifier(small).training_step({"image": 0}, 0)
