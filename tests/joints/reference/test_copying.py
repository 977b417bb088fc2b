"""A frozen copy runs no part of the network, whatever functions stand on its layers, and nobody hears it."""

import functools
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm

from lightning_feat.callbacks import FeatureShiftMonitor, FeatureShiftRegularizer
from lightning_feat.joints.reference.copying import independent_copy
from tests.helpers import Plain, loader, trainer


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.adapter, self.fc = Body(), nn.Linear(8, 8), nn.Linear(8, 3)
        self.heard = []

    def forward(self, x):
        return self.fc(self.body(x))

    def keep(self, layer, args, output):
        self.heard.append(output)


def compiled(net):
    net.body.forward = torch.compile(net.body.forward, backend="eager")
    net.body.last.forward = torch.compile(net.body.last.forward, backend="eager")


def compiled_in_place(net):
    net.body.last.compile(backend="eager")


def by_closure(net):
    before, adapter = net.body.last.forward, net.adapter
    net.body.last.forward = lambda x: before(x) + adapter(x)


GLOBALS = {}


def by_global_names(net):
    exec("def forward(x):\n    return before(x) + adapter(x)", GLOBALS)
    GLOBALS.update(before=net.body.last.forward, adapter=net.adapter)
    net.body.last.forward = GLOBALS["forward"]


def by_partial(net):
    net.body.last.forward = functools.partial(lambda layer, before, x: before(x) + layer.weight.sum(), net.adapter)
    net.body.last.forward = functools.partial(net.body.last.forward, type(net.body.last).forward.__get__(net.body.last))


def by_method(net):
    net.body.last.forward = types.MethodType(lambda layer, x: nn.Linear.forward(layer, x).tanh(), net.body.last)


def by_hook(net):
    adapter = net.adapter
    net.body.last.register_forward_hook(lambda layer, args, output: output + adapter(args[0]))


def with_spectral_norm(net):
    spectral_norm(net.body.last)


def pruned(net):
    prune.random_unstructured(net.body.last, "weight", 0.5)


CHANGES = [
    *(compiled, compiled_in_place, by_closure, by_global_names, by_partial, by_method, by_hook),
    *(with_spectral_norm, pruned),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_copy_stays_what_the_network_was_and_leaves_no_trace_on_it(change):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(6, 4)
    change(net)
    net.body.eval()
    copied = independent_copy(net.body, "body").eval()
    with torch.no_grad():
        before = net.body(x)
        torch.testing.assert_close(copied(x), before, rtol=0, atol=0)
        for p in net.parameters():
            p.add_(1.0)
        assert not torch.allclose(net.body(x), before)
        torch.testing.assert_close(copied(x), before, rtol=0, atol=0)
        net.body.train()
        copied.train()(x)
    assert int(net.body.norm.num_batches_tracked) == 0


def test_what_only_listens_does_not_hear_a_copy():
    net, outside = Net(), []

    class Stores:
        def __init__(self):
            self.heard = []

        def __call__(self, layer, args, output):
            self.heard.append(output)

    def statement(layer, args, output):
        outside.append(output)

    stores = Stores()
    hooks = [net.keep, statement, stores, lambda layer, args, output: outside.append(output)]
    for hook in hooks:
        net.body.last.register_forward_hook(hook)
    net.body.last.register_forward_pre_hook(lambda layer, args: outside.append(args[0]))
    net.body(torch.randn(6, 4))  # what they have heard has a graph, and cannot be copied
    heard = len(outside), len(net.heard), len(stores.heard)
    assert heard == (3, 1, 1)
    independent_copy(net.body, "body")(torch.randn(6, 4))
    assert (len(outside), len(net.heard), len(stores.heard)) == heard


def test_what_cannot_be_copied_is_refused():
    net = Net()
    before, stream = net.body.last.forward, iter([1])
    numbers = (number for number in stream)
    net.body.last.forward = lambda x: before(x) + next(numbers, 0)
    with pytest.raises(ValueError, match=r"body has a forward or a hook .* cannot be copied"):
        independent_copy(net.body, "body")


class Trained(Plain):
    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        if change is not None:
            change(self.net)


@pytest.mark.parametrize("make", [FeatureShiftMonitor, lambda: FeatureShiftRegularizer(weight=3.0)])
def test_the_shift_of_a_compiled_forward_is_that_of_the_same_network(tmp_path, make):
    found = []
    for change in (None, compiled):
        module = Trained(change)
        run = trainer(tmp_path, callbacks=[make()], max_epochs=2)
        run.fit(module, loader())
        name = next(name for name in run.callback_metrics if "relative" in name)
        found.append((float(run.callback_metrics[name]), int(module.net.body.norm.num_batches_tracked)))
    assert found[0] == found[1]
    assert found[0][0] > 0.1
