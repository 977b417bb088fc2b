"""The surgery block of RESTORE: a residual adapter on the features of a tower."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_feat.joints.arguments import checked
from lightning_feat.layers.feature_shift.insertion import Insertion, Tower, Towers


class SurgeryBlock(nn.Module):
    r"""Features plus a small share of a transformed copy of themselves.

    .. math:: f' = f + r \, \mathrm{FFN}(\mathrm{LN}(f)), \qquad \mathrm{FFN} = \text{Linear}(D, 4 D) \to
              \text{QuickGELU} \to \text{Linear}(4 D, D)

    It stands on the projected feature of a tower, before that is normalised. The consistency of the towers' shifts can
    be had by shifting both far; the block gives the features a way to make up for it. Source: Yang et al., "RESTORE",
    arXiv 2403.06136, as in the released code, where it reads ``r (f + FFN(LN(f))) + (1 - r) f``. The FFN does not start
    at zero: neither does the block.

    ``ratio`` is not trained. It grows once, by :meth:`strengthen`: the further the prompts of its tower have grown, the
    more. It is saved, so that a test meets the same features, and stays in float32 when the module is moved to a half
    precision.

    Args:
        num_features: width D of the features; 2.1 million parameters for 512.
        ratio: r at the start. The paper's runs have 0.01 to 0.15, by data set and tower.
        expansion: width of the FFN, as a multiple of D.

    Example:
        >>> block = SurgeryBlock(num_features=8)
        >>> block(torch.randn(4, 8)).shape, round(float(block.ratio), 3)
        (torch.Size([4, 8]), 0.1)
    """

    ratio: Tensor
    strengthened: Tensor

    @checked
    def __init__(self, num_features: int, ratio: float = 0.1, expansion: int = 4) -> None:
        super().__init__()
        if num_features < 1 or expansion < 1:
            raise ValueError(f"num_features={num_features} and expansion={expansion} must be positive.")
        self.num_features = num_features
        self.norm = nn.LayerNorm(num_features)
        self.expand = nn.Linear(num_features, expansion * num_features)
        self.contract = nn.Linear(expansion * num_features, num_features)
        self._first_ratio = float(ratio)
        self.register_buffer("ratio", torch.tensor(float(ratio), dtype=torch.float32))
        self.register_buffer("strengthened", torch.tensor(False))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the ratio to its first value; after ``to_empty``, where a module was built on the meta device."""
        if self.ratio.device.type != "meta":
            self.ratio.fill_(self._first_ratio)
            self.strengthened.fill_(False)

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(..., D)``, in the dtype they came in."""
        if features.shape[-1] != self.num_features:
            raise ValueError(f"the features are {features.shape[-1]} wide, but num_features={self.num_features}.")
        hidden = self.expand(self.norm(features))
        change = self.contract(hidden * torch.sigmoid(1.702 * hidden))  # QuickGELU, as in OpenAI's CLIP
        return features + (self.ratio * change).to(features.dtype)

    @torch.no_grad()
    def strengthen(self, coefficient: float, gram_norms: Tensor) -> bool:
        """Add ``coefficient * mean(gram_norms)`` to the ratio: once, also over a save and a load.

        RESTORE does so after the epoch with index floor(epochs / 3), with the Gram norms (not their ratios) of the deep
        prompts of the same tower, and 0.02 for text and 0.005 for images.

        Returns:
            Whether the ratio was changed: False the second time.
        """
        if bool(self.strengthened):
            return False
        if not gram_norms.numel():
            raise ValueError("no Gram norms: prompts of depth 1 have no deep prompts, and the ratio would become nan.")
        self.ratio += coefficient * gram_norms.mean().to(self.ratio)
        self.strengthened.fill_(True)
        return True

    def extra_repr(self) -> str:
        return f"{self.num_features}, ratio={float(self.ratio):g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SurgeryBlock":
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = tensor is self.ratio and moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(moved.device) if narrow else moved

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call, no-any-return]


def attach_surgery(towers: Towers, text: SurgeryBlock | None = None, image: SurgeryBlock | None = None) -> Insertion:
    """Put the blocks on the features of the towers, before these are normalised; a tower without one stays as it is.

    The blocks are called by hooks and are not registered in the model: register them where your parameters live.

    Args:
        towers: what ``clip_towers.find_clip_towers`` gives.
        text: the block of the text tower.
        image: that of the image tower.

    Raises:
        ValueError: if a block does not fit its tower, or the tower has one already. Nothing is attached then.
    """
    if text is None and image is None:
        raise ValueError("attach_surgery needs a block for the text tower, the image tower, or both.")
    insertion = Insertion()
    try:
        for kind, block in (("text", text), ("image", image)):
            if block is not None:
                tower: Tower = towers.text if kind == "text" else towers.image
                _check(tower, block, kind)
                insertion.add(tower.on_features(block))
    except Exception:
        insertion.remove()
        raise
    return insertion


def _check(tower: Tower, block: SurgeryBlock, kind: str) -> None:
    if tower.num_features not in (None, block.num_features):
        raise ValueError(
            f"the {kind} features are {tower.num_features} wide, but the block has num_features={block.num_features}."
        )
    if any(isinstance(hook, SurgeryBlock) for hook in tower.hooks()):
        raise ValueError(f"the {kind} tower has a SurgeryBlock already: remove that first.")
