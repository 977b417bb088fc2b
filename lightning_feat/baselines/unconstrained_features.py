"""The unconstrained-features model: what neural-collapse theory is about, as a module to train.

Shapes: N samples, D features, C classes or outputs, M linear layers.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim import LBFGS
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.baselines.baseline import Baseline, default_optimizer


class FreeFeatures(nn.Module):
    """One parameter vector for each sample, looked up by the index of the sample.

    Args:
        num_samples: number of samples N.
        num_features: width D.
        nonnegative: pass the parameters through a ReLU. They start positive, since a ReLU that is off stays off.
        init_scale: standard deviation of the normal start; with ``nonnegative``, of the normal whose absolute value it
            is.
        given: ``(N, D)`` start in its place.
    """

    given: Tensor | None

    def __init__(
        self, num_samples: int, num_features: int, nonnegative: bool, init_scale: float, given: Tensor | None = None
    ) -> None:
        super().__init__()
        start_ND = init_scale * torch.randn(num_samples, num_features, dtype=torch.float64)
        start_ND = start_ND if given is None else given.clone()
        self.nonnegative = nonnegative
        self.register_buffer("given", given, persistent=False)
        self.free = nn.Parameter(start_ND.abs() if nonnegative else start_ND)

    def all(self) -> Tensor:
        """The features of all samples, ``(N, D)``."""
        return self.free.relu() if self.nonnegative else self.free

    def forward(self, indices: Tensor) -> Tensor:
        """The features ``(B, D)`` of the samples with these indices ``(B,)``."""
        return self.all()[indices]


class UnconstrainedFeatures(Baseline):
    r"""Features that are parameters, one vector for each sample, below a linear head: a network that can do anything.

    Minimises, over features H, layers :math:`W_1, \dots, W_M` and bias b, all at once and in float64,

    .. math:: \mathcal L(W_M \cdots W_1 H + b, Y) + \tfrac{\lambda_W}{2} \sum_l \lVert W_l \rVert^2
              + \tfrac{\lambda_b}{2} \lVert b \rVert^2 + \tfrac{\lambda_H}{2} \sum_i \lVert h_i \rVert^2

    with the mean cross-entropy, or the squared error :math:`\tfrac{1}{2N} \lVert W_M \cdots W_1 H + b - Y \rVert^2`
    against one-hot targets or given outputs. The decays are part of the loss: give the optimizer none of its own.

    With ``given`` features :math:`H_0` the objective has :math:`\tfrac{\beta}{2} \lVert H - H_0 \rVert^2` beside,
    which keeps the features near them, as those of a layer are near what the layer before gives; they start there.
    ``functional.neural_collapse.kept_features_optimum`` has the solution for the squared error.

    Brings its data: the training loader hands out ``(indices, targets)`` of all samples in one batch, classes one after
    the other, so that an epoch is one step of the optimizer. Logs after each epoch ``train/objective`` and
    ``train/gradient``, the largest entry of its gradient, by which to stop.

    Random starts come from torch's global generator. With several layers zero is a local minimum, and a start of
    small ``init_scale`` ends there. The default optimizer is L-BFGS with line search.

    Args:
        counts: samples in each class, for a classifier; or
        outputs: ``(N, C)`` nested sequence of numbers, for regression.
        num_features: width D; the theory asks for C at least.
        loss: ``"ce"`` for cross-entropy, ``"mse"`` for the squared error.
        num_layers: linear layers M of the head; all but the last are ``(D, D)``.
        bias: whether the last layer has one.
        bias_decay: factor :math:`\lambda_b`.
        nonnegative: features that come out of a ReLU.
        weight_decay: factor :math:`\lambda_W`.
        feature_decay: factor :math:`\lambda_H`, on the sum over all samples and not on their mean.
        init_scale: standard deviation of features and weights at the start.
        given: ``(N, D)`` nested sequence of numbers, features to stay near to, for the samples in their order; D is
            then theirs, and must be ``num_features``.
        keep_weight: factor :math:`\beta`, on the sum over all samples.
        iterations: of L-BFGS, the default optimizer, in each step, that is in each epoch; None for 20.

    Raises:
        ValueError: if ``counts`` and ``outputs`` are both given or both missing, or an argument does not fit.

    Example:
        >>> module = UnconstrainedFeatures(counts=[5, 5, 2], num_features=4)
        >>> module(torch.tensor([0, 11])).shape, module.weight.shape
        (torch.Size([2, 3]), torch.Size([3, 4]))
    """

    targets: Tensor

    def __init__(
        self,
        counts: Sequence[int] | None = None,
        outputs: Sequence[Sequence[float]] | None = None,
        num_features: int = 8,
        loss: Literal["ce", "mse"] = "ce",
        num_layers: int = 1,
        bias: bool = False,
        bias_decay: float = 0.0,
        nonnegative: bool = False,
        weight_decay: float = 2e-3,
        feature_decay: float = 2e-4,
        init_scale: float = 1.0,
        iterations: int | None = None,
        given: Sequence[Sequence[float]] | None = None,
        keep_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if (counts is None) == (outputs is None):
            raise ValueError("give either counts, for a classifier, or outputs, for regression.")
        if outputs is not None and loss == "ce":
            raise ValueError("outputs need loss='mse': cross-entropy is for classes.")
        if min(num_features, num_layers, 20 if iterations is None else iterations) < 1:
            raise ValueError(f"{num_features=}, {num_layers=} and {iterations=}: each is at least 1.")
        if min(weight_decay, feature_decay, bias_decay) < 0 or not 0 < init_scale < math.inf:
            raise ValueError(
                f"{weight_decay=}, {feature_decay=}, {bias_decay=}, {init_scale=}: no decay is negative, and a start "
                "at zero stays there."
            )
        if bias_decay and not bias:
            raise ValueError(f"{bias_decay=}, but there is no bias: set bias=True.")
        self.loss, self.iterations = loss, 20 if iterations is None else iterations
        self.weight_decay, self.feature_decay, self.bias_decay = weight_decay, feature_decay, bias_decay
        targets = _class_targets(counts) if counts is not None else _output_targets(outputs)
        self.num_outputs = len(counts) if counts is not None else targets.shape[1]
        self.register_buffer("targets", targets, persistent=False)
        near = _given_features(given, (len(targets), num_features), nonnegative, keep_weight)
        self.keep_weight = keep_weight
        self.features = FreeFeatures(len(targets), num_features, nonnegative, init_scale, near)
        widths = [num_features] * num_layers + [self.num_outputs]
        layers = [
            nn.Linear(num_features, width, bias=bias and last, dtype=torch.float64)
            for width, last in zip(widths[1:], [False] * (num_layers - 1) + [True], strict=True)
        ]
        for layer in layers:
            nn.init.normal_(layer.weight, std=init_scale)
        if bias:
            nn.init.zeros_(layers[-1].bias)
        self.head = nn.Sequential(*layers)

    @property
    def weight(self) -> Tensor:
        """The product of all layers, ``(C, D)``."""
        return reduce(lambda product, layer: layer.weight @ product, self._layers[1:], self._layers[0].weight)

    @property
    def bias(self) -> Tensor:
        """The bias ``(C,)`` of the last layer; zeros where there is none."""
        last = self._layers[-1]
        return last.weight.new_zeros(self.num_outputs) if last.bias is None else last.bias

    @property
    def indices(self) -> Tensor:
        """The indices of all samples, ``(N,)``, in the order of ``targets``."""
        return torch.arange(len(self.targets), device=self.targets.device)

    @property
    def _layers(self) -> list[nn.Linear]:
        return [layer for layer in self.head if isinstance(layer, nn.Linear)]

    def forward(self, indices: Tensor) -> Tensor:
        """Logits or outputs ``(B, C)`` of the samples with these indices ``(B,)``."""
        logits: Tensor = self.head(self.features(indices))
        return logits

    def objective(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch and the decay of all parameters."""
        if self.loss == "ce":
            error = cross_entropy(logits, targets)
        else:
            wanted = targets if targets.is_floating_point() else one_hot(targets, self.num_outputs)
            error = (logits - wanted).square().sum() / (2 * len(logits))
        weights = sum((layer.weight.square().sum() for layer in self._layers), error.new_zeros(()))
        free_ND = self.features.all()
        decay = self.weight_decay * weights + self.feature_decay * free_ND.square().sum()
        if self.features.given is not None:
            decay = decay + self.keep_weight * (free_ND - self.features.given).square().sum()
        return error + (decay + self.bias_decay * self.bias.square().sum()) / 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        indices, targets = batch
        return self.objective(self(indices), targets)

    def on_train_epoch_end(self) -> None:
        # Not in training_step: L-BFGS calls that for every trial of its line search.
        with torch.enable_grad():
            objective = self.objective(self(self.indices), self.targets)
            slopes = torch.autograd.grad(objective, [*self.parameters()])
        self.log("train/objective", objective.detach(), prog_bar=True)
        self.log("train/gradient", torch.stack([slope.abs().max() for slope in slopes]).max(), prog_bar=True)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All samples in one batch ``(indices, targets)``."""
        size = len(self.targets)
        return DataLoader(TensorDataset(torch.arange(size), self.targets.cpu()), batch_size=size)

    @default_optimizer("iterations")
    def configure_optimizers(self) -> LBFGS:
        """L-BFGS with a strong Wolfe line search, without a stop of its own short of rounding."""
        return LBFGS(
            self.parameters(),
            max_iter=self.iterations,
            history_size=50,
            tolerance_grad=1e-13,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )


def _class_targets(counts: Sequence[int]) -> Tensor:
    if len(counts) < 2 or min(counts) < 1:
        raise ValueError(f"counts={list(counts)}: give at least two classes, each with a sample.")
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def _output_targets(outputs: Any) -> Tensor:
    targets = torch.as_tensor(outputs, dtype=torch.float64)
    if targets.ndim != 2 or targets.numel() == 0:
        raise ValueError(f"outputs must be (N, C) numbers, got shape {tuple(targets.shape)}.")
    return targets


def _given_features(given: Any, shape: tuple[int, int], nonnegative: bool, keep_weight: float) -> Tensor | None:
    if given is None:
        if keep_weight:
            raise ValueError(f"{keep_weight=}, but nothing to stay near to: give features (argument given).")
        return None
    features = torch.as_tensor(given, dtype=torch.float64)
    if tuple(features.shape) != shape or not features.isfinite().all():
        raise ValueError(
            f"given must be finite numbers of shape {shape}, samples and num_features, got {tuple(features.shape)}."
        )
    if keep_weight <= 0:
        raise ValueError(f"{keep_weight=}: with given features it must be above zero.")
    if nonnegative and bool((features < 0).any()):
        raise ValueError("nonnegative=True, but given has numbers below zero.")
    return features
