"""Prompts put in by hooks are the prompts put in by hand, in every library and under everything Lightning turns on."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_feat.functional.feature_shift.prompt_gram import gram_norm
from lightning_feat.joints.clip.towers import find_clip_towers, remove_hooks
from lightning_feat.layers.feature_shift.prompt_hooks import insert_prompts
from lightning_feat.layers.feature_shift.prompts import DeepPrompts
from tests.joints.clip import models as clip_models
from tests.joints.clip.models import (
    BLOCKS,
    IMAGE_WIDTH,
    LIBRARIES,
    TEXT_WIDTH,
    enlarge,
    gradients,
    images,
    lists,
    logits,
    logits_by_hand,
    make,
    resnet,
    texts,
    tokens_first,
)
from tests.layers.feature_shift import prompts_ddp_cases
from tests.pairs import run_pair

LAYOUTS = {
    "maple": {"coupling": "maple", "depth": 3, "length": 2},
    "independent": {"coupling": "independent", "depth": 4, "length": 2, "image_depth": 2, "image_length": 3},
    "text": {"coupling": "text", "depth": 1, "length": 3},
    "vision": {"coupling": "vision", "depth": BLOCKS, "length": 1},
}
# float32 logits up to 14 (cosines times 1 / 0.07), in which another kernel of attention rounds another way
EXACT = {"rtol": 0, "atol": 2e-5}


def prompted(library="open_clip", **kwargs):
    """A model, the prompts of its size, large enough to show, and their insertion."""
    model = make(library)
    prompts = enlarge(DeepPrompts.for_towers(find_clip_towers(model), **{**LAYOUTS["maple"], **kwargs}))
    return model, prompts, insert_prompts(find_clip_towers(model), prompts)


def loss_of(logits):
    return cross_entropy(logits, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_by_hooks_is_by_hand(library, layout):
    model, prompts, insertion = prompted(library, **layout)
    by_hook, by_hand = (
        logits(model, images(), texts(4)),
        logits_by_hand(make(library), images(), texts(4), **lists(prompts)),
    )
    torch.testing.assert_close(by_hook, by_hand, **EXACT)
    insertion.remove()
    plain = logits(model, images(), texts(4))
    torch.testing.assert_close(plain, logits_by_hand(make(library), images(), texts(4)), **EXACT)
    assert (by_hook - plain).abs().mean() > 0.02  # a thousand times the tolerance


@pytest.mark.parametrize("library", LIBRARIES)
def test_so_are_the_gradients_of_all_prompts_and_projections(library):
    model, prompts, _ = prompted(library)
    twin = copy.deepcopy(prompts)
    loss_of(logits(model, images(), texts())).backward()
    loss_of(logits_by_hand(make(library), images(), texts(), **lists(twin))).backward()
    by_hook, by_hand = gradients(prompts), gradients(twin)
    assert set(by_hook) == {name for name, _ in prompts.named_parameters()}
    for name, gradient in by_hook.items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(gradient, by_hand[name], rtol=1e-4, atol=1e-6)  # float32 sums of another order


def test_so_it_is_where_tokens_come_before_samples_between_the_blocks():
    model, prompts, _ = prompted()
    turned = tokens_first(make())
    insert_prompts(find_clip_towers(turned), prompts)
    torch.testing.assert_close(logits(turned, images(), texts()), logits(model, images(), texts()), **EXACT)


@pytest.mark.parametrize("index", range(3))
def test_each_depth_shows_in_the_logits(index):
    model, prompts, _ = prompted()
    before = logits(model, images(), texts())
    with torch.no_grad():
        prompts.text[index] += 1
    after = logits(model, images(), texts())
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(after, logits_by_hand(make(), images(), texts(), **lists(prompts)), **EXACT)


# What stays


@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_is_left_behind(library):
    model = make(library)
    before, state, keys = logits(model, images(), texts()), {**model.state_dict()}, set(model.__dict__)
    insertion = insert_prompts(find_clip_towers(model), DeepPrompts.for_towers(find_clip_towers(model), depth=3))
    assert type(model) is type(make(library))
    assert set(model.state_dict()) == set(state)
    insertion.remove()
    insertion.remove()
    assert torch.equal(logits(model, images(), texts()), before)
    assert set(model.__dict__) == keys
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_paused_prompts_are_not_there_for_a_while():
    model, _, insertion = prompted()
    with_prompts = logits(model, images(), texts())
    with insertion.paused():
        assert torch.equal(logits(model, images(), texts()), logits(make(), images(), texts()))
    assert torch.equal(logits(model, images(), texts()), with_prompts)


@pytest.mark.parametrize("library", ["open_clip", "huggingface"])
def test_a_copy_of_model_and_prompts_belongs_together(library):
    whole = nn.ModuleDict(dict(zip(("clip", "prompts"), prompted(library), strict=False)))
    expected = logits(whole["clip"], images(), texts())
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert torch.equal(logits(twin["clip"], images(), texts()), expected)
        with torch.no_grad():
            twin["prompts"].text[0] += 1
        assert not torch.equal(logits(twin["clip"], images(), texts()), expected)
        remove_hooks(twin)
    assert torch.equal(logits(whole["clip"], images(), texts()), expected)


# What Lightning turns on


@pytest.mark.slow
@pytest.mark.parametrize("library", ["open_clip", "huggingface"])
def test_compiled_before_and_after_is_not_compiled(library):
    model = make(library)
    compiled = torch.compile(model, backend="eager")
    plain = logits(compiled, images(), texts())  # traced without hooks
    towers = find_clip_towers(compiled)
    prompts = enlarge(DeepPrompts.for_towers(towers, **LAYOUTS["maple"]))
    insertion = insert_prompts(towers, prompts)
    by_hand = logits_by_hand(make(library), images(), texts(), **lists(prompts))
    traced = logits(compiled, images(), texts())
    torch.testing.assert_close(traced, by_hand, **EXACT)
    loss_of(traced).backward()
    assert set(gradients(prompts)) == {name for name, _ in prompts.named_parameters()}
    with insertion.paused():
        torch.testing.assert_close(logits(compiled, images(), texts()), plain, **EXACT)
    insertion.remove()
    torch.testing.assert_close(logits(compiled, images(), texts()), plain, **EXACT)
    torch.compiler.reset()


@pytest.mark.slow
def test_the_hooks_of_open_clip_compile_into_one_graph():
    model, prompts, _ = prompted()
    logits(model, images(), texts())  # what all these texts begin with is known from now on
    traced = logits(torch.compile(model, backend="aot_eager", fullgraph=True), images(), texts())
    torch.testing.assert_close(traced, logits_by_hand(make(), images(), texts(), **lists(prompts)), **EXACT)
    loss_of(traced).backward()
    by_trace = gradients(prompts)
    prompts.zero_grad()
    loss_of(logits(model, images(), texts())).backward()
    for name, gradient in gradients(prompts).items():
        torch.testing.assert_close(by_trace[name], gradient, rtol=1e-4, atol=1e-6)  # float32 sums of another order
    torch.compiler.reset()


@pytest.mark.parametrize("library", LIBRARIES)
def test_gradient_checkpointing_gives_the_same_gradients(library):
    model, prompts, _ = prompted(library)
    twin, same, _ = prompted(library)
    if library == "huggingface":
        twin.gradient_checkpointing_enable()
        twin.train()  # it checkpoints nothing in eval mode; there is no dropout
    else:
        twin.set_grad_checkpointing()
    loss_of(logits(model, images(), texts())).backward()
    loss_of(logits(twin, images(), texts())).backward()
    for name, gradient in gradients(prompts).items():
        torch.testing.assert_close(gradients(same)[name], gradient, rtol=1e-5, atol=1e-7)  # recomputed alike


def test_checkpointed_blocks_that_are_recomputed_after_another_forward_keep_their_axes():
    model, prompts, _ = prompted()
    model.set_grad_checkpointing()
    first = logits(model, images(), texts())
    logits(model, images(7), texts(4))  # a second batch before the backward of the first
    loss_of(first).backward()
    recomputed = gradients(prompts)
    prompts.zero_grad()
    loss_of(logits(model, images(), texts())).backward()
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients(prompts).items())


@pytest.mark.parametrize("library", ["open_clip", "huggingface"])
def test_under_bf16_autocast_it_is_by_hand_under_autocast(library):
    model, prompts, _ = prompted(library)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_hook = logits(model, images(), texts()).float()
        by_hand = logits_by_hand(make(library), images(), texts(), **lists(prompts)).float()
    # bfloat16 keeps 8 bits: a logit of 14 is rounded by up to 0.03, and cosines of features by as much again
    torch.testing.assert_close(by_hook, by_hand, rtol=0, atol=0.1)
    assert (by_hook - logits(model, images(), texts())).abs().mean() < 0.15  # and float32 is near
    loss_of(by_hook).backward()
    assert all(p.grad.dtype == torch.float32 for p in prompts.parameters())


@pytest.mark.parametrize("library", ["open_clip", "huggingface"])
def test_float32_prompts_go_into_a_model_of_bfloat16(library):
    model, prompts, _ = prompted(library)
    model.bfloat16()
    out = logits(model, images().bfloat16(), texts())
    assert out.dtype == torch.bfloat16
    loss_of(out.float()).backward()
    assert set(gradients(prompts)) == {name for name, _ in prompts.named_parameters()}


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    first, second = run_pair(prompts_ddp_cases, tmp_path)
    assert first == second
    # float32, three steps: the mean of two half batches instead of one mean
    assert first == pytest.approx(prompts_ddp_cases.train(range(8), lambda module: module), rel=1e-4, abs=1e-5)


# Start, Gram norms, save and load


def deep(coupling="maple", **kwargs):
    torch.manual_seed(0)
    return DeepPrompts(coupling, **{"text_width": 32, "image_width": 48, "depth": 5, **kwargs})


def test_the_first_prompt_starts_from_the_template_and_the_others_small():
    model = make()
    ids = texts()[0]
    prompts = DeepPrompts.for_towers(find_clip_towers(model), depth=3, length=2, template_ids=ids)
    assert torch.equal(prompts.prompt("text", 0), model.token_embedding.weight[ids[1:3]])
    assert deep(text_width=4096).text[1].std().item() == pytest.approx(0.02, rel=0.05)
    # With its own words in place the text tower is what it was.
    alone = DeepPrompts.for_towers(find_clip_towers(model), "text", depth=1, length=2, template_ids=ids)
    before = model.encode_text(ids[None])
    insert_prompts(find_clip_towers(model), alone)
    assert torch.equal(model.encode_text(ids[None]), before)


def test_the_projections_of_the_deep_prompts_start_equal_and_are_not_one():
    first, *rest = deep().projections[1:]
    assert all(torch.equal(first.weight, p.weight) and torch.equal(first.bias, p.bias) for p in rest)
    assert len({id(p.weight) for p in deep().projections}) == 5
    assert not torch.equal(deep().projections[0].weight, first.weight)


@pytest.mark.parametrize("coupling", ["maple", "independent"])
def test_at_the_start_the_loss_is_zero_exactly(coupling):
    prompts = deep(coupling, text_width=512, image_width=768, depth=9)
    assert prompts.gram_consistency_loss() == 0
    assert prompts.gram_consistency_loss().dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prompts.gram_consistency_loss() == 0
    assert torch.equal(prompts.gram_ratios("image"), torch.ones(8))


@pytest.mark.gpu
def test_on_another_device_too():
    assert deep(text_width=512, image_width=768, depth=9).cuda().gram_consistency_loss() == 0


def test_deep_prompts_are_the_prompts_without_the_first():
    prompts = deep(depth=5, length=3)
    for kind in ("text", "image"):
        slow = torch.stack([prompts.prompt(kind, j) for j in range(1, 5)])
        torch.testing.assert_close(prompts.deep_prompts(kind).float(), slow, rtol=0, atol=1e-6)  # float64, float32
        torch.testing.assert_close(prompts.gram_norms(kind), gram_norm(slow), rtol=1e-5, atol=0)


def test_the_first_prompt_does_not_enter_the_loss_and_all_others_do():
    prompts = enlarge(deep())
    prompts.gram_consistency_loss().backward()
    assert prompts.text[0].grad is None
    assert prompts.projections[0].weight.grad is None
    rest = [*prompts.text][1:] + [p.weight for p in [*prompts.projections][1:]]
    assert all(p.grad.abs().max() > 0 for p in rest)


@pytest.mark.parametrize("coupling", ["maple", "independent"])
def test_after_save_and_load_the_loss_is_bit_for_bit_what_it_was(coupling):
    prompts, file = enlarge(deep(coupling)), io.BytesIO()
    loss = prompts.gram_consistency_loss()
    assert loss > 0
    torch.save(prompts.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = DeepPrompts(coupling, text_width=32, image_width=48, depth=5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.gram_consistency_loss(), loss)


def test_in_half_precision_the_norms_at_the_start_stay_what_they_were():
    prompts = deep()
    start = prompts.text_gram_start.clone()
    assert torch.equal(prompts.bfloat16().text_gram_start, start)
    assert prompts.text[0].dtype == torch.bfloat16


def test_other_start_values_are_a_new_start_when_that_is_said():
    prompts = enlarge(deep())
    prompts.reset_gram_start()
    assert prompts.gram_consistency_loss() == 0


def test_towers_of_unlike_depth_are_compared_where_both_have_prompts():
    prompts = enlarge(deep("independent", depth=5, image_depth=3, image_length=4))
    difference = prompts.gram_ratios("text")[:2] - prompts.gram_ratios("image")
    assert prompts.gram_consistency_loss() == difference.square().sum()
    assert torch.equal(prompts.gram_discrepancy(), difference.abs())


# What is refused


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"coupling": "joint"}, "coupling='joint': choose 'maple', 'independent', 'text' or 'vision'"),
        ({"depth": 0}, "text prompts need depth, length and text_width of one or more"),
        ({"coupling": "independent", "image_length": 0}, "image prompts need depth, length and image_width"),
        ({"image_width": None}, "image prompts need"),
        ({"image_depth": 3}, "only 'independent' image prompts have a depth and a length of their own"),
        ({"first": torch.zeros(3, 32)}, r"first must be \(length, text_width\)=\(2, 32\), got \(3, 32\)"),
    ],
)
def test_prompts_that_cannot_be_are_refused(kwargs, text):
    with pytest.raises(ValueError, match=text):
        deep(**kwargs)


def test_one_tower_or_one_depth_has_nothing_to_compare():
    with pytest.raises(ValueError, match="coupling='text' prompts one tower"):
        deep("text").gram_consistency_loss()
    with pytest.raises(ValueError, match="coupling='text' has no image prompts"):
        deep("text").prompt("image", 0)
    with pytest.raises(ValueError, match="prompts of depth 1 have no deep prompts"):
        deep(depth=1).gram_consistency_loss()


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"text_width": TEXT_WIDTH + 1}, "the text prompts are 17 wide, the text tower 16"),
        ({"image_width": IMAGE_WIDTH + 1}, "the image prompts are 25 wide, the image tower 24"),
        ({"depth": BLOCKS + 1}, "prompts for 5 blocks, but the text tower has 4"),
    ],
)
def test_what_does_not_fit_the_towers_is_refused_and_nothing_inserted(kwargs, text):
    model = make()
    prompts = deep(**{"text_width": TEXT_WIDTH, "image_width": IMAGE_WIDTH, "depth": 3, **kwargs})
    with pytest.raises(ValueError, match=text):
        insert_prompts(find_clip_towers(model), prompts)
    assert not find_clip_towers(model).text.hooks()


def test_a_second_set_is_refused_and_the_first_stays():
    model, prompts, _ = prompted("open_clip", coupling="vision")
    both = DeepPrompts.for_towers(find_clip_towers(model), depth=2)
    with pytest.raises(ValueError, match="the image tower has prompts already"):
        insert_prompts(find_clip_towers(model), both)
    by_hand = logits_by_hand(make(), images(), texts(), **lists(prompts))
    torch.testing.assert_close(logits(model, images(), texts()), by_hand, **EXACT)


def test_a_resnet_is_prompted_in_its_text_tower_only():
    model = resnet()
    with pytest.raises(ValueError, match="ResNet, which has no tokens: it takes no image prompts"):
        DeepPrompts.for_towers(find_clip_towers(model), "maple", depth=2)
    prompts = enlarge(DeepPrompts.for_towers(find_clip_towers(model), "text", depth=2))
    before = model.encode_text(texts())
    insert_prompts(find_clip_towers(model), prompts)
    assert not torch.allclose(model.encode_text(texts()), before, atol=1e-2)


def test_a_model_of_the_users_own_gets_prompts_by_layer_names():
    model = make("small")
    layers = {
        "text_embedding": "token_embedding",
        "text_blocks": "transformer.resblocks",
        "image_embedding": "visual.ln_pre",
        "image_blocks": "visual.transformer.resblocks",
    }
    towers = find_clip_towers(model, layers=layers)
    prompts = enlarge(DeepPrompts.for_towers(towers, **LAYOUTS["maple"]))
    insert_prompts(towers, prompts)
    by_hand = clip_models.logits_by_hand(make("small"), images(), texts(), **lists(prompts))
    torch.testing.assert_close(logits(model, images(), texts()), by_hand, **EXACT)
