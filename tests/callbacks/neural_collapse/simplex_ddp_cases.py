"""What two gloo processes do, for ``test_simplex_ddp.py``."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_feat.callbacks import DotRegressionRegularizer, NeuralCollapseRegularizer, SimplexETFHead
from lightning_feat.functional.neural_collapse.losses import between_class_push, scale_gradient, within_class_pull
from tests.joints import ddp_cases
from tests.joints.ddp_cases import Momentum, fit, flat


class Halves(Momentum):
    """In one process: the mean over the halves of each batch that two processes would hold."""

    def __init__(self):
        super().__init__()
        self.means = nn.Parameter(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))

    def training_step(self, batch, batch_idx):
        losses = []
        for rank in range(2):
            x, y = (part[rank::2] for part in batch)
            features = self.net.body(x)
            pull = within_class_pull(features, y, scale_gradient(self.means, 1 / 0.2))
            losses.append(cross_entropy(self.net.fc(features), y) + 0.2 * pull + 0.1 * between_class_push(self.means))
        return sum(losses) / 2


def dot_regression(world):
    _, module = fit(Momentum, [SimplexETFHead(), DotRegressionRegularizer()], world)
    return flat(module) + module.net.fc.prototypes.flatten().tolist()


def collapse(world):
    regularizer = NeuralCollapseRegularizer(pull_weight=0.2)
    _, module = fit(Momentum, [regularizer], world)
    return flat(module) + regularizer.means.flatten().tolist()


def halves():
    _, module = fit(Halves, [], 1)
    return flat(module.net) + module.means.flatten().tolist()


if __name__ == "__main__":
    ddp_cases.CASES[:] = [dot_regression, collapse]
    ddp_cases.main(Path(sys.argv[1]))
