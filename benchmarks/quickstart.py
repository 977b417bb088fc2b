"""Time of an epoch of the quickstart with class subspaces, beside the same with its linear classifier.

    python benchmarks/quickstart.py [--epochs 15]

One process, training epochs in turns, so that whatever else the machine does meets both. The monitors are left out.
"""

import argparse
import statistics
import time

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from lightning_feat.__main__ import find_recipe
from lightning_feat.callbacks import GrassmannHead


class EpochTimer(Callback):
    """Seconds of each training epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="of each head, after one that is not counted")
    arguments = parser.parse_args()
    runs = {}
    for name in ("linear", "subspaces"):
        cli = LightningCLI(args=["--config", find_recipe("quickstart")], run=False, save_config_callback=None)
        heads = [callback for callback in cli.trainer.callbacks if isinstance(callback, GrassmannHead)]  # type: ignore[attr-defined]
        runs[name] = cli.model, cli.datamodule, heads if name == "subspaces" else [], EpochTimer()
    for _ in range(arguments.epochs + 1):
        for module, data, heads, timer in runs.values():
            trainer = Trainer(
                max_epochs=1,
                accelerator="cpu",
                callbacks=[*heads, timer],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
            )
            trainer.fit(module, data)
    seconds = {name: run[3].seconds[1:] for name, run in runs.items()}
    ratios = [ours / linear for ours, linear in zip(seconds["subspaces"], seconds["linear"], strict=True)]
    print(f"\n{arguments.epochs} epochs of each\n\n| | median | from | to |\n|---|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} (s) | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    low, _, high = statistics.quantiles(ratios)
    print(f"| ratio, pair by pair | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |")
    print(f"\nhalf of the ratios lie between {low:.3f} and {high:.3f}")


if __name__ == "__main__":
    main()
