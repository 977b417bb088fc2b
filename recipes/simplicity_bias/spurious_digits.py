"""Digits beside a patch that mostly tells their class: what showing slow examples twice does, and what else does it.

    python recipes/simplicity_bias/spurious_digits.py [--seeds 10] [--settings main strong] [--quick]

Each run trains the same small perceptron, by SGD or by SGD with one of the ways to choose and to show slow examples.
All runs of one seed share the split, the patches, the first weights and the orders of epochs that show every example
once, so that differences are paired. A reference knows what the networks have to find out: a network trained on digits
without patches reads the digit, and Bayes' rule adds what the patch tells.

Prints the tables of README.md; writes runs.csv, table.md and spurious_digits.png to --out.

Shapes: N test images, C classes.
"""

import argparse
import csv
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning import Callback, Trainer, seed_everything
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from lightning_feat.baselines import MLPClassifier
from lightning_feat.callbacks import DataPlan, SharpnessAwareMinimization, SimplicityBiasUpsampler
from lightning_feat.data.spurious_digits import (
    NO_PATCH,
    NUM_CLASSES,
    Kind,
    Otherwise,
    SpuriousDigitsDataModule,
    SpuriousDigitsPart,
    patch_likelihood,
)
from lightning_feat.functional.simplicity_bias.reliance import (
    accuracy,
    block_randomized,
    feature_reliance,
    selection_quality,
    slow_feature_accuracy,
)

HIDDEN = (128, 64)
# Distinct for all kinds of colour vision; Okabe and Ito, "Color Universal Design", 2008.
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#999999")
COLOURS += ("#332288", "#117733", "#882255")  # of Paul Tol, for SAM
MEASURES = {  # name, and the factor it is printed with
    "error": ("test error (%)", 100.0),
    "slow": ("right without help (%)", 100.0),
    "digit": ("digit alone (%)", 100.0),
    "conflict": ("wrong patch (%)", 100.0),
    "drop": ("lost to random patches (points)", 100.0),
    "reliance": ("reliance on the patch", 1.0),
}
BEST = "best"  # the reference, in the tables and in runs.csv
SELECTION = {"share": "chosen (%)", "precision": "precision (%)", "recall": "recall (%)", "wrong": "wrong labels (%)"}


class Setting(NamedTuple):
    """A training distribution, that of the test too."""

    title: str
    kind: Kind = "colour"
    otherwise: Otherwise = "none"
    strength: float = 0.9
    label_noise: float = 0.0


# The first was chosen before any result was seen, as the case of the theory (Nguyen et al., section 3): an easy feature
# on nine tenths of the examples and nothing on the rest, a hard one on all. The others move one thing each.
SETTINGS = {
    "main": Setting("colour on 90 %,\nelse none"),
    "strong": Setting("colour on 98 %,\nelse none", strength=0.98),
    "other": Setting("colour right in 90 %,\nelse another's", otherwise="other"),
    "texture": Setting("texture on 90 %,\nelse none", kind="texture"),
    "noise": Setting("colour on 90 %,\n10 % wrong labels", label_noise=0.1),
}


class Method(NamedTuple):
    title: str
    arguments: dict[str, Any] | None  # of the upsampler
    sharpness: dict[str, Any] | None = None  # of SharpnessAwareMinimization


METHODS = {
    "sgd": Method("SGD", None),
    "useful": Method("USEFUL", {}),
    "continue": Method("USEFUL, no restart", {"restart": False}),
    "weights": Method("USEFUL, loss weights", {"show": "weights"}),
    "loss": Method("highest loss", {"choose": "loss"}),
    "misclassified": Method("misclassified", {"choose": "misclassified"}),
    "random": Method("random", {"choose": "random"}),
    "oracle": Method("oracle", None),  # those whose patch does not agree
    # Lengths chosen on validation images, see README.md.
    "sam": Method("SAM", None, {"rho": 0.05}),
    "asam": Method("ASAM", None, {"rho": 0.2, "adaptive": True}),
    "sam-useful": Method("SAM and USEFUL", {}, {"rho": 0.05}),
}
ELSEWHERE = ["sgd", "useful", "loss", "random", "oracle"]  # in all settings but the first
SWEEP = {
    **{f"epoch {t}": Method(f"USEFUL, epoch {t}", {"separating_epoch": t}) for t in (1, 2, 10, 20)},
    "knee": Method("USEFUL, knee", {"separating_epoch": "knee"}),
    **{f"sam {rho:g}": Method(f"SAM, {rho:g}", None, {"rho": rho}) for rho in (0.01, 0.02, 0.1)},
    **{f"asam {rho:g}": Method(f"ASAM, {rho:g}", None, {"rho": rho, "adaptive": True}) for rho in (0.05, 0.1, 0.5)},
}


class Perceptron(MLPClassifier):
    """The baseline with the schedule of the paper: a tenth of the rate after half of the epochs, and after 3/4."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])  # without logging, which costs as much as the step

    def configure_optimizers(self) -> Any:
        epochs = self.trainer.max_epochs or 1
        optimizer = SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        return [optimizer], [MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4], gamma=0.1)]


class Probe(NamedTuple):
    """Every digit of a part beside every patch, by their numbers: inputs of a model are ``(N, 2)``, digit and patch."""

    digits: Tensor  # (N, 3, 8, 8)
    patches: Tensor  # (N + 1 + C N, 3, 8, 8): those of the part; none; each class beside each digit
    patch_classes: Tensor  # of these
    targets: Tensor
    conflict: Tensor  # (N,) number of a patch of another class

    @classmethod
    def of(cls, data: SpuriousDigitsDataModule, split: Literal["val", "test"]) -> "Probe":
        part = data.variant("same", split)
        size = len(part)
        without = part.with_patches(torch.full_like(part.targets, NO_PATCH))
        each = [part.with_patches(torch.full_like(part.targets, c)) for c in range(NUM_CLASSES)]
        images = [images_of(part), images_of(without)[:1], *map(images_of, each)]
        classes = [part.patch_classes, without.patch_classes[:1], *(p.patch_classes for p in each)]
        conflict = size + 1 + data.variant("conflict", split).patch_classes * size + torch.arange(size)
        return cls(images[0][..., :8], torch.cat(images)[..., 8:], torch.cat(classes), part.clean_targets, conflict)

    def beside(self, patches: Tensor | int) -> Tensor:
        """Pairs ``(N, 2)`` of each digit and the patch of a number."""
        size = len(self.digits)
        return torch.stack([torch.arange(size), torch.as_tensor(patches).expand(size)], dim=1)

    def crossed(self) -> Tensor:
        """Pairs ``(C N, 2)`` of each digit and each class of patch."""
        size = len(self.digits)
        return torch.cat([self.beside(size + 1 + c * size + torch.arange(size)) for c in range(NUM_CLASSES)])


Model = Callable[[Tensor], Tensor]  # from pairs to outputs


def network_on(probe: Probe, module: MLPClassifier) -> Model:
    return lambda pairs: module(torch.cat([probe.digits[pairs[:, 0]], probe.patches[pairs[:, 1]]], dim=3))


def best_on(probe: Probe, log_posterior: Tensor, setting: Setting) -> Model:
    """Bayes' rule: what the digit tells, by a network that saw no patches, and what the patch tells."""
    log_likelihood = patch_likelihood(probe.patch_classes, setting.strength, setting.otherwise).log()
    return lambda pairs: log_posterior[pairs[:, 0]] + log_likelihood[pairs[:, 1]]


def images_of(part: SpuriousDigitsPart) -> Tensor:
    return torch.stack([image for image, *_ in part.__getitems__(list(range(len(part))))])  # type: ignore[misc]


def data_of(setting: Setting, seed: int, strength: float | None = None) -> SpuriousDigitsDataModule:
    data = SpuriousDigitsDataModule(
        kind=setting.kind,
        train_strength=setting.strength if strength is None else strength,
        otherwise=setting.otherwise if strength is None else "none",
        label_noise=setting.label_noise,
        batch_size=128,
        val_fraction=0.1,
        test_fraction=0.4,
        seed=seed,
    )
    data.setup()
    return data


def train(
    data: SpuriousDigitsDataModule, callbacks: list[Callback], seed: int, epochs: int, lr: float, folder: Path
) -> tuple[MLPClassifier, float]:
    """The trained network, and the seconds that it took of the processor, whatever else ran."""
    seed_everything(seed, verbose=False)
    module = Perceptron(3 * 8 * 16, NUM_CLASSES, HIDDEN, lr=lr)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    began = time.process_time()
    trainer.fit(module, data)
    return module.eval(), time.process_time() - began


def callback_for(name: str, data: SpuriousDigitsDataModule, seed: int) -> DataPlan:
    arguments = (METHODS | SWEEP)[name].arguments
    if arguments is not None:
        return SimplicityBiasUpsampler(seed=seed, **arguments)
    counts = 1 + (~data.train_set.agrees).long() if name == "oracle" else torch.ones(len(data.train_set)).long()
    return DataPlan(counts, seed=seed)


@torch.no_grad()
def measure(model: Model, probe: Probe, agrees: Tensor) -> dict[str, float]:
    own = probe.beside(torch.arange(len(probe.digits)))
    outputs = model(own)
    right = accuracy(outputs, probe.targets)
    patch = torch.tensor([False, True])
    crossed = probe.crossed()
    found = {
        "error": 1 - right,
        "slow": slow_feature_accuracy(outputs.argmax(1), probe.targets, agrees),
        "digit": accuracy(model(probe.beside(len(probe.digits))), probe.targets),
        "conflict": accuracy(model(probe.beside(probe.conflict)), probe.targets),
        "drop": right - block_randomized(model, own, probe.targets, patch, repeats=10),
        "reliance": feature_reliance(model(crossed).argmax(1), probe.patch_classes[crossed[:, 1]], NUM_CLASSES),
    }
    return {name: float(value) for name, value in found.items()}


def log_posterior_of(module: MLPClassifier, data: SpuriousDigitsDataModule, probe: Probe) -> Tensor:
    """What a network that saw no patches says of each digit, its temperature that of the validation images."""
    with torch.no_grad():
        val = images_of(data.variant("digit", "val"))
        temperatures = torch.logspace(-0.5, 1, 61).tolist()
        logits, targets = module(val), data.val_set.targets
        best = min(temperatures, key=lambda t: float(cross_entropy(logits / t, targets)))
        return log_softmax(network_on(probe, module)(probe.beside(len(probe.digits))) / best, dim=1)


def run_seed(
    setting: Setting, methods: Sequence[str], seed: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """All methods of one setting and seed, and the reference."""
    data, alone = data_of(setting, seed), data_of(setting, seed, strength=0.0)
    probe = Probe.of(data, options.split)
    agrees = data.variant("same", options.split).agrees
    module, _ = train(alone, [callback_for("sgd", alone, seed)], seed, options.epochs, options.lr, options.out)
    rows = {BEST: measure(best_on(probe, log_posterior_of(module, alone, probe), setting), probe, agrees)}
    for name in methods:
        callback = callback_for(name, data, seed)
        sharpness = (METHODS | SWEEP)[name].sharpness
        callbacks = [callback] if sharpness is None else [callback, SharpnessAwareMinimization(**sharpness)]
        module, seconds = train(data, callbacks, seed, options.epochs, options.lr, options.out)
        fitted = accuracy(module(images_of(data.train_set)), data.train_set.targets)
        rows[name] = {**measure(network_on(probe, module), probe, agrees), "fitted": float(fitted), "seconds": seconds}
        selection = getattr(callback, "selection", None)
        if selection is not None:
            quality = selection_quality(selection.slow, ~data.train_set.agrees)
            wrong = (data.train_set.targets != data.train_set.clean_targets)[selection.slow].double().mean()
            rows[name] |= {key: float(value) for key, value in quality._asdict().items()}
            rows[name] |= {"wrong": float(wrong), "epoch": selection.epoch}
        passes = 1 if sharpness is None else 2
        rows[name]["shown"] = passes * examples_shown(callback, rows[name], options.epochs)
    return rows


def examples_shown(callback: DataPlan, row: dict[str, float], epochs: int) -> float:
    """Examples that the run trained on, over those of SGD: what a method costs where a step costs the same."""
    if not isinstance(callback, SimplicityBiasUpsampler):
        return float(torch.as_tensor(callback.plan).double().mean())
    first = row["epoch"] / epochs
    longer = row["share"] if callback.show == "copies" else 0.0
    return first + 1 + longer if callback.restart else 1 + longer * (1 - first)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval that Student's t gives it; nan for a single value."""
    from scipy.stats import t  # type: ignore[import-untyped]  # comes with scikit-learn

    sample = torch.tensor(values, dtype=torch.float64)
    count = len(values)
    spread = float(sample.std()) / math.sqrt(count) if count > 1 else math.nan
    return float(sample.mean()), float(t.ppf(0.975, max(count - 1, 1))) * spread


Runs = dict[str, dict[str, list[dict[str, float]]]]  # setting, method, seeds


def title_of(name: str) -> str:
    return "digits alone, and Bayes' rule" if name == BEST else (METHODS | SWEEP)[name].title


def differences(by_method: dict[str, list[dict[str, float]]], name: str, key: str) -> tuple[float, float]:
    pairs = zip(by_method[name], by_method["sgd"], strict=True)
    return mean_and_half_width([MEASURES[key][1] * (row[key] - base[key]) for row, base in pairs])


def spread_of(values: Sequence[float], digits: int) -> str:
    sample = torch.tensor(values, dtype=torch.float64)
    sample = sample[~sample.isnan()]
    if len(sample) == 0:
        return ""
    return f"{float(sample.mean()):.{digits}f}" + (f" ± {float(sample.std()):.{digits}f}" if len(sample) > 1 else "")


def tables(runs: Runs) -> str:
    """Markdown: means and deviations over seeds; paired differences to SGD with intervals; selections and costs."""
    heads = " | ".join(head for head, _ in MEASURES.values())
    values = [f"| setting | method | {heads} |", "|---|---|" + "---|" * len(MEASURES)]
    changes = [f"| setting | method, minus SGD | {heads} |", "|---|---|" + "---|" * len(MEASURES)]
    choices = [
        f"| setting | method | {' | '.join(SELECTION.values())} | epoch | examples shown | time |",
        "|---|---|" + "---|" * (len(SELECTION) + 3),
    ]
    for setting, by_method in runs.items():
        for name, rows in by_method.items():
            start = f"| {SETTINGS[setting].title.replace(chr(10), ' ')} | {title_of(name)} | "
            digits = {key: 1 if scale > 1 else 2 for key, (_, scale) in MEASURES.items()}
            digits["error"] = 2
            cells = [spread_of([s * row[key] for row in rows], digits[key]) for key, (_, s) in MEASURES.items()]
            values.append(f"{start}{' | '.join(cells)} |")
            if name in (BEST, "sgd") or "sgd" not in by_method:
                continue
            found = {key: differences(by_method, name, key) for key in MEASURES}
            cells = [
                f"{mean:+.{digits[k]}f} [{mean - half:+.{digits[k]}f}, {mean + half:+.{digits[k]}f}]"
                for k, (mean, half) in found.items()
            ]
            changes.append(f"{start}{' | '.join(cells)} |")
            cells = [spread_of([100 * row.get(key, math.nan) for row in rows], 0) for key in SELECTION]
            cells.append(spread_of([row.get("epoch", math.nan) for row in rows], 0))
            cells.append(f"{sum(row['shown'] for row in rows) / len(rows):.2f}")
            cells.append(f"{relative_time(by_method, name):.2f}")
            choices.append(f"{start}{' | '.join(cells)} |")
    return "\n\n".join("\n".join(lines) for lines in (values, changes, choices))


def relative_time(by_method: dict[str, list[dict[str, float]]], name: str) -> float:
    """Median over seeds of the time over that of SGD with the same seed."""
    pairs = zip(by_method[name], by_method["sgd"], strict=True)
    return float(torch.tensor([row["seconds"] / base["seconds"] for row, base in pairs]).median())


def draw_figure(runs: Runs, path: Path) -> None:
    """Training images of each setting, and paired differences to SGD with 95 % intervals; dotted: the reference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "error": ("test error (points)", "{:.1f} %"),
        "digit": ("accuracy on digits alone (points)", "{:.1f} %"),
        "reliance": ("reliance on the patch", "{:.2f}"),
    }
    shown = [name for name in METHODS if name != "sgd" and any(name in by_method for by_method in runs.values())]
    sizes = [2.0 + sum(name in by_method for name in shown) for by_method in runs.values()]
    figure, grid = plt.subplots(
        len(runs),
        4,
        figsize=(10, 1.0 + 0.25 * sum(sizes)),
        width_ratios=[1.15, 1, 1, 1],
        height_ratios=sizes,
        layout="constrained",
        squeeze=False,
    )
    for (setting, by_method), row in zip(runs.items(), grid, strict=True):
        row[0].imshow(mosaic(setting), interpolation="nearest", aspect="equal")
        row[0].set_title(SETTINGS[setting].title, fontsize=8.5, loc="left")
        row[0].set_axis_off()
        here = [name for name in shown if name in by_method]
        for axis, (key, (_, form)) in zip(row[1:], panels.items(), strict=True):
            level = mean_and_half_width([MEASURES[key][1] * run[key] for run in by_method["sgd"]])[0]
            axis.set_title(f"SGD: {form.format(level)}", fontsize=8, loc="left")
            for place, name in enumerate(here):
                mean, half = differences(by_method, name, key)
                colour = COLOURS[shown.index(name) + 1]
                axis.errorbar(mean, place, xerr=half, fmt="o", color=colour, markersize=4.5, capsize=2)
            if BEST in by_method and key != "reliance":
                axis.axvline(differences(by_method, BEST, key)[0], color="black", linewidth=0.9, linestyle=":")
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set_ylim(len(here) - 0.5, -0.5)
            axis.set_yticks(range(len(here)), [METHODS[name].title for name in here] if key == "error" else [])
            axis.tick_params(labelsize=8, length=2)
            axis.spines[["top", "right"]].set_visible(False)
    for axis, (title, _) in zip(grid[-1, 1:], panels.values(), strict=True):
        axis.set_xlabel(f"{title},\nminus SGD", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def mosaic(setting: str) -> Any:
    """A dozen training images ``(H, W, 3)``, three in a row."""
    part = data_of(SETTINGS[setting], seed=0).train_set
    found = torch.cat([(part.targets == c).nonzero()[:2, 0] for c in range(6)])
    found[-1] = (~part.agrees).nonzero()[0, 0]
    images = images_of(part)[found]
    images = torch.cat([(images[..., :8] + 0.8) / 3.3, (images[..., 8:] + 1.75) / 3.5], dim=3).clamp(0, 1)
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1.0)
    rows = [torch.cat(list(four), dim=2) for four in framed.split(4)]
    return torch.cat(rows, dim=1).permute(1, 2, 0).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each method")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["main", "other", "noise"])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *SWEEP], help="for all settings; must hold sgd")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--split", choices=["test", "val"], default="test", help="val: to choose settings with")
    parser.add_argument("--quick", "--fast", action="store_true", help="two seeds, few methods: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/simplicity_bias_spurious_digits"))
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs, options.settings = 2, 4, ["main", "other"]
        options.methods = ["sgd", "useful", "loss", "oracle"]

    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    options.out.mkdir(parents=True, exist_ok=True)
    runs: Runs = {}
    began = time.perf_counter()
    keys = ["seed", *MEASURES, *SELECTION, "epoch", "fitted", "shown", "seconds"]
    with open(options.out / "runs.csv", "w", newline="", buffering=1) as file:  # by line, lest it be cut off
        writer = csv.DictWriter(file, ["setting", "method", *keys], restval="")
        writer.writeheader()
        for setting in options.settings:
            methods = options.methods or (list(METHODS | SWEEP) if setting == "main" else ELSEWHERE)
            by_method = runs[setting] = {name: [] for name in (BEST, *methods)}
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                for name, row in run_seed(SETTINGS[setting], methods, seed, options).items():
                    by_method[name].append({"seed": seed, **row})
                    writer.writerow({"setting": setting, "method": name, **by_method[name][-1]})
    taken, busy = time.perf_counter() - began, time.process_time()

    text = tables(runs)
    (options.out / "table.md").write_text(text + "\n")
    draw_figure(runs, options.out / "spurious_digits.png")
    count = sum(len(rows) for by_method in runs.values() for rows in by_method.values())
    print(f"{text}\n\n{count} runs in {taken:.0f} s, of which {busy:.0f} s of the processor; all in {options.out}")


if __name__ == "__main__":
    main()
