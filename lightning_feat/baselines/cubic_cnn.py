"""A network of one trained layer, cubes of what its filters see, on which simplicity bias can be computed by hand.

Shapes: N examples, P patches in each, D numbers in a patch, J filters.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_feat.baselines.baseline import default_optimizer
from lightning_feat.baselines.classifier import Classifier


class CubicFilters(nn.Module):
    r"""From patches to the answers of the filters, :math:`h_j = \sum_p \langle w_j, x_p \rangle^3`.

    Args:
        patch_size: numbers D in a patch.
        num_filters: number J.
        init_scale: standard deviation of the weights at the start, from the global generator.
    """

    def __init__(self, patch_size: int, num_filters: int, init_scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(init_scale * torch.randn(num_filters, patch_size))

    def forward(self, patches: Tensor) -> Tensor:
        """Features ``(N, J)`` of patches ``(N, P, D)``."""
        return (patches @ self.weight.T).pow(3).sum(1)


class CubicCNN(Classifier):
    r"""Two classes by the sign of a sum of cubes, trained on the logistic loss: the network of simplicity-bias theory.

    .. math:: f(x) = \sum_{j=1}^{J} \sum_{p=1}^{P} \langle w_j, x_p \rangle^3, \qquad
              L = \log(1 + e^{-y f(x)}), \quad y = \pm 1

    ``backbone`` gives the features ``(N, J)``, one for each filter, and ``head`` is a ``Linear`` without bias that is
    never trained. Its rows are -1/2 and +1/2 throughout, so that the logits of the classes 0 and 1, for y = -1 and +1,
    are -f/2 and f/2: softmax cross-entropy on them is the logistic loss, the more probable class is the sign of f, and
    what reads the features, the logits or the head of a classifier finds them here. As logits they are balanced, and
    a clustering of them is one of f.

    Losses and accuracies are those of ``Classifier``. Source: Nguyen, Haddad, Gan, Mirzasoleiman, NeurIPS 2024, arXiv
    2404.17768; number of filters, scale and rate are ours. ``data.TwoFeaturePatchesDataModule`` is the data of the
    theory, and ``batch_size=num_train`` with the default optimizer makes it gradient descent.

    Args:
        patch_size: numbers D in a patch.
        num_filters: number J.
        init_scale: standard deviation of the weights at the start. Outputs begin at its third power, and the time that
            a feature takes to be learned is about inverse to it.
        lr: learning rate of the default optimizer; None for 0.1.
        momentum: of the default optimizer; None for none.
        weight_decay: of the default optimizer; None for none.

    Raises:
        ValueError: if a size is below one or a number negative, or ``init_scale`` is zero, where the gradient is, too.

    Example:
        >>> logits = CubicCNN(patch_size=50)(torch.ones(4, 3, 50))
        >>> logits.shape, bool(torch.equal(logits[:, 0], -logits[:, 1]))
        (torch.Size([4, 2]), True)
    """

    def __init__(
        self,
        patch_size: int = 50,
        num_filters: int = 40,
        init_scale: float = 0.01,
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
    ) -> None:
        super().__init__(
            num_classes=2, label_smoothing=0.0, lr=0.1 if lr is None else lr, weight_decay=weight_decay or 0.0
        )
        self.save_hyperparameters()
        if min(patch_size, num_filters) < 1:
            raise ValueError(f"{patch_size=} and {num_filters=}: each is at least 1.")
        if not init_scale > 0:
            raise ValueError(f"init_scale={init_scale}: at zero weights the gradient is zero, so give more.")
        if (momentum or 0.0) < 0:
            raise ValueError(f"momentum={momentum} cannot be negative.")
        self.momentum = momentum or 0.0
        self.backbone = CubicFilters(patch_size, num_filters, init_scale)
        self.head = nn.Linear(num_filters, 2, bias=False)
        self.head.requires_grad_(False).weight.copy_(torch.tensor([[-0.5], [0.5]]))

    def forward(self, patches: Tensor) -> Tensor:
        """Logits ``(N, 2)`` of patches ``(N, P, D)``."""
        logits: Tensor = self.head(self.backbone(patches))
        return logits

    @default_optimizer("lr", "momentum", "weight_decay")
    def configure_optimizers(self) -> dict[str, Any]:
        """SGD at a constant learning rate."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return {"optimizer": SGD(trained, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)}
