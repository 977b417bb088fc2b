"""Find and replace the classifier of a module that was written without us. What is ambiguous is asked about, not
guessed.

Names tell what is likely; ``head_check`` looks, in the first batch, whether it is so.
"""

import sys
from typing import Any, TypeAlias

import torch
from torch import nn

from lightning_feat.joints.features.last_layers import last_of_forward

Named: TypeAlias = tuple[str, nn.Module]

# torchvision, Hugging Face, and most modules written by hand
_CLASSIFIER_NAMES = ("fc", "classifier", "heads", "head", "score", "classification_head")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
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
    parts = [(_plain(name), part) for name, part in module.named_modules()]
    put_in = [(name, part) for name, part in parts if _FOUND in part.__dict__]
    if len(put_in) == 1:
        return put_in[0]
    every = _possible(module)
    candidates = _timm_classifiers(module)
    by_timm = bool(candidates)
    candidates = _higher_named(parts, candidates) or candidates or _by_name(parts)
    if len(candidates) == 1:
        candidates += _above(candidates[0], every, by_timm)
    if not candidates:
        candidates = [(name, part) for name, part in every if _is_own_kind(part)]
        linear = [(name, part) for name, part in every if not isinstance(part, _CONVOLUTIONS)]
        embeds = len(linear) == 1 and _feeds_blocks(module, linear[0])
        candidates = candidates or ([] if embeds else linear)
    if len(candidates) == 1:
        return candidates[0]
    ran = last_of_forward(module)
    if ran is not None and len(ran) == 1:  # what alone makes the output is no guess
        return next((name, part) for name, part in parts if name in ran)
    raise ValueError(_question(module, candidates or every, bool(candidates), argument))


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
        put_in = [(_plain(name), part) for name, part in module.named_modules() if _FOUND in part.__dict__]
        listed = put_in or _timm_classifiers(module)
        kinds = {(type(head), head_sizes(head)[1]) for _, head in listed}
        if len(listed) < 2 or len(kinds) > 1 or (not put_in and _stands_under_another(module, listed)):
            raise
        return listed


def remember_found(head: nn.Module) -> None:
    """Let ``find_classifier`` find this head from now on, and in copies of the module, whatever else is there."""
    head.__dict__[_FOUND] = True


def is_found(head: nn.Module) -> bool:
    """Whether this head was put in the place of the classifier that was found."""
    return _FOUND in head.__dict__


def head_sizes(head: nn.Module) -> tuple[int | None, int | None]:
    """Width of the features D and number of classes C of a classifier; None where it does not say."""
    found = []
    for names in (("in_features", "in_channels"), ("out_features", "num_classes", "out_channels")):
        sizes = [getattr(head, name, None) for name in names]
        found.append(next((size for size in sizes if isinstance(size, int)), None))
    return found[0], found[1]


def _question(module: nn.Module, candidates: list[Named], plainly: bool, argument: str) -> str:
    found = ", ".join(f"{name} ({type(part).__name__})" for name, part in candidates[-8:])
    maps = candidates and all(isinstance(part, _CONVOLUTIONS) for _, part in candidates)
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


def _is_own_kind(part: nn.Module) -> bool:
    return hasattr(part, "num_classes") and hasattr(part, "in_features") and not [*part.children()]


def _is_head(part: nn.Module) -> bool:
    adapted = hasattr(part, "base_layer") and hasattr(part, "in_features")  # LoRA and its like, around a Linear
    return isinstance(part, nn.Linear) or _is_own_kind(part) or adapted


def _heads_in(name: str, part: nn.Module, convolutions: bool = False) -> list[Named]:
    """All layers below that could make logits, in their order; those inside of such a layer are left out."""
    if _is_head(part) or (convolutions and isinstance(part, _CONVOLUTIONS)):
        return [(_plain(name), part)]
    children = part.named_children()
    saved: Any = getattr(part, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict) and hasattr(part, "original_module"):  # peft trains a copy, and keeps both
        children = saved.named_children()
        name = f"{name}.modules_to_save" if name else "modules_to_save"
    prefix = f"{name}." if name else ""
    return [head for child_name, child in children for head in _heads_in(prefix + child_name, child, convolutions)]


def _last_head(name: str, part: nn.Module) -> list[Named]:
    heads = _heads_in(name, part) or _heads_in(name, part, convolutions=True)
    if heads:
        return heads[-1:]
    return [(_plain(name), part)] if part._parameters and not [*part.children()] else []  # of a class of one's own


def _timm_classifiers(module: nn.Module) -> list[Named]:
    heads: list[nn.Module] = []
    outermost: list[str] = []
    for name, part in module.named_modules():
        if callable(getattr(part, "get_classifier", None)) and not any(
            name.startswith(f"{o}.") or not o for o in outermost
        ):
            outermost.append(name)
            try:
                found: Any = part.get_classifier()
            except (AttributeError, TypeError, IndexError):  # some, when they were made without classes
                continue
            heads += [*found] if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    named = [(name, part) for name, part in module.named_modules() if any(part is head for head in heads)]
    return [head for name, part in named for head in _beside_each_other(name, part) or _last_head(name, part)]


def _beside_each_other(name: str, part: nn.Module) -> list[Named]:
    """The heads of a container, as RepViT's, that all make the same classes, and of which none reads another."""
    heads = [] if isinstance(part, nn.Sequential) else _heads_in(name, part)
    sizes = [head_sizes(head) for _, head in heads]
    alike = len({classes for _, classes in sizes}) == 1 and not any(width == sizes[0][1] for width, _ in sizes)
    return heads if len(heads) > 1 and alike else []


def _by_name(parts: list[Named]) -> list[Named]:
    named = [(name, part) for name, part in parts if name.rpartition(".")[2] in _CLASSIFIER_NAMES]
    named = [(name, part) for name, part in named if not _pools_tokens(part)]
    heads = [(name, head) for name, part in named for head in _last_head(name, part)]
    depth = min((name.count(".") for name, _ in heads), default=0)
    highest = [head for name, head in heads if name.count(".") == depth]
    return [head for i, head in enumerate(highest) if not any(head[1] is other for _, other in highest[:i])]


def _pools_tokens(part: nn.Module) -> bool:
    """Whether this is what a tower of SigLIP calls its head: attention that makes one vector of all tokens."""
    return any(isinstance(child, nn.MultiheadAttention) for child in part.modules())


def _higher_named(parts: list[Named], found: list[Named]) -> list[Named]:
    """What is called like a classifier, and stands above what a timm model in it says of itself."""
    named = _by_name(parts) if found else []
    inside = any(head is other for _, head in named for _, other in found)
    depth = min((name.count(".") for name, _ in found), default=0)
    return [] if inside else [(name, head) for name, head in named if name.count(".") < depth]


def _above(found: Named, every: list[Named], by_timm: bool) -> list[Named]:
    """The layers that come after the one found, stand higher, and could read what it puts out: what a user may have
    built on a whole model.
    """
    names = [name for name, _ in every]
    if found[0] not in names:
        return []
    later = every[names.index(found[0]) + 1 :]
    higher = [(name, head) for name, head in later if name.count(".") < found[0].count(".")]
    features, classes = head_sizes(found[1])
    takes = {classes} if by_timm else {classes, features, None}  # else it stands beside the one found, not above it
    return [head for head in higher if head_sizes(head[1])[0] in takes]


def _stands_under_another(module: nn.Module, heads: list[Named]) -> bool:
    every = _possible(module)
    parts = [(_plain(name), part) for name, part in module.named_modules()]
    return bool(_higher_named(parts, heads)) or any(_above(head, every, True) for head in heads)


def _possible(module: nn.Module) -> list[Named]:
    """The layers that could make logits: not those of repeated blocks, nor those that feed the next of a Sequential."""
    inner: set[str] = set()
    for name, part in module.named_modules():
        if isinstance(part, (nn.ModuleList, nn.Sequential)):
            blocks = [(child_name, child) for child_name, child in part.named_children() if [*child.children()]]
            kinds = [type(child) for _, child in blocks]
            if blocks and type(part[-1]) is nn.Sequential and _ends_in_head(part):
                blocks = blocks[:-1]  # a perceptron in pieces, whose last layer is no block
            repeated = [f"{name}.{n}".lstrip(".") for n, child in blocks if kinds.count(type(child)) > 1]
            inner.update(_plain(block) for block in repeated)
        if isinstance(part, nn.MultiheadAttention):
            inner.add(_plain(name))
    found = _heads_in("", module, convolutions=True)
    feeding: set[str] = set()
    for name, part in module.named_modules():
        if isinstance(part, nn.Sequential):
            of_it = _heads_in(name, part, convolutions=True)
            feeding.update(head_name for head_name, _ in of_it[:-1])
    possible = [
        (name, head)
        for name, head in found
        if name not in feeding and not any(name == block or name.startswith(f"{block}.") for block in inner)
    ]
    return possible or found


def _ends_in_head(part: nn.Module) -> bool:
    """Whether nothing comes after the last layer of this Sequential that could make logits: no activation."""
    while isinstance(part, nn.Sequential) and len(part):
        part = part[-1]
    return _is_head(part)


def _feeds_blocks(module: nn.Module, found: Named) -> bool:
    """Whether repeated blocks with weights stand after this layer: then it embeds their inputs."""
    seen = False
    for _, part in module.named_modules():
        seen = seen or part is found[1]
        if seen and isinstance(part, (nn.ModuleList, nn.Sequential)):
            blocks = [type(child) for child in part if any(p.ndim > 1 for p in child.parameters())]
            if len(blocks) > len({*blocks}):
                return True
    return False


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
    if "torch._dynamo" in sys.modules and any(is_compiled(part) for part in module.modules()):
        # torch.compiler.reset() forgets more: with torch 2.6, a few of these between compilations end the process.
        getattr(torch._dynamo, "reset_code_caches", torch.compiler.reset)()


def is_compiled(part: nn.Module) -> bool:
    named = type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None
    return named or getattr(part, "_compiler_ctx", None) is not None  # the last: a compiled LightningModule
