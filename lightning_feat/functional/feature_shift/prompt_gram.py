"""How far learned prompts can shift a block, told from the prompts alone: the norms of their Gram matrices.

With attention linearised, prompt rows P add ``x W_q W_k^T (P^T P) W_v`` to the other tokens x, so that the norm of
``P^T P`` bounds how far the block's output moves (our derivation). RESTORE (Yang et al., arXiv 2403.06136) holds the
two towers of a CLIP together by the ratio of this norm to its value at the start of training. That is what the released
code penalises; the paper defines the shift on the tokens themselves, which needs a second forward.

Shapes: J blocks, n prompts, D width of a tower.
"""

import torch
from torch import Tensor


def gram_norm(prompts: Tensor) -> Tensor:
    r"""Frobenius norms ``(...)`` of the Gram matrices of prompts ``(..., n, D)``.

    .. math:: \lVert P^\top P \rVert_F = \lVert P P^\top \rVert_F

    It is computed in the form on the right, n by n, in float64 (float32 where the device has no other), under autocast
    too, and rounded to float32 at the end: so that two devices, or two orders of summation, give the same number, and
    the ratio to a norm of the same prompts is one, exactly. The gradient of prompts that are all zero is zero.

    Example:
        >>> gram_norm(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))  # sqrt(9 ** 2 + 16 ** 2)
        tensor(18.3576)
    """
    if prompts.ndim < 2 or not prompts.is_floating_point():
        raise ValueError(f"prompts (..., n, D) are needed, got {tuple(prompts.shape)} of {prompts.dtype}.")
    with torch.autocast(prompts.device.type, enabled=False):
        exact = prompts.to(exact_dtype(prompts.device))
        return torch.linalg.vector_norm(exact @ exact.mT, dim=(-2, -1)).float()


def gram_ratio(norms: Tensor, start: Tensor) -> Tensor:
    """Gram norms as multiples of those at the start; ``start`` gets no gradient.

    It is one, exactly, while the prompts are what they were, and two when they have grown by a factor of sqrt(2).
    """
    if norms.shape != start.shape:
        raise ValueError(f"norms {tuple(norms.shape)} and those at the start {tuple(start.shape)} must match.")
    return norms / start.detach()


def gram_discrepancy(text_norms: Tensor, image_norms: Tensor, text_start: Tensor, image_start: Tensor) -> Tensor:
    """``|s_t - s_v|`` of each block ``(J,)``; the arguments are those of :func:`gram_consistency_loss`."""
    return (gram_ratio(text_norms, text_start) - gram_ratio(image_norms, image_start)).abs()


def gram_consistency_loss(text_norms: Tensor, image_norms: Tensor, text_start: Tensor, image_start: Tensor) -> Tensor:
    r"""Squared difference of how the prompts of both towers have grown, summed over the blocks.

    .. math:: \sum_j \left( s_t(j) - s_v(j) \right)^2, \qquad s(j) = \lVert P_j^\top P_j \rVert_F \,/\,
              \lVert P_j^\top P_j \rVert_F^{\text{start}}

    A sum, not a mean, with gradient on both sides: the released code of RESTORE, where the prompts of block 0 are left
    out and the weight is one. At the start it is zero, exactly. It has no anchor: both towers may grow by the same
    factor without end, so log the norms too.

    Args:
        text_norms: ``(J,)``, :func:`gram_norm` of the text prompts of each block.
        image_norms: ``(J,)``, of the image prompts.
        text_start: ``(J,)``, what ``text_norms`` was before training, without gradient. Save it with the prompts: taken
            anew when a run resumes, it would silently be another loss.
        image_start: ``(J,)``, the same for the images.

    Returns:
        Scalar, float32.

    Example:
        >>> start = torch.tensor([2.0, 2.0])
        >>> gram_consistency_loss(torch.tensor([2.0, 3.0]), torch.tensor([2.0, 2.0]), start, start)
        tensor(0.2500)
    """
    difference_J = gram_ratio(text_norms, text_start) - gram_ratio(image_norms, image_start)
    return difference_J.square().sum()


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that lack it."""
    return torch.float32 if device.type == "mps" else torch.float64
