"""The text towers that open_clip takes from transformers, described here as the hub describes them."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
_XLM = {**_ROBERTA, "vocab_size": 250002}
_NLLB = {"vocab_size": 256206, "d_model": 1024}
CONFIGS: dict[str, tuple[str, dict[str, int]]] = {  # the class of a configuration, and its sizes
    "roberta-base": ("RobertaConfig", _ROBERTA),
    "xlm-roberta-base": ("XLMRobertaConfig", _XLM),
    "xlm-roberta-large": (
        "XLMRobertaConfig",
        {**_XLM, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "google/mt5-base": ("MT5Config", {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}),
    "google/mt5-xl": ("MT5Config", {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}),
    "facebook/nllb-200-distilled-600M": ("M2M100Config", {**_NLLB, "encoder_layers": 12, "encoder_ffn_dim": 4096}),
    "facebook/nllb-200-distilled-1.3B": ("M2M100Config", {**_NLLB, "encoder_layers": 24, "encoder_ffn_dim": 8192}),
}


@contextlib.contextmanager
def described() -> Iterator[None]:
    """Inside, open_clip finds the configurations of text towers here."""
    import open_clip.hf_model
    import transformers

    def config_of(name: str, **_: Any) -> Any:
        kind, sizes = CONFIGS[name]  # a tower that is not here is a new one: add it
        return getattr(transformers, kind)(**sizes)

    with mock.patch.object(open_clip.hf_model.AutoConfig, "from_pretrained", config_of):
        yield
