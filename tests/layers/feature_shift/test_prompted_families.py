"""The invariants of prompted towers, over models of the libraries with random weights: prompts equal to the words that
they replace change nothing, what is taken out leaves nothing, gradients arrive, a text is read to its end.
"""

import pytest
import torch

from lightning_feat.joints.clip.towers import find_clip_towers
from lightning_feat.layers.feature_shift.prompt_hooks import insert_prompts
from lightning_feat.layers.feature_shift.prompts import DeepPrompts
from tests.joints.clip.models import LENGTH, enlarge

transformers = pytest.importorskip("transformers")
pytest.importorskip("open_clip")
pytestmark = pytest.mark.slow

SHARED = {"intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16}
TEXT = {**SHARED, "vocab_size": 40, "max_position_embeddings": LENGTH + 4}
IMAGE = {**SHARED, "image_size": 32, "patch_size": 8}
WORDS = 2


def both(config, model, text=None, image=None, **more):
    made = getattr(transformers, config)(
        text_config={**TEXT, **(text or {})}, vision_config={**IMAGE, **(image or {})}, projection_dim=12, **more
    )
    return getattr(transformers, model)(made)


def altclip():
    text = {"project_dim": 12, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
    return both("AltCLIPConfig", "AltCLIPModel", text, {"projection_dim": 12})


def clipseg():
    decoder = {"extract_layers": [0, 1], "reduce_dim": 8}
    return both("CLIPSegConfig", "CLIPSegForImageSegmentation", {"eos_token_id": 39}, **decoder)


def xclip():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {f"mit_{name}": size for name, size in sizes.items()}
    return both("XCLIPConfig", "XCLIPModel", {"eos_token_id": 39}, {**image, "num_frames": 2})


def dual():
    text = transformers.BertConfig(**TEXT)
    image = transformers.ViTConfig(**IMAGE)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(image, text, projection_dim=12)
    return transformers.VisionTextDualEncoderModel(config)


def by_open_clip(text, pooler):
    from open_clip.hf_model import HFTextEncoder
    from open_clip.model import CustomTextCLIP

    image = {"image_size": 16, "patch_size": 4, "width": 24, "layers": 2, "head_width": 8}
    words = {"context_length": LENGTH, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2}
    model = CustomTextCLIP(12, image, words)
    model.text = HFTextEncoder("", 12, config=text, pooler_type=pooler, proj_type="linear")
    return model


def roberta(pooler="mean_pooler"):
    config = transformers.XLMRobertaConfig(**TEXT, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    return by_open_clip(config, pooler)


def mt5():
    config = transformers.MT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    model = by_open_clip(transformers.XLMRobertaConfig(**TEXT), "mean_pooler")
    model.text.transformer, model.text.config = transformers.MT5EncoderModel(config).encoder, config
    return model


def trunk(name, **more):
    from open_clip.model import CustomTextCLIP

    image = {"timm_model_name": name, "timm_pool": "token", "timm_proj": None, "image_size": 224, **more}
    words = {"context_length": LENGTH, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2}
    return CustomTextCLIP(12, image, words)


# The id at the start (None: there is none), at the end, and of padding, of what a tower reads
TEXTS = {
    "clip": (lambda: both("CLIPConfig", "CLIPModel", {"eos_token_id": 39}), (1, 39, 0)),
    "altclip": (altclip, (0, 2, 1)),
    "chinese": (lambda: both("ChineseCLIPConfig", "ChineseCLIPModel"), (3, 4, 0)),
    "clipseg": (clipseg, (1, 39, 0)),
    "xclip": (xclip, (1, 39, 0)),
    "blip": (lambda: both("BlipConfig", "BlipModel", {"projection_dim": 12, "encoder_hidden_size": 16}), (3, 4, 0)),
    "dual": (dual, (3, 4, 0)),
    "siglip2": (lambda: transformers.Siglip2Model(_siglip2()), (None, 1, 1)),
    "xlm-roberta": (roberta, (0, 2, 1)),
    "roberta, read at its start": (lambda: roberta("cls_last_hidden_state_pooler"), (0, 2, 1)),
    "mt5": (mt5, (None, 1, 0)),
}
IMAGES = {
    "clip": (TEXTS["clip"][0], 32),
    "altclip": (altclip, 32),
    "chinese": (TEXTS["chinese"][0], 32),
    "eva": (lambda: trunk("eva02_tiny_patch14_224"), 224),
    "eva, averaged": (lambda: trunk("eva02_tiny_patch14_224", timm_pool="avg"), 224),
    "pe": (lambda: trunk("vit_pe_core_tiny_patch16_384", timm_pool="map"), 384),
    "gap": (lambda: trunk("vit_tiny_patch16_224", timm_pool="avg", timm_proj="linear"), 224),
}


def _siglip2():
    return transformers.Siglip2Config(
        text_config={**TEXT, "projection_size": 16}, vision_config={**SHARED, "num_patches": 16, "patch_size": 4}
    )


def made(build):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def text(marks, *words, length=LENGTH):
    start, end, pad = marks
    ids = [*([] if start is None else [start]), *words, end]
    return torch.tensor([ids + [pad] * (length - len(ids))])


def read(model, ids):
    whole = getattr(model, "clip", model)
    if hasattr(whole, "encode_text"):
        return whole.encode_text(ids)
    out = whole.get_text_features(input_ids=ids)
    return getattr(out, "pooler_output", out)


def seen(model, images):
    if hasattr(model, "encode_image"):
        return model.encode_image(images)
    out = model.get_image_features(pixel_values=images)
    return getattr(out, "pooler_output", out)


@pytest.mark.parametrize("name", TEXTS)
def test_of_texts(name):
    build, marks = TEXTS[name]
    model = made(build)
    towers, first = find_clip_towers(model), int(marks[0] is not None)
    assert towers.text.first_word == first
    full = LENGTH - 1 - first
    ids = text(marks, 10, 11, *range(12, 10 + full))
    plain = read(model, ids)
    prompts = DeepPrompts.for_towers(towers, "text", 1, WORDS, template_ids=ids[0])
    insertion = insert_prompts(towers, prompts)
    assert torch.equal(read(model, ids), plain)  # prompts equal to the words that they replace
    insertion.remove()
    prompts = enlarge(DeepPrompts.for_towers(towers, "text", 2, WORDS, template_ids=ids[0]))
    insertion = insert_prompts(towers, prompts)
    now = read(model, ids)
    for place in range(first + WORDS, LENGTH - 1):  # every word of a text of full length counts
        other = ids.clone()
        other[0, place] = 30
        assert (read(model, other) - now).abs().max() > 1e-5, place
    names = torch.cat([text(marks, w, 20, 21) for w in (11, 12)])
    moved = read(model, names)
    by_hand = read(model, torch.cat([text(marks, 10, 11, w, 20, 21) for w in (11, 12)]))
    torch.testing.assert_close(moved, by_hand, rtol=1e-4, atol=1e-5)  # float32, other lengths
    moved.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prompts.parameters())
    insertion.remove()
    assert torch.equal(read(model, ids), plain)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("name", IMAGES)
def test_of_images(name):
    build, size = IMAGES[name]
    model = made(build)
    towers, images = find_clip_towers(model), torch.randn(2, 3, size, size)
    plain = seen(model, images)
    prompts = DeepPrompts.for_towers(towers, "vision", 3, WORDS)
    insertion = insert_prompts(towers, prompts)
    now = seen(model, images)
    assert now.shape == plain.shape
    assert not torch.allclose(now, plain, atol=1e-5)
    now.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prompts.parameters())
    with insertion.paused():
        assert torch.equal(seen(model, images), plain)
    insertion.remove()
    assert torch.equal(seen(model, images), plain)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_tokens_that_are_turned_are_the_patches_alone():
    model = made(IMAGES["eva"][0])
    towers, heard = find_clip_towers(model), []
    insert_prompts(towers, DeepPrompts.for_towers(towers, "vision", 2, WORDS))
    for block in model.visual.trunk.blocks:
        block.attn.register_forward_pre_hook(
            lambda layer, args, kwargs: heard.append((args[0].shape[1], kwargs["rope"])), with_kwargs=True
        )
    seen(model, torch.zeros(1, 3, 224, 224))
    for tokens, rope in heard:
        assert tokens == 1 + 256 + WORDS
        assert len(rope) == 256 + WORDS
        sin, cos = rope[256:].chunk(2, -1)
        assert torch.equal(sin, torch.zeros_like(sin))
        assert torch.equal(cos, torch.ones_like(cos))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convnext_atto", "passes maps of features on"),
        ("swin_tiny_patch4_window7_224", "passes maps of features on"),
        ("vit_relpos_small_patch16_224", "adds a number for each pair of places"),
    ],
)
def test_what_takes_no_image_prompts_says_why(name, reason):
    with pytest.raises(ValueError, match=reason):
        _ = find_clip_towers(trunk(name, timm_pool="", timm_proj="linear")).image


@pytest.mark.parametrize(("name", "reason"), [("clipseg", "a decoder, "), ("xclip", "change the texts")])
def test_what_is_read_token_by_token_takes_no_image_prompts(name, reason):
    with pytest.raises(ValueError, match=reason):
        _ = find_clip_towers(made(TEXTS[name][0])).image
