import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_feat.callbacks import SharpnessMonitor
from tests.helpers import Disturbed, Plain, equal, loader, points, trainer, weights

EXACT = {"num_examples": 64, "max_products": 300, "tolerance": 1e-3}


def fit(tmp_path, monitor, module, data=None, val=None, **options):
    pl.seed_everything(0)
    module = module()
    run = trainer(tmp_path, callbacks=[monitor] if monitor else [], **options)
    run.fit(module, loader(64, shuffle=True) if data is None else data, val)
    return module, {k: float(v) for k, v in run.callback_metrics.items() if k.startswith("sharpness/")}


def dense(module, x, y, criterion=cross_entropy):
    """The Hessian of the loss with respect to all parameters, entry by entry."""
    module.double().eval()
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    shapes = [dict(module.named_parameters())[name].shape for name in names]

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return criterion(functional_call(module, values, (x.double(),)), y)

    flat = torch.cat([dict(module.named_parameters())[name].detach().flatten() for name in names])
    return torch.autograd.functional.hessian(loss, flat), loss, flat


@pytest.mark.parametrize("module", [Plain, Disturbed])
def test_the_eigenvalue_is_that_of_the_dense_hessian(tmp_path, module):
    trained, found = fit(tmp_path, SharpnessMonitor(**EXACT), module, max_epochs=2)
    hessian, _, _ = dense(trained, *points(64).tensors)
    assert found["sharpness/top_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-3)


def test_the_rise_is_that_of_a_step_along_the_gradient(tmp_path):
    monitor = SharpnessMonitor(top_eigenvalue=False, rho=0.3, num_examples=64)
    trained, found = fit(tmp_path, monitor, Plain)
    _, loss, flat = dense(trained, *points(64).tensors)
    slope = torch.autograd.functional.jacobian(loss, flat)
    expected = loss(flat + 0.3 * slope / slope.norm()) - loss(flat)
    assert found == {"sharpness/worst_rise": pytest.approx(float(expected), rel=1e-3)}


class Linear(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)


def half_square(logits, targets):
    return (logits - one_hot(targets, 3)).square().sum(1) / 2


def test_of_a_quadratic_it_is_known(tmp_path):
    monitor = SharpnessMonitor(**EXACT, criterion=half_square)
    _, found = fit(tmp_path, monitor, Linear)
    x = torch.cat([points(64).tensors[0], torch.ones(64, 1)], dim=1).double()
    assert found["sharpness/top_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(x.T @ x / 64)[-1]), rel=1e-3)


def test_frozen_parameters_stay_out(tmp_path):
    class Frozen(Plain):
        def __init__(self):
            super().__init__()
            self.net.body.requires_grad_(False)

    trained, found = fit(tmp_path, SharpnessMonitor(**EXACT), Frozen)
    hessian, _, _ = dense(trained, *points(64).tensors)
    assert len(hessian) == 27
    assert found["sharpness/top_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-3)


def test_examples_without_a_label_and_parameters_without_a_part(tmp_path):
    class Ignores(Plain):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch[0]), batch[1], ignore_index=-100)

    x, y = points(64).tensors
    y[::4] = -100
    trained, found = fit(tmp_path, SharpnessMonitor(**EXACT), Ignores, DataLoader(TensorDataset(x, y), 8))
    del trained.unused
    hessian, _, _ = dense(trained, x[y >= 0], y[y >= 0])
    assert found["sharpness/top_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-3)


def test_half_precision_in_training_does_not_round_it(tmp_path):
    trained, found = fit(tmp_path, SharpnessMonitor(**EXACT), Plain, precision="bf16-mixed")
    hessian, _, _ = dense(trained, *points(64).tensors)
    assert found["sharpness/top_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-3)


def test_attention_whose_fused_kernel_has_no_second_derivative(tmp_path):
    class Attends(Plain):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.mix(x[:, None] + torch.eye(4), x[:, None], x[:, None])[0].mean(1))

    _, found = fit(tmp_path, SharpnessMonitor(layer="head"), Attends)
    assert found["sharpness/top_eigenvalue"] == found["sharpness/top_eigenvalue"]


def test_the_training_is_bit_for_bit_what_it_is_without_the_monitor(tmp_path):
    runs = []
    for monitor in (None, SharpnessMonitor()):
        module, _ = fit(tmp_path, monitor, Disturbed, max_epochs=2)
        slopes = [p.grad for p in module.parameters()]
        runs.append((weights(module), [*module.buffers()], slopes, torch.get_rng_state()))
    assert all(equal(a, b) for a, b in zip(runs[0][:3], runs[1][:3], strict=True))
    assert torch.equal(runs[0][3], runs[1][3])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return slope


def test_without_a_second_derivative_it_is_nan_and_said_once(tmp_path):
    with pytest.warns(UserWarning, match="a derivative of the loss could not be taken") as said:
        _, found = fit(tmp_path, SharpnessMonitor(layer="net.fc"), KernelBefore, max_epochs=2)
    assert found["sharpness/top_eigenvalue"] != found["sharpness/top_eigenvalue"]
    assert found["sharpness/worst_rise"] > 0
    assert len([w for w in said if "could not be taken" in str(w.message)]) == 1


class KernelBefore(Plain):
    """The classifier comes after the kernel."""

    def __init__(self):
        super().__init__()
        self.net.body.append(Kernel())


class Kernel(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_diverged_weights_are_nan_and_no_end(tmp_path):
    class Diverges(Plain):
        def forward(self, x):
            return super().forward(x) * (torch.nan if self.global_step > 2 else 1.0)

    _, found = fit(tmp_path, SharpnessMonitor(), Diverges)
    assert all(value != value for value in found.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_examples": 0}, "must be at least 1"),
        ({"max_products": 0}, "must be at least 1"),
        ({"every_n_epochs": 0}, "must be at least 1"),
        ({"rho": 0.0}, "must be above zero"),
        ({"tolerance": 0.0}, "must be above zero"),
        ({"data": "test"}, "choose 'train' or 'val'"),
    ],
)
def test_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SharpnessMonitor(**arguments)


def test_a_criterion_of_the_mean_is_refused_before_training(tmp_path):
    class NeverSteps(Plain):
        def training_step(self, batch, batch_idx):
            raise AssertionError("not reached")

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    with pytest.raises(ValueError, match="reduction='none'"):
        fit(tmp_path, SharpnessMonitor(criterion=cross_entropy), NeverSteps)
