"""What the scripts of recipes publish comes out again from YAML arms, to the last digit."""

import runpy
from pathlib import Path

import pytest

from lightning_feat.compare import YamlArm, compare

RECIPES = Path(__file__).parents[2] / "recipes"
ADAMW = """
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.001, weight_decay: 0.01}}
"""


@pytest.mark.slow
def test_the_optimizers_of_neural_collapse(tmp_path):
    script = runpy.run_path(str(RECIPES / "neural_collapse" / "digits.py"))
    base, arm = str(RECIPES / "neural_collapse" / "digits.yaml"), tmp_path / "adamw.yaml"
    arm.write_text(ADAMW)
    options = ("--trainer.max_epochs", "10", "--lr_scheduler.init_args.T_max", "10")
    made = compare(
        {"sgd": YamlArm("sgd", (base,), options), "adamw": YamlArm("adamw", (base, str(arm)), options)},
        seeds=1,
        metrics=[script["logged"]("nc1_pinv_over_k"), script["logged"]("nc3"), "val/accuracy"],
        folder=tmp_path / "out",
        executor="inline",
        threads=1,
        share_order=False,
        quiet=True,
    )
    for record in made.records:
        points = script["train"](record.arm, 0, 10).points
        for metric in made.question.metrics:
            assert record.value(metric) == points[metric][-1][1]
