r"""The step of sharpness-aware minimisation to the worst point near the weights.

With gradient g and a diagonal T the first-order solution of :math:`\max L(w + e)` over :math:`\lVert T^{-1} e \rVert
\le \rho` is :math:`e = \rho\, T^2 g / \lVert T g \rVert`. SAM has T = 1 (Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021,
arXiv 2010.01412), ASAM T = |w| + eta for each entry (Kwon, Kim, Park, Choi, ICML 2021, arXiv 2102.11600).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def sharpness_step(
    gradients: Sequence[Tensor], rho: float = 0.05, scales: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """The perturbation of the weights, of length ``rho``, along which the loss rises most, to first order.

    Args:
        gradients: of each parameter, any shapes and floating dtypes; a common factor, as of a gradient scaler, does not
            matter.
        rho: length of the perturbation over all parameters together, in the metric of ``scales``.
        scales: T for each parameter, of its shape, or None for ones; see ``adaptive_scales``.

    Returns:
        A tensor like each gradient. Zeros for all where the gradient is zero or not finite; nothing waits for the
        device.

    Raises:
        ValueError: if ``rho`` is not positive, or ``scales`` are not as many as gradients.

    Example:
        >>> sharpness_step([torch.tensor([3.0, 4.0])], rho=1.0)
        [tensor([0.6000, 0.8000])]
    """
    if not rho > 0:
        raise ValueError(f"rho={rho}: give a length above zero; the paper's is 0.05.")
    every: list[Tensor | None] = [None] * len(gradients) if scales is None else list(scales)
    if len(every) != len(gradients):
        raise ValueError(f"{len(gradients)} gradients and {len(every)} scales: give one for each, None for ones.")
    if not gradients:
        return []
    scaled = [g if t is None else g * t for g, t in zip(gradients, every, strict=True)]
    device = scaled[0].device
    peaks = [g.detach().abs().amax() if g.numel() else g.new_zeros(()) for g in scaled]
    peak = torch.stack([one.to(device, torch.float32) for one in peaks]).amax()
    # Over the largest entry first: squares of what a bfloat16 holds leave the range of float32.
    units = [g / peak.to(g.device, g.dtype) for g in scaled]
    lengths = [torch.linalg.vector_norm(u, dtype=torch.promote_types(u.dtype, torch.float32)) for u in units]
    length = torch.linalg.vector_norm(torch.stack([one.to(device, lengths[0].dtype) for one in lengths]))
    moves, factor = length.isfinite(), rho / length
    steps = [(u * factor.to(u.device)).to(u.dtype) for u in units]
    steps = [e if t is None else e * t for e, t in zip(steps, every, strict=True)]
    return [torch.where(moves.to(e.device), e, torch.zeros_like(e)) for e in steps]


@torch.no_grad()
def adaptive_scales(parameters: Sequence[Tensor], eta: float = 0.01) -> list[Tensor]:
    """ASAM's T for each parameter, ``|w| + eta``: a rescaling of the layers that leaves the network the same leaves its
    sharpness the same, too.

    Args:
        parameters: any shapes.
        eta: lets weights move that are zero; 0.01 in the paper.

    Raises:
        ValueError: if ``eta`` is negative.
    """
    if eta < 0:
        raise ValueError(f"eta={eta} must not be negative; the paper's is 0.01.")
    return [p.detach().abs() + eta for p in parameters]
