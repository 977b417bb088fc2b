"""Time of an epoch of the quickstart with class subspaces, beside the same with its linear classifier.

    python benchmarks/quickstart.py [--turns 15]

One process; each turn is a fit of three epochs with either head, of which the first is not counted, so that whatever
else the machine does meets both.

- training: the batches alone
- epoch: with the validation and the quickstart's neural-collapse monitor, which for a linear classifier measures other
  things than for subspaces
"""

import argparse
import copy
import statistics
import time

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from lightning_feat.__main__ import find_recipe
from lightning_feat.callbacks import GrassmannHead, NeuralCollapseMonitor


class EpochTimer(Callback):
    """Seconds of each epoch but the first of a fit, and of its training part."""

    def __init__(self) -> None:
        self.epoch: list[float] = []
        self.training: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch > 0:
            self.epoch.append(time.perf_counter() - self.began)
            self.training.append(self.trained - self.began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--moment", action="store_true", help="one turn: shows only that it runs")
    arguments = parser.parse_args()
    turns = 1 if arguments.moment else arguments.turns
    runs = {}
    kept_by: dict[str, tuple[type[Callback], ...]] = {
        "linear": (NeuralCollapseMonitor,),
        "subspaces": (GrassmannHead, NeuralCollapseMonitor),
    }
    for name, kinds in kept_by.items():
        cli = LightningCLI(args=["--config", find_recipe("quickstart")], run=False, save_config_callback=None)
        callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
        kept = [copy.deepcopy(callback) for callback in callbacks if isinstance(callback, kinds)]
        runs[name] = cli.model, cli.datamodule, kept, EpochTimer()
    for _ in range(turns):
        for module, data, kept, timer in runs.values():
            trainer = Trainer(
                max_epochs=3,
                accelerator="cpu",
                callbacks=[*kept, timer],
                logger=False,
                num_sanity_val_steps=0,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, data)
    print(f"\n{2 * turns} epochs of each\n")
    print("| seconds | linear | subspaces | ratio, pair by pair | half of them |")
    print("|---|---|---|---|---|")
    for part in ("training", "epoch"):
        linear, ours = (getattr(runs[name][3], part) for name in ("linear", "subspaces"))
        ratios = [b / a for a, b in zip(linear, ours, strict=True)]
        low, middle, high = statistics.quantiles(ratios)
        cells = [f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})" for times in (linear, ours)]
        print(f"| {part} | {' | '.join(cells)} | {middle:.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
