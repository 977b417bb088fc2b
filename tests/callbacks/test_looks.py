"""No monitor looks at the device in a training step: on an accelerator each look waits until all that was queued has
run. Looks are operators that bring a value, or a size that depends on values, to the host.
"""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_feat.callbacks import (
    CollapseThreshold,
    DistributionalSimplicityMonitor,
    FeatureRelianceMonitor,
    FeatureShiftMonitor,
    FewShotMonitor,
    ForgettingMonitor,
    GrassmannHead,
    GrassmannMonitor,
    LinearProbe,
    MixupGeometryMonitor,
    NeuralCollapseMonitor,
    SharpnessMonitor,
    SimplicityBiasUpsampler,
)
from tests.helpers import Plain, loader, trainer

LOOKS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "is_nonzero", "bincount")
HOOKS = ("on_train_batch_start", "on_before_backward", "on_train_batch_end")


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.looks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool]
        if name in LOOKS or (name in ("index", "index_put", "index_put_") and masks):
            self.looks.append(name)
        return func(*args, **(kwargs or {}))


def watched(callback, looks):
    """The callback, its hooks in a training step counted but for the first, in which wrong labels are refused."""
    for hook in HOOKS:
        setattr(callback, hook, partial(counted, getattr(callback, hook), looks))
    return callback


def counted(call, looks, trainer, *args, **kwargs):
    with Counter() as counter:
        call(trainer, *args, **kwargs)
    if trainer.global_step > 1:
        looks.extend(counter.looks)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NeuralCollapseMonitor(),
        lambda: NeuralCollapseMonitor(["net.body", "net.fc"], num_classes=3, second_moment=True),
        lambda: NeuralCollapseMonitor(thresholds=[CollapseThreshold("cdnv", 1e9)]),
        lambda: NeuralCollapseMonitor(mode="exact"),
        lambda: GrassmannMonitor(),
        lambda: GrassmannMonitor(mode="exact"),
        lambda: FeatureShiftMonitor(["net.body"]),
        lambda: MixupGeometryMonitor(num_pairs=4),
        lambda: LinearProbe(penalties=[0.1]),
        lambda: FewShotMonitor(shots=[1], episodes=2),
        lambda: FeatureRelianceMonitor({"first": 0}),
        lambda: ForgettingMonitor(),
        lambda: SharpnessMonitor(max_products=2),
        lambda: SimplicityBiasUpsampler(separating_epoch="knee", restart=False),
    ],
    ids=lambda make: None,
)
def test_no_monitor_looks_at_the_device_in_a_training_step(tmp_path, make):
    looks, monitor = [], make()
    heads = [GrassmannHead(2)] if isinstance(monitor, GrassmannMonitor) else []
    run = trainer(tmp_path, callbacks=[*heads, watched(monitor, looks)], max_epochs=2)
    run.fit(Plain(), loader(64), loader(16))
    assert run.global_step > 8
    assert not looks


def test_clones_are_measured_in_the_steps_that_are_due_and_in_no_other(tmp_path):
    monitor, steps = DistributionalSimplicityMonitor(num_examples=16, per_decade=2), set()
    hook = monitor.on_train_batch_end

    def counting(trainer, *args):
        with Counter() as counter:
            hook(trainer, *args)
        if counter.looks:
            steps.add(trainer.global_step)

    monitor.on_train_batch_end = counting
    trainer(tmp_path, callbacks=[monitor], max_epochs=2).fit(Plain(), loader(64))
    assert steps == {1, 3, 10}


def test_labels_that_do_not_fit_are_told_at_the_end_of_the_epoch_at_the_latest(tmp_path):
    x, y = torch.randn(32, 4), torch.arange(32) % 3
    y[20] = 5  # in the third batch

    class Forgives(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0], batch[1].clamp(max=2)), batch_idx)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8)
    with pytest.raises(ValueError, match="1 targets lay outside"):
        trainer(tmp_path, callbacks=[NeuralCollapseMonitor()]).fit(Forgives(), data)
