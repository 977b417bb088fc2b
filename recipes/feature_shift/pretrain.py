"""Pre-train a small CLIP on composed digits and their captions, for the prompt-tuning recipes beside this file.

    python recipes/feature_shift/pretrain.py [--seed 0] [--fast]

Writes a checkpoint with the weights and the vocabulary to --out (1.3 MB), and prints the accuracy of zero-shot
classification on base and novel classes, which pre-training has not seen as such: as the few-shot task shows them, and
without its change of look. The seed decides the first weights, the order of the pairs, the pairs themselves, and which
compositions are classes: tune with the same seed of the data.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import torch
from lightning import Trainer, seed_everything

from lightning_feat.baselines.clip_classifier import ClipClassifier
from lightning_feat.baselines.clip_pretraining import SmallClipPretraining
from lightning_feat.data.captioned_digits import CaptionedDigitsDataModule

TEMPLATES = ["a photo of a {}.", "a {}.", "a picture of a {}."]


def trainer(epochs: int = 1) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def pretrain(data: CaptionedDigitsDataModule, seed: int, epochs: int) -> Trainer:
    """The fitted trainer, whose module is a ``SmallClipPretraining``."""
    seed_everything(seed, verbose=False)
    module = SmallClipPretraining(data.words, layers=3, lr=2e-3)
    run = trainer(epochs)
    run.fit(module, data)
    return run


def zero_shot(checkpoint: Path, seed: int, shift: float, template: str | list[str]) -> dict[str, float]:
    """Shares of the test images classified rightly: ``base``, ``novel`` and ``harmonic_mean``."""
    data = CaptionedDigitsDataModule(shift=shift, seed=seed)
    run = trainer()
    run.test(ClipClassifier(source="small", model=str(checkpoint), template=template), data, verbose=False)
    return {name.removeprefix("test/"): float(value) for name, value in run.callback_metrics.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=16_000)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--caption-noise", type=float, default=0.0, help="share of captions with a wrong word")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fast", action="store_true", help="a few steps: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/feature_shift/clip.ckpt"))
    arguments = parser.parse_args()
    if arguments.out.is_dir():
        parser.error(f"--out {arguments.out} is a folder: give the path of a file, such as {arguments.out}/clip.ckpt.")
    if arguments.fast:
        arguments.pairs, arguments.epochs = 640, 1
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    data = CaptionedDigitsDataModule(
        "pairs",
        batch_size=arguments.batch_size,
        num_pairs=arguments.pairs,
        caption_noise=arguments.caption_noise,
        seed=arguments.seed,
    )
    began, busy = time.perf_counter(), time.process_time()
    run = pretrain(data, arguments.seed, arguments.epochs)
    taken, busy = time.perf_counter() - began, time.process_time() - busy
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    run.save_checkpoint(arguments.out, weights_only=True)
    values = ", ".join(f"{name} {float(value):.3f}" for name, value in sorted(run.callback_metrics.items()))
    print(f"{run.global_step} steps in {taken:.0f} s ({busy:.0f} s of processor time): {values}\n")
    print("| images | templates | base (%) | novel (%) | harmonic mean (%) |\n|---|---|---|---|---|")
    for shift in (CaptionedDigitsDataModule().shift, 0.0):
        for template in (TEMPLATES[0], TEMPLATES):
            shares = zero_shot(arguments.out, arguments.seed, shift, template)
            cells = " | ".join(f"{100 * shares[name]:.1f}" for name in ("base", "novel", "harmonic_mean"))
            name = template if isinstance(template, str) else f"{len(template)}, averaged"
            print(f"| shift {shift:g} | {name} | {cells} |")
    print(f"\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
