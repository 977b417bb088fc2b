import copy
import inspect
import io

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_feat.joints.module.wraps import add_link, get_link, remove_link
from tests.helpers import Plain


class Double:
    def __call__(self, module, call, *args, **kwargs):
        return 2 * call(*args, **kwargs)


class Increment:
    def __call__(self, module, call, *args, **kwargs):
        return call(*args, **kwargs) + 1


class Scaled(Plain):
    factor = 1.0

    def training_step(self, batch):
        return self.factor * batch


def test_links_stand_around_the_method_in_the_order_they_came():
    module = Scaled()
    add_link(module, "training_step", "double", Double())
    add_link(module, "training_step", "increment", Increment())
    assert module.training_step(3.0) == 7.0


def test_the_same_key_twice_is_one_link():
    module = Scaled()
    for _ in range(3):
        add_link(module, "training_step", "double", Double())
    assert module.training_step(3.0) == 6.0


def test_with_the_last_link_the_module_is_what_it_was():
    module = Scaled()
    before = dict(module.__dict__)
    add_link(module, "training_step", "a", Double())
    add_link(module, "training_step", "b", Double())
    remove_link(module, "training_step", "a")
    assert module.training_step(1.0) == 2.0
    remove_link(module, "training_step", "b")
    assert module.__dict__ == before


def test_an_instance_attribute_comes_back():
    module = Scaled()
    module.training_step = compiled = lambda batch: -batch
    add_link(module, "training_step", "double", Double())
    assert module.training_step(3.0) == -6.0
    remove_link(module, "training_step", "double")
    assert module.training_step is compiled


def test_a_deep_copy_calls_its_own_method():
    module = Scaled()
    add_link(module, "training_step", "double", Double())
    twin = copy.deepcopy(module)
    twin.factor = 10.0
    assert (twin.training_step(1.0), module.training_step(1.0)) == (20.0, 2.0)


def test_a_pickled_module_can_be_wrapped_again():
    module = Scaled()
    add_link(module, "training_step", "double", Double())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded.training_step(1.0) == 1.0  # the method of its class, and no link that is said to be there
    assert get_link(loaded, "training_step", "double") is None
    add_link(loaded, "training_step", "double", Double())
    assert loaded.training_step(1.0) == 2.0


def test_lightning_reads_the_signature_of_the_method_and_sees_a_wrapped_hook_as_overridden():
    module = Scaled()
    add_link(module, "training_step", "double", Double())
    assert list(inspect.signature(module.training_step).parameters) == ["batch"]
    assert not is_overridden("configure_model", module)
    add_link(module, "configure_model", "double", Double())
    assert is_overridden("configure_model", module)
