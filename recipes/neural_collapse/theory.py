"""What neural-collapse theory predicts for free features, and what training them reaches, side by side.

    python recipes/neural_collapse/theory.py [--fast] [--out runs/neural_collapse_theory]

Each case trains ``UnconstrainedFeatures``, a parameter for every sample below a linear head, by L-BFGS in float64
from a random start. The predictions are those of ``lightning_feat.functional``, which know the class sizes and the
decays and nothing of the training: lengths and angles of the rows of the classifier and of the class means, the class
sizes at which classes collapse, and the head of a regression.

Prints the table of README.md; writes table.md and theory.png to --out.

Shapes: N samples, D features, C classes.
"""

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_feat.baselines import UnconstrainedFeatures
from lightning_feat.functional.common.class_sums import class_means, class_sums
from lightning_feat.functional.neural_collapse import kept_features_optimum, nc1_quotient
from lightning_feat.functional.neural_collapse.geometry import (
    ce_frame,
    ce_merge_count,
    ce_nonnegative_collapse_count,
    ce_nonnegative_frame,
    mse_collapse_count,
    mse_orthogonal_frame,
    seli_grams,
)
from lightning_feat.functional.neural_collapse.regression import (
    nrc1,
    nrc2,
    nrc3,
    regression_optimum,
    target_covariance,
)

NUM_FEATURES = 8
ITERATIONS = 5  # of L-BFGS in each epoch
STOP = 1e-10  # gradient at which a training ends; some end above it, in rounding
# Distinct for all kinds of colour vision; Okabe and Ito, "Color Universal Design", 2008.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PATIENCE = 40  # epochs without a smaller gradient, after which rounding is all there is


class Grams(NamedTuple):
    """Inner products at an optimum, ``(C, C)`` each."""

    weights: Tensor
    means: Tensor


class Row(NamedTuple):
    """A line of the table."""

    case: str
    quantity: str
    predicted: str
    reached: str
    error: float


class Record(Callback):
    """Keep the distance of the Gram matrices to their prediction after every epoch."""

    def __init__(self, predicted: Grams) -> None:
        self.predicted, self.errors = predicted, list[float]()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, UnconstrainedFeatures):
            pairs = zip(reached_grams(pl_module), self.predicted, strict=True)
            self.errors.append(max(relative(*pair) for pair in pairs))


def train(
    epochs: int, seed: int = 0, stop: float = STOP, callbacks: Sequence[Callback] = (), **arguments: Any
) -> UnconstrainedFeatures:
    """Free features trained until no gradient exceeds ``stop`` or it falls no more, for ``epochs`` at most."""
    seed_everything(seed, verbose=False)
    module = UnconstrainedFeatures(**{"num_features": NUM_FEATURES, "iterations": ITERATIONS, **arguments})
    Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[EarlyStopping("train/gradient", stopping_threshold=stop, patience=PATIENCE), *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    ).fit(module)
    return module


@torch.no_grad()
def reached_grams(module: UnconstrainedFeatures) -> Grams:
    mean_CD = class_means(class_sums(module.features.all(), module.targets, module.num_outputs))
    return Grams(module.weight @ module.weight.T, mean_CD @ mean_CD.T)


def predicted_grams(arguments: dict[str, Any]) -> Grams:
    """The prediction that belongs to these arguments of ``UnconstrainedFeatures``."""
    counts, decays = torch.tensor(arguments["counts"]), (arguments["weight_decay"], arguments["feature_decay"])
    if arguments.get("loss") == "mse" and arguments.get("bias"):
        # A regression on one-hot targets; its feature decay is that of the mean over the samples.
        targets = one_hot(torch.arange(len(counts)).repeat_interleave(counts)).double()
        size = len(targets)
        optimum = regression_optimum(targets, decays[0], size * decays[1])
        # From stationarity in the features, size * feature_decay * h = weight^T (target - output).
        slack_CC = (targets - optimum.predictions)[counts.cumsum(0) - 1] / (size * decays[1])
        return Grams(optimum.weight_gram, slack_CC @ optimum.weight_gram @ slack_CC.T)
    if arguments.get("loss") == "mse":
        frame = mse_orthogonal_frame(counts, *decays, arguments.get("num_layers", 1))
        return Grams(torch.diag(frame.weights), torch.diag(frame.means))
    if arguments.get("nonnegative"):
        nonnegative = ce_nonnegative_frame(counts, *decays)
        return Grams(nonnegative.weight_gram, torch.diag(nonnegative.means))
    signed = ce_frame(counts, *decays)
    return Grams(signed.weights, signed.means)


def relative(reached: Tensor, predicted: Tensor) -> float:
    """Largest difference of two entries over the largest entry predicted; over one if all of these are zero."""
    return float((reached - predicted).abs().max()) / (float(predicted.abs().max()) or 1.0)


def numbers(values: Tensor, digits: int = 5) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values.tolist())


def angles(gram: Tensor) -> Tensor:
    """Angles in degrees between all pairs of vectors, smallest first."""
    length_C = gram.diagonal().sqrt()
    row_P, column_P = torch.triu_indices(len(gram), len(gram), 1)
    cosine_P = (gram / torch.outer(length_C, length_C))[row_P, column_P]
    return cosine_P.clamp(-1, 1).acos().rad2deg().sort().values


def span(values: Tensor) -> str:
    low, high = f"{values[0]:.3f}", f"{values[-1]:.3f}"
    return low if low == high else f"{low} to {high}"


def compare(case: str, module: UnconstrainedFeatures, predicted: Grams) -> list[Row]:
    """Classifier and class means: squared lengths, one class of each size, and the range of the angles."""
    counts = torch.bincount(module.targets).tolist()
    shown = sorted({counts.index(count) for count in counts})
    rows = []
    names = "rows: squared lengths, angles", "means: squared lengths, angles"
    for name, *grams in zip(names, predicted, reached_grams(module), strict=True):
        wanted, found = (f"{numbers(gram.diagonal()[shown])}; {span(angles(gram))}°" for gram in grams)
        error = max(relative(of(grams[1]), of(grams[0])) for of in (torch.diagonal, angles))
        rows.append(Row(case, name, wanted, found, error))
    return rows


CE = {"weight_decay": 2e-3, "feature_decay": 2e-4}
MSE = {"loss": "mse", "weight_decay": 1e-2, "feature_decay": 1e-3}
EQUAL, UNEQUAL = [10] * 4, [40, 20, 10, 4]
FRAMES: dict[str, dict[str, Any]] = {
    "cross-entropy, bias, equal classes": {"counts": EQUAL, "bias": True, **CE},
    "cross-entropy, two class sizes": {"counts": [40, 40, 10, 10], **CE},
    "cross-entropy, unequal classes": {"counts": UNEQUAL, **CE},
    "cross-entropy, ReLU, unequal classes": {"counts": UNEQUAL, "nonnegative": True, **CE},
    "squared error, equal classes": {"counts": EQUAL, **MSE},
    "squared error, bias, equal classes": {"counts": EQUAL, "bias": True, **MSE},
    "squared error, bias, unequal classes": {"counts": UNEQUAL, "bias": True, **MSE, "feature_decay": 2e-4},
    "squared error, unequal classes": {"counts": UNEQUAL, **MSE, "feature_decay": 5e-4},
    "squared error, unequal classes, two layers": {
        **{"counts": UNEQUAL, "num_layers": 2, "init_scale": 2.0},
        **{**MSE, "weight_decay": 8e-3, "feature_decay": 1e-4},
    },
    "squared error, unequal classes, three layers": {
        **{"counts": UNEQUAL, "num_layers": 3, "init_scale": 2.0},
        **{**MSE, "weight_decay": 8e-3, "feature_decay": 1e-4},
    },
}


def frames(epochs: int, names: Sequence[str]) -> tuple[list[Row], dict[str, list[float]]]:
    """Each case of ``FRAMES``, and the error of its Gram matrices after every epoch."""
    rows, approach, spread = [], {}, 0.0
    for name in names:
        predicted = predicted_grams(FRAMES[name])
        record = Record(predicted)
        module = train(epochs, callbacks=[record], **FRAMES[name])
        rows += compare(name, module, predicted)
        approach[name] = record.errors
        totals = class_sums(module.features.all().detach(), module.targets, module.num_outputs)
        spread = max(spread, float(nc1_quotient(totals)))
    return [*rows, Row("the largest of these", "spread within classes (NC1)", "0", f"{spread:.0e}", spread)], approach


class Threshold(NamedTuple):
    """A sweep over the size n of the smallest classes: what is measured on them, and where it leaves zero."""

    title: str
    quantity: str  # of which it is the squared length
    arguments: dict[str, Any]
    counts: Callable[[int], list[int]]
    measure: Callable[[Grams], float]
    starts: int  # random starts, of which the lowest minimum counts


def _beside_two(n: int) -> list[int]:
    return [30, 30, n]


def _two_of(n: int) -> list[int]:
    return [30, 30, n, n]


def thresholds() -> dict[str, Threshold]:
    """Decays at which classes of 8 samples collapse and those of 9 do not."""
    # Every threshold is proportional to the weight decay; with 9 samples it is to be 8.5.
    one, two, relu, merged = (2e-2, 2e-3, 2e-2, 2e-2)
    small, pair = sum(_beside_two(9)), sum(_two_of(9))
    decays = {
        "one layer": (8.5 / mse_collapse_count(small, 1.0, one), one),
        "two layers": (8.5 / mse_collapse_count(small, 1.0, two, 2), two),
        "ReLU": (8.5 / ce_nonnegative_collapse_count(small, 3, 1.0, relu), relu),
        "any sign": (8.5 / ce_merge_count(pair, 1.0, merged), merged),
    }
    arguments: dict[str, dict[str, Any]] = {
        name: {"weight_decay": decay[0], "feature_decay": decay[1]} for name, decay in decays.items()
    }
    arguments["one layer"] |= {"loss": "mse"}
    arguments["two layers"] |= {"loss": "mse", "num_layers": 2, "init_scale": 2.0}
    arguments["ReLU"] |= {"nonnegative": True, "num_features": 24}

    def row(grams: Grams) -> float:
        return float(grams.weights[-1, -1])

    def mean(grams: Grams) -> float:
        return float(grams.means[-1, -1])

    def apart(grams: Grams) -> float:
        return float(grams.weights[-1, -1] + grams.weights[-2, -2] - 2 * grams.weights[-1, -2])

    # One layer without ReLU has no local minima, two have one at zero, and a ReLU that is off stays off.
    return {
        "one layer": Threshold("squared error", "row", arguments["one layer"], _beside_two, row, 1),
        "two layers": Threshold("squared error, two layers", "row", arguments["two layers"], _beside_two, row, 6),
        "ReLU": Threshold("cross-entropy, ReLU", "mean", arguments["ReLU"], _beside_two, mean, 8),
        "any sign": Threshold("cross-entropy", "rows apart", arguments["any sign"], _two_of, apart, 1),
    }


def lowest(epochs: int, starts: int, **arguments: Any) -> UnconstrainedFeatures:
    """The lowest minimum that some random starts reach."""
    modules = [train(epochs, seed=seed, **arguments) for seed in range(starts)]
    return min(modules, key=lambda module: float(module.objective(module(module.indices), module.targets).detach()))


def sweep(epochs: int, threshold: Threshold, sizes: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Predicted and reached measure for each size of the smallest classes."""
    found = {}
    for n in sizes:
        arguments = {**threshold.arguments, "counts": threshold.counts(n)}
        module = lowest(epochs, threshold.starts, **arguments)
        found[n] = threshold.measure(predicted_grams(arguments)), threshold.measure(reached_grams(module))
    return found


def threshold_rows(threshold: Threshold, values: dict[int, tuple[float, float]]) -> list[Row]:
    rows = []
    for n in (8, 9):
        predicted, reached = values[n]
        predicted = 0.0 if predicted < 1e-12 else predicted
        case = f"{threshold.title}, threshold between 8 and 9 samples"
        error = abs(reached - predicted) / (predicted or 1.0)
        rows.append(
            Row(case, f"{n} samples: {threshold.quantity}, squared length", f"{predicted:.5f}", f"{reached:.5f}", error)
        )
    return rows


def vanishing_decay(epochs: int, decays: Sequence[float]) -> tuple[list[Row], dict[float, tuple[float, float]]]:
    """Cross-entropy with two large and two small classes on its way to the limit for no decay, SELI."""
    counts = [40, 40, 4, 4]
    limit = Grams(*seli_grams(torch.tensor(counts)))
    rows, ratios = [], {}
    for decay in decays:
        arguments: dict[str, Any] = {"counts": counts, "weight_decay": decay, "feature_decay": decay}
        predicted = predicted_grams(arguments)
        # The gradients are as small as the decay: stop by it.
        module = train(epochs, stop=1e-6 * decay, **arguments)
        reached = reached_grams(module)
        pair = [torch.stack([gram[0, 0] / gram[-1, -1] for gram in grams]) for grams in (predicted, reached, limit)]
        case = f"cross-entropy, large over small classes (SELI limit {numbers(pair[2], 3)})"
        rows.append(
            Row(
                case,
                f"decay {decay:.0e}: squared lengths of rows, means",
                numbers(pair[0]),
                numbers(pair[1]),
                relative(pair[1], pair[0]),
            )
        )
        ratios[decay] = float(pair[0][0]), float(pair[1][0])
    return rows, ratios


def regressions(epochs: int) -> list[Row]:
    """Three correlated outputs, all kept; and with a third that varies less than the decays cost."""
    size, decay = 60, 0.1  # of the head, and of the mean over samples of the features
    generator = torch.Generator().manual_seed(0)
    independent = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    rows = []
    for case, spread in (("regression", (3.0, 2.0, 1.0)), ("regression, third output too weak", (3.0, 2.0, 0.05))):
        outputs = 1 + independent * torch.tensor(spread) @ mix
        module = train(
            epochs,
            outputs=outputs.tolist(),
            loss="mse",
            bias=True,
            weight_decay=decay,
            feature_decay=decay / size,
        )
        optimum, weight = regression_optimum(outputs, decay, decay), module.weight.detach()
        for quantity, wanted, found in (
            ("eigenvalues of W Wᵀ", *map(torch.linalg.eigvalsh, (optimum.weight_gram, weight @ weight.T))),
            ("bias", optimum.bias, module.bias.detach()),
        ):
            rows.append(Row(case, quantity, numbers(wanted), numbers(found), relative(found, wanted)))
        error = relative(module(module.indices).detach(), optimum.predictions)
        rows.append(Row(case, "outputs for all samples", "", "", error))
        if spread[-1] == 1.0:
            features, covariance = module.features.all().detach(), target_covariance(outputs)
            measures = nrc1(features, 3, centered=False), nrc2(features, weight), nrc3(weight, covariance, decay**2)
            text = ", ".join(f"{value:.1e}" for value in measures)
            rows.append(Row(case, "NRC1, NRC2, NRC3", "0, 0, 0", text, float(torch.stack(measures).max())))
    return rows


def kept(epochs: int) -> list[Row]:
    """Features that stay near given ones: the distance to the reference solution, and what becomes of their spread."""
    targets = torch.arange(3).repeat_interleave(torch.tensor([12, 8, 4]))
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, NUM_FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(targets), NUM_FEATURES, generator=generator, dtype=torch.float64)
    given, (weight_decay, feature_decay) = means[targets] + 0.5 * noise, (1e-2, 1e-3)

    def spread(features: Tensor) -> float:
        return float(nc1_quotient(class_sums(features.detach(), targets, 3)))

    rows = []
    for keep in (1e-4, 1e-3, 1e-2, 1e-1):
        arguments: dict[str, Any] = {"weight_decay": weight_decay, "feature_decay": feature_decay, "keep_weight": keep}
        optimum = kept_features_optimum(given, targets, **arguments)
        module = train(epochs, counts=[12, 8, 4], loss="mse", given=given.tolist(), **arguments)
        reached = module.features.all().detach()
        case = f"kept near features of NC1 {spread(given):.3f}, weight {keep:g}"
        error = relative(reached, optimum.features)
        rows.append(Row(case, "NC1; features", f"{spread(optimum.features):.5f}", f"{spread(reached):.5f}", error))
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = ["| case | quantity | predicted | reached | relative error |", "|---|---|---|---|---|"]
    last = ""
    for row in rows:
        case, last = ("" if row.case == last else row.case), row.case
        lines.append(f"| {case} | {row.quantity} | {row.predicted} | {row.reached} | {row.error:.0e} |")
    return "\n".join(lines)


def draw(
    approach: dict[str, list[float]],
    sweeps: dict[str, dict[int, tuple[float, float]]],
    ratios: dict[float, tuple[float, float]],
    path: Path,
) -> None:
    """The way to the predictions, and the predictions (lines) with what was reached (marks)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    above, below = halves
    axes = above.subplots()
    for number, (name, errors) in enumerate(approach.items()):
        iterations = [ITERATIONS * (epoch + 1) for epoch in range(len(errors))]
        dashes = "-" if name.startswith("cross-entropy") else "--"
        colour = COLOURS[number % len(COLOURS)]
        axes.loglog(
            iterations,
            errors,
            dashes,
            color=colour,
            linewidth=1.2,
            marker="o",
            markersize=4.5,
            markevery=[-1],
            label=name,
        )
    axes.set(xlabel="iterations of L-BFGS", ylabel="Gram matrices, distance to prediction")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0, frameon=False, fontsize=8)

    every, panels = thresholds(), below.subplots(1, 3)
    axes = panels[0]
    for number, name in enumerate(("one layer", "two layers", "ReLU")):
        _draw_sweep(axes, every[name], sweeps[name], COLOURS[number], "os^"[number])
    axes.set(xlabel="samples in the smallest class", ylabel="its squared length")
    axes = panels[1]
    _draw_sweep(axes, every["any sign"], sweeps["any sign"], COLOURS[3], "D")
    axes.set(xlabel="samples in each of two small classes", ylabel="their squared distance")
    axes = panels[2]
    counts = torch.tensor([40, 40, 4, 4])
    steps = torch.logspace(math.log10(max(ratios)), math.log10(min(ratios)), 30).tolist()
    grams = [ce_frame(counts, decay, decay).weights for decay in steps]
    axes.semilogx(steps, [float(gram[0, 0] / gram[-1, -1]) for gram in grams], color=COLOURS[4], label="cross-entropy")
    axes.plot(list(ratios), [reached for _, reached in ratios.values()], "o", color=COLOURS[4], markersize=4.5)
    limit = seli_grams(counts)[0]
    axes.axhline(float(limit[0, 0] / limit[-1, -1]), color="0.4", linestyle="--", label="limit (SELI)")
    axes.invert_xaxis()
    axes.set(xlabel="both decays", ylabel="rows, large over small, squared")
    for number, axes in enumerate([*above.axes, *panels]):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_fontsize(9)
        axes.yaxis.label.set_fontsize(9)
        if number:
            axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, fontsize=7)
    figure.savefig(path, dpi=160)


def _draw_sweep(
    axes: Any, threshold: Threshold, values: dict[int, tuple[float, float]], colour: str, mark: str
) -> None:
    sizes = range(min(values), max(values) + 1)
    line = [threshold.measure(predicted_grams({**threshold.arguments, "counts": threshold.counts(n)})) for n in sizes]
    axes.axvline(8.5, color="0.8", linewidth=0.8)
    axes.plot(sizes, line, color=colour, linewidth=1.2, label=f"{threshold.title}: {threshold.quantity}")
    axes.plot(list(values), [reached for _, reached in values.values()], mark, color=colour, markersize=4.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="two cases, a few steps: does it run?")
    parser.add_argument("--epochs", type=int, default=2000, help=f"at most, of {ITERATIONS} iterations each")
    parser.add_argument("--out", type=Path, default=Path("runs/neural_collapse_theory"))
    arguments = parser.parse_args()
    names, sizes, decays = list(FRAMES), [5, 7, 8, 9, 10, 12, 14, 16], [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7]
    if arguments.fast:
        arguments.epochs, names, sizes, decays = 5, names[:2], [8, 9], [1e-3]

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    began = time.perf_counter()
    rows, approach = frames(arguments.epochs, names)
    sweeps = {name: sweep(arguments.epochs, threshold, sizes) for name, threshold in thresholds().items()}
    for name, threshold in thresholds().items():
        rows += threshold_rows(threshold, sweeps[name])
    more, ratios = vanishing_decay(arguments.epochs, decays)
    rows += [*more, *regressions(arguments.epochs), *kept(arguments.epochs)]
    taken = time.perf_counter() - began

    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(rows)
    (arguments.out / "table.md").write_text(text + "\n")
    draw(approach, sweeps, ratios, arguments.out / "theory.png")
    worst = max(row.error for row in rows)
    print(f"{text}\n\nlargest error {worst:.0e}; {taken:.0f} s; all in {arguments.out}")


if __name__ == "__main__":
    main()
