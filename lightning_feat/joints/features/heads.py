"""Find and replace the classifier of a module that was written without us. What is ambiguous is asked about, not
guessed.
"""

import sys

import torch
from torch import nn

_CLASSIFIER_NAMES = ("fc", "classifier", "heads", "head")  # torchvision, Hugging Face, and most modules written by hand


def find_classifier(module: nn.Module) -> tuple[str, nn.Module]:
    """The dotted name and the layer that turns features into logits.

    In this order: what timm's ``get_classifier()`` gives; the one layer called ``fc``, ``classifier``, ``heads`` or
    ``head`` that stands highest (of a container its last ``Linear``); the only head of a kind of its own there is, such
    as a ``GrassmannLinear``; the only ``Linear`` there is.

    Raises:
        ValueError: if there is none or more than one; the message lists the candidates.
    """
    candidates = _timm_classifiers(module) or _by_name(module) or _by_kind(module)
    if not candidates:
        candidates = [(_plain(name), part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(f"{name} ({type(part).__name__})" for name, part in candidates[-8:])
    raise ValueError(
        f"{type(module).__name__} has "
        f"{'no layer that is plainly' if not candidates else 'several layers that could be'} the "
        f"classifier{': ' + found if found else ''}. Say which one by its dotted name (argument `layer`)."
    )


def _timm_classifiers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    heads: list[nn.Module] = []
    outermost: list[str] = []
    for name, part in module.named_modules():
        if callable(getattr(part, "get_classifier", None)) and not any(
            name.startswith(f"{o}.") or not o for o in outermost
        ):
            outermost.append(name)
            found = part.get_classifier()
            heads += [*found] if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    return [(_plain(name), part) for name, part in module.named_modules() if any(part is head for head in heads)]


def _by_name(module: nn.Module) -> list[tuple[str, nn.Module]]:
    named = [(name, part) for name, part in module.named_modules() if name.rpartition(".")[2] in _CLASSIFIER_NAMES]
    depth = min((name.count(".") for name, _ in named), default=0)
    heads = []
    for name, part in named:
        if name.count(".") == depth:
            linear = [(n, p) for n, p in part.named_modules(prefix=name) if isinstance(p, nn.Linear)]
            heads.append(linear[-1] if linear else (name, part))
    return [(_plain(name), part) for name, part in heads]


def _by_kind(module: nn.Module) -> list[tuple[str, nn.Module]]:
    leaves = [(name, part) for name, part in module.named_modules() if not [*part.children()]]
    return [
        (_plain(name), part) for name, part in leaves if hasattr(part, "num_classes") and hasattr(part, "in_features")
    ]


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def replace_layer(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered below ``module``, also twice, or below a ``torch.compile`` wrapper."""
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    forget_compiled_code(module)


def forget_compiled_code(module: nn.Module) -> None:
    """Let ``torch.compile`` trace again whatever it traced of ``module``, after a hook or a layer has changed."""
    # A graph that was traced before the hook was there never calls it, and says nothing.
    if "torch._dynamo" in sys.modules and any(_is_compiled(part) for part in module.modules()):
        # torch.compiler.reset() forgets more: with torch 2.6, a few of these between compilations end the process.
        getattr(torch._dynamo, "reset_code_caches", torch.compiler.reset)()


def _is_compiled(part: nn.Module) -> bool:
    named = type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None
    return named or getattr(part, "_compiler_ctx", None) is not None  # the last: a compiled LightningModule
