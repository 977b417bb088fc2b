"""The layers of the towers in ``open_clip`` and in Hugging Face's transformers, told by their names; neither is
imported.

A tower that hooks cannot reach into is a sentence that says why.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_feat.joints.clip.reading import EndOfText, Reading
from lightning_feat.joints.clip.tower import ImageTower, Places, TextTower, plain

Pair: TypeAlias = tuple[TextTower | str, ImageTower | str]
Build: TypeAlias = Callable[[nn.Module, Any, str, bool | None], Pair]

_ONLY_TEXT = "prompt the text tower only"


def layout_of(part: nn.Module) -> Build | None:
    """What builds the towers of this model; None if it is none that is known."""
    is_read = _has(part, "text_projection") or _has(part, "text_model.head")
    if is_read and _words_and_blocks(part) is not None and _has(part, "vision_model"):
        return _huggingface_towers
    if _has(part, "visual") and (_has(part, "token_embedding") or _has(part, "text")):
        return _open_clip_towers
    return None


def _open_clip_towers(root: nn.Module, model: Any, prefix: str, batch_first: bool | None) -> Pair:
    text: TextTower | str
    flat = _has(model, "token_embedding")
    encoder: Any = model if flat else plain(model.text)
    name = f"{prefix}{'' if flat else 'text.'}transformer.resblocks"
    if _has(encoder, "transformer.resblocks") and _has(encoder, "token_embedding"):
        words, width = plain(encoder.token_embedding), _columns(encoder.text_projection)
        places = Places(root, words, encoder.transformer.resblocks, name, encoder, width, by_encode_text=flat)
        longest = None if flat else getattr(encoder, "context_length", None)
        places = places._replace(entrance=encoder, longest=longest)
        text = TextTower(places, batch_first, _open_clip_reading(encoder, "text_" if flat else ""))
    elif (found := _first_of(encoder, _BY_HUGGINGFACE)) is not None:
        embedding, stack = found
        named = f"{prefix}{'' if flat else 'text.'}{stack}"
        width = getattr(encoder, "output_dim", None)
        words, blocks = plain(encoder.get_submodule(embedding)), encoder.get_submodule(stack)
        pad_id = int(getattr(encoder.config, "pad_token_id", None) or 0)
        first = "Cls" in type(getattr(encoder, "pooler", None)).__name__
        reading = Reading("first" if first else None, int(not stack.endswith("block")), pad_id)
        places = Places(root, words, blocks, named, encoder, width, entrance=encoder)
        text = TextTower(places, batch_first in (None, True), reading)
    else:
        text = f"there is no {name} in {type(model).__name__}: name the layers of this text tower (text_blocks, ...)."
    visual = plain(model.visual)
    where = f"the image tower {prefix}visual ({type(visual).__name__})"
    tower = _timm_tower if _has(visual, "trunk") else _open_clip_image
    return text, tower(root, visual, f"{prefix}visual", where, batch_first)


# Text towers of Hugging Face's in open_clip: a BERT or a RoBERTa; a T5, whose tokenizer puts no start; NLLB.
_BY_HUGGINGFACE = (
    ("transformer.embeddings.word_embeddings", "transformer.encoder.layer"),
    ("transformer.embed_tokens", "transformer.block"),
    ("transformer.embed_tokens", "transformer.layers"),
)


def _first_of(part: nn.Module, names: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The first pair of names, both of which a module has."""
    return next(((words, blocks) for words, blocks in names if _has(part, words) and _has(part, blocks)), None)


def _open_clip_reading(encoder: Any, prefix: str) -> Reading:
    rule: Any = getattr(encoder, f"{prefix}pool_type", "argmax")
    pad_id = getattr(encoder, "pad_id", 0)
    if getattr(encoder, "cls_emb", None) is not None:
        return Reading("appended", pad_id=pad_id)
    if rule == "eos":
        return Reading(int(getattr(encoder, f"{prefix}eos_id")), pad_id=pad_id)
    end: EndOfText = rule if rule in ("argmax", "first", "last") else None
    return Reading(end, start=0 if end == "last" else 1, pad_id=pad_id)


def _open_clip_image(root: nn.Module, visual: Any, name: str, where: str, batch_first: bool | None) -> ImageTower | str:
    if not _has(visual, "transformer.resblocks") or not _has(visual, "ln_pre"):
        what = "is a ResNet, which has no tokens" if _has(visual, "layer1") else "has no transformer.resblocks"
        return (
            f"{where} {what}: it takes no image prompts. Prompt the text tower only, or use a ViT; of a transformer of "
            "another layout name the layers (image_blocks, ...)."
        )
    pools = getattr(visual, "pool_type", "tok") != "tok" or getattr(visual, "attn_pool", None) is not None
    after: Any = (plain(visual.transformer), "output") if pools or getattr(visual, "output_tokens", False) else None
    blocks, width = visual.transformer.resblocks, _columns(visual.proj) or getattr(visual, "output_dim", None)
    places = Places(root, plain(visual.ln_pre), blocks, f"{name}.transformer.resblocks", visual, width)
    return ImageTower(places._replace(after_blocks=after), batch_first)


def _timm_tower(root: nn.Module, visual: Any, name: str, where: str, batch_first: bool | None) -> ImageTower | str:
    trunk: Any = plain(visual.trunk)
    what = f"{where} has a {type(trunk).__name__}"
    has_tokens = isinstance(getattr(trunk, "num_prefix_tokens", None), int)
    if not (has_tokens and _has(trunk, "blocks") and _has(trunk, "norm")):
        return f"{what}, which passes maps of features on, and no tokens: it takes no image prompts, {_ONLY_TEXT}."
    first = next(iter(trunk.blocks.children()), None)
    if any("rel_pos" in name or "relative_position" in name for name in _attributes(trunk, first)):
        return f"{what}, whose attention adds a number for each pair of places, which prompts lack: {_ONLY_TEXT}."
    norm = plain(trunk.norm_pre) if _has(trunk, "norm_pre") else None
    ends = [*getattr(trunk, "head", nn.Identity()).modules(), *visual.head.modules()]
    linear = [part.out_features for part in ends if isinstance(part, nn.Linear)]
    width = linear[-1] if linear else getattr(trunk, "num_features", None)
    places = Places(root, norm, trunk.blocks, f"{name}.trunk.blocks", visual, width)
    turns = int(trunk.num_prefix_tokens) if getattr(trunk, "rope", None) is not None else None
    places = places._replace(after_blocks=(plain(trunk.norm), "input"), turned_after=turns)
    return ImageTower(places, batch_first in (None, True))


def _attributes(trunk: nn.Module, block: nn.Module | None) -> set[str]:
    """Names of what the trunk, and the parts of one block, hold."""
    parts = [trunk, *(() if block is None else block.modules())]
    return {name for part in parts for name, held in {**vars(part), **part._modules}.items() if held is not None} | {
        name for part in parts for name in part._parameters
    }


def _huggingface_towers(root: nn.Module, model: Any, prefix: str, batch_first: bool | None) -> Pair:
    text: Any = plain(model.text_model)
    image, samples_first = plain(model.vision_model), batch_first in (None, True)
    siglip = not _has(model, "text_projection")
    projection = plain(text.head if siglip else model.text_projection)
    embedding, stack = _words_and_blocks(model) or ("", "")
    words, blocks = plain(text.get_submodule(embedding)), text.get_submodule(stack)
    places = Places(root, words, blocks, f"{prefix}text_model.{stack}", projection, _columns(projection))
    pad_id = getattr(getattr(text, "config", None), "pad_token_id", None)
    end: EndOfText = "last" if siglip else "first" if embedding.endswith("word_embeddings") else _huggingface_end(text)
    reading = Reading(end, int(not siglip), 0 if pad_id is None else int(pad_id))
    places = places._replace(entrance=text, longest=_longest(text))
    return TextTower(places, samples_first, reading), _huggingface_image(root, model, image, prefix, samples_first)


_TEXT_TOWERS = (  # of CLIP and SigLIP; of a BERT, as ChineseCLIP has; of a RoBERTa, as AltCLIP has
    ("embeddings.token_embedding", "encoder.layers"),
    ("embeddings.word_embeddings", "encoder.layer"),
    ("roberta.embeddings.word_embeddings", "roberta.encoder.layer"),
    ("roberta.embeddings.word_embeddings", "roberta.encoder.layers"),
)


def _words_and_blocks(part: nn.Module) -> tuple[str, str] | None:
    """Where the text tower of one of Hugging Face's keeps the embedding of its words, and its blocks."""
    text = getattr(part, "text_model", None)
    return _first_of(text, _TEXT_TOWERS) if isinstance(text, nn.Module) else None


def _longest(text: Any) -> int | None:
    seen: Any = getattr(text, "embeddings", None)
    table: Any = getattr(seen, "position_embedding", getattr(seen, "position_embeddings", None))
    return int(table.num_embeddings) if isinstance(table, nn.Embedding) else None


def _huggingface_end(text: Any) -> EndOfText:
    eos = getattr(text, "eos_token_id", None)
    kind = str(getattr(getattr(text, "config", None), "model_type", ""))
    # 2 stands in configurations of CLIP that never named the right one, which reads at the largest id then. MetaCLIP 2
    # means it.
    return "argmax" if eos is None or (eos == 2 and "metaclip" not in kind) else int(eos)


def _huggingface_image(
    root: nn.Module, model: Any, image: Any, prefix: str, batch_first: bool | None
) -> ImageTower | str:
    where = f"the image tower {prefix}vision_model ({type(image).__name__})"
    norm: nn.Module | None = None
    if _has(model, "prompts_generator"):
        return f"all tokens of {where} change the texts, prompts would too: {_ONLY_TEXT}."
    if not _has(image, "encoder.layers"):
        return f"{where} has no encoder.layers: {_ONLY_TEXT}, or name the layers (image_blocks, ...)."
    if _has(image, "pre_layrnorm"):
        norm, features, after = plain(image.pre_layrnorm), plain(model.visual_projection), None
    elif _has(image, "head") and _has(image, "post_layernorm"):
        features, after = plain(image.head), (plain(image.post_layernorm), "input")
    else:
        return f"{where} has neither a norm before its blocks nor a head that pools: {_ONLY_TEXT}."
    if "attention_mask" in inspect.signature(image.forward).parameters:
        return f"{where} masks patches, and prompts have no place in its masks: {_ONLY_TEXT}."
    for part in root.modules():
        if _has(part, "decoder") and any(child is model for child in part.children()):
            return f"a decoder, {type(part.decoder).__name__}, reads all tokens of {where}, prompts too: {_ONLY_TEXT}."
    width = _columns(features) or getattr(getattr(image, "config", None), "hidden_size", None)
    places = Places(root, norm, image.encoder.layers, f"{prefix}vision_model.encoder.layers", features, width)
    return ImageTower(places._replace(after_blocks=after), batch_first)  # type: ignore[arg-type]


def _columns(projection: Any) -> int | None:
    if isinstance(projection, nn.Linear):
        return projection.out_features
    return projection.shape[1] if isinstance(projection, Tensor) else None


def _has(part: nn.Module, path: str) -> bool:
    found: Any = part
    for name in path.split("."):
        found = getattr(found, name, None)
    return isinstance(found, nn.Module)
