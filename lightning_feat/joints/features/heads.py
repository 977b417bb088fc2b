"""Find and replace the classifier of a module that was written without us. What is ambiguous is asked about, not
guessed.

Names tell what is likely; ``head_check`` looks, in the first batch, whether it is so.
"""

import sys

import torch
from torch import nn

from lightning_feat.joints.features.candidates import (
    CONVOLUTIONS,
    Candidate,
    Named,
    above,
    by_name,
    by_timm,
    feeding_next,
    feeds_blocks,
    head_sizes,
    higher_named,
    is_own_kind,
    of_unknown_kind,
    plain,
    possible,
)
from lightning_feat.joints.features.last_layers import last_of_forward

_FOUND = "_feat_found"  # on a head that was put in the place of the classifier that was found


def find_classifier(module: nn.Module, argument: str = "layer") -> Named:
    """The dotted name and the layer that turns features into logits.

    In this order: the head that a callback put in its place; what timm's ``get_classifier()`` gives; the one layer
    called ``fc``, ``classifier``, ``heads``, ``head``, ``score`` or ``classification_head`` that stands highest; the
    only head of a kind of its own there is, such as a ``GrassmannLinear``; the only ``Linear`` that could be it; with
    an ``example_input_array``, the layer that makes the output of ``forward``. Of a container it is the last ``Linear``
    or head of a kind of its own, or else the last convolution.

    Args:
        module: what is searched.
        argument: by which argument the caller lets its user name the layer, for the error.

    Raises:
        ValueError: if there is none or more than one, or if another layer stands above the one whose name would do: a
            backbone may keep a head of its own. The message lists the candidates.
    """
    parts = [(plain(name), part) for name, part in module.named_modules()]
    put_in = [(name, part) for name, part in parts if _FOUND in part.__dict__]
    if len(put_in) == 1:
        return put_in[0]
    every = possible(module)
    known = by_timm(module)
    found = _without_followers(module, higher_named(parts, known) or known or by_name(parts))
    candidates = [(head.name, head.layer) for head in found]
    if len(found) == 1:
        candidates += [(head.name, head.layer) for head in above(module, found[0], every, bool(known))]
    if not candidates:
        candidates = [(name, part) for name, part in every if is_own_kind(part)] or _only_linear(module, every)
    if len(candidates) == 1:
        return candidates[0]
    ran = last_of_forward(module)
    made_by = [(name, part) for name, part in parts if ran is not None and ran == {name}]
    if made_by:  # what alone makes the output is no guess
        return made_by[0]
    raise ValueError(_question(module, candidates or every, bool(candidates), argument))


def _without_followers(module: nn.Module, found: list[Candidate]) -> list[Candidate]:
    """Those after which no Sequential goes on with layers that could make logits: a whole model may stand in one."""
    feeding = feeding_next(module) if found else set()
    return [head for head in found if head.name not in feeding]


def _only_linear(module: nn.Module, every: list[Named]) -> list[Named]:
    """The layers that could be it where none says so: those that are no convolutions."""
    linear = [(name, part) for name, part in every if not isinstance(part, CONVOLUTIONS)]
    if len(linear) != 1:
        return linear
    return [] if feeds_blocks(module, linear[0]) else linear + of_unknown_kind(module, linear[0][0])


def find_heads(module: nn.Module, argument: str = "layer") -> list[Named]:
    """The classifier that ``find_classifier`` finds; or all heads of one kind, of as many classes, that a timm model
    says it has: those are commonly averaged.

    Args:
        module: what is searched.
        argument: see ``find_classifier``.

    Raises:
        ValueError: see ``find_classifier``.
    """
    try:
        return [find_classifier(module, argument)]
    except ValueError:
        put_in = [(plain(name), part) for name, part in module.named_modules() if _FOUND in part.__dict__]
        known = by_timm(module)
        listed = put_in or [(head.name, head.layer) for head in known]
        kinds = {(type(head), head_sizes(head)[1]) for _, head in listed}
        if len(listed) < 2 or len(kinds) > 1 or (not put_in and _stand_under_another(module, known)):
            raise
        return listed


def _stand_under_another(module: nn.Module, heads: list[Candidate]) -> bool:
    every = possible(module)
    parts = [(plain(name), part) for name, part in module.named_modules()]
    return (
        bool(higher_named(parts, heads))
        or len(_without_followers(module, heads)) < len(heads)
        or any(above(module, head, every, True) for head in heads)
    )


def remember_found(head: nn.Module) -> None:
    """Let ``find_classifier`` find this head from now on, and in copies of the module, whatever else is there."""
    head.__dict__[_FOUND] = True


def is_found(head: nn.Module) -> bool:
    """Whether this head was put in the place of the classifier that was found."""
    return _FOUND in head.__dict__


def _question(module: nn.Module, candidates: list[Named], plainly: bool, argument: str) -> str:
    found = ", ".join(f"{name} ({type(part).__name__})" for name, part in candidates[-8:])
    maps = candidates and all(isinstance(part, CONVOLUTIONS) for _, part in candidates)
    more = ""
    if maps and argument in ("classifier", "layer` with `read='input'"):  # of callbacks that let one choose it
        more = (
            " What it gets are maps: choose a pooling, too; 'tokens' where each position has a target, with the "
            "ignore_index of those that have none."
        )
    return (
        f"{type(module).__name__} has "
        f"{'several layers that could be' if plainly else 'no layer that is plainly'} the "
        f"classifier{': ' + found if found else ''}. Say which one by its dotted name (argument `{argument}`).{more}"
    )


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
    if "torch._dynamo" in sys.modules and any(is_compiled(part) for part in module.modules()):
        # torch.compiler.reset() forgets more: with torch 2.6, a few of these between compilations end the process.
        getattr(torch._dynamo, "reset_code_caches", torch.compiler.reset)()


def is_compiled(part: nn.Module) -> bool:
    named = type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None
    return named or getattr(part, "_compiler_ctx", None) is not None  # the last: a compiled LightningModule
