import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_feat.functional.grassmann import orthonormality_error, polar_projection, random_basis, subspace_logits
from lightning_feat.joints.arguments import checked

LOST = 1e-2  # orthonormality error that no rounding explains
_TOLERANCE = 1e-4  # float32 steps stay below 1e-5; a basis that was averaged or stored in half precision is above 1e-3


class GrassmannLinear(nn.Module):
    r"""A classifier whose classes are subspaces: the logit of a class is the length of the feature's part in its
    subspace.

    .. math:: l_c = \gamma \lVert S_c x / \lVert x \rVert \rVert_2

    There is no bias. Logits lie in ``[0, scale]``. The basis must stay orthonormal, which an ordinary optimizer step
    does not care for: train it with the ``GrassmannHead`` callback, or with
    ``lightning_feat.optim.follow_subspaces``. Source: Wang, Li, Zhang, ICCV 2023, arXiv 2308.01547; the formula is in
    ``functional.grassmann.subspace_logits``.

    The basis stays in float32 when the module is moved to a half precision, where it would be orthonormal to 4e-3 only.

    Args:
        in_features: width of the features, D.
        num_classes: number of classes, C.
        subspace_dim: dimensions of every class subspace, k. Keep it well below ``in_features``: the logit of a random
            feature is near ``scale * sqrt(k / D)``.
        scale: the largest possible logit.
        learn_scale: make the scale a parameter.
        normalize: divide features by their length first.

    Attributes:
        basis: ``(C, k, D)``, orthonormal rows, contiguous; drawn uniformly. Only the subspaces count, not their bases.

    Example:
        >>> head = GrassmannLinear(in_features=512, num_classes=10, subspace_dim=8)
        >>> head(torch.randn(4, 512)).shape
        torch.Size([4, 10])
    """

    scale: Tensor

    @checked
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        subspace_dim: int,
        scale: float = 25.0,
        learn_scale: bool = False,
        normalize: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(subspace_dim, int):
            raise ValueError(f"subspace_dim={subspace_dim!r}: all classes share one whole number of dimensions.")
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: there must be at least one class.")
        if not 1 <= subspace_dim <= in_features:
            raise ValueError(
                f"subspace_dim={subspace_dim} must lie between 1 and the width of the features, {in_features}; the "
                "paper uses 8 of 384 to 2048."
            )
        if not scale > 0:
            raise ValueError(f"scale={scale} must be positive.")
        self.in_features, self.num_classes, self.subspace_dim = in_features, num_classes, subspace_dim
        self.normalize = normalize
        self._passes, self._next_look = 0, 2  # in training; see _look
        dtype = torch.promote_types(
            torch.get_default_dtype(), torch.float32
        )  # Lightning's bf16-true changes the default
        self.basis = nn.Parameter(torch.empty(num_classes, subspace_dim, in_features, dtype=dtype, device=device))
        self._first_scale = float(scale)
        scale_tensor = torch.tensor(float(scale), dtype=dtype, device=device)
        if learn_scale:
            self.scale = nn.Parameter(scale_tensor)
        else:
            self.register_buffer("scale", scale_tensor)
        self.reset_parameters()

    @property
    def out_features(self) -> int:
        """The number of classes, under the name that ``nn.Linear`` has for it."""
        return self.num_classes

    @property
    def learn_scale(self) -> bool:
        """Whether the scale is a parameter."""
        return isinstance(self.scale, nn.Parameter)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the subspaces anew, uniformly, and set the scale to its first value; after ``to_empty``, where a module
        was built on the meta device.
        """
        if self.basis.device.type != "meta":
            shape = self.num_classes, self.subspace_dim, self.in_features
            self.basis.copy_(random_basis(*shape, dtype=self.basis.dtype, device=self.basis.device))
            self.scale.fill_(self._first_scale)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(..., C)`` of features ``(..., D)``, in float32 at least, under autocast too."""
        if features.shape[-1] != self.in_features:
            raise ValueError(f"the features are {features.shape[-1]} wide, but in_features={self.in_features}.")
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._look()
        flat = features.reshape(-1, self.in_features)
        logits = subspace_logits(flat, self.basis, self.scale, normalize=self.normalize)
        return logits.reshape(*features.shape[:-1], self.num_classes)

    @torch.no_grad()
    def _look(self) -> None:
        """Now and then in training, ever more rarely: say, once, that nobody keeps the subspaces on their manifold."""
        self._passes += 1
        if self._passes != self._next_look or not self.basis.requires_grad or hasattr(self.basis, "placements"):
            return
        self._next_look *= 4
        error = float(orthonormality_error(self.basis.detach()).max())
        if error > LOST:
            self._next_look = 0
            warnings.warn(off_the_manifold(error), stacklevel=3)

    @torch.no_grad()
    def project_(self, tolerance: float = _TOLERANCE) -> float:
        """Put the basis back on the manifold if its orthonormality error is above ``tolerance``; gives the error
        found.
        """
        local = local_part(self.basis)
        error = float(orthonormality_error(local).max()) if local.numel() else 0.0
        if error > tolerance:  # not where it is NaN: a diverged run is the user's to see
            local.copy_(polar_projection(local))
        return error

    def extra_repr(self) -> str:
        scale = "learned" if isinstance(self.scale, nn.Parameter) else f"{float(self.scale):g}"
        return f"{self.in_features}, num_classes={self.num_classes}, subspace_dim={self.subspace_dim}, scale={scale}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GrassmannLinear":
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = tensor.is_floating_point() and moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(moved.device) if narrow else moved

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}basis")
        if isinstance(loaded, Tensor) and type(loaded) in (Tensor, nn.Parameter) and not loaded.is_meta:
            shape = (self.num_classes, self.subspace_dim, self.in_features)
            if loaded.shape != shape:
                error_messages: list[str] = args[-1]
                error_messages.append(
                    f"{prefix}basis has shape {tuple(loaded.shape)}, but this head holds {self.num_classes} classes of "
                    f"{self.subspace_dim} dimensions in {self.in_features} features: {shape}. Build the head as "
                    "it was saved."
                )
                return
            exact = loaded.detach().to(torch.promote_types(loaded.dtype, torch.float32))
            error = float(orthonormality_error(exact).max())
            if error != error:
                warnings.warn(f"the loaded {prefix}basis has entries that are NaN or inf.", stacklevel=2)
            elif error > _TOLERANCE:
                warnings.warn(
                    f"the loaded {prefix}basis was off the manifold (orthonormality error {error:.1e}) and has been "
                    "projected: it was averaged, stored in half precision, or trained without Riemannian steps.",
                    stacklevel=2,
                )
                exact = polar_projection(exact)
            state_dict[f"{prefix}basis"] = exact
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]


def off_the_manifold(error: float) -> str:
    """What to say of class subspaces with this orthonormality error."""
    return (
        f"the class subspaces are off their manifold (orthonormality error {error:.2g}): what trains them knows "
        "nothing of it, and neither logits nor angles mean what they say. Add the GrassmannHead callback, or call "
        "lightning_feat.optim.follow_subspaces(optimizer, module) in configure_optimizers."
    )


def local_part(parameter: Tensor) -> Tensor:
    """The classes that this process holds, sharing memory: all of them, but for a parameter sharded by FSDP2.

    Raises:
        ValueError: if the parameter is sharded along anything but its classes, as tensor parallelism does.
    """
    data: Any = parameter.detach()
    if not hasattr(data, "to_local"):
        return cast(Tensor, data)
    if any(not (placement.is_replicate() or placement.is_shard(0)) for placement in data.placements):
        raise ValueError(
            f"subspaces can be sharded by class only, got placements {data.placements}: leave the head out."
        )
    return cast(Tensor, data.to_local())
