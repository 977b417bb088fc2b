"""The models of other libraries by families, built on the ``meta`` device: their layers, and no weights."""

import contextlib
import functools
import io
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from tests.models.text_towers import described

NUM_CLASSES = 7
_TASKS = ("image_classification", "sequence_classification", "audio_classification", "video_classification")


class Model(NamedTuple):
    """One model of a library."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Any]  # what forward gets, on meta
    is_clip: bool = False  # two towers, to be prompted, and no classifier


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.device("meta"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def built(model: Model) -> nn.Module:
    """The model on ``meta``, in eval mode."""
    try:
        with _quiet():
            return model.build().eval()
    except NotImplementedError:  # it draws its weights by a function that meta has not
        with _quiet(), torch.device("cpu"):
            return model.build().eval().to("meta")


def timm_models() -> list[Model]:
    """Of timm; a family is the file that a model is in."""
    import timm
    from timm.models import _registry

    def inputs(network: Any) -> Any:
        return torch.zeros(2, *network.default_cfg["input_size"], device="meta")

    found = []
    for name in timm.list_models():
        family = _registry._model_entrypoints[name].__module__.rpartition(".")[2]
        found.append(
            Model(name, family, lambda name=name: timm.create_model(name, num_classes=NUM_CLASSES), inputs)  # type: ignore[misc]
        )
    return found


def torchvision_models() -> list[Model]:
    """Classifiers and segmenters of torchvision; a family is the file that a model is in."""
    from torchvision import models

    names = [
        *models.list_models(module=models),
        *models.list_models(module=models.segmentation),
        *models.list_models(module=models.video),
    ]
    found = []
    for name in names:
        family = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        video = family.startswith("video")

        def inputs(network: Any, name: str = name, video: bool = video) -> Any:
            size = 299 if "inception" in name else 224
            return torch.zeros(2, 3, *([16] if video else []), size, size, device="meta")

        def build(name: str = name, segments: bool = family.startswith("segmentation")) -> nn.Module:
            more: dict[str, Any] = {"weights_backbone": None} if segments else {}
            model: nn.Module = models.get_model(name, weights=None, num_classes=NUM_CLASSES, **more)
            return model

        found.append(Model(name, family, build, inputs))
    return found


def _shortened(config: Any) -> Any:
    for part in (config, *(v for v in vars(config).values() if hasattr(v, "num_hidden_layers"))):
        for layers in ("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer"):
            if isinstance(getattr(part, layers, None), int):
                with contextlib.suppress(Exception):
                    setattr(part, layers, 2)
    return config


def transformers_models() -> list[Model]:
    """The classes of transformers that classify images, texts, sounds and videos; each is a family."""
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    found = []
    for task in _TASKS:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{task.upper()}_MAPPING_NAMES")
        for kind, names in mapping.items():
            config_name = configuration_auto.CONFIG_MAPPING_NAMES.get(kind)
            for name in names if isinstance(names, (tuple, list)) else (names,):

                def build(name: str = name, config_name: Any = config_name) -> nn.Module:
                    config = _shortened(getattr(transformers, config_name)())
                    config.num_labels = NUM_CLASSES
                    model: nn.Module = getattr(transformers, name)(config)
                    return model

                found.append(Model(name, name, build, lambda network: None))
    return found


_NOT_SIZES = ("SigLIP2", "SigLIP", "CLIPA", "worldwide")


def open_clip_models() -> list[Model]:
    """Of open_clip; a family is what a name begins with, or says of the way texts are read."""
    import open_clip

    def build(name: str) -> nn.Module:
        with described():
            model: nn.Module = open_clip.create_model(name, load_weights=False, pretrained_hf=False, device="meta")
        return model

    found = []
    for name in open_clip.list_models():
        tower = open_clip.get_model_config(name)["text_cfg"].get("hf_model_name")
        family = next((word for word in _NOT_SIZES if f"-{word}" in name), re.split(r"[-_]|(?<=RN)|(?<=EVA)", name)[0])
        family = f"text by {tower.split('/')[-1].split('-')[0]}" if tower else family
        found.append(Model(name, family, functools.partial(build, name), lambda network: None, is_clip=True))
    return found


def clip_models() -> list[Model]:
    """The classes of transformers that compare images and texts; each is a family."""
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    def build(name: str, config_name: str) -> nn.Module:
        config = _shortened(getattr(transformers, config_name)())
        model: nn.Module = getattr(transformers, name)(config)
        return model

    kinds = modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    named = {names if isinstance(names, str) else names[0]: kind for kind, names in kinds.items()}
    named["CLIPSegForImageSegmentation"] = "clipseg"
    found = []
    for name, kind in named.items():
        make = functools.partial(build, name, configuration_auto.CONFIG_MAPPING_NAMES[kind])
        found.append(Model(name, name, make, lambda network: None, is_clip=True))
    return found


LIBRARIES = {
    "timm": timm_models,
    "torchvision": torchvision_models,
    "transformers": transformers_models,
    "open_clip": open_clip_models,
    "transformers, of images and texts": clip_models,
}


_SMALL = (
    "test_",
    "atto",
    "femto",
    "nano",
    "pico",
    "tiny",
    "xxs",
    "xsmall",
    "_xs",
    "_s0",
    "_b0",
    "_t0",
    "18",
    "_s",
    "_t",
)


def one_of_each(models: list[Model]) -> list[Model]:
    """The smallest model of each family, as far as names tell."""

    def size(model: Model) -> tuple[int, int, str]:
        hint = next((i for i, word in enumerate(_SMALL) if word in model.name), len(_SMALL))
        return hint, len(model.name), model.name

    return [min(family, key=size) for family in by_family(models).values()]


def by_family(models: list[Model]) -> dict[str, list[Model]]:
    """The models of each family."""
    families: dict[str, list[Model]] = defaultdict(list)
    for model in models:
        families[model.family].append(model)
    return dict(families)
