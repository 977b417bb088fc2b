"""The written side is no free choice: under Lightning it is, bit for bit, a loop in plain torch."""

import pytest
import torch

from tests.conformance.conditions import CONDITIONS
from tests.conformance.registry import CALLBACKS

ROUNDING = 1e-6  # of clipping: Lightning's norm is of all parameters of the optimizer at once, in the same order


class Pass:
    """Forward and backward of a batch: the closure of an optimizer, with the result that Lightning's has, too."""

    def __init__(self, run):
        self.run, self._result = run, None

    def __call__(self):
        return self.run()


def plain_loop(side, trainer_options):
    """Two epochs without Lightning."""
    torch.manual_seed(0)
    accumulate = trainer_options.get("accumulate_grad_batches", 1)
    clip = trainer_options.get("gradient_clip_val")
    module = side.module()
    torch.manual_seed(1)
    module.prepare()
    for method in module.methods:
        method.at_start(module)
    (optimizer,), (scheduler,) = module.configure_optimizers()
    for _ in range(2):
        batches = list(side.loader("train"))
        for i, (x, y) in enumerate(batches):

            def run(i=i, x=x, y=y):
                loss = module.loss(x, y, i) / accumulate
                if i % accumulate == 0:
                    optimizer.zero_grad()
                loss.backward()
                return loss

            closure = Pass(run)
            if (i + 1) % accumulate and i + 1 < len(batches):
                closure()
            else:
                for method in module.methods:
                    closure = method.closure(optimizer, closure)
                closure()
                if clip:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
                afters = [method.before_step(module) for method in module.methods]
                optimizer.step()
                for after in afters:
                    after()
        scheduler.step()
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["fp32", "accumulate 3 batches", "clip by norm"])
@pytest.mark.parametrize("entry", [e for e in CALLBACKS if e.kind not in ("data", "plotter")], ids=str)
def test_written_side_is_a_plain_loop(entry, name, tmp_path):
    condition = next(condition for condition in CONDITIONS if condition.name == name)
    side = condition.side(entry, tmp_path, ours=False)
    lightning = side.module()
    side.fit(side.trainer(max_epochs=2, limit_val_batches=0), lightning)
    by_hand = plain_loop(side, condition.trainer())
    for p, q in zip(lightning.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=ROUNDING, atol=ROUNDING)
