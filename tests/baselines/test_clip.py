import json
import math
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from lightning import seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader, DistributedSampler

from lightning_feat.baselines.clip import SmallClip
from lightning_feat.baselines.clip_pretraining import SmallClipPretraining, contrastive_loss, load_small_clip
from lightning_feat.baselines.clip_tokenizer import WordTokenizer
from tests.helpers import trainer
from tests.pairs import run_pair

SMALL = {"context_length": 6, "image_size": 16, "patch_size": 8, "embed_dim": 8, "width": 16, "layers": 2, "heads": 2}
TOWERS = {f"{kind}_{name}": SMALL[name] for kind in ("vision", "text") for name in ("width", "layers", "heads")}
SIZES = {name: SMALL[name] for name in ("context_length", "image_size", "patch_size", "embed_dim")}
CAPTIONS = ["a red one", "a blue two", "a red two", "a blue one"]


def clip(seed=0):
    torch.manual_seed(seed)
    return SmallClip(vocab_size=9, **SIZES, **TOWERS)


def pretraining(**arguments):
    torch.manual_seed(0)
    return SmallClipPretraining(CAPTIONS, **{**SMALL, "warmup_steps": 2, **arguments})


def pairs(num=16, batch_size=4, size=16):
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(3, size, size, generator=generator), CAPTIONS[i % 4]) for i in range(num)]
    return DataLoader(data, batch_size)


IDS = torch.tensor([[2, 3, 4, 8, 0, 0], [2, 5, 8, 0, 0, 0]])  # the end is 8


def test_text_features_are_read_at_the_end_token():
    model, read = clip(), []
    model.ln_final.register_forward_hook(lambda _, __, out: read.append(out))
    features = model.encode_text(IDS)
    by_hand = torch.stack([read[0][0, 3], read[0][1, 2]]) @ model.text_projection
    torch.testing.assert_close(features, by_hand)


def test_text_tower_does_not_look_ahead():
    model, changed = clip(), IDS.clone()
    changed[:, 4:] = 7  # what follows the end
    torch.testing.assert_close(model.encode_text(IDS), model.encode_text(changed))
    torch.testing.assert_close(model.encode_text(IDS), model.encode_text(IDS[:, :4]))


def test_image_features_are_those_of_the_tower_written_out():
    model, images = clip().eval(), torch.randn(2, 3, 16, 16)
    tower = model.visual
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 4, -1)
    tokens = torch.cat([tower.class_embedding.expand(2, 1, -1), patches @ tower.conv1.weight.flatten(1).T], 1)
    x = tower.ln_pre(tokens + tower.positional_embedding)
    for block in tower.transformer.resblocks:
        query, key, value = (
            part.unflatten(2, (2, 8)).transpose(1, 2)
            for part in (block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, 2)
        )
        mixed = (query @ key.transpose(2, 3) / math.sqrt(8)).softmax(3) @ value
        x = x + block.attn.out_proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    torch.testing.assert_close(model.encode_image(images), tower.ln_post(x[:, 0]) @ tower.proj)


def test_forward_gives_features_of_length_one_and_the_scale():
    model, images = clip(), torch.randn(2, 3, 16, 16)
    image_features, text_features, scale = model(images, IDS)
    torch.testing.assert_close(
        image_features @ text_features.T,
        cosine_similarity(model.encode_image(images)[:, None], model.encode_text(IDS)[None], dim=2),
    )
    assert scale.item() == pytest.approx(1 / 0.07)


def test_checkpointed_blocks_have_the_same_gradient():
    gradients = []
    for enable in (False, True):
        model = clip()
        model.set_grad_checkpointing(enable)
        sum(f.square().sum() for f in (model.encode_image(torch.ones(2, 3, 16, 16)), model.encode_text(IDS))).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_it_can_be_exported_to_what_compile_sees():
    model = clip().eval()
    exported = torch.export.export(model, (torch.randn(2, 3, 16, 16), IDS)).module()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(exported(images, IDS)[0], model(images, IDS)[0])


def test_loss_is_the_mean_of_both_directions():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(5, 3, generator=generator).double() for _ in range(2))
    scale = torch.tensor(2.0).double()
    terms = []
    for i in range(5):
        row = [2 * float(image[i] @ text[j]) for j in range(5)]
        column = [2 * float(image[j] @ text[i]) for j in range(5)]
        terms += [math.log(sum(map(math.exp, side))) - side[i] for side in (row, column)]
    assert contrastive_loss(image, text, scale).item() == pytest.approx(sum(terms) / 10)


def test_loss_is_log_n_where_nothing_is_told_apart():
    same = torch.ones(7, 2)
    assert contrastive_loss(same, same, torch.tensor(3.0)).item() == pytest.approx(math.log(7))


def test_pretraining_learns_pairs_by_heart(tmp_path):
    module, run = pretraining(lr=5e-3), trainer(tmp_path, max_epochs=60)
    loader = pairs(4)
    run.fit(module, loader, loader)
    assert run.callback_metrics["val/accuracy"] == 1
    assert run.callback_metrics["val/loss"] < 0.5 < math.log(4)
    assert {"train/loss", "train/logit_scale"} <= set(run.callback_metrics)


def test_scale_stays_below_a_hundred(tmp_path):
    module = pretraining(lr=0.0)
    module.clip.logit_scale.data.fill_(9.0)
    trainer(tmp_path).fit(module, pairs())
    assert module.clip.logit_scale.exp().item() == pytest.approx(100)


def test_a_caption_with_the_same_words_is_right(tmp_path):
    module, run = pretraining(), trainer(tmp_path)
    image = torch.randn(3, 16, 16)
    run.validate(module, DataLoader([(image, "a red one")] * 3, 3), verbose=False)
    assert run.callback_metrics["val/accuracy"] == 1


def test_learning_rate_rises_on_a_line_and_falls_on_a_half_cosine(tmp_path):
    module, run, rates = pretraining(lr=0.1), trainer(tmp_path, max_epochs=2), []
    module.on_train_batch_start = lambda *_: rates.append(run.optimizers[0].param_groups[0]["lr"])
    run.fit(module, pairs())  # 8 steps
    cosine = [0.05 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx([0.05, 0.1, *cosine])


def test_decay_is_on_matrices_alone():
    decayed, rest = pretraining().configure_optimizers()["optimizer"].param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in rest["params"]} == {0, 1}
    assert 1 not in {p.ndim for p in decayed["params"]}


def test_checkpoint_is_all_that_is_needed(tmp_path):
    module, run = pretraining(), trainer(tmp_path)
    run.fit(module, pairs())
    run.save_checkpoint(tmp_path / "clip.ckpt")
    model, tokenizer = load_small_clip(tmp_path / "clip.ckpt")
    assert tokenizer.words == module.tokenizer.words
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.encode_image(images, True), module.eval()(images, CAPTIONS[:2])[0])
    torch.testing.assert_close(model.encode_text(tokenizer(CAPTIONS), True), module(images, CAPTIONS)[1])


def test_other_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint"):
        load_small_clip(tmp_path / "none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of SmallClipPretraining"):
        load_small_clip(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ((torch.zeros(2, 3, 16, 16), torch.arange(2)), r"a tuple of \(Tensor, Tensor\)"),
        ({"image": 0, "text": 1}, r"a dict with keys \['image', 'text'\]"),
    ],
)
def test_batch_without_captions_is_described(batch, named):
    with pytest.raises(ValueError, match=f"images and a list of captions, got {named}"):
        pretraining().training_step(batch, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 15}, "width=15, layers=2 and heads=2"),
        ({"patch_size": 7}, "image_size=16 is no multiple of patch_size=7"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"context_length": 2}, "context_length=2"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        pretraining(**arguments)


def test_images_and_texts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"images are \(2, 3, 8, 8\), but this tower reads \(N, 3, 16, 16\)"):
        clip().encode_image(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="texts of 7 tokens are longer than context_length=6"):
        clip().encode_text(torch.zeros(2, 7, dtype=torch.long))


def test_tokens_are_the_words_between_start_and_end():
    tokenizer = WordTokenizer(["a red one.", "TWO"], context_length=8)
    assert tokenizer.words == (".", "a", "one", "red", "two")
    assert tokenizer(["A two.", ""]).tolist() == [[2, 4, 7, 3, 8, 0, 0, 0], [2, 8, 0, 0, 0, 0, 0, 0]]
    assert tokenizer("a red one").shape == (1, 8)
    assert (tokenizer("a red one").argmax(1), tokenizer.eos_id, tokenizer.vocab_size) == (4, 8, 9)


def test_unknown_words_share_one_id_and_can_be_listed():
    tokenizer = WordTokenizer(["a b"], context_length=6)
    assert tokenizer("a cat, b").tolist() == [[2, 3, 1, 1, 4, 5]]
    assert tokenizer.unknown(["a cat, b", "Dog"]) == [",", "cat", "dog"]


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="'a a a' makes 5 tokens with start and end, but context_length=4"):
        WordTokenizer(["a"], context_length=4)("a a a")


@pytest.mark.parametrize(("words", "message"), [("a b", "give a list"), ([], "words is empty")])
def test_a_vocabulary_of_the_wrong_kind_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        WordTokenizer(words)


def trained_weights(world):
    """All weights after two epochs of three steps; each step shows two processes what one would see."""
    seed_everything(0, verbose=False)
    module, data = pretraining(), pairs(12).dataset
    # Not AdamW: the gradient of a key's bias is zero but for rounding, by which it would divide.
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9)
    two = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, "use_distributed_sampler": False}
    if world == 2:
        rank = int(os.environ["LOCAL_RANK"])
        loader = DataLoader(data, 2, sampler=DistributedSampler(data, 2, rank, shuffle=False))
    else:
        loader = DataLoader(data, 4)
    with tempfile.TemporaryDirectory() as root:
        trainer(Path(root), max_epochs=2, **(two if world == 2 else {})).fit(module, loader)
    return torch.cat([p.detach().flatten() for p in module.parameters()]).double().tolist()


@pytest.mark.slow
def test_two_processes_compare_the_pairs_of_both(tmp_path):
    pair = run_pair(sys.modules[__name__], tmp_path)
    assert pair[0] == pair[1]
    alone = trained_weights(1)
    assert pair[0] == pytest.approx(alone, rel=1e-4, abs=2e-5)  # float32, 6 steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps(trained_weights(2)))
