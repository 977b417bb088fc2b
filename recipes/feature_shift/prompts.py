"""Prompt-tune a small CLIP on few images of some classes, and see what becomes of others: base-to-novel generalisation.

    python recipes/feature_shift/pretrain.py            # first: writes runs/feature_shift/clip.ckpt
    python recipes/feature_shift/prompts.py [--seeds 10] [--fast]

Each run teaches the frozen model prompts by one of the methods, from 16 images of each of 20 base classes, and is
tested on other images of these and on 20 novel classes, whose names alone it is given. A seed draws the images, the
order of the batches and the first prompts; methods of one seed share them, so that differences are paired. Every method
trains for equally many steps, at the learning rate that did best on validation images of the base classes, by other
seeds than the tables show (--tune).

The shift of a tower is that of its blocks against the same model without prompts, on validation images of base classes;
the discrepancy is the mean difference of the two towers' shifts. Prints the tables of README.md, writes runs.csv,
table.md and prompts.png to --out.
"""

import argparse
import csv
import logging
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, Trainer, seed_everything

from lightning_feat.baselines.clip_classifier import ClipClassifier
from lightning_feat.baselines.clip_pretraining import SmallClipPretraining
from lightning_feat.callbacks import FeatureShiftMonitor, FeatureShiftRegularizer, PromptLearner
from lightning_feat.data.captioned_digits import CaptionedDigitsDataModule

COLOURS = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#999999")
MARKS = "os^vDPX<"  # with the colours, so that a copy in grey can be read
DEPTH, LENGTH, BATCH_SIZE, EPOCHS = 3, 2, 16, 10  # all blocks of the small towers; nine of twelve in the paper
RATES = (0.001, 0.004, 0.014)  # the last is the paper's 0.0035 for batches of 4


class Method(NamedTuple):
    """What is learned; the learning rate is that chosen by --tune."""

    title: str
    lr: float
    prompts: dict[str, Any]  # of PromptLearner
    consistency: float = 0.0  # weight of the embedding form


METHODS = {
    "text": Method("text prompts (CoOp)", 0.004, {"coupling": "text", "depth": 1, "length": 4}),
    "vision": Method("vision prompts", 0.001, {"coupling": "vision"}),
    "independent": Method("independent", 0.001, {"coupling": "independent"}),
    "maple": Method("MaPLe", 0.014, {"coupling": "maple"}),
    "embedding": Method("MaPLe, embedding consistency", 0.014, {"coupling": "maple"}, consistency=1.0),
    # At 0.014 the Gram consistency diverges: prompts begin so small that a step changes their norms manifold.
    "slower": Method("MaPLe, at the lower rate", 0.004, {"coupling": "maple"}),
    "gram": Method("MaPLe, Gram consistency", 0.004, {"coupling": "maple", "gram_weight": 1.0}),
    "surgery": Method(
        "MaPLe, Gram consistency, surgery (RESTORE)",
        0.004,
        {"coupling": "maple", "gram_weight": 1.0, "text_surgery": 0.1, "image_surgery": 0.1},
    ),
}
AGAINST = {"text": "maple", "vision": "maple", "independent": "maple", "embedding": "maple"}
AGAINST |= {"gram": "slower", "surgery": "slower"}  # MaPLe at the same rate
MEASURES = {"base": "base (%)", "novel": "novel (%)", "harmonic_mean": "HM (%)", "discrepancy": "discrepancy"}


def run_once(checkpoint: Path, method: Method, lr: float, seed: int, epochs: int) -> dict[str, float]:
    """Accuracies in percent, shifts, and seconds of one run."""
    pretrained = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    data = CaptionedDigitsDataModule(batch_size=BATCH_SIZE, shot_seed=seed)
    if list(pretrained["words"]) != data.words:
        raise ValueError(f"{checkpoint} was pre-trained on other captions: run pretrain.py again.")
    module = ClipClassifier(source="small", model=str(checkpoint), lr=lr)
    learner = PromptLearner(**{"depth": DEPTH, "length": LENGTH, **method.prompts})
    monitor = FeatureShiftMonitor(data="val", reference="without_prompts")
    callbacks: list[Callback] = [learner, monitor]
    if method.consistency:
        callbacks.append(
            FeatureShiftRegularizer(form="consistency", reference="without_prompts", weight=method.consistency)
        )
    seed_everything(seed, verbose=False)
    began = time.perf_counter()
    trainer = quiet_trainer(epochs, callbacks)
    trainer.fit(module, data)
    seconds = time.perf_counter() - began
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    shift = {
        kind: statistics.mean(line[-1][1] for name, line in monitor.history.items() if ("visual" in name) == image)
        for kind, image in (("text_shift", False), ("image_shift", True))
        if any(("visual" in name) == image for name in monitor.history)
    }
    trainer.test(module, data, verbose=False)
    tested = {
        name: 100 * float(trainer.callback_metrics[f"test/{name}"]) for name in ("base", "novel", "harmonic_mean")
    }
    return {
        **tested,
        "val": 100 * found["val/accuracy"],
        "discrepancy": found["feature_shift_val/discrepancy/mean"],
        "text_shift": 0.0,
        "image_shift": 0.0,
        **shift,
        "gram_text": found.get("prompts/gram_norm/text", math.nan),
        "gram_discrepancy": found.get("prompts/discrepancy", math.nan),
        "seconds": seconds,
    }


def zero_shot(checkpoint: Path) -> dict[str, float]:
    """Accuracies in percent of the model as it is."""
    trainer = quiet_trainer(1, [])
    trainer.test(ClipClassifier(source="small", model=str(checkpoint)), CaptionedDigitsDataModule(), verbose=False)
    return {name: 100 * float(trainer.callback_metrics[f"test/{name}"]) for name in ("base", "novel", "harmonic_mean")}


def quiet_trainer(epochs: int, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# Student's t for 95 %, by degrees of freedom.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)


def interval(differences: Sequence[float]) -> str:
    """Mean and 95 % interval of paired differences."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f}"
    half = _T[min(len(differences) - 2, len(_T) - 1)] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and deviation; of runs that diverged there is no shift."""
    known = [value for value in values if math.isfinite(value)]
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.{digits}f} ± {deviation:.{digits}f}"


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, of what is finite."""
    x, y = zip(*[(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a)], strict=True)
    ranks = [[sorted(v).index(each) + (v.count(each) - 1) / 2 for each in v] for v in (list(x), list(y))]
    return statistics.correlation(*ranks) if min(len(set(rank)) for rank in ranks) > 1 else math.nan


def table(rows: list[dict[str, Any]], start: dict[str, float]) -> str:
    """The tables of the README."""
    lines = ["| method | rate | base (%) | novel (%) | HM (%) | text shift | image shift | discrepancy | s |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    lines += [f"| zero-shot | | {start['base']:.1f} | {start['novel']:.1f} | {start['harmonic_mean']:.1f} | | | | |"]
    by_method = {name: [row for row in rows if row["method"] == name] for name in METHODS}
    for name, runs in by_method.items():
        cells = [spread([run[key] for run in runs]) for key in ("base", "novel", "harmonic_mean")]
        cells += [spread([run[key] for run in runs], 2) for key in ("text_shift", "image_shift", "discrepancy")]
        lost = sum(not math.isfinite(run["discrepancy"]) for run in runs)
        cells[0] += f", {lost} diverged" if lost else ""
        seconds = statistics.median(run["seconds"] for run in runs)
        lines.append(f"| {METHODS[name].title} | {runs[0]['lr']:g} | {' | '.join(cells)} | {seconds:.0f} |")
    lines += ["", "| paired by seed, with 95 % intervals | minus | base | novel | HM |", "|---|---|---|---|---|"]
    for name, other in AGAINST.items():
        pairs = list(zip(by_method[name], by_method[other], strict=True))
        cells = [interval([a[key] - b[key] for a, b in pairs]) for key in ("base", "novel", "harmonic_mean")]
        lines.append(f"| {METHODS[name].title} | {METHODS[other].title} | {' | '.join(cells)} |")
    lines += ["", "| does the discrepancy tell the loss on novel classes? | runs | rank correlation |", "|---|---|---|"]
    every = rank_correlation([row["discrepancy"] for row in rows], [row["novel"] for row in rows])
    lines.append(f"| all methods and seeds | {len(rows)} | {every:+.2f} |")
    means = [
        tuple(
            statistics.mean(r[key] for r in runs if math.isfinite(r["discrepancy"])) for key in ("discrepancy", "novel")
        )
        for runs in by_method.values()
    ]
    lines.append(f"| means of methods | {len(means)} | {rank_correlation(*zip(*means, strict=True)):+.2f} |")
    within = [
        rank_correlation([r["discrepancy"] for r in runs], [r["novel"] for r in runs]) for runs in by_method.values()
    ]
    known = [value for value in within if not math.isnan(value)]
    if known:
        lines.append(f"| within a method, mean over methods | {len(rows)} | {statistics.mean(known):+.2f} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], start: dict[str, float], path: Path) -> None:
    """Base against novel accuracy, and novel accuracy against the discrepancy of the towers' shifts. Runs that diverged
    lie far below, at chance: the legend counts them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, method), colour, mark in zip(METHODS.items(), COLOURS, MARKS, strict=False):
        every = [row for row in rows if row["method"] == name]
        runs = [row for row in every if math.isfinite(row["discrepancy"])]
        lost = f", without {len(every) - len(runs)} diverged" if len(runs) < len(every) else ""
        title = method.title.replace(", ", ",\n", 1) + lost
        style: dict[str, Any] = {"marker": mark, "edgecolors": "white", "linewidths": 0.8, "zorder": 3}
        for axes, x in ((left, "base"), (right, "discrepancy")):
            axes.scatter(
                [r[x] for r in runs],
                [r["novel"] for r in runs],
                s=11,
                color=colour,
                marker=mark,
                alpha=0.4,
                linewidths=0,
            )
            mean = statistics.mean(r[x] for r in runs), statistics.mean(r["novel"] for r in runs)
            axes.scatter(*mean, s=60, color=colour, label=title, **style)
    left.scatter(start["base"], start["novel"], marker="*", s=110, color="#444444", label="zero-shot", zorder=3)
    right.axhline(start["novel"], color="#444444", linewidth=0.8, linestyle=":", label="zero-shot")
    left.set_xlabel("accuracy on base classes (%)", fontsize=9)
    right.set_xlabel("discrepancy of the towers' shifts", fontsize=9)
    left.set_ylabel("accuracy on novel classes (%)", fontsize=9)
    for axes, letter in ((left, "a"), (right, "b")):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_title(letter, loc="left", fontsize=9, fontweight="bold")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    figure.savefig(path, dpi=200)


def tune(checkpoint: Path, seeds: Sequence[int], epochs: int) -> None:
    """Print the accuracy on validation images of base classes for each learning rate."""
    print(f"| method | {' | '.join(f'{lr:g}' for lr in RATES)} |\n|---|{'---|' * len(RATES)}")
    for method in METHODS.values():
        found = [statistics.mean(run_once(checkpoint, method, lr, s, epochs)["val"] for s in seeds) for lr in RATES]
        print(f"| {method.title} | {' | '.join(f'{value:.1f}' for value in found)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, default=Path("runs/feature_shift/clip.ckpt"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tune", action="store_true", help="try learning rates instead, on two seeds of their own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fast", action="store_true", help="one epoch, two seeds, an untrained model: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/feature_shift/prompts"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.fast:
        arguments.clip = arguments.out / "untrained.ckpt"
        untrained = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        untrained.strategy.connect(SmallClipPretraining(CaptionedDigitsDataModule().words))
        untrained.save_checkpoint(arguments.clip, weights_only=True)
    if not arguments.clip.exists():
        raise SystemExit(f"there is no {arguments.clip}: run python recipes/feature_shift/pretrain.py first.")
    epochs, seeds = (1, 2) if arguments.fast else (EPOCHS, arguments.seeds)
    if arguments.tune:
        tune(arguments.clip, (100, 101), epochs)
        return
    began = time.perf_counter()
    start, rows = zero_shot(arguments.clip), []
    for seed in range(seeds):
        for name, method in METHODS.items():
            rows.append(
                {"method": name, "seed": seed, "lr": method.lr}
                | run_once(arguments.clip, method, method.lr, seed, epochs)
            )
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    with (arguments.out / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = table(rows, start)
    (arguments.out / "table.md").write_text(text + "\n")
    draw(rows, start, arguments.out / "prompts.png")
    print(f"\n{text}\n\n{len(rows)} runs in {time.perf_counter() - began:.0f} s; written to {arguments.out}")


if __name__ == "__main__":
    main()
