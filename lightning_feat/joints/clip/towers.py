"""The two towers of a CLIP-like model, found by the names of its layers.

Known are the layouts of ``open_clip`` (that of OpenAI's code and of ``baselines.clip.SmallClip`` too) and of Hugging
Face's ``CLIPModel`` and ``SiglipModel``; any other model by the names you give. What one can do with a tower is in
``tower``, how it is hooked in ``hooks``, what the layouts look like in ``layouts``.
"""

from collections.abc import Mapping

from torch import nn

from lightning_feat.joints.clip.hooks import remove_hooks
from lightning_feat.joints.clip.layouts import Build, layout_of
from lightning_feat.joints.clip.reading import Reading
from lightning_feat.joints.clip.tower import ImageTower, Places, TextTower, plain
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
    start_token: bool | None = None,
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
        eos_token_id: the id at which text features are read. By default what the model says, and for ``layers`` the
            largest in each text.
        start_token: whether texts begin with a token that is no word. By default they do, but not in towers that are
            read at their last position, as SigLIP's.

    Raises:
        ValueError: if there is no such model, or more than one, or a layer of that name is not there.
    """
    if layers is not None:
        end = "argmax" if eos_token_id is None else eos_token_id
        reading = Reading(end, 1 if start_token is None else int(start_token))  # type: ignore[arg-type]
        return _named_towers(module, layers, batch_first, reading)
    found: list[tuple[str, nn.Module, Build]] = []
    for wrapped_name, part in module.named_modules():
        name = ".".join(step for step in wrapped_name.split(".") if step != "_orig_mod")
        inside = any(not outer or name == outer or name.startswith(f"{outer}.") for outer, *_ in found)
        build = None if inside else layout_of(plain(part))
        if build is not None:
            found.append((name, plain(part), build))
    if len(found) != 1:
        raise ValueError(
            f"{type(module).__name__} holds {'several models' if found else 'no model'} with the layers of open_clip's "
            "CLIP or of Hugging Face's CLIPModel or SiglipModel"
            f"{': ' + ', '.join(name for name, *_ in found) if found else ''}. "
            f"{'Give one of them' if found else 'Name its layers by layers={...}, of ' + ', '.join(_LAYERS)}."
        )
    name, model, build = found[0]
    text, image = build(module, model, f"{name}." if name else "", batch_first)
    if isinstance(text, TextTower):
        text.say(eos_token_id, start_token)
    return ClipTowers(model, name, text, image)


def _named_towers(
    module: nn.Module, layers: Mapping[str, str], batch_first: bool | None, reading: Reading
) -> ClipTowers:
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
                whole = features is not None and {*features.modules()} >= {blocks, named.get("text_embedding", blocks)}
                places = places._replace(entrance=features if whole else None)
                text = TextTower(places, batch_first, reading)
            else:
                image = ImageTower(places, batch_first)
    return ClipTowers(module, "", text, image)
