"""Where a CLIP comes from: open_clip, a folder of Hugging Face, or a small one of ours; each with its tokenizer."""

from pathlib import Path
from typing import Literal

from torch import nn

from lightning_feat.baselines.clip_pretraining import load_small_clip
from lightning_feat.baselines.clip_tokenizer import (
    HuggingFaceTokenizer,
    OpenClipTokenizer,
    Tokenizer,
    import_open_clip,
    import_transformers,
)

Source = Literal["open_clip", "huggingface", "small"]


def load_clip(source: Source, model: str, pretrained: str | None = None) -> tuple[nn.Module, Tokenizer]:
    """A CLIP on the CPU in float32, and its tokenizer; see ``ClipClassifier`` for the arguments."""
    if pretrained is not None and source != "open_clip":
        raise ValueError(f"pretrained={pretrained!r} is for source='open_clip' alone: {source!r} takes all from model.")
    if source == "small":
        return load_small_clip(model)
    if source == "huggingface":
        if not (Path(model) / "config.json").is_file():
            raise ValueError(f"{model!r} is no folder with a config.json: give one that save_pretrained has written.")
        network: nn.Module = import_transformers().CLIPModel.from_pretrained(model, local_files_only=True)
        length = int(network.config.text_config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
        return network.float(), HuggingFaceTokenizer(model, length)
    if source != "open_clip":
        raise ValueError(f"source={source!r}: choose 'open_clip', 'huggingface' or 'small'.")
    open_clip = import_open_clip()
    if ":" not in model and model not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {model!r}: see open_clip.list_models().")
    return open_clip.create_model(model, pretrained=pretrained), OpenClipTokenizer(model)
