r"""Displacements of class subspaces that are made from the gradient alone, beside whatever optimizer trains the rest.

Each rule writes ``start + displacement`` into ``moved``; the geodesic step that follows takes the part inside the
subspace out. Shapes: C classes, k dimensions, D features; ``moved``, ``start``, ``gradient`` and momentum buffers are
``(C, k, D)``.
"""

import torch
from torch import Tensor

from lightning_feat.functional.grassmann import tangent_projection

Skipped = Tensor | None  # a scalar that is not zero where an fp16 step is to be skipped; None where it never is


def move_by_momentum(
    moved: Tensor, start: Tensor, gradient: Tensor, buffer: Tensor, rate: float, momentum: float, skipped: Skipped
) -> None:
    r"""SGD with momentum, :math:`b \leftarrow \mu b + g,\ \Delta = - \eta b`: the paper's rule, its buffer Euclidean.

    Source: Wang, Li, Zhang, ICCV 2023, arXiv 2308.01547.
    """
    if skipped is None:
        buffer.mul_(momentum).add_(gradient)
        torch.sub(start, buffer, alpha=rate, out=moved)
        return
    taken = _taken(skipped)
    buffer.mul_(1 - taken * (1 - momentum)).add_(_harmless(gradient, skipped))
    moved.copy_(start - rate * taken * buffer)


def move_by_adam(
    moved: Tensor,
    start: Tensor,
    gradient: Tensor,
    buffer: Tensor,
    squares: Tensor,
    steps: Tensor,
    rate: float,
    momentum: float,
    second_momentum: float,
    skipped: Skipped,
) -> None:
    r"""Adam with one second moment for each class, so that it does not depend on the choice of basis.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) G,\quad v_c \leftarrow \beta_2 v_c + (1 - \beta_2) \lVert G_c
    \rVert_F^2,
              \quad \Delta_c = - \eta\, \hat m_c / (\sqrt{\hat v_c} + 10^{-8})

    with G the tangent part of the gradient and hats for the usual correction of the bias to zero. Another basis R S
    of the same subspace has the gradient R G and the momentum R m, and the norm of G stays: so the subspaces go the
    same way. An elementwise second moment would mix up the entries of R G, and with them the direction. A class moves
    by about ``rate`` radians in a step (geodesic distance) while its gradients point one way.

    ``squares`` ``(C,)`` holds the moments v, ``steps`` the number of steps taken, a scalar; both are updated, and so
    is ``buffer``, m. Source: the per-point second moment of Becigneul and Ganea, "Riemannian adaptive optimization
    methods", ICLR 2019, with the projection at the step in place of a transport.
    """
    taken = steps.new_ones(()) if skipped is None else _taken(skipped).to(steps.dtype)
    if skipped is not None:
        gradient = _harmless(gradient, skipped)
    gradient = tangent_projection(start, gradient)
    steps.add_(taken)
    buffer.lerp_(gradient, (1 - momentum) * taken.to(buffer.dtype))
    squares.lerp_(gradient.square().sum((1, 2)), (1 - second_momentum) * taken.to(squares.dtype))
    unbiased = buffer / (1 - momentum**steps)
    length_C = (squares / (1 - second_momentum**steps)).sqrt() + 1e-8
    moved.copy_(torch.where(taken > 0, start - rate * unbiased / length_C[:, None, None], start))


def _taken(skipped: Tensor) -> Tensor:
    return (skipped == 0).to(torch.float32).reshape(())


def _harmless(gradient: Tensor, skipped: Tensor) -> Tensor:
    return torch.where(skipped.reshape(()) == 0, gradient, 0.0)  # an infinite gradient times zero would be NaN
