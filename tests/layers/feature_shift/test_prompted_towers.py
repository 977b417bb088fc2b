"""What must hold of every tower that takes prompts, however it reads a text and pools an image."""

import warnings

import pytest
import torch

from lightning_feat.joints.clip.towers import find_clip_towers
from lightning_feat.layers.feature_shift.prompt_hooks import insert_prompts
from lightning_feat.layers.feature_shift.prompts import DeepPrompts
from tests.joints.clip.models import EOS, READERS, SIZE, enlarge, features, make, reader

pytest.importorskip("open_clip")
pytest.importorskip("transformers")
WORDS = 3


def whole(name):
    """A model, a text of full length and the place of its first word."""
    _, first, ids = READERS[name]
    return reader(name), torch.tensor([ids]), first


def pictures(name, n=2):
    size = 160 if name == "timm" else SIZE
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", READERS)
def test_prompts_equal_to_the_words_they_replace_change_nothing(name):
    model, ids, _ = whole(name)
    towers = find_clip_towers(model)
    plain = features(model, pictures(name), ids)[1]
    prompts = DeepPrompts.for_towers(towers, "text", 1, WORDS, template_ids=ids[0])
    insertion = insert_prompts(towers, prompts)
    assert torch.equal(features(model, pictures(name), ids)[1], plain)
    with torch.no_grad():
        prompts.text[0].normal_()
    assert not torch.allclose(features(model, pictures(name), ids)[1], plain, atol=1e-3)
    insertion.remove()
    assert torch.equal(features(model, pictures(name), ids)[1], plain)


@pytest.mark.parametrize("name", READERS)
def test_the_words_after_the_prompts_are_all_read(name):
    model, ids, first = whole(name)
    towers = find_clip_towers(model)
    assert towers.text.first_word == first
    insert_prompts(towers, DeepPrompts.for_towers(towers, "text", 2, WORDS))
    read = features(model, pictures(name), ids)[1]
    for place in range(first + WORDS, ids.shape[1] - 1):  # up to the end of a text of full length
        other = ids.clone()
        other[0, place] += 5 if ids[0, place] < 30 else -5
        assert (features(model, pictures(name), other)[1] - read).abs().max() > 1e-4, place


@pytest.mark.parametrize("name", READERS)
def test_gradients_arrive_and_images_without_prompts_are_as_before(name):
    model, ids, _ = whole(name)
    towers = find_clip_towers(model)
    plain = features(model, pictures(name), ids)[0]
    prompts = enlarge(DeepPrompts.for_towers(towers, "independent", 2, WORDS))
    insertion = insert_prompts(towers, prompts)
    image, text = features(model, pictures(name), ids)
    assert image.shape == plain.shape
    assert not torch.allclose(image, plain, atol=1e-4)
    (image.square().sum() + text.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prompts.parameters())
    insertion.remove()
    assert torch.equal(features(model, pictures(name), ids)[0], plain)


def test_what_pools_over_tokens_gets_no_prompts():
    model = reader("averaged")
    heard, towers = [], find_clip_towers(model)
    insert_prompts(towers, DeepPrompts.for_towers(towers, "vision", 2, WORDS))
    model.visual.ln_post.register_forward_pre_hook(lambda layer, args: heard.append(args[0]))
    pooled = model.encode_image(pictures("averaged"))
    tokens = heard[0]
    assert tokens.shape[1] == 17  # the class token and 16 patches
    expected = model.visual.ln_post(tokens)[:, 1:].mean(1) @ model.visual.proj
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)  # float32, another order


def test_tokens_that_mean_the_same_fit_the_tokens_of_the_tower():
    for name, ids in {
        "coca": [[37, 12, 13, 14, 15, 38, 0, 0, 0, 0]],
        "siglip": [[11, 12, 13, 14, 1, 1, 1, 1, 1, 1]],
    }.items():
        model, heard = reader(name), []
        tower = find_clip_towers(model).text
        tower.on_block_output(0, lambda tokens, heard=heard: heard.append(tokens))
        model.encode_text(torch.tensor(ids))
        mask = tower.comparable_tokens(torch.tensor(ids), num_prompts=2)
        assert mask.shape == heard[0].shape[:2]
        same = {"coca": [1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1], "siglip": [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]}[name]
        assert mask.int().tolist() == [same]


# Class names that would become one


def prompted_text(**kwargs):
    model = make("open_clip")
    towers = find_clip_towers(model)
    insert_prompts(towers, DeepPrompts.for_towers(towers, "text", 1, 2))
    return model


def test_names_with_the_same_tokens_are_refused_and_captions_are_warned_of():
    ids = torch.tensor([[1, 7, 9, 6, EOS, 0, 0, 0, 0, 0]] * 2)
    model = prompted_text()
    with pytest.warns(UserWarning, match="texts 0 and 1 have the same tokens"):
        model.encode_text(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_text(ids)  # said once
    model = prompted_text()
    model.register_buffer("tokens", ids)
    with pytest.raises(ValueError, match="as names of classes they are one"):
        model.encode_text(model.tokens)


def test_texts_without_their_end_and_without_a_start_are_refused():
    model = reader("metaclip")
    towers = find_clip_towers(model)
    insert_prompts(towers, DeepPrompts.for_towers(towers, "text", 1, 2))
    with pytest.raises(ValueError, match="a text has no token 2"):
        model.get_text_features(input_ids=torch.tensor([[0, 7, 8, 9, 10, 11, 12, 13, 14, 15]]))
    with pytest.raises(ValueError, match="set start_token=False"):
        prompted_text().encode_text(torch.tensor([[5, 7, 9, 6, EOS, 0, 0, 0, 0, 0], [6, 7, 9, 6, EOS, 0, 0, 0, 0, 0]]))


def test_what_the_user_says_of_a_tower_holds():
    text = find_clip_towers(reader("siglip"), eos_token_id=1, start_token=True).text
    assert text.first_word == 1
    assert text.eos_positions(torch.tensor([[5, 6, 7, 1, 1]])).tolist() == [3]


def test_a_decoder_of_all_tokens_keeps_prompts_out():
    from torch import nn

    module = nn.Module()
    module.clip, module.decoder = make("huggingface"), nn.Linear(2, 2)
    towers = find_clip_towers(module)
    assert towers.text.first_word == 1
    with pytest.raises(ValueError, match="a decoder, Linear, reads all tokens"):
        _ = towers.image
