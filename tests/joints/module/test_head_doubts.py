"""Steps in which nothing is wrong with the head, or in which it is not certain."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_feat.callbacks import FeatureRegularizer, NeuralCollapseMonitor, SimplexETFHead
from tests.helpers import Plain, loader, trainer


def fit(tmp_path, module, *callbacks):
    trainer(tmp_path, callbacks=list(callbacks)).fit(module, loader())


class Scale(nn.Module):
    """Calibrates: a temperature, or a bias for each class."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.scale


class Projection(nn.Module):
    """A head whose weight is found by no rule."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 3) / 8)

    def forward(self, h):
        return h @ self.matrix


class Step(Plain):
    """``of`` takes the module, its features and the class indices."""

    def __init__(self, of, manual=False, **parts):
        super().__init__(manual=manual)
        self.of = of
        for name, part in parts.items():
            self.add_module(name, part)

    def training_step(self, batch, batch_idx):
        loss = self.of(self, self.net.body(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        return None


class Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def by_hand(z, y):
    return -z.log_softmax(-1).gather(1, y[:, None]).mean()


def in_places(m, h, y):
    z, filled = m.net.fc(h), h.new_zeros(len(h), 3)
    filled[:, :2], filled[:, 2] = z[:, :2], z[:, 2]
    return F.cross_entropy(filled, y) + F.mse_loss(m.other(h), torch.zeros(len(h), 3))


def contrast(m, h):
    z = F.normalize(m.other(h))
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def weighed(m, h, y):
    return m.scale(torch.stack([by_hand(m.net.fc(h), y), F.mse_loss(m.other(h), torch.zeros(len(h), 3))])).sum()


def adapted(m, h, y):
    return F.cross_entropy(copy.deepcopy(m.net.fc)(h), y) + by_hand(m.net.fc(h), y)


SILENT = {
    "temperature": lambda: Step(lambda m, h, y: F.cross_entropy(m.scale(m.net.fc(h)), y), scale=Scale(1)),
    "number of each class": lambda: Step(lambda m, h, y: F.cross_entropy(m.scale(m.net.fc(h)), y), scale=Scale(3)),
    "weights of losses": lambda: Step(weighed, scale=Scale(2), other=Projection()),
    "manual": lambda: Step(
        lambda m, h, y: by_hand(m.net.fc(h), y) + F.mse_loss(m.other(h), torch.zeros(len(h), 3)),
        manual=True,
        other=Projection(),
    ),
    "filled in places": lambda: Step(in_places, other=Projection()),
    "not followed": lambda: Step(
        lambda m, h, y: F.cross_entropy(Passed.apply(m.net.fc(h)), y) + F.cross_entropy(m.other(h), y),
        other=Projection(),
    ),
    "no gradient": lambda: Step(
        lambda m, h, y: by_hand(m.net.fc(h), y) + F.cross_entropy(m.other(h).detach(), y), other=Projection()
    ),
    "copied in the step": lambda: Step(adapted),
    "scripted teacher": lambda: Step(
        lambda m, h, y: F.cross_entropy(m.net.fc(h), y) + F.mse_loss(m.net.fc(h), m.teacher(h)),
        teacher=torch.jit.script(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))),
    ),
}
DOUBTFUL = {
    "another head has the usual loss": lambda: Step(
        lambda m, h, y: by_hand(m.net.fc(h), y) + F.cross_entropy(m.other(h), y), other=Projection()
    ),
    "probe": lambda: Step(lambda m, h, y: contrast(m, h) + by_hand(m.net.fc(h.detach()), y), other=Projection()),
    "refined": lambda: Step(
        lambda m, h, y: by_hand(m.net.fc(h), y) + F.cross_entropy(m.top(m.net.fc(h)), y), top=nn.BatchNorm1d(3)
    ),
    "added": lambda: Step(lambda m, h, y: F.cross_entropy(m.net.fc(h) + m.other(h), y), other=Projection()),
    "not yet": lambda: Step(
        lambda m, h, y: F.cross_entropy(m.other(h), y) + 0 * m.net.fc(h).detach().sum(), other=Projection()
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("name", SILENT)
def test_nothing_is_said_of_a_head_that_makes_the_logits(tmp_path, name):
    term = FeatureRegularizer(lambda h: h.square().mean(), "small")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the logits")
        fit(tmp_path, SILENT[name](), term, NeuralCollapseMonitor())


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_doubt_does_not_end_the_run(tmp_path, name):
    term = FeatureRegularizer(lambda h: h.square().mean(), "small")
    with pytest.warns(UserWarning, match=r"the term small.*the logits"):
        fit(tmp_path, DOUBTFUL[name](), term)


def test_a_copy_that_the_step_makes_has_no_hooks_of_ours(tmp_path):
    copies = []

    def step(m, h, y):
        copies.append(copy.deepcopy(m.net))
        return F.cross_entropy(m.net.fc(h), y)

    fit(tmp_path, Step(step), NeuralCollapseMonitor(classifier="net.fc"), SimplexETFHead(layer="net.fc"))
    hooks = [hook for part in copies[0].modules() for hook in part._forward_hooks.values()]
    assert not any("last_layers" in type(hook).__module__ for hook in hooks)


@pytest.mark.parametrize("attribute", ["training_step", "forward"])
def test_compiled_code_is_not_followed_wherever_it_is_kept(tmp_path, attribute):
    class Looks(Plain):
        def validation_step(self, batch, batch_idx):
            pass

    followed, module = [], Looks()

    def compiled(*args):
        followed.append(len(torch.overrides._get_current_function_mode_stack()))
        return getattr(type(module), attribute)(module, *args)

    compiled._torchdynamo_orig_callable = compiled  # as torch.compile marks what it gives
    setattr(module, attribute, compiled)
    fit(tmp_path, module, NeuralCollapseMonitor(), SimplexETFHead())
    assert set(followed) == {0}


def test_the_losses_of_a_gan_beside_it_raise_no_alarm(tmp_path):
    class Gan(Plain):
        def __init__(self):
            super().__init__(manual=True)
            self.draws = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
            self.judges = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))

        def training_step(self, batch, batch_idx):
            judged = self.judges(self.draws(torch.randn(len(batch[0]), 5)))
            losses = [
                F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged)),
                F.binary_cross_entropy_with_logits(self.judges(batch[0]), torch.ones_like(judged)),
                F.cross_entropy(self(batch[0]), batch[1]),
            ]
            for optimizer, loss in zip(self.optimizers(), losses, strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.draws, self.judges, self.net)]

    module = Gan()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the logits")
        fit(tmp_path, module, NeuralCollapseMonitor(), SimplexETFHead())
    assert type(module.net.fc).__name__ == "SimplexETF"
