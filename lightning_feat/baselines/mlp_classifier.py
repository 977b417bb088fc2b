"""A multi-layer perceptron, small enough to train in seconds."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from lightning_feat.baselines.classifier import Classifier


class MLPClassifier(Classifier):
    """Linear layers with ReLU: ``backbone`` puts out features ``(N, hidden[-1])``, ``head`` is a ``Linear`` on them.

    Losses, accuracies and the default optimizer are those of ``Classifier``.

    Args:
        in_features: values in one input, all axes but the first taken together: 64 for 8 x 8 grey images.
        num_classes: number of classes.
        hidden: width of each hidden layer; none makes a linear classifier, whose features are the inputs, flattened.
        dropout: share of each hidden layer's outputs set to zero in training.
        batch_norm: normalise before each ReLU; needs two samples at least in every training batch.
        label_smoothing: share of each training target spread evenly over all classes.
        lr: learning rate of the default optimizer at the start of the run; None for 0.05.
        weight_decay: of the default optimizer, on all parameters; None for 0.0005.

    Example:
        >>> import torch
        >>> module = MLPClassifier(in_features=64, num_classes=10)
        >>> module(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: Sequence[int] = (128, 64),
        dropout: float = 0.0,
        batch_norm: bool = False,
        label_smoothing: float = 0.0,
        lr: float | None = None,
        weight_decay: float | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            label_smoothing,
            lr=0.05 if lr is None else lr,
            weight_decay=5e-4 if weight_decay is None else weight_decay,
        )
        self.save_hyperparameters()
        widths = [in_features, *hidden]
        if min(widths) < 1:
            raise ValueError(f"in_features={in_features} and hidden={list(hidden)}: every width is at least 1.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: give a share in [0, 1).")
        layers: list[nn.Module] = [nn.Flatten()]
        for before, width in pairwise(widths):
            layers.append(nn.Linear(before, width))
            layers.extend([nn.BatchNorm1d(width)] if batch_norm else [])
            layers.append(nn.ReLU())
            layers.extend([nn.Dropout(dropout)] if dropout else [])
        self.backbone = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)`` of inputs ``(N, ...)``."""
        logits: Tensor = self.head(self.backbone(images))
        return logits
