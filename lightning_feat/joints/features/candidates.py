"""Which layers of a module could make its logits, as far as names, kinds and widths tell."""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from torch import nn

Named: TypeAlias = tuple[str, nn.Module]

# torchvision, Hugging Face, and most modules written by hand
_CLASSIFIER_NAMES = ("fc", "classifier", "heads", "head", "score", "classification_head")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Candidate(NamedTuple):
    """A layer that says of itself that it is the classifier, by its name or by timm."""

    name: str
    layer: nn.Module
    model: str  # the dotted name of the model whose classifier it is, or of the part that is called like one where that
    # is all there is: what stands outside may read its logits


def head_sizes(head: nn.Module) -> tuple[int | None, int | None]:
    """Width of the features D and number of classes C of a classifier; None where it does not say."""
    found = []
    for names in (("in_features", "in_channels"), ("out_features", "num_classes", "n_classes", "out_channels")):
        sizes = [getattr(head, name, None) for name in names]
        found.append(next((size for size in sizes if isinstance(size, int)), None))
    return found[0], found[1]


def by_timm(module: nn.Module) -> list[Candidate]:
    """What the ``get_classifier()`` of timm models below ``module`` gives."""
    found: list[Candidate] = []
    outermost: list[str] = []
    for name, part in module.named_modules():
        if callable(getattr(part, "get_classifier", None)) and not any(
            name.startswith(f"{o}.") or not o for o in outermost
        ):
            outermost.append(name)
            try:
                given: Any = part.get_classifier()
            except (AttributeError, TypeError, IndexError):  # some, when they were made without classes
                continue
            listed = [*given] if isinstance(given, (tuple, list, nn.ModuleList)) else [given]
            named = [(n, p) for n, p in part.named_modules(prefix=name) if any(p is head for head in listed)]
            found += [Candidate(n, head, plain(name)) for nm, p in named for n, head in last_heads(nm, p)]
    return found


def by_name(parts: list[Named]) -> list[Candidate]:
    """The layers that are called like a classifier, and stand highest."""
    named = [(name, part) for name, part in parts if name.rpartition(".")[2] in _CLASSIFIER_NAMES]
    named = [(name, part) for name, part in named if not _pools_tokens(part)]
    heads = [
        Candidate(n, head, name.rpartition(".")[0] or name)
        for name, part in named
        for n, head in last_heads(name, part)
    ]
    depth = min((head.name.count(".") for head in heads), default=0)
    highest = [head for head in heads if head.name.count(".") == depth]
    return [head for i, head in enumerate(highest) if not any(head.layer is other.layer for other in highest[:i])]


def higher_named(parts: list[Named], found: list[Candidate]) -> list[Candidate]:
    """What is called like a classifier, and stands above what a timm model in it says of itself."""
    named = by_name(parts) if found else []
    inside = any(head.layer is other.layer for head in named for other in found)
    depth = min((head.name.count(".") for head in found), default=0)
    return [] if inside else [head for head in named if head.name.count(".") < depth]


def above(module: nn.Module, found: Candidate, every: list[Named], timms: bool) -> list[Candidate]:
    """The layers outside of the model of the one found that could read what it puts out: what a user may have built on
    a whole model.
    """
    names = [name for name, _ in every]
    if found.name not in names or not found.model:
        return []
    place, depth = names.index(found.name), found.name.count(".")
    features, classes = head_sizes(found.layer)
    readers = []
    for i, (name, head) in enumerate(every):
        if within(name, [found.model]):
            continue
        linear = not isinstance(head, CONVOLUTIONS)  # maps are no logits
        reads = classes in _widths_beside(module, name, found.name) and (linear or i > place)
        higher = i > place and name.count(".") < depth and head_sizes(head)[0] in (features, None)
        if reads or (higher and not timms):  # of a timm model one of the width of the features stands beside the head
            readers.append(Candidate(name, head, ""))
    return readers


def _widths_beside(module: nn.Module, name: str, found: str) -> set[int | None]:
    """What the layers take that stand with this one in the largest part that does not hold the one found."""
    pieces, others = name.split("."), found.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(pieces, others, strict=False)) if a != b), 0)
    top = ".".join(pieces[: shared + 1])
    part = next(part for known, part in module.named_modules() if plain(known) == top)
    return {head_sizes(head)[0] for _, head in heads_in(top, part)}


def is_own_kind(part: nn.Module) -> bool:
    """Whether this is a head of a kind of its own, such as a ``GrassmannLinear``."""
    leaf = hasattr(part, "num_classes") and hasattr(part, "in_features") and not [*part.children()]
    return leaf or isinstance(part, nn.AdaptiveLogSoftmaxWithLoss)


def is_head(part: nn.Module) -> bool:
    """Whether this is of a kind that makes logits."""
    adapted = hasattr(part, "base_layer") and hasattr(part, "in_features")  # LoRA and its like, around a Linear
    return isinstance(part, nn.Linear) or is_own_kind(part) or adapted


def heads_in(name: str, part: nn.Module, convolutions: bool = False) -> list[Named]:
    """All layers below that could make logits, in their order; those inside of such a layer are left out."""
    if is_head(part) or (convolutions and isinstance(part, CONVOLUTIONS)):
        return [(plain(name), part)]
    children = part.named_children()
    saved: Any = getattr(part, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict) and hasattr(part, "original_module"):  # peft trains a copy, and keeps both
        children = saved.named_children()
        name = f"{name}.modules_to_save" if name else "modules_to_save"
    prefix = f"{name}." if name else ""
    return [head for child_name, child in children for head in heads_in(prefix + child_name, child, convolutions)]


def last_heads(name: str, part: nn.Module) -> list[Named]:
    """The layer of a part that could make its output; several where they stand beside each other in it."""
    heads = heads_in(name, part) or heads_in(name, part, convolutions=True)
    if isinstance(part, nn.Sequential):
        return heads[-1:]
    if heads:
        return _beside_each_other(heads)
    return [(plain(name), part)] if part._parameters and not [*part.children()] else []  # of a class of one's own


def _beside_each_other(heads: list[Named]) -> list[Named]:
    """Of the layers of a part, in whatever order they were made, those that by their widths feed none of the others,
    and read or make the same as the last of these.
    """
    sizes = [head_sizes(head) for _, head in heads]
    ends = [i for i, (_, out) in enumerate(sizes) if not any(out == other[0] for other in sizes)] or [len(heads) - 1]
    width, classes = sizes[ends[-1]]
    return [heads[i] for i in ends if sizes[i][0] == width or sizes[i][1] == classes]


def _pools_tokens(part: nn.Module) -> bool:
    """Whether this is what a tower of SigLIP calls its head: attention that makes one vector of all tokens."""
    return any(isinstance(child, nn.MultiheadAttention) for child in part.modules())


def possible(module: nn.Module) -> list[Named]:
    """The layers that could make logits: not those of repeated blocks, nor those that feed the next of a Sequential."""
    blocks = repeated_blocks(module)
    found = heads_in("", module, convolutions=True)
    feeding = feeding_next(module)
    left = [(name, head) for name, head in found if name not in feeding and not within(name, blocks)]
    return left or found


def repeated_blocks(module: nn.Module) -> set[str]:
    """The dotted names of blocks that stand in a row with others of their kind, and of attention."""
    inner: set[str] = set()
    for name, part in module.named_modules():
        if isinstance(part, (nn.ModuleList, nn.Sequential)):
            blocks = [(n, child) for n, child in part.named_children() if [*child.children()] and not is_head(child)]
            kinds = [type(child) for _, child in blocks]
            if blocks and type(part[-1]) is nn.Sequential and _ends_in_head(part):
                blocks = blocks[:-1]  # a perceptron in pieces, whose last layer is no block
            repeated = [f"{name}.{n}".lstrip(".") for n, child in blocks if kinds.count(type(child)) > 1]
            inner.update(plain(block) for block in repeated)
        if isinstance(part, nn.MultiheadAttention):
            inner.add(plain(name))
    return inner


def feeding_next(module: nn.Module) -> set[str]:
    """The names of the layers after which a Sequential has others that could make logits."""
    feeding: set[str] = set()
    for name, part in module.named_modules():
        if isinstance(part, nn.Sequential):
            feeding.update(head_name for head_name, _ in heads_in(name, part, convolutions=True)[:-1])
    return feeding


def of_unknown_kind(module: nn.Module, after: str) -> list[Named]:
    """Layers of a class of the user's own that have a matrix of weights, such as cosine heads, and come after this."""
    blocks = repeated_blocks(module)
    parts = [(plain(name), part) for name, part in module.named_modules()]
    later = parts[[name for name, _ in parts].index(after) + 1 :]
    return [
        (name, part)
        for name, part in later
        if not [*part.children()]
        and not type(part).__module__.startswith("torch.")
        and not within(name, [*blocks, after])
        and any(p.ndim > 1 and p.numel() > max(p.shape) for p in part.parameters(recurse=False))
    ]


def _ends_in_head(part: nn.Module) -> bool:
    """Whether nothing comes after the last layer of this Sequential that could make logits: no activation."""
    while isinstance(part, nn.Sequential) and len(part):
        part = part[-1]
    return is_head(part)


def feeds_blocks(module: nn.Module, found: Named) -> bool:
    """Whether repeated blocks with weights stand after this layer: then it embeds their inputs."""
    seen = False
    for _, part in module.named_modules():
        seen = seen or part is found[1]
        if seen and isinstance(part, (nn.ModuleList, nn.Sequential)):
            blocks = [type(child) for child in part if any(p.ndim > 1 for p in child.parameters())]
            if len(blocks) > len({*blocks}):
                return True
    return False


def within(name: str, parts: Iterable[str]) -> bool:
    """Whether the layer of this name is one of these parts, or in one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def plain(name: str) -> str:
    """A dotted name without what ``torch.compile`` puts into it."""
    return name.replace("_orig_mod.", "")
