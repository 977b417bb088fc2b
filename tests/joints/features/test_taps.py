import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_feat.joints.features.taps import FeatureTap, TapError, find_layer
from tests.helpers import Plain

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def heard(module, tap, x=X):
    tap.listen()
    module(x)
    return tap.take()


def test_output_and_input_of_a_layer():
    module = Plain()
    tap = FeatureTap("net.body")
    tap.attach(module)
    assert torch.equal(heard(module, tap), module.net.body(X))
    tap = FeatureTap("net.body", read="input")
    tap.attach(module)
    assert torch.equal(heard(module, tap), X)
    assert tap.label == "net.body.input"


def test_without_a_name_it_is_the_input_of_the_classifier():
    module, tap = Plain(), FeatureTap()
    tap.attach(module)
    assert torch.equal(heard(module, tap), module.net.body(X))
    assert tap.label == "penultimate"


def test_inputs_given_by_keyword_are_heard():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(input=x)

    module, tap = Net(), FeatureTap()
    tap.attach(module)
    assert torch.equal(heard(module, tap), X)


def test_it_hears_only_from_listen_to_hold():
    module, tap = Plain(), FeatureTap()
    tap.attach(module)
    module(X)
    tap.listen()
    module(X)
    tap.hold()
    module(X)  # a second closure, a recomputed block, validation
    assert len(tap.take()) == len(X)


def test_several_forwards_are_concatenated_in_order():
    module, tap = Plain(), FeatureTap("net.body.0", read="input")
    tap.attach(module)
    tap.listen()
    module(X)
    module(X + 1)
    assert torch.equal(tap.take(), torch.cat([X, X + 1]))


@pytest.mark.parametrize("keep", [True, False])
def test_the_graph_is_kept_only_where_asked(keep):
    module, tap = Plain(), FeatureTap(keep_graph=keep)
    tap.attach(module)
    assert heard(module, tap).requires_grad is keep


def test_a_layer_that_did_not_run_is_an_error():
    module, tap = Plain(), FeatureTap()
    tap.attach(module)
    tap.listen()
    nn.functional.linear(module.net.body(X), module.net.fc.weight)  # its weight is used, the layer is not called
    with pytest.raises(TapError, match="did not run in this batch"):
        tap.take()


def test_a_layer_that_gives_no_tensor_is_an_error():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 3)

        def forward(self, x):
            return self.rnn(x)[0]

    module, tap = Pair(), FeatureTap("rnn")
    tap.attach(module)
    with pytest.raises(TapError, match="output of layer rnn is a tuple, not a tensor"):
        heard(module, tap)


def test_an_unknown_layer_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"Plain has no layer 'net.bdoy'. Nearest: net.body"):
        FeatureTap("net.bdoy").attach(Plain())
    with pytest.raises(ValueError, match=r"no layer 'fc'. Nearest: net.fc"):
        find_layer(Plain(), "fc")


def test_removing_leaves_no_hook():
    module, tap = Plain(), FeatureTap()
    for _ in range(2):  # attaching twice is attaching once
        tap.attach(module)
    assert len(module.net.fc._forward_pre_hooks) == 1
    tap.remove()
    assert not module.net.fc._forward_pre_hooks
    with pytest.raises(RuntimeError, match="not attached"):
        tap.listen()


def test_a_copy_of_the_module_has_an_ear_of_its_own():
    module, tap = Plain(), FeatureTap()
    tap.attach(module)
    tap.listen()
    module(X).sum()
    twin = copy.deepcopy(module)  # with a graph in the ear, which cannot be copied
    twin(X)
    assert len(tap.take()) == len(X)
    pickle.loads(pickle.dumps(module.net.fc))


@pytest.mark.parametrize("style", ["submodule", "in place"])
def test_a_tap_that_comes_after_compilation_is_heard(style):
    module = Plain()
    if style == "submodule":
        module.net = torch.compile(module.net, backend="eager")
    else:
        module.net.compile(backend="eager")
    module(X)  # traced without the hook
    tap = FeatureTap("net.body", keep_graph=True)
    tap.attach(module)
    assert torch.equal(heard(module, tap), module.net.body(X))
    module(X)
    with pytest.raises(TapError):  # the flag is read by the compiled code too
        tap.take()


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="read='outputs'"):
        FeatureTap(read="outputs")
    with pytest.raises(ValueError, match="pooling='avg'"):
        FeatureTap(pooling="avg")


class Checkpoints(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.fc, self.reentrant = nn.Linear(4, 8), nn.Linear(8, 3), reentrant

    def forward(self, x):
        return self.fc(checkpoint(self.body, x, use_reentrant=self.reentrant))


def test_a_layer_that_ran_without_gradient_alone_is_told_as_that():
    module, tap = Checkpoints(reentrant=True), FeatureTap("body", keep_graph=True)
    tap.attach(module)
    with pytest.raises(TapError, match=r"ran in this batch without gradient alone.*use_reentrant=False"):
        heard(module, tap, X.clone().requires_grad_())
    module.reentrant = False
    assert heard(module, tap, X.clone().requires_grad_()).requires_grad


def test_code_that_was_compiled_before_the_tap_is_named_as_a_reason():
    module = Plain()
    fast = torch.compile(lambda x: module.net(x), backend="eager")
    fast(X)
    tap = FeatureTap("net.body")
    tap.attach(module)
    tap.listen()
    fast(X)
    with pytest.raises(TapError, match=r"compiled, and run, before this callback came.*compile after"):
        tap.take()
    torch.compiler.reset()
