"""Small CLIP models with random weights, and their forward with learned prompts, written out from their submodules."""

import inspect

import torch
from torch import nn
from torch.nn.functional import normalize

BLOCKS, TEXT_WIDTH, IMAGE_WIDTH, NUM_FEATURES = 4, 16, 24, 12
LENGTH, EOS, SIZE = 10, 39, 16
LIBRARIES = ["open_clip", "open_clip_custom", "huggingface", "small"]


def make(library="open_clip", seed=0):
    """A model in eval mode, seeded."""
    torch.manual_seed(seed)
    model = {
        "open_clip": lambda: _open_clip("CLIP"),
        "open_clip_custom": lambda: _open_clip("CustomTextCLIP"),
        "huggingface": _huggingface,
        "small": _small,
    }[library]()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.LayerNorm):  # else the norm before the blocks is undone by that of block 0
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(std=0.3)
    return model.eval()


def tokens_first(model):
    """open_clip's text tower with (T, N, D) between the blocks, as in its older versions."""
    import pytest

    transformer = pytest.importorskip("open_clip.transformer").Transformer
    newer = {"batch_first": False} if hasattr(model.transformer, "batch_first") else {}
    turned = transformer(TEXT_WIDTH, BLOCKS, 2, **newer).eval()
    turned.load_state_dict(model.transformer.state_dict())
    model.transformer = turned
    return model


def _open_clip(cls, **vision):
    import pytest

    models = pytest.importorskip("open_clip.model")
    image = {"image_size": SIZE, "patch_size": 4, "width": IMAGE_WIDTH, "layers": BLOCKS, "head_width": 8, **vision}
    text = models.CLIPTextCfg(context_length=LENGTH, vocab_size=EOS + 1, width=TEXT_WIDTH, heads=2, layers=BLOCKS)
    return getattr(models, cls)(NUM_FEATURES, models.CLIPVisionCfg(**image), text)


def _huggingface():
    import pytest

    transformers = pytest.importorskip("transformers")
    shared = {"intermediate_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
    text = {"hidden_size": TEXT_WIDTH, "vocab_size": EOS + 1, "max_position_embeddings": LENGTH, "eos_token_id": EOS}
    image = {"hidden_size": IMAGE_WIDTH, "image_size": SIZE, "patch_size": 4}
    towers = {"text_config": {**shared, **text}, "vision_config": {**shared, **image}}
    return transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=NUM_FEATURES))


def _small():
    from lightning_feat.baselines.clip import SmallClip

    vision = {"vision_width": IMAGE_WIDTH, "vision_layers": BLOCKS, "vision_heads": 3}
    text = {"text_width": TEXT_WIDTH, "text_layers": BLOCKS, "text_heads": 2}
    return SmallClip(EOS + 1, LENGTH, image_size=SIZE, patch_size=4, embed_dim=NUM_FEATURES, **vision, **text)


def resnet():
    """An open_clip model with a ResNet for the images."""
    return _open_clip("CLIP", layers=[1, 1, 1, 1], image_size=32, width=8)


def _siglip(**kwargs):
    """open_clip's text tower without a start token, read at its last position."""
    from open_clip.model import CustomTextCLIP

    image = {"image_size": SIZE, "patch_size": 4, "width": IMAGE_WIDTH, "layers": BLOCKS, "head_width": 8}
    text = {"context_length": LENGTH, "vocab_size": EOS + 1, "width": TEXT_WIDTH, "heads": 2, "layers": BLOCKS}
    kind = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    return CustomTextCLIP(
        NUM_FEATURES, {**image, **kwargs.get("image", {})}, {**text, **kind, **kwargs.get("text", {})}
    )


def _coca():
    """Read from a token that the text tower appends; its image tower pools by attention."""
    appended = {"embed_cls": True, "pool_type": "last", "no_causal_mask": False, "proj_bias": False}
    pooled = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": False}
    return _siglip(text=appended, image=pooled)


def _metaclip():
    from transformers import MetaClip2Config, MetaClip2Model

    return _transformers(MetaClip2Config, MetaClip2Model, {"eos_token_id": 2})


def _transformers_siglip():
    from transformers import SiglipConfig, SiglipModel

    return _transformers(SiglipConfig, SiglipModel, {"projection_size": IMAGE_WIDTH})


def _transformers(config, model, more):
    shared = {"intermediate_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
    text = {"hidden_size": TEXT_WIDTH, "vocab_size": EOS + 1, "max_position_embeddings": LENGTH, **more}
    image = {"hidden_size": IMAGE_WIDTH, "image_size": SIZE, "patch_size": 4}
    return model(config(text_config={**shared, **text}, vision_config={**shared, **image}))


# What reads a text, or pools an image, otherwise than CLIP; with where the first word stands, and a text of full length
# that has its end where the tower looks for it.
READERS = {
    "siglip": (_siglip, 0, [11, 12, 13, 14, 15, 16, 17, 18, 19, 1]),
    "averaged": (lambda: _siglip(image={"pool_type": "avg"}), 0, [11, 12, 13, 14, 15, 16, 17, 18, 19, 1]),
    "timm": (lambda: _siglip(image={"timm_model_name": "test_vit", "image_size": 160}), 0, [*range(11, 20), 1]),
    "coca": (_coca, 1, [37, 12, 13, 14, 15, 16, 17, 18, 19, 38]),
    "metaclip": (_metaclip, 1, [0, 12, 13, 14, 15, 16, 17, 18, 19, 2]),
    "transformers-siglip": (_transformers_siglip, 0, [11, 12, 13, 14, 15, 16, 17, 18, 19, 1]),
}


def reader(name):
    """One of ``READERS`` in eval mode, seeded."""
    torch.manual_seed(0)
    return READERS[name][0]().eval()


def images(n=3, seed=0):
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def texts(n=5, seed=0):
    """Ids ``(n, LENGTH)``: SOS, three words that all have, others, EOS at positions 5 and after, padding."""
    ids = torch.randint(2, EOS, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, 1:4] = 1, torch.tensor([12, 7, 25])
    for row, end in enumerate(5 + torch.arange(n) % 4):
        ids[row, end], ids[row, end + 1 :] = EOS, 0
    return ids


def logits(model, images, ids):
    """Those of the model itself, by its own forward."""
    if hasattr(model, "vision_model"):
        return model(input_ids=ids, pixel_values=images).logits_per_image
    image, text, scale = model(images, ids)[:3]
    return scale * image @ text.T


def features(model, images, ids):
    """Image and text features before they are normalised."""
    if not hasattr(model, "vision_model"):
        return model.encode_image(images), model.encode_text(ids)
    image, text = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=ids)
    return getattr(image, "pooler_output", image), getattr(text, "pooler_output", text)


def logits_by_hand(model, images, ids, text=None, image=None):
    """Logits with the prompts in ``text`` and ``image``, lists of ``(n, D)`` for blocks 0, 1, ..., put in by hand."""
    image_features, text_features = features_by_hand(model, images, ids, text, image)
    scale = model.logit_scale.exp()
    return scale * normalize(image_features, dim=-1) @ normalize(text_features, dim=-1).T


def features_by_hand(model, images, ids, text=None, image=None):
    """Image and text features before they are normalised, with prompts as in ``logits_by_hand``."""
    by_hand = _huggingface_by_hand if hasattr(model, "vision_model") else _open_clip_by_hand
    return by_hand(model, images, ids, text or [], image or [])


def _put(x, prompt, start):
    x = x.clone()
    x[:, start : start + len(prompt)] = prompt.to(x.dtype)
    return x


def _blocks(x, blocks, prompts, start, call):
    for index, block in enumerate(blocks):
        if 0 < index < len(prompts):
            x = _put(x, prompts[index], start)
        x = call(block, x)
    return x


def _patches(conv, class_embedding, positions, images, prompts):
    x = conv(images).flatten(2).transpose(1, 2)
    x = torch.cat([class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + positions.to(x.dtype)
    return torch.cat([x, *(p.to(x.dtype).expand(len(x), -1, -1) for p in prompts[:1])], dim=1)


def _open_clip_by_hand(model, images, ids, text, image):
    visual, encoder = model.visual, getattr(model, "text", model)
    positions = visual.positional_embedding
    x = visual.ln_pre(_patches(visual.conv1, visual.class_embedding, positions, images, image))
    # The blocks of open_clip before 2.27 take (T, N, D).
    ours = not type(model).__module__.startswith("open_clip")
    turned = not ours and not getattr(encoder.transformer, "batch_first", False)

    def run(block, x, **mask):
        return block(x.transpose(0, 1), **mask).transpose(0, 1) if turned else block(x, **mask)

    x = _blocks(x, visual.transformer.resblocks, image, len(positions), run)
    image_features = visual.ln_post(x)[:, 0] @ visual.proj
    x = encoder.token_embedding(ids)
    x = (x if not text else _put(x, text[0], 1)) + encoder.positional_embedding
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    x = _blocks(x, encoder.transformer.resblocks, text, 1, lambda block, x: run(block, x, attn_mask=mask))
    x = encoder.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)]
    return image_features, x @ encoder.text_projection


def _huggingface_block(block, x, mask):
    older = "causal_attention_mask" in inspect.signature(block.forward).parameters
    if older and mask is not None:
        mask = mask.expand(len(x), -1, -1, -1)
    found = block(x, None, mask) if older else block(x, mask)
    return found[0] if isinstance(found, tuple) else found


def _huggingface_by_hand(model, images, ids, text, image):
    vision, words = model.vision_model, model.text_model
    seen = vision.embeddings
    positions = seen.position_embedding.weight
    x = vision.pre_layrnorm(_patches(seen.patch_embedding, seen.class_embedding, positions, images, image))
    x = _blocks(x, vision.encoder.layers, image, len(positions), lambda block, x: _huggingface_block(block, x, None))
    image_features = model.visual_projection(vision.post_layernorm(x[:, 0]))
    x = words.embeddings.token_embedding(ids)
    x = (x if not text else _put(x, text[0], 1)) + words.embeddings.position_embedding.weight[: ids.shape[1]]
    mask = torch.full((1, 1, LENGTH, LENGTH), -torch.inf).triu(1)
    x = _blocks(x, words.encoder.layers, text, 1, lambda block, x: _huggingface_block(block, x, mask.to(x.dtype)))
    x = words.final_layer_norm(x)[torch.arange(len(ids)), (ids == EOS).int().argmax(1)]
    return image_features, model.text_projection(x)


def enlarge(prompts, seed=0):
    """Prompts as long as embeddings, so that each of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prompts.parameters():
            if parameter.ndim == 2 and parameter.shape[0] < 8:  # not the projections
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return prompts


def lists(prompts):
    """The arguments ``text`` and ``image`` of ``logits_by_hand`` for a ``DeepPrompts``."""
    return {kind: [prompts.prompt(kind, j) for j in range(prompts.depth_of(kind))] for kind in prompts.kinds}


def gradients(module: nn.Module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
