"""Any optimizer, in a loop of one's own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_feat.functional.grassmann import geodesic_distance, orthonormality_error
from lightning_feat.layers import GrassmannLinear
from lightning_feat.optim import follow_subspaces, sharpness_aware

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def closure_of(module, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(module(X), Y)
        loss.backward()
        return loss

    return closure


def adam(module):
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)


def by_hand(module, optimizer, rho, adaptive=False, eta=0.01):
    """The two gradients, from their definition."""
    random = torch.get_rng_state()
    closure_of(module, optimizer)()
    weights = [*module.parameters()]
    before, statistics = [w.detach().clone() for w in weights], copy.deepcopy(dict(module.named_buffers()))
    scales = [w.detach().abs() + eta if adaptive else torch.ones_like(w) for w in weights]
    length = sum(float((t * w.grad).square().sum()) for t, w in zip(scales, weights, strict=True)) ** 0.5
    with torch.no_grad():
        for w, t in zip(weights, scales, strict=True):
            w += rho * t * t * w.grad / length
    torch.set_rng_state(random)
    closure_of(module, optimizer)()
    with torch.no_grad():
        for w, old in zip(weights, before, strict=True):
            w.copy_(old)
        for name, buffer in module.named_buffers():
            buffer.copy_(statistics[name])
    optimizer.step()


@pytest.mark.parametrize("adaptive", [False, True])
def test_steps_are_those_of_the_definition(adaptive):
    module, twin = network(), network()
    optimizer, other = adam(module), adam(twin)
    sharpness_aware(optimizer, module, rho=0.2, adaptive=adaptive)
    torch.manual_seed(5)
    for _ in range(4):
        optimizer.step(closure_of(module, optimizer))
    torch.manual_seed(5)
    for _ in range(4):
        by_hand(twin, other, 0.2, adaptive)
    for (name, a), b in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert optimizer.state_dict().keys() == other.state_dict().keys()


def test_the_optimizer_is_what_it_was_when_the_handle_is_removed_and_its_state_loads_anywhere():
    module, twin = network().eval(), network().eval()
    optimizer, other = adam(module), adam(twin)
    handle = sharpness_aware(optimizer, module)
    optimizer.step(closure_of(module, optimizer))
    handle.remove()
    twin.load_state_dict(module.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((module, optimizer), (twin, other)):
        o.step(closure_of(m, o))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


def test_subspaces_are_perturbed_on_their_manifold():
    torch.manual_seed(0)
    head = GrassmannLinear(4, 3, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    follow_subspaces(optimizer, head)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(head.basis.detach().clone())
        loss = cross_entropy(head(X), Y)
        loss.backward()
        return loss

    sharpness_aware(optimizer, head, rho=0.4)
    optimizer.step(closure)
    assert float(orthonormality_error(seen[1]).max()) < 1e-5
    # The length of the step is shared by the classes; along a geodesic it is the distance.
    assert float(geodesic_distance(seen[0], seen[1]).square().sum().sqrt()) == pytest.approx(0.4, rel=1e-4)
    assert float(orthonormality_error(head.basis.detach()).max()) < 1e-5


def test_what_cannot_be_is_said():
    module = network()
    optimizer = adam(module)
    sharpness_aware(optimizer, module)
    with pytest.raises(RuntimeError, match=r"call AdamW.step with a closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="LBFGS evaluates the loss several times"):
        sharpness_aware(torch.optim.LBFGS(module.parameters()))
    with pytest.raises(ValueError, match=r"rho=-1\.0 must be above zero"):
        sharpness_aware(adam(module), rho=-1.0)
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    sharpness_aware(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = embedding(torch.tensor([1])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step(closure)
