from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_feat.functional.neural_collapse.simplex import (
    prototype_cosines,
    simplex_prototypes,
    sparse_simplex_prototypes,
)
from lightning_feat.joints.arguments import checked


class SimplexETF(nn.Module):
    r"""A classifier that is fixed from the start: its rows are the corners of a simplex, where training would end.

    .. math:: l_c = \gamma \langle h / \lVert h \rVert, e_c \rangle, \qquad
              \langle e_c, e_{c'} \rangle = -1 / (C - 1)

    There is nothing to learn and no bias. Logits lie in ``[-scale, scale]``, in float32 at least, under autocast too.
    Train it with cross-entropy, or with ``functional.neural_collapse.dot_regression``, which only pulls features to
    their corner and so treats small classes as it does large ones. Source: Yang et al., "Inducing neural collapse in
    imbalanced learning", NeurIPS 2022, arXiv 2203.09081. Their network ends in a ``BatchNorm1d`` before this head; that
    is left to you. After a ReLU no feature has a negative entry, and the corners cannot all be reached.

    The prototypes stay in float32 when the module is moved to a half precision.

    Args:
        in_features: width of the features, D; at least ``num_classes - 1``.
        num_classes: number of classes, C; at least two.
        scale: the largest possible logit. Cross-entropy asks for more of it with more classes; dot-regression does not
            know it.
        seed: draws the position of the simplex, from a generator of its own.

    Attributes:
        prototypes: buffer ``(C, D)``, unit rows. It is saved: a checkpoint is read with any seed.

    Example:
        >>> head = SimplexETF(in_features=512, num_classes=10)
        >>> head(torch.randn(4, 512)).shape
        torch.Size([4, 10])
    """

    prototypes: Tensor
    scale: Tensor
    sparsity = 0.0

    @checked
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        scale: float = 25.0,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale={scale} must be positive.")
        self.in_features, self.num_classes, self.seed = in_features, num_classes, seed
        # Lightning's bf16-true changes the default dtype
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self._first_scale = float(scale)
        self.register_buffer("prototypes", torch.empty(num_classes, in_features, dtype=dtype, device=device))
        self.register_buffer("scale", torch.empty((), dtype=dtype, device=device))
        self.reset_parameters()

    @property
    def out_features(self) -> int:
        """The number of classes, under the name that ``nn.Linear`` has for it."""
        return self.num_classes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set prototypes and scale to what they were at first; after ``to_empty``, where a module was built on the meta
        device.
        """
        with torch.device("cpu"):  # also where the module is built inside another
            drawn = self._draw()
        if self.prototypes.device.type != "meta":
            self.prototypes.copy_(drawn)
            self.scale.fill_(self._first_scale)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(..., C)`` of features ``(..., D)``."""
        if features.shape[-1] != self.in_features:
            raise ValueError(f"the features are {features.shape[-1]} wide, but in_features={self.in_features}.")
        cosines = prototype_cosines(features.reshape(-1, self.in_features), self.prototypes)
        return (self.scale * cosines).reshape(*features.shape[:-1], self.num_classes)

    def extra_repr(self) -> str:
        return f"{self.in_features}, num_classes={self.num_classes}, scale={float(self.scale):g}, seed={self.seed}"

    def _draw(self) -> Tensor:
        return simplex_prototypes(self.num_classes, self.in_features, self.seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SimplexETF":
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = tensor.is_floating_point() and moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(moved.device) if narrow else moved

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call, no-any-return]


class SparseETF(SimplexETF):
    """A :class:`SimplexETF` of which a share of the entries is zero, so that each class looks at few features only.

    Its construction, and what it owes to FedLoGe (Xiao et al., ICLR 2024), is in
    ``sparse_simplex_prototypes``; making it takes seconds for hundreds of classes. The product is an
    ordinary dense one: nothing is faster.

    Args:
        in_features: see :class:`SimplexETF`, and there ``num_classes``, ``scale`` and ``seed``.
        sparsity: share of the entries that are zero, below about ``1 - 1 / C - (C - 1) / (2 D)``.
    """

    @checked
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        sparsity: float = 0.6,
        scale: float = 25.0,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.sparsity = sparsity
        super().__init__(in_features, num_classes, scale, seed, device)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparsity={self.sparsity:g}"

    def _draw(self) -> Tensor:
        return sparse_simplex_prototypes(self.num_classes, self.in_features, self.sparsity, self.seed)
