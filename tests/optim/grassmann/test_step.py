"""Whatever optimizer steps, the subspaces stay on the manifold, and with SGD they go where the paper's go."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm.optim
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_feat.functional.grassmann import geodesic_distance, orthonormality_error, random_basis
from lightning_feat.layers import GrassmannLinear
from lightning_feat.optim import follow_subspaces

GOLDEN = [Path(__file__).parents[2] / "data" / f"grassmann_rsgd{end}.npz" for end in ("", "_lines")]


class Model(nn.Module):
    """A layer and a head of subspaces."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(6, 12)
        self.head = GrassmannLinear(12, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


def projectors(basis: torch.Tensor) -> torch.Tensor:
    return basis.detach().mT @ basis.detach()


def train(model, optimizer, steps=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(16, 6, generator=generator), torch.randint(0, 5, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(model.body.weight)), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("decay", [0.0, 0.3])  # no decay acts on a subspace, coupled and with momentum included
@pytest.mark.parametrize("flavour", [{}, {"foreach": True}, {"fused": True}, {"by closure": True}])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_sgd_follows_the_authors_trajectory(path, flavour, decay):
    z = np.load(path)
    num_classes, k, width = z["initial_basis"].shape
    head = GrassmannLinear(width, num_classes, k, scale=float(z["gamma"])).double()
    head.load_state_dict({"basis": torch.tensor(z["initial_basis"])}, strict=False)
    by_closure = "by closure" in flavour
    options = {} if by_closure else flavour
    optimizer = torch.optim.SGD(
        head.parameters(), lr=float(z["lr"]), momentum=float(z["momentum"]), weight_decay=decay, **options
    )
    follow_subspaces(optimizer, head)
    for gradient, projector in zip(z["gradients"], z["projectors"], strict=True):

        def closure(gradient=gradient):
            head.basis.grad = torch.tensor(gradient)

        if by_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        torch.testing.assert_close(projectors(head.basis), torch.tensor(projector), rtol=0, atol=1e-10)
    logits = head(torch.tensor(z["features"])).detach()
    torch.testing.assert_close(logits, torch.tensor(z["logits_final"]), rtol=0, atol=1e-10)


def make(name, parameters):
    if name.startswith("timm "):
        return timm.optim.create_optimizer_v2(
            list(parameters), opt=name.removeprefix("timm "), lr=1e-3, weight_decay=0.01
        )
    kind, *flags = name.split()
    return getattr(torch.optim, kind)(parameters, lr=1e-2, **dict.fromkeys(flags, True))


OPTIMIZERS = [
    *("SGD", "SGD foreach", "SGD fused", "AdamW", "AdamW foreach", "AdamW fused", "Adam amsgrad", "NAdam", "RAdam"),
    *("RMSprop", "Adagrad", "Adamax", "timm lamb", "timm lion", "timm nadamw", "timm adafactor"),
]


@pytest.mark.parametrize("update", ["displacement", "momentum", "adam"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_stays_on_the_manifold_moves_and_is_saved(name, update):
    model = Model()
    optimizer = make(name, model.parameters())
    step = follow_subspaces(optimizer, model, update=update)
    before = projectors(model.head.basis)
    train(model, optimizer)
    assert step.steps == 6
    assert orthonormality_error(model.head.basis.detach()).max() < 1e-5
    assert (projectors(model.head.basis) - before).abs().max() > 1e-5
    twin = copy.deepcopy(model)  # saved and restored, both go the same way
    other = make(name, twin.parameters())
    follow_subspaces(other, twin, update=update)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, seed=2)
    train(twin, other, seed=2)
    assert torch.equal(model.head.basis, twin.head.basis)


def test_auto_is_displacement_for_sgd_and_momentum_for_the_rest():
    model = Model()
    assert follow_subspaces(torch.optim.SGD(model.parameters(), lr=0.1), model).update == "displacement"
    assert follow_subspaces(torch.optim.AdamW(model.parameters()), model).update == "momentum"


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (torch.optim.SGD, {"lr": 0.3}, "lr=0.3: no effect, as with SGD and update='auto' the subspaces follow"),
        (torch.optim.AdamW, {"update": "displacement", "momentum": 0.9}, "momentum=0.9: no effect, as the subspaces"),
        (torch.optim.AdamW, {"second_momentum": 0.9}, "second_momentum=0.9: no effect, as with AdamW"),
    ],
)
def test_an_option_of_another_rule_is_refused(kind, options, said):
    model = Model()
    with pytest.raises(ValueError, match=said):
        follow_subspaces(kind(model.parameters(), lr=0.1), model, **options)


def test_the_momentum_rule_beside_adamw_is_sgd_with_momentum_on_the_subspaces():
    torch.manual_seed(3)
    gradients = torch.randn(5, 5, 3, 12, dtype=torch.float64)
    ends = []
    for kind in ("AdamW", "SGD"):
        head = Model().double().head
        adaptive = kind == "AdamW"
        optimizer = (
            torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.1)
            if adaptive
            else torch.optim.SGD(head.parameters(), lr=0.2, momentum=0.8)
        )
        options = {"lr": 0.1, "lr_factor": 2.0, "momentum": 0.8} if adaptive else {}
        follow_subspaces(optimizer, head, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)  # the shape is followed
        for gradient in gradients:
            head.basis.grad = gradient.clone()
            optimizer.step()
            schedule.step()
        ends.append(projectors(head.basis))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_lr_factor_scales_the_displacement_of_the_subspaces_alone():
    models = [Model(), Model()]
    for model, lr, factor in zip(models, (0.1, 0.05), (1.0, 2.0), strict=True):
        optimizer = torch.optim.SGD(
            [{"params": model.body.parameters(), "lr": 0.1}, {"params": model.head.parameters()}], lr=lr
        )
        follow_subspaces(optimizer, model, lr_factor=factor)
        train(model, optimizer)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_decay_of_an_adaptive_optimizer_leaves_its_displacement_alone():
    models = [Model().double(), Model().double()]
    for model, decay in zip(models, (0.0, 0.5), strict=True):
        optimizer = torch.optim.Adam(model.head.parameters(), lr=0.01, weight_decay=decay)
        follow_subspaces(optimizer, model, update="displacement")
        train(model, optimizer)
    torch.testing.assert_close(projectors(models[0].head.basis), projectors(models[1].head.basis), rtol=0, atol=1e-10)


def test_a_basis_without_a_gradient_or_frozen_stays_bit_for_bit():
    model = Model()
    before = model.head.basis.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    follow_subspaces(optimizer, model)
    model.body(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert torch.equal(model.head.basis, before)
    model.head.requires_grad_(False)
    train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    assert torch.equal(model.head.basis, before)


def test_a_step_that_fp16_skips_moves_nothing_and_leaves_the_momentum():
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)  # called by the scaler, skips in its kernel
    follow_subspaces(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = torch.randn(16, 6), torch.randint(0, 5, (16,))

    def step(factor):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    basis = model.head.basis.detach().clone()
    buffer = optimizer.state[model.head.basis]["subspace_momentum"].clone()
    step(float("inf"))
    assert torch.equal(model.head.basis, basis)
    assert torch.equal(optimizer.state[model.head.basis]["subspace_momentum"], buffer)


def test_under_fp16_a_fused_step_is_the_step_without_it():
    ends = []
    for scaled in (False, True):
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        follow_subspaces(optimizer, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        torch.manual_seed(0)
        for _ in range(3):
            x, y = torch.randn(16, 6), torch.randint(0, 5, (16,))
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(projectors(model.head.basis))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["LBFGS", "Lookahead", "ScheduleFreeAdamW"])
def test_what_cannot_follow_is_refused_by_name(kind):
    model = Model()
    cls = torch.optim.LBFGS if kind == "LBFGS" else type(kind, (torch.optim.SGD,), {})
    with pytest.raises(ValueError, match=f"class subspaces cannot follow {kind}"):
        follow_subspaces(cls(model.parameters()), model)


def test_numbers_out_of_range_are_refused():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrong in ({"update": "euclidean"}, {"lr_factor": -1.0}, {"momentum": 1.0}):
        with pytest.raises(ValueError):
            follow_subspaces(optimizer, model, **wrong)


def test_an_unfinished_step_can_be_undone():
    class Breaks(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            model.head.basis.add_(1.0)
            raise KeyboardInterrupt

    model = Model()
    before = model.head.basis.detach().clone()
    optimizer = Breaks(model.head.parameters(), lr=1.0)
    step = follow_subspaces(optimizer, model)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, steps=1)
    assert not torch.equal(model.head.basis, before)
    step.undo_unfinished()
    assert torch.equal(model.head.basis, before)


def test_a_step_that_calls_the_step_of_its_base_class_is_one_step():
    class Derived(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    models = [Model(), Model()]
    for model, cls in zip(models, (torch.optim.SGD, Derived), strict=True):
        optimizer = cls(model.parameters(), lr=0.5, momentum=0.9)
        step = follow_subspaces(optimizer, model)
        train(model, optimizer)
        assert step.steps == 6
    assert torch.equal(models[0].head.basis, models[1].head.basis)


def test_removed_hooks_leave_the_optimizer_alone():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    follow_subspaces(optimizer, model).remove()
    train(model, optimizer, steps=3)
    assert orthonormality_error(model.head.basis.detach()).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_thousand_float32_steps_stay_orthonormal(name):
    torch.manual_seed(0)
    basis = nn.Parameter(random_basis(20, 4, 64))
    head = GrassmannLinear(64, 20, 4)
    head.basis = basis
    optimizer = getattr(torch.optim, name)(head.parameters(), lr=0.1)
    follow_subspaces(optimizer, head)
    for _ in range(1000):
        basis.grad = torch.randn_like(basis)
        optimizer.step()
    assert orthonormality_error(basis.detach()).max() < 1e-5


@pytest.mark.parametrize("update", ["momentum", "adam"])
def test_our_own_rules_do_not_depend_on_the_basis(update):
    torch.manual_seed(4)
    rotation = torch.linalg.qr(torch.randn(5, 3, 3, dtype=torch.float64)).Q
    gradients = torch.randn(4, 5, 3, 12, dtype=torch.float64)
    ends = []
    for turn in (torch.eye(3, dtype=torch.float64).expand(5, 3, 3), rotation):
        head = Model().double().head
        with torch.no_grad():
            head.basis.copy_(turn @ head.basis)
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
        follow_subspaces(optimizer, head, update=update)
        for gradient in gradients:
            head.basis.grad = turn @ gradient
            optimizer.step()
        ends.append(projectors(head.basis))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_elementwise_adam_depends_on_the_basis():
    """Why its displacement is not the default: the same subspaces and gradients end elsewhere in other coordinates."""
    torch.manual_seed(4)
    rotation = torch.linalg.qr(torch.randn(5, 3, 3, dtype=torch.float64)).Q
    gradient = torch.randn(5, 3, 12, dtype=torch.float64)
    ends = []
    for turn in (torch.eye(3, dtype=torch.float64).expand(5, 3, 3), rotation):
        head = Model().double().head
        with torch.no_grad():
            head.basis.copy_(turn @ head.basis)
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
        follow_subspaces(optimizer, head, update="displacement")
        head.basis.grad = turn @ gradient
        optimizer.step()
        ends.append(projectors(head.basis))
    assert (ends[0] - ends[1]).abs().max() > 1e-2


def test_the_adam_rule_moves_each_class_by_its_rate_while_gradients_point_one_way():
    head = Model().double().head
    start = head.basis.detach().clone()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1.0)
    follow_subspaces(optimizer, head, update="adam", lr=0.01)
    head.basis.grad = torch.randn_like(head.basis) * torch.logspace(-3, 3, 5, dtype=torch.float64)[:, None, None]
    optimizer.step()
    # the first step of Adam has the length of the rate, whatever that of the gradient (but for epsilon)
    torch.testing.assert_close(
        geodesic_distance(start, head.basis.detach()), torch.full((5,), 0.01).double(), rtol=1e-4, atol=0
    )


def test_the_adam_rule_is_its_definition():
    torch.manual_seed(5)
    head = Model().double().head
    head.project_(tolerance=0.0)  # it was drawn in float32
    x = head.basis.detach().clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    follow_subspaces(optimizer, head, update="adam", lr=0.2, momentum=0.8, second_momentum=0.9)
    m, v = torch.zeros_like(x), torch.zeros(5, dtype=x.dtype)
    for t in range(1, 5):
        gradient = torch.randn_like(x)
        head.basis.grad = gradient.clone()
        optimizer.step()
        tangent = gradient - gradient @ x.mT @ x
        m = 0.8 * m + 0.2 * tangent
        v = 0.9 * v + 0.1 * tangent.square().sum((1, 2))
        step = -0.2 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)[:, None, None]
        step = step - step @ x.mT @ x
        w, s, uh = torch.linalg.svd(step, full_matrices=False)  # the geodesic of the paper, by singular values
        x = w @ torch.diag_embed(s.cos()) @ w.mT @ x + w @ torch.diag_embed(s.sin()) @ uh
        torch.testing.assert_close(projectors(head.basis), projectors(x), rtol=0, atol=1e-10)


def decayed(cls, decay, num_steps=10, **options):
    """The subspaces after some steps of an optimizer with weight decay."""
    torch.manual_seed(0)
    head = GrassmannLinear(12, 4, 2).double()
    optimizer = cls(head.parameters(), lr=0.1, weight_decay=decay, **options)
    follow_subspaces(optimizer, head, update="displacement")
    for step in range(num_steps):
        optimizer.zero_grad()
        features = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        cross_entropy(head(features), torch.arange(8) % 4).backward()
        optimizer.step()
    return head.basis.detach()


class MySGD(torch.optim.SGD):
    """Inherits everything."""


class Calling(torch.optim.SGD):
    """Its step calls that of the base class, and the hooks of both fire."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("cls", [torch.optim.SGD, MySGD, Calling])
def test_no_coupled_decay_acts_on_subspaces_of_derived_optimizers_either(cls):
    moved = geodesic_distance(decayed(cls, 0.0, momentum=0.9), decayed(cls, 0.5, momentum=0.9))
    assert moved.max() < 1e-12


def rates_of(optimizer, head, schedule, num_steps=6):
    """The turn of the first class in each step, for one and the same gradient and no momentum."""
    turns = []
    for _ in range(num_steps):
        start = head.basis.detach().clone()
        head.basis.grad = torch.zeros_like(head.basis)
        head.basis.grad[:, 0, -1] = 1.0
        head.basis.grad -= head.basis.grad @ start.mT @ start
        length = float(torch.linalg.vector_norm(head.basis.grad[0]))
        optimizer.step()
        turns.append(float(geodesic_distance(head.basis.detach()[0], start[0])) / length)
        schedule(optimizer)
    return turns


def momentum_rule(lr, **options):
    torch.manual_seed(0)
    head = GrassmannLinear(40, 3, 2).double()
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, **options)
    follow_subspaces(optimizer, head, lr=0.01, momentum=0.0)
    return head, optimizer


def test_the_momentum_rule_never_exceeds_its_peak_rate():
    head, optimizer = momentum_rule(1e-4)
    cyclic = torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-5, 1e-3, step_size_up=3, cycle_momentum=False)
    assert max(rates_of(optimizer, head, lambda _: cyclic.step())) < 0.0101


def test_the_momentum_rule_follows_a_plateau_schedule_also_where_the_rate_is_a_tensor():
    head, optimizer = momentum_rule(torch.tensor(1e-3), foreach=False, capturable=False)

    def cut(optimizer):
        optimizer.param_groups[0]["lr"].mul_(0.1)

    turns = rates_of(optimizer, head, cut, 3)
    assert turns == pytest.approx([0.01, 1e-3, 1e-4], rel=1e-3)


def test_the_peak_rate_survives_a_resume():
    head, optimizer = momentum_rule(1e-3)
    rates_of(optimizer, head, lambda o: o.param_groups[0].update(lr=1e-4), 2)
    other, resumed = momentum_rule(1e-3)
    resumed.load_state_dict(optimizer.state_dict())
    assert rates_of(resumed, other, lambda _: None, 1) == pytest.approx([1e-3], rel=1e-3)


def test_maximising_goes_the_other_way():
    def loss_after(maximize):
        torch.manual_seed(0)
        head = GrassmannLinear(12, 4, 2)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, maximize=maximize)
        follow_subspaces(optimizer, head)
        features, targets = torch.randn(16, 12), torch.arange(16) % 4
        before = cross_entropy(head(features), targets)
        for _ in range(5):
            optimizer.zero_grad()
            cross_entropy(head(features), targets).backward()
            optimizer.step()
        return float(cross_entropy(head(features), targets) - before)

    assert loss_after(False) < -0.1
    assert loss_after(True) > 0.1


def test_following_twice_is_refused_until_the_first_lets_go():
    head = GrassmannLinear(12, 4, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    first = follow_subspaces(optimizer, head)
    with pytest.raises(ValueError, match="already follow this SGD"):
        follow_subspaces(optimizer, head)
    first.remove()
    follow_subspaces(optimizer, head)


def test_a_head_frozen_in_mid_run_stays_where_it_is():
    head = GrassmannLinear(12, 4, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    follow_subspaces(optimizer, head)
    cross_entropy(head(torch.randn(8, 12)), torch.arange(8) % 4).backward()
    optimizer.step()
    head.requires_grad_(False)
    start = head.basis.detach().clone()
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    assert torch.equal(head.basis, start)


class WritesGradients(torch.optim.Optimizer):
    """Adds its decay to the gradient itself and centralises it, as half of pytorch_optimizer does; knows no rate."""

    def __init__(self, params, weight_decay, group_rate=True, clears=False):
        super().__init__(params, {"weight_decay": weight_decay, **({"lr": 0.1} if group_rate else {})})
        self.clears = clears

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(p, alpha=group["weight_decay"])
                    p.grad.sub_(p.grad.mean())
                    state = self.state[p]
                    state["sum"] = 0.9 * state.get("sum", torch.zeros_like(p)) + p.grad
                    p.sub_(state["sum"], alpha=0.1)
                    p.grad = None if self.clears else p.grad
        return loss


@pytest.mark.parametrize("update", ["displacement", "momentum", "adam"])
@pytest.mark.parametrize("by_closure", [False, True])
@pytest.mark.parametrize("beside", [False, True])  # another weight in the same group, which is to decay
def test_decay_that_is_written_into_gradients_acts_on_no_subspace(update, by_closure, beside):
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 4, 2, 12, generator=generator, dtype=torch.float64)
    ends, others = [], []
    for decay in (0.0, 0.3):
        torch.manual_seed(0)
        head, other = GrassmannLinear(12, 4, 2).double(), nn.Parameter(torch.ones(3))
        optimizer = WritesGradients([head.basis, *([other] if beside else [])], decay)
        group, params, start = optimizer.param_groups[0], optimizer.param_groups[0]["params"], projectors(head.basis)
        follow_subspaces(optimizer, head, update=update)
        for gradient in gradients:

            def closure(gradient=gradient, head=head, other=other):
                head.basis.grad, other.grad = gradient.clone(), torch.tensor([1.0, 0.0, 0.0])

            if not by_closure:
                closure()
            optimizer.step(*[closure] if by_closure else [])
        assert optimizer.param_groups == [group]
        assert group["params"] is params
        assert group["weight_decay"] == decay
        ends.append(projectors(head.basis))
        others.append(other.detach())
    assert (ends[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)
    assert not beside or not torch.equal(*others)


def test_the_momentum_rule_takes_the_gradient_that_the_optimizer_was_given():
    ends = []
    for cls in (torch.optim.AdamW, WritesGradients):
        torch.manual_seed(0)
        head = GrassmannLinear(12, 4, 2).double()
        optimizer = cls([head.basis], weight_decay=0.3)
        follow_subspaces(optimizer, head, update="momentum")
        for seed in range(4):
            torch.manual_seed(seed)
            head.basis.grad = torch.randn_like(head.basis)
            optimizer.step()
        ends.append(projectors(head.basis))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"group_rate": False}, {"clears": True}])
def test_groups_without_a_rate_and_gradients_that_are_gone_after_the_step(options):
    head = GrassmannLinear(12, 4, 2)
    before = projectors(head.basis)
    optimizer = WritesGradients([head.basis], 0.0, **options)
    follow_subspaces(optimizer, head, update="momentum")
    head.basis.grad = torch.randn_like(head.basis)
    optimizer.step()
    assert (projectors(head.basis) - before).abs().max() > 1e-3


def test_a_step_that_breaks_leaves_the_groups_as_they_were():
    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            raise ArithmeticError

    model = Model()
    optimizer = Breaks(model.parameters(), lr=1.0, weight_decay=0.1)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    step = follow_subspaces(optimizer, model)
    with pytest.raises(ArithmeticError):
        train(model, optimizer, steps=1)
    step.undo_unfinished()
    assert len(optimizer.param_groups) == 1
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], held, strict=True))
