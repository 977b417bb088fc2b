"""Prompts stand in place of words that all texts have, and else before the words, all of which are kept."""

import copy
import warnings

import pytest
import torch

from lightning_feat.joints.clip.hooks import installed_on
from lightning_feat.joints.clip.towers import find_clip_towers
from lightning_feat.joints.reference.tower_comparison import _TokenTap
from lightning_feat.layers.feature_shift.prompt_hooks import insert_prompts
from lightning_feat.layers.feature_shift.prompts import DeepPrompts
from tests.joints.clip.models import EOS, LIBRARIES, READERS, SIZE, enlarge, features, make, reader

pytest.importorskip("open_clip")
pytest.importorskip("transformers")
N = 2
KINDS = [*LIBRARIES, *READERS]
ENDS = {"siglip": (None, 1, 1), "averaged": (None, 1, 1), "timm": (None, 1, 1), "transformers-siglip": (None, 1, 1)}
ENDS |= {"coca": (37, 38, 0), "metaclip": (0, 2, 1)}


def model_of(name):
    return make(name) if name in LIBRARIES else reader(name)


def text(name, *words, length=10):
    """Ids ``(1, length)`` of these words, with the start and the end that the tower knows."""
    start, end, pad = ENDS.get(name, (1, EOS, 0))
    ids = [*([] if start is None else [start]), *words, end]
    return torch.tensor([ids + [pad] * (length - len(ids))])


def read(name, model, ids):
    size = 160 if name == "timm" else SIZE
    with torch.no_grad():
        return features(model, torch.zeros(1, 3, size, size), ids)[1]


def prompted(name, template_ids=None, depth=2):
    model = model_of(name)
    towers = find_clip_towers(model)
    torch.manual_seed(1)
    prompts = enlarge(DeepPrompts.for_towers(towers, "text", depth, N, template_ids=template_ids))
    return model, prompts, insert_prompts(towers, prompts)


@pytest.mark.parametrize("name", KINDS)
def test_a_name_at_the_beginning_moves_behind_the_prompts(name):
    names = torch.cat([text(name, 11, 20), text(name, 12, 20), text(name, 11, 13, 14, 20)])  # "{} texture"
    model, prompts, insertion = prompted(name)
    by_hook = read(name, model, names)
    assert prompts.words == [-1]
    twin, other, _ = prompted(name, text(name, 30, 31)[0])
    other.load_state_dict(prompts.state_dict())
    by_hand = torch.cat([text(name, 30, 31, *row) for row in ([11, 20], [12, 20], [11, 13, 14, 20])])
    torch.testing.assert_close(by_hook, read(name, twin, by_hand), rtol=0, atol=1e-6)  # float32, other lengths
    assert (by_hook[0] - by_hook[1]).abs().max() > 1e-3
    insertion.remove()
    assert torch.equal(read(name, model, names), read(name, model_of(name), names))


@pytest.mark.parametrize("name", KINDS)
def test_a_text_has_the_same_features_alone_and_beside_others(name):
    texts = torch.cat([text(name, 30, 31, 11), text(name, 30, 31, 12, 13), text(name, 14), text(name, 30, 15)])
    model, prompts, _ = prompted(name, texts[0])
    together = read(name, model, texts)
    alone = torch.cat([read(name, model, row[None]) for row in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)  # float32, batches of other sizes
    assert prompts.words == [30, 31]
    assert torch.cdist(together, together).fill_diagonal_(1).min() > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_a_text_that_fills_its_tower_has_no_room_and_one_token_less_than_needed_has_none(name):
    length = {"coca": 10}.get(name, 10)
    room = length - len([i for i in (ENDS.get(name, (1, EOS, 0))[:2]) if i is not None])
    for words, fits in ((room - N, True), (room - N + 1, False), (room, False)):
        ids = torch.stack([torch.cat([text(name, w, *range(20, 19 + words))]) for w in (11, 12)])[:, 0]
        model, _, _ = prompted(name)
        model.register_buffer("tokens", ids)
        if fits:
            assert (read(name, model, model.tokens).diff(dim=0)).abs().max() > 1e-3
            continue
        with pytest.raises(ValueError, match=rf"text 0 fills \d+ of the 10 tokens .* {N} prompts have no room"):
            read(name, model, model.tokens)
        del model.tokens
        with pytest.warns(UserWarning, match="it loses its last, as in a shorter tower"):
            cut = read(name, model, ids + 0)
        assert cut.diff(dim=0).abs().max() > 1e-3
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read(name, model, ids.flip(0))  # said once


@pytest.mark.parametrize("name", ["huggingface", "metaclip"])
def test_a_short_batch_grows_where_the_tower_takes_longer_texts(name):
    model, _, _ = prompted(name)
    ids = torch.cat([text(name, w, 20, length=4) for w in (11, 12)])
    mask = torch.ones_like(ids)
    short = model.get_text_features(input_ids=ids, attention_mask=mask)
    long = model.get_text_features(input_ids=torch.cat([text(name, w, 20) for w in (11, 12)]))
    short, long = (getattr(out, "pooler_output", out) for out in (short, long))
    torch.testing.assert_close(short, long, rtol=0, atol=1e-6)  # float32, other lengths


def test_classes_that_would_become_one_are_refused():
    ids = torch.cat([text("open_clip", 30, 31, 11), text("open_clip", 11)])  # "a photo dog" and "dog"
    model, _, _ = prompted("open_clip", ids[0])
    with pytest.raises(ValueError, match="texts 0 and 1 differ only where prompts would stand"):
        read("open_clip", model, ids)


def test_classes_one_by_one_are_not_covered():
    model, prompts, _ = prompted("open_clip")
    read("open_clip", model, text("open_clip", 30, 31, 11))
    read("open_clip", model, text("open_clip", 30, 31, 12))
    assert prompts.words == [30, 31]
    model, prompts, _ = prompted("open_clip")
    read("open_clip", model, text("open_clip", 11, 20))
    with pytest.raises(ValueError, match="the first text came alone"):
        read("open_clip", model, text("open_clip", 12, 20))


def test_where_nothing_is_known_of_the_entrance_first_words_are_replaced_and_names_stay_apart():
    layers = {"text_embedding": "token_embedding", "text_blocks": "transformer.resblocks"}
    for together in (True, False):
        model = make()
        towers = find_clip_towers(model, layers)
        insert_prompts(towers, DeepPrompts.for_towers(towers, "text", 1, N))
        ids = torch.cat([text("open_clip", w, 20, 9) for w in (11, 12)])
        with pytest.raises(
            ValueError, match="where prompts would stand" if together else "differs from an earlier one"
        ):
            read("open_clip", model, ids) if together else [read("open_clip", model, row[None]) for row in ids]


def test_a_copy_of_the_model_has_its_prompts_at_the_same_places():
    model, _, _ = prompted("open_clip")
    ids = torch.cat([text("open_clip", w, 20) for w in (11, 12)])
    before = read("open_clip", model, ids)
    twin = copy.deepcopy(model)
    shared = torch.cat([text("open_clip", 30, 31, w, 20) for w in (11, 12)])
    assert torch.equal(read("open_clip", twin, ids), before)
    assert torch.equal(read("open_clip", twin, shared), read("open_clip", model, shared))


@pytest.mark.parametrize("name", ["open_clip", "coca", "siglip"])
def test_tokens_are_compared_with_the_same_tokens_without_prompts(name):
    texts = torch.cat([text(name, 30, 31, 11), text(name, 14), text(name, 15, 16, 17)])
    model, _, _ = prompted(name, texts[0])
    tower = find_clip_towers(model).text
    heard = []
    tower.on_block_output(0, lambda tokens: heard.append(tokens))
    read(name, model, texts)
    placed = tower.placed(_ids_of(tower))
    assert torch.equal(placed.given, texts)
    mask = tower.comparable_tokens(placed.ids, N)
    appended = torch.full((len(texts), mask.shape[1] - placed.ids.shape[1]), -1)
    now, given = torch.cat([placed.ids, appended], 1), torch.cat([texts, appended], 1)
    for turned in (False, True):
        tap = _TokenTap("", keep_graph=False)
        tap.shape = mask.T.shape if turned else mask.shape
        rows = tap.rows_of(mask, placed.source, texts.shape[1])
        same = (given.T if turned else given).flatten()[rows]
        assert torch.equal(same, (now.T if turned else now).flatten()[tap.spread(mask)])
        assert len(same) > 8


def _ids_of(tower):
    return next(hook.placing.last.ids for hook in installed_on(tower._words()))


@pytest.mark.slow
def test_in_compiled_code_all_words_are_kept_too():
    ids = torch.cat([text("open_clip", w, 20) for w in (11, 12)])
    model, prompts, _ = prompted("open_clip", text("open_clip", 30, 31)[0])
    traced = torch.compile(model.encode_text, backend="eager")(ids)
    torch.testing.assert_close(traced, read("open_clip", model, ids), rtol=0, atol=1e-6)
    model, prompts, _ = prompted("open_clip")
    first = torch.compile(model.encode_text, backend="eager")(ids)  # looked at outside of the graph
    assert prompts.words == [-1]
    torch.testing.assert_close(first, read("open_clip", model, ids), rtol=0, atol=1e-6)
    torch.compiler.reset()
