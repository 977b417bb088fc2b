"""A core feature that tells the class better, and a shortcut that is easier to get at.

Shapes: N examples, D numbers in each; the latents are ``(core, shortcut)``.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_feat.data.parts import PartsDataModule
from lightning_feat.data.synthetic.drawn import DrawnPart, check_sizes, random_rotation, seed_of
from lightning_feat.joints.arguments import checked


class ShortcutExamples(NamedTuple):
    """Examples and what they are made of."""

    inputs: Tensor  # (N, D) float32
    targets: Tensor  # (N,) int64, 0 or 1
    latents: Tensor  # (N, 2) float32, core and shortcut


class ShortcutProbe(NamedTuple):
    """Every value of one latent with every value of the other."""

    inputs: Tensor  # (N, D) float32
    core: Tensor  # (N,) int64, the class that the core feature stands for
    shortcut: Tensor  # (N,) int64, the class that the shortcut stands for


def shortcut_examples(
    num_examples: int,
    mixing: Tensor,
    core_predictivity: float = 0.9,
    shortcut_predictivity: float = 0.75,
    core_availability: float = 1.0,
    shortcut_availability: float = 4.0,
    noise: float = 0.0,
    seed: int = 0,
) -> ShortcutExamples:
    r"""Draw examples of two classes with two features, whose predictivity and availability are set apart.

    With :math:`y = \pm 1` at equal odds, the latents are independent given the class, and normal,

    .. math:: z_i \sim N(y \mu_i, 1), \quad \mu_i = \Phi^{-1}(\rho_i), \qquad
              x = Q \, (\alpha_c z_c, \ \alpha_s z_s)^T + \sigma \, (I - Q Q^T) \, \epsilon

    so that the sign of :math:`z_i` alone tells the class with probability :math:`\rho_i`, its **predictivity**. The
    columns of Q are orthonormal; the amplification :math:`\alpha_i` is the **availability**, how loud the feature is
    in the input.

    **What can be reached.** The classes are normal with one covariance: the best rule is linear, :math:`\mu_c z_c +
    \mu_s z_s > 0` (linear discriminant analysis finds it), right with probability :math:`\Phi(\sqrt{\mu_c^2 +
    \mu_s^2})`, and does not depend on availability. On latents that are uniform over a square it follows
    the weaker of both features with the reliance :math:`R^*_s = \mu_s / (2 \mu_c)` and the core with
    :math:`1 - \mu_s / (2 \mu_c)` (``functional.simplicity_bias.feature_reliance``). What a network relies on the
    shortcut beyond that is its shortcut bias. Linear models have next to none; one hidden layer is enough to be biased
    towards what is more available (Hermann et al., who explain it by the neural tangent kernel).

    Source: Hermann, Mobahi, Fel, Mozer, "On the foundations of shortcut learning", ICLR 2024, arXiv 2310.16228, from
    memory: predictivity, availability as amplification, the orthogonal mixing and the balanced probe. The variance
    of one, the defaults and the noise, which is orthogonal to both features, are ours.

    Args:
        num_examples: number N.
        mixing: Q, ``(D, 2)`` with orthonormal columns: where core and shortcut lie in the input.
        core_predictivity: :math:`\rho_c`, from 0.5 (tells nothing) to below 1.
        shortcut_predictivity: :math:`\rho_s`, at most that of the core.
        core_availability: :math:`\alpha_c`.
        shortcut_availability: :math:`\alpha_s`.
        noise: :math:`\sigma`.
        seed: of a generator of its own on the CPU.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> inputs, targets, latents = shortcut_examples(4, torch.eye(3)[:, :2])
        >>> inputs.shape, torch.equal(inputs[:, 1], 4 * latents[:, 1])
        (torch.Size([4, 3]), True)
    """
    _check(num_examples, core_predictivity, shortcut_predictivity, core_availability, shortcut_availability, noise)
    if mixing.ndim != 2 or mixing.shape[1] != 2 or len(mixing) < 2:
        raise ValueError(f"mixing {tuple(mixing.shape)} must be (D, 2): the directions of core and shortcut.")
    generator = torch.Generator().manual_seed(seed)
    targets_N = torch.randint(2, (num_examples,), generator=generator)
    means_2 = torch.tensor([_mean(core_predictivity), _mean(shortcut_predictivity)])
    sign_N1 = 2.0 * targets_N[:, None] - 1
    latents_N2 = sign_N1 * means_2 + torch.randn(num_examples, 2, generator=generator)
    inputs_ND = mixed(latents_N2, mixing, core_availability, shortcut_availability)
    if noise:
        noise_ND = noise * torch.randn(num_examples, len(mixing), generator=generator)
        inputs_ND = inputs_ND + noise_ND - (noise_ND @ mixing) @ mixing.T
    return ShortcutExamples(inputs_ND, targets_N, latents_N2)


def mixed(latents: Tensor, mixing: Tensor, core_availability: float, shortcut_availability: float) -> Tensor:
    """Inputs ``(N, D)`` of latents ``(N, 2)``, without noise."""
    return (latents * torch.tensor([core_availability, shortcut_availability])) @ mixing.T.to(latents)


class ShortcutDataModule(PartsDataModule):
    """Examples of :func:`shortcut_examples`, which says what they are, in batches ``(inputs, targets)``.

    After ``setup``, ``train_set``, ``val_set`` and ``test_set`` are the parts, each with ``inputs``, ``targets`` and
    ``latents``, core and shortcut. A part depends on its size, the arguments of the distribution and the seed alone.

    Args:
        batch_size: examples in a batch, at most.
        num_train: examples to train on.
        num_val: examples to validate on.
        num_test: examples to test on.
        num_features: numbers D in an example, at least 2.
        core_predictivity: how often the sign of the core feature tells the class, from 0.5 to below 1.
        shortcut_predictivity: the same of the shortcut; at most that of the core.
        core_availability: amplification of the core feature.
        shortcut_availability: amplification of the shortcut.
        noise: standard deviation of each number, orthogonal to both features.
        seed: of every draw and the mixing; the order of training batches follows the global seed.
        num_workers: worker processes of each loader. Fetching is so cheap that zero is fastest.
        return_index: batches become ``(inputs, targets, indices)``, with positions in the part, int64.

    Attributes:
        mixing: ``(D, 2)``, the directions of core and shortcut in the input.

    Example:
        >>> data = ShortcutDataModule(num_features=10)
        >>> inputs, core, shortcut = data.probe(side=4)
        >>> inputs.shape, core.tolist()[:4], shortcut.tolist()[:4]
        (torch.Size([16, 10]), [0, 0, 0, 0], [0, 0, 1, 1])
    """

    num_classes = 2

    @checked
    def __init__(
        self,
        batch_size: int = 64,
        num_train: int = 5_000,
        num_val: int = 1_000,
        num_test: int = 2_000,
        num_features: int = 50,
        core_predictivity: float = 0.9,
        shortcut_predictivity: float = 0.75,
        core_availability: float = 1.0,
        shortcut_availability: float = 4.0,
        noise: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
        return_index: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_sizes(num_train, num_val, num_test)
        if num_features < 2:
            raise ValueError(f"num_features={num_features}: each of the two features needs a direction.")
        self.predictivities = core_predictivity, shortcut_predictivity
        self.availabilities = core_availability, shortcut_availability
        _check(num_train, *self.predictivities, *self.availabilities, noise)
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}
        self.noise, self.seed, self.return_index = noise, seed, return_index
        self.mixing = random_rotation(num_features, seed_of("mixing", seed))[:, :2]

    def setup(self, stage: str | None = None) -> None:
        """Draw all three parts whatever the stage."""
        self.train_set, self.val_set, self.test_set = map(self._part, ("train", "val", "test"))

    def best_rule(self, inputs: Tensor) -> Tensor:
        """Classes ``(N,)`` of inputs ``(N, D)`` by the best rule there is for this distribution, which is linear."""
        weights_2 = [_mean(p) / a for p, a in zip(self.predictivities, self.availabilities, strict=True)]
        direction_D = (self.mixing.double() @ torch.tensor(weights_2, dtype=torch.float64)).to(inputs.device)
        return (inputs.double() @ direction_D > 0).long()

    def probe(self, side: int = 20, reach: float = 2.0) -> ShortcutProbe:
        """A balanced grid of ``side`` values of both latents, from ``-reach`` to ``reach``, without noise.

        What the output of a network agrees with here is what it relies on: see ``feature_reliance`` and
        ``shortcut_bias`` in ``functional.simplicity_bias``, for which ``best_rule`` is the best classifier.
        """
        if side < 2 or side % 2 or not 0 < reach < math.inf:
            raise ValueError(f"{side=}, {reach=}: give an even number of values, as zero has no sign, and a reach > 0.")
        values = reach * ((2 * torch.arange(side) + 1) / side - 1)
        latents_N2 = torch.cartesian_prod(values, values)
        core, shortcut = (latents_N2 > 0).long().T
        return ShortcutProbe(mixed(latents_N2, self.mixing, *self.availabilities), core, shortcut)

    def _part(self, name: str) -> DrawnPart:
        seed = seed_of(name, self.seed)
        arguments = (*self.predictivities, *self.availabilities, self.noise)
        return DrawnPart(*shortcut_examples(self.sizes[name], self.mixing, *arguments, seed), self.return_index)


def _mean(predictivity: float) -> float:
    return NormalDist().inv_cdf(predictivity)


def _check(
    num_examples: int,
    core_predictivity: float,
    shortcut_predictivity: float,
    core_availability: float,
    shortcut_availability: float,
    noise: float,
) -> None:
    if num_examples < 1:
        raise ValueError(f"num_examples={num_examples}: draw at least one.")
    if not 0.5 <= shortcut_predictivity <= core_predictivity < 1:
        raise ValueError(
            f"{core_predictivity=} and {shortcut_predictivity=} must lie in [0.5, 1), and the shortcut's must not be "
            "above the core's: the core is what tells the class better."
        )
    if not (0 < core_availability < math.inf and 0 < shortcut_availability < math.inf and 0 <= noise < math.inf):
        raise ValueError(f"{core_availability=}, {shortcut_availability=} must be above zero, {noise=} not below it.")
