"""Where the towers of each library are found, and that hooks meet tokens and features there."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_feat.joints.clip.towers import find_clip_towers, remove_hooks
from tests.joints.clip.models import (
    BLOCKS,
    EOS,
    IMAGE_WIDTH,
    LENGTH,
    LIBRARIES,
    NUM_FEATURES,
    TEXT_WIDTH,
    features,
    images,
    logits,
    make,
    resnet,
    texts,
    tokens_first,
)

BLOCK_NAMES = {
    "open_clip": ("transformer.resblocks.2", "visual.transformer.resblocks.2"),
    "open_clip_custom": ("text.transformer.resblocks.2", "visual.transformer.resblocks.2"),
    "huggingface": ("text_model.encoder.layers.2", "vision_model.encoder.layers.2"),
    "small": ("transformer.resblocks.2", "visual.transformer.resblocks.2"),
}


class Shapes:
    """Records the shapes it is called with, and changes nothing."""

    def __init__(self):
        self.seen = []

    def __call__(self, tensor):
        self.seen.append(tuple(tensor.shape))


class Add:
    def __init__(self, amount=1.0):
        self.amount = amount

    def __call__(self, tensor):
        return tensor + self.amount


class Keep:
    def __init__(self):
        self.value = None

    def __call__(self, tensor):
        self.value = tensor.detach()


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_library_is_known(library):
    model = make(library)
    towers = find_clip_towers(model)
    assert (towers.text.kind, towers.image.kind, towers.name) == ("text", "image", "")
    assert (towers.text.width, towers.image.width) == (TEXT_WIDTH, IMAGE_WIDTH)
    assert towers.text.num_features == towers.image.num_features == NUM_FEATURES
    assert (towers.text.block_names[2], towers.image.block_names[2]) == BLOCK_NAMES[library]
    for tower in (towers.text, towers.image):
        assert [model.get_submodule(name) for name in tower.block_names] == tower.blocks
        assert len(tower.blocks) == BLOCKS


@pytest.mark.parametrize("library", LIBRARIES)
def test_hooks_meet_tokens_of_samples_first_and_features(library):
    model = make(library)
    towers, shapes = find_clip_towers(model), {}
    for tower, name in ((towers.text, "text"), (towers.image, "image")):
        for place in ("on_embeddings", "on_features"):
            getattr(tower, place)(shapes.setdefault((name, place), Shapes()))
        tower.on_block_input(1, shapes.setdefault((name, "in"), Shapes()))
        tower.on_block_output(1, shapes.setdefault((name, "out"), Shapes()))
    expected = logits(make(library), images(), texts())
    assert torch.equal(logits(model, images(), texts()), expected)  # hooks that return None change nothing
    for (name, place), hook in shapes.items():
        tokens = (5, LENGTH, TEXT_WIDTH) if name == "text" else (3, 17, IMAGE_WIDTH)
        assert hook.seen == [(tokens[0], NUM_FEATURES) if place == "on_features" else tokens], (name, place)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_hook_on_features_changes_them_before_they_are_normalised(library):
    model = make(library)
    image, text = features(model, images(), texts())
    towers = find_clip_towers(model)
    towers.text.on_features(Add(1.0))
    towers.image.on_features(Add(2.0))
    expected = model.logit_scale.exp() * nn.functional.normalize(image + 2) @ nn.functional.normalize(text + 1).T
    # float32 rounding of a normalisation in another order; logits reach 14
    torch.testing.assert_close(logits(model, images(), texts()), expected, rtol=0, atol=1e-5)
    assert torch.equal(features(model, images(), texts())[1], text + 1)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_copy_and_a_pickle_take_the_hooks_along_and_lose_them_when_asked(library):
    model = make(library)
    before = logits(model, images(), texts())
    towers = find_clip_towers(model)
    handles = [tower.on_features(Add()) for tower in (towers.text, towers.image)]
    handles += [tower.on_block_input(1, Add()) for tower in (towers.text, towers.image)]
    after = logits(model, images(), texts())
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model, images(), texts()), before)
    for twin in twins:
        assert torch.equal(logits(twin, images(), texts()), after)
        remove_hooks(twin)
        assert torch.equal(logits(twin, images(), texts()), before)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in twin.modules())
        assert not any(part._forward_pre_hooks_with_kwargs for part in twin.modules())


def test_the_hooks_of_others_stay():
    model = make()
    model.ln_final.register_forward_hook(lambda *_: None)
    find_clip_towers(model).text.on_block_input(0, Add())
    remove_hooks(model)
    assert len(model.ln_final._forward_hooks) == 1


def test_a_hook_that_is_not_active_does_nothing():
    model = make()
    before = logits(model, images(), texts())
    handle = find_clip_towers(model).text.on_features(Add())
    handle.active = False
    # normalised here and not in open_clip, by the same function
    assert torch.equal(logits(model, images(), texts()), before)
    handle.active = True
    assert not torch.equal(logits(model, images(), texts()), before)


def test_the_one_clip_in_a_module_is_found_with_its_name():
    module = nn.Module()
    module.net = nn.ModuleDict({"clip": make(), "head": nn.Linear(2, 2)})
    towers = find_clip_towers(module)
    assert (towers.name, towers.model) == ("net.clip", module.net["clip"])
    assert module.get_submodule(towers.text.block_names[0]) is towers.text.blocks[0]


def test_a_compiled_model_is_found_under_its_plain_names():
    module = nn.Module()
    module.clip = torch.compile(make(), backend="eager")
    towers = find_clip_towers(module)
    assert (towers.name, towers.text.block_names[1]) == ("clip", "clip.transformer.resblocks.1")


# The order of axes


@pytest.mark.parametrize("n", [5, LENGTH])  # as many texts as tokens: shapes alone do not tell
def test_what_attention_says_of_its_axes_is_heeded(n):
    model, turned, shapes = make(), tokens_first(make()), Shapes()
    hook = find_clip_towers(turned).text.on_block_input(1, shapes)
    torch.testing.assert_close(turned.encode_text(texts(n)), model.encode_text(texts(n)), rtol=0, atol=1e-6)
    assert shapes.seen == [(n, LENGTH, TEXT_WIDTH)]
    hook.remove()


class Silent(nn.Module):
    """Attention that does not say which axis counts samples."""

    def __init__(self, block):
        super().__init__()
        self.norm = nn.LayerNorm(TEXT_WIDTH)
        self.call = block.forward
        self.get_weight_dtype = getattr(block, "get_weight_dtype", None)  # newer versions ask for it, older for
        self.__dict__["mlp"] = block.mlp

    def forward(self, x, attn_mask=None):
        return self.call(x, attn_mask=attn_mask)


def test_without_that_the_shapes_of_the_first_pass_tell_and_it_is_kept():
    model = tokens_first(make())
    model.transformer.resblocks = nn.ModuleList(Silent(block) for block in model.transformer.resblocks)
    shapes, tower = Shapes(), find_clip_towers(model).text
    tower.on_embeddings(Shapes())
    tower.on_block_input(1, shapes)
    with pytest.raises(ValueError, match=r"samples come first cannot be told. Say batch_first=True or False"):
        model.encode_text(texts(LENGTH))
    for n in (5, LENGTH):
        model.encode_text(texts(n))
    assert shapes.seen == [(5, LENGTH, TEXT_WIDTH), (LENGTH, LENGTH, TEXT_WIDTH)]


# Which tokens


@pytest.mark.parametrize("library", LIBRARIES)
def test_text_features_are_read_at_the_positions_of_eos(library):
    model, kept = make(library), Keep()
    tower, ids = find_clip_towers(model).text, texts()
    tower.on_block_output(BLOCKS - 1, kept)
    end = tower.eos_positions(ids)
    assert end.tolist() == [5, 6, 7, 8, 5]
    text = getattr(model, "text", model)
    norm = text.ln_final if library != "huggingface" else model.text_model.final_layer_norm
    expected = features(model, images(), ids)[1]
    read = norm(kept.value)[torch.arange(5), end]
    project = model.text_projection if library == "huggingface" else lambda x: x @ text.text_projection
    torch.testing.assert_close(project(read), expected, rtol=0, atol=1e-6)  # float32, another order


def test_prompt_slots_and_padding_are_not_comparable():
    ids = torch.tensor([[1, 7, 8, 9, EOS, 0, 0], [1, 7, 8, 9, 6, 5, EOS]])
    mask = find_clip_towers(make()).text.comparable_tokens(ids, num_prompts=2)
    assert mask.int().tolist() == [[1, 0, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1, 1]]
    assert find_clip_towers(make()).image.comparable_tokens(7, 2).int().tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_eos_by_id_and_padding_by_the_same_id_is_the_first_of_them():
    model = make("huggingface")
    ids = torch.tensor([[1, 7, EOS, EOS, EOS]])
    assert find_clip_towers(model).text.eos_positions(ids).tolist() == [2]
    model.text_model.eos_token_id = 2  # in old configurations: read at the largest id
    assert find_clip_towers(model).text.eos_positions(torch.tensor([[1, 2, 7, EOS, 0]])).tolist() == [3]


def test_word_embeddings_are_those_of_the_first_words():
    model = make()
    ids = texts()[0]
    words = find_clip_towers(model).text.word_embeddings(ids, 2)
    assert torch.equal(words, model.token_embedding.weight[ids[1:3]])
    assert not words.requires_grad
    with pytest.raises(ValueError, match="the template has 4 words, fewer than the 5 prompts"):
        find_clip_towers(model).text.word_embeddings(ids, 5)


# What is refused, and models of the user's own


def test_a_resnet_takes_no_image_hooks_but_its_text_tower_does():
    towers = find_clip_towers(resnet())
    assert towers.text.width == TEXT_WIDTH
    with pytest.raises(ValueError, match=r"visual \(ModifiedResNet\) is a ResNet, which has no tokens"):
        _ = towers.image


def test_no_clip_and_two_are_said_to_be_so():
    with pytest.raises(ValueError, match="Linear holds no model with the layers of open_clip's CLIP"):
        find_clip_towers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"ModuleList holds several models .*: 0, 1"):
        find_clip_towers(nn.ModuleList([make(seed=0), make(seed=1)]))


OWN = {
    "text_embedding": "clip.token_embedding",
    "text_blocks": "clip.transformer.resblocks",
    "image_embedding": "clip.visual.ln_pre",
    "image_blocks": "clip.visual.transformer.resblocks",
    "image_features": "clip.visual",
}


def test_layers_can_be_named():
    module = nn.ModuleDict({"clip": make("small")})
    named, known = find_clip_towers(module, layers=OWN), find_clip_towers(module)
    for a, b in ((named.text, known.text), (named.image, known.image)):
        assert (a.blocks, a.block_names, a.width) == (b.blocks, b.block_names, b.width)
    with pytest.raises(ValueError, match="Name it as text_features"):
        named.text.on_features(Add())


def test_one_tower_is_enough_and_wrong_names_are_told():
    module = nn.ModuleDict({"clip": make("small")})
    towers = find_clip_towers(module, layers={"image_blocks": OWN["image_blocks"]})
    assert towers.image.width == IMAGE_WIDTH
    with pytest.raises(ValueError, match="no layers of the text tower were named"):
        _ = towers.text
    with pytest.raises(ValueError, match=r"layers has text_block: choose from text_embedding"):
        find_clip_towers(module, layers={"text_block": "clip"})
    with pytest.raises(ValueError, match=r"has no layer 'clip\.blocks'"):
        find_clip_towers(module, layers={"text_blocks": "clip.blocks"})


def test_a_replaced_encode_text_is_not_overwritten():
    model = make()
    model.encode_text = model.encode_text
    with pytest.raises(ValueError, match="encode_text is already replaced on this instance"):
        find_clip_towers(model).text.on_features(Add())
