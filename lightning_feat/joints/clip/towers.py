"""The two towers of a CLIP-like model, found by the names of its layers.

Known are the layouts of ``open_clip`` (that of OpenAI's code and of ``baselines.clip.SmallClip`` too) and of Hugging
Face's ``CLIPModel``, without importing either; any other model by the names you give. What one can do with a tower is
in ``clip_tower``, how it is hooked in ``clip_hooks``.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_feat.joints.clip.hooks import remove_hooks
from lightning_feat.joints.clip.tower import EndOfText, ImageTower, Places, TextTower, plain
from lightning_feat.joints.features.taps import find_layer

__all__ = ["ClipTowers", "ImageTower", "TextTower", "find_clip_towers", "remove_hooks"]

_LAYERS = ("text_embedding", "text_blocks", "text_features", "image_embedding", "image_blocks", "image_features")


class ClipTowers:
    """The towers of one model.

    Attributes:
        model: the CLIP-like module.
        name: its dotted name in the module that was searched; empty if that is the model.
    """

    def __init__(self, model: nn.Module, name: str, text: TextTower | str, image: ImageTower | str) -> None:
        self.model, self.name, self._text, self._image = model, name, text, image

    @property
    def text(self) -> TextTower:
        """The text tower. Raises ``ValueError`` if hooks cannot reach into it."""
        if isinstance(self._text, str):
            raise ValueError(self._text)
        return self._text

    @property
    def image(self) -> ImageTower:
        """The image tower. Raises ``ValueError`` if hooks cannot reach into it, as with a ResNet."""
        if isinstance(self._image, str):
            raise ValueError(self._image)
        return self._image


def find_clip_towers(
    module: nn.Module,
    layers: Mapping[str, str] | None = None,
    batch_first: bool | None = None,
    eos_token_id: int | None = None,
) -> ClipTowers:
    """The towers of ``module``, or of the one CLIP that it holds.

    Args:
        module: a model, or a LightningModule that has one somewhere.
        layers: dotted names in ``module``, for a model of another layout: ``text_embedding`` (an ``nn.Embedding``),
            ``text_blocks`` (their ModuleList), ``text_features`` (puts out the projected feature, or a tuple that
            begins with it), ``image_embedding`` (takes class token and patches with positions; without it block 0
            does), ``image_blocks``, ``image_features``. Those of one tower will do if the other is not needed.
        batch_first: whether blocks get ``(N, T, D)``. By default what their attention says, or else what the shapes in
            the first pass tell.
        eos_token_id: the id at which text features are read, for ``layers``; by default the largest in each text.

    Raises:
        ValueError: if there is no such model, or more than one, or a layer of that name is not there.
    """
    if layers is not None:
        return _named_towers(module, layers, batch_first, "argmax" if eos_token_id is None else eos_token_id)
    found: list[tuple[str, nn.Module]] = []
    for wrapped_name, part in module.named_modules():
        name = ".".join(step for step in wrapped_name.split(".") if step != "_orig_mod")
        inside = any(not outer or name == outer or name.startswith(f"{outer}.") for outer, _ in found)
        if not inside and _layout(plain(part)) is not None:
            found.append((name, plain(part)))
    if len(found) != 1:
        raise ValueError(
            f"{type(module).__name__} holds {'several models' if found else 'no model'} with the layers of open_clip's "
            f"CLIP or of Hugging Face's CLIPModel{': ' + ', '.join(name for name, _ in found) if found else ''}. "
            f"{'Give one of them' if found else 'Name its layers by layers={...}, of ' + ', '.join(_LAYERS)}."
        )
    name, model = found[0]
    towers = _huggingface_towers if _layout(model) == "huggingface" else _open_clip_towers
    return ClipTowers(model, name, *towers(module, model, f"{name}." if name else "", batch_first))


def _layout(part: nn.Module) -> str | None:
    if _has(part, "text_model.embeddings.token_embedding") and _has(part, "vision_model.pre_layrnorm"):
        return "huggingface"
    if _has(part, "visual") and (_has(part, "token_embedding") or _has(part, "text")):
        return "open_clip"
    return None


def _open_clip_towers(
    root: nn.Module, model: Any, prefix: str, batch_first: bool | None
) -> tuple[TextTower | str, ImageTower | str]:
    text: TextTower | str
    flat = _has(model, "token_embedding")
    encoder: Any = model if flat else plain(model.text)
    name = f"{prefix}{'' if flat else 'text.'}transformer.resblocks"
    if _has(encoder, "transformer.resblocks") and _has(encoder, "token_embedding"):
        words, width = plain(encoder.token_embedding), _columns(encoder.text_projection)
        places = Places(root, words, encoder.transformer.resblocks, name, encoder, width, by_encode_text=flat)
        text = TextTower(places, batch_first, _open_clip_end(encoder, "text_" if flat else ""))
    else:
        text = f"there is no {name} in {type(model).__name__}: name the layers of this text tower (text_blocks, ...)."

    visual: Any = plain(model.visual)
    where = f"the image tower {prefix}visual ({type(visual).__name__})"
    if not _has(visual, "transformer.resblocks") or not _has(visual, "ln_pre"):
        what = "is a ResNet, which has no tokens" if _has(visual, "layer1") else "has no transformer.resblocks"
        return text, (
            f"{where} {what}: it takes no image prompts. Prompt the text tower only, or use a ViT; of a transformer of "
            "another layout name the layers (image_blocks, ...)."
        )
    if getattr(visual, "pool_type", "tok") != "tok" or getattr(visual, "attn_pool", None) is not None:
        return text, f"{where} pools over all tokens and would average prompts into the feature: prompt the text only."
    name, width = f"{prefix}visual.transformer.resblocks", _columns(visual.proj) or getattr(visual, "output_dim", None)
    places = Places(root, plain(visual.ln_pre), visual.transformer.resblocks, name, visual, width)
    return text, ImageTower(places, batch_first)


def _open_clip_end(encoder: Any, prefix: str) -> EndOfText:
    read = getattr(encoder, f"{prefix}pool_type", "argmax")
    if read == "eos":
        return int(getattr(encoder, f"{prefix}eos_id"))
    return "argmax" if read == "argmax" else None


def _huggingface_towers(
    root: nn.Module, model: Any, prefix: str, batch_first: bool | None
) -> tuple[TextTower, ImageTower]:
    text, image, samples_first = model.text_model, model.vision_model, batch_first in (None, True)
    projection = model.text_projection
    words, name = text.embeddings.token_embedding, f"{prefix}text_model.encoder.layers"
    places = Places(root, words, text.encoder.layers, name, plain(projection), projection.out_features)
    eos = getattr(text, "eos_token_id", None)
    end: EndOfText = "argmax" if eos in (None, 2) else int(eos)  # 2: in configurations that never named the right one
    text_tower = TextTower(places, samples_first, end)
    norm, projection, name = plain(image.pre_layrnorm), model.visual_projection, f"{prefix}vision_model.encoder.layers"
    places = Places(root, norm, image.encoder.layers, name, plain(projection), projection.out_features)
    return text_tower, ImageTower(places, samples_first)


def _named_towers(module: nn.Module, layers: Mapping[str, str], batch_first: bool | None, end: EndOfText) -> ClipTowers:
    unknown = set(layers) - set(_LAYERS)
    if unknown:
        raise ValueError(f"layers has {', '.join(sorted(unknown))}: choose from {', '.join(_LAYERS)}.")
    named = {key: plain(find_layer(module, name)) for key, name in layers.items()}
    text: TextTower | str = "no layers of the text tower were named: name text_blocks at least."
    image: ImageTower | str = "no layers of the image tower were named: name image_blocks at least."
    for kind in ("text", "image"):
        if f"{kind}_blocks" in named:
            blocks, features = named[f"{kind}_blocks"], named.get(f"{kind}_features")
            width = getattr(features, "out_features", None)
            name = layers[f"{kind}_blocks"]
            places = Places(module, named.get(f"{kind}_embedding"), blocks, name, features, width)
            if kind == "text":
                text = TextTower(places, batch_first, end)
            else:
                image = ImageTower(places, batch_first)
    return ClipTowers(module, "", text, image)


def _columns(projection: Any) -> int | None:
    if isinstance(projection, nn.Linear):
        return projection.out_features
    return projection.shape[1] if isinstance(projection, Tensor) else None


def _has(part: nn.Module, path: str) -> bool:
    found: Any = part
    for name in path.split("."):
        found = getattr(found, name, None)
    return isinstance(found, nn.Module)
