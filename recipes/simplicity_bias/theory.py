"""Simplicity bias where it can be computed: a fast and a slow feature, gradient descent, and what upsampling changes.

    python recipes/simplicity_bias/theory.py [--seeds 10] [--fast] [--out runs/simplicity_bias_theory]

Trains ``CubicCNN`` by full-batch gradient descent on ``TwoFeaturePatchesDataModule``, by a loop of its own: there is no
randomness but the data and the first weights, which the seed draws. With the strengths of the paper it follows how
the two features are learned, which examples the clusters of the outputs call slow, and which iteration each rule for
the separating epoch takes. With a stronger slow feature, which can be learned at all, it starts again from the same
weights with the slow examples shown twice, or as many random ones, so that differences are paired.

Prints the tables of README.md; writes table.md and theory.png to --out.

Shapes: N examples, P patches in each, D numbers in a patch, J filters, M patches of noise.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_feat.baselines.cubic_cnn import CubicCNN
from lightning_feat.callbacks.reports.figures import COLOURS
from lightning_feat.data.synthetic.two_feature_patches import (
    FAST_AXIS,
    SLOW_AXIS,
    PatchesPart,
    TwoFeaturePatchesDataModule,
)
from lightning_feat.functional.simplicity_bias.clusters import slow_examples
from lightning_feat.functional.simplicity_bias.epochs import separating_epoch

LEARNED = 0.5  # product of a filter with a feature from which on the feature is learned; it passes in no time


class Setting(NamedTuple):
    """A training."""

    slow_strength: float
    lr: float
    iterations: int
    every: int  # iterations of an epoch: between two records
    marks: tuple[int, int]  # iterations that the tables look at


PAPER = Setting(slow_strength=0.2, lr=0.1, iterations=1000, every=10, marks=(200, 400))
LEARNABLE = Setting(slow_strength=0.5, lr=1.0, iterations=4000, every=10, marks=(500, 1000))


class Task(NamedTuple):
    """What a seed draws."""

    train: PatchesPart
    held_out: PatchesPart
    slow_only: PatchesPart  # examples without the fast feature
    weight: Tensor  # (J, D) at the start


class Found(NamedTuple):
    """Which training examples are called slow, and how well that fits those without the fast feature."""

    slow: Tensor  # (N,) bool
    precision: float
    recall: float


class Run(NamedTuple):
    """A training, one entry for each epoch and one before the first."""

    fast: list[float]  # largest product of a filter with the direction of the feature
    slow: list[float]
    loss: list[float]  # of the training examples, each counted once
    error: list[float]
    held_out: list[float]  # accuracy
    slow_only: list[float]  # accuracy
    selections: list[Found]


def draw_task(seed: int, setting: Setting, num_examples: int) -> Task:
    data = TwoFeaturePatchesDataModule(
        num_train=num_examples,
        num_val=num_examples,
        num_test=num_examples,
        slow_strength=setting.slow_strength,
        test_fast_share=0.0,
        seed=seed,
    )
    data.setup()
    torch.manual_seed(seed)
    return Task(data.train_set, data.val_set, data.test_set, CubicCNN().backbone.weight.detach())


class Content(NamedTuple):
    """Examples taken apart: patches of a feature differ in sign and strength alone, so one product does for all."""

    features: Tensor  # (N, 2) what the patches have along the slow and the fast direction
    noise: Tensor  # (N * (P - 2), D) the other patches

    def answers(self, weight_JD: Tensor) -> Tensor:
        """Products of filters and patches of noise, ``(N * (P - 2), J)``."""
        return self.noise @ weight_JD.T

    def outputs(self, weight_JD: Tensor, answers: Tensor) -> Tensor:
        """The network's f, ``(N,)``."""
        of_features = self.features.pow(3) @ weight_JD[:, [SLOW_AXIS, FAST_AXIS]].pow(3).sum(0)
        return of_features + answers.pow(3).view(len(self.features), -1).sum(1)


def content(part: PatchesPart) -> Content:
    along_NP2 = part.patches[:, :, [SLOW_AXIS, FAST_AXIS]]
    # The patch of a fast feature that is missing is all zeros, and no noise.
    is_noise_NP = (along_NP2 == 0).all(2) & (part.patches != 0).any(2)
    return Content(along_NP2.sum(1), part.patches[is_noise_NP])


@torch.no_grad()
def descend(task: Task, setting: Setting, counts: Tensor | None = None, select: bool = False, rho: float = 0.0) -> Run:
    """Gradient descent on the logistic loss, with each example counted as often as ``counts`` ``(N,)`` say.

    By SAM, with perturbations of length ``rho``, where that is not zero.
    """
    weight_JD = task.weight.clone()
    parts = train, *_ = [content(part) for part in (task.train, task.held_out, task.slow_only)]
    sign_N = 2.0 * task.train.targets - 1
    weighted_N = torch.ones_like(sign_N) if counts is None else counts.float()
    share_N = weighted_N / weighted_N.sum()
    run = Run([], [], [], [], [], [], [])
    for iteration in range(setting.iterations + 1):
        gradient_JD, margin_N = _gradient(train, weight_JD, sign_N, share_N)
        if iteration % setting.every == 0:
            _record(run, task, parts, weight_JD, margin_N, select)
        if rho:
            worst_JD = weight_JD + rho * gradient_JD / gradient_JD.norm()
            gradient_JD, _ = _gradient(train, worst_JD, sign_N, share_N)
        weight_JD -= setting.lr * gradient_JD
    return run


def _gradient(train: Content, weight_JD: Tensor, sign_N: Tensor, share_N: Tensor) -> tuple[Tensor, Tensor]:
    """Of the loss, each example counted by its share; and the margins ``(N,)``."""
    answer_MJ = train.answers(weight_JD)
    margin_N = sign_N * train.outputs(weight_JD, answer_MJ)
    slope_N = -sign_N * (-margin_N).sigmoid() * share_N
    slope_M1 = slope_N.repeat_interleave(len(train.noise) // len(sign_N))[:, None]
    gradient_JD = 3 * (answer_MJ.square() * slope_M1).T @ train.noise
    gradient_JD[:, [SLOW_AXIS, FAST_AXIS]] += (
        3 * weight_JD[:, [SLOW_AXIS, FAST_AXIS]].square() * (slope_N @ train.features.pow(3))
    )
    return gradient_JD, margin_N


def _record(run: Run, task: Task, parts: Sequence[Content], weight_JD: Tensor, margin_N: Tensor, select: bool) -> None:
    run.fast.append(float(weight_JD[:, FAST_AXIS].max()))
    run.slow.append(float(weight_JD[:, SLOW_AXIS].max()))
    run.loss.append(float(softplus(-margin_N).mean()))
    run.error.append(float((margin_N <= 0).double().mean()))
    run.held_out.append(accuracy(parts[1], task.held_out.targets, weight_JD))
    run.slow_only.append(accuracy(parts[2], task.slow_only.targets, weight_JD))
    if select:
        run.selections.append(selection(task.train, margin_N))


def accuracy(examples: Content, targets: Tensor, weight_JD: Tensor) -> float:
    output_N = examples.outputs(weight_JD, examples.answers(weight_JD))
    return float(((output_N > 0) == (targets == 1)).double().mean())


def selection(part: PatchesPart, margin_N: Tensor) -> Found:
    """Two clusters of the logits of each class, as ``SimplicityBiasUpsampler`` makes them."""
    output_N = (2.0 * part.targets - 1) * margin_N
    logits_NC = torch.stack([-output_N / 2, output_N / 2], dim=1)
    slow_N = slow_examples(logits_NC, softplus(-margin_N), part.targets, num_classes=2).slow
    right = int((slow_N & ~part.has_fast).sum())
    return Found(slow_N, right / max(int(slow_N.sum()), 1), right / max(int((~part.has_fast).sum()), 1))


def first_slow_drop(values: Sequence[float], max_epochs: int, bounded: bool) -> int | None:
    """A plain reading of the paper: the first epoch whose drop is below a quarter of the largest so far.

    ``bounded`` keeps it between 3 and 10 % of the epochs.
    """
    first, last = (round(0.03 * max_epochs), round(0.1 * max_epochs)) if bounded else (1, max_epochs)
    drops = [before - after for before, after in pairwise(values)]
    for epoch in range(max(first, 2), max(last, 2) + 1):
        so_far = drops[: epoch - 1]
        if so_far[-1] < 0.25 * max(so_far):
            return epoch
    return last if bounded else None


class Rule(NamedTuple):
    """A way to choose the epoch, from one value for each and the number planned; it does not see the start."""

    title: str
    reads: str  # "error" or "loss"
    of: Callable[[Sequence[float], int], int | None]


RULES = [
    Rule(title, reads, of)
    for reads in ("error", "loss")
    for title, of in (
        ("first slow drop, 3 to 10 %", partial(first_slow_drop, bounded=True)),
        ("first slow drop", partial(first_slow_drop, bounded=False)),
        ("`separating_epoch`", separating_epoch),
    )
]
BOUNDED, KNEE_OF_ERROR, KNEE_OF_LOSS = RULES[0], RULES[2], RULES[5]


def chosen(run: Run, setting: Setting, rule: Rule) -> int | None:
    """The epoch that a rule takes."""
    values = run.loss if rule.reads == "loss" else run.error
    return rule.of(values[1:], setting.iterations // setting.every)


def learned(products: Sequence[float], setting: Setting) -> float:
    """The iteration at which a feature is learned; infinite if it is not."""
    epochs = (epoch for epoch, product in enumerate(products) if product > LEARNED)
    return setting.every * next(epochs, math.inf)


def predicted(task: Task, setting: Setting, factor: int) -> tuple[float, float]:
    """When the fast and the slow feature should be learned, by the growth that ``two_feature_patches`` states.

    The slow one grows with the gradient of all examples until the fast one is learned, then with that of the examples
    without it.
    """
    with_fast = float(task.train.has_fast.double().mean())
    without = factor * (1 - with_fast)
    shares = with_fast / (with_fast + without), without / (with_fast + without)
    start = {axis: float(task.weight[:, axis].max()) for axis in (FAST_AXIS, SLOW_AXIS)}
    fast = (1 / start[FAST_AXIS] - 1 / LEARNED) / (1.5 * setting.lr * shares[0])  # of strength 1
    slow_rate = 1.5 * setting.lr * setting.slow_strength**3
    left = 1 / start[SLOW_AXIS] - 1 / LEARNED - slow_rate * fast
    return fast, fast + left / (slow_rate * shares[1])


class Paper(NamedTuple):
    """A seed with the strengths of the paper."""

    plain: Run
    doubled: Run  # with the examples without fast feature shown twice


class Learnable(NamedTuple):
    """A seed with the stronger slow feature, by what is shown twice."""

    plain: Run
    slow: Run  # the cluster of higher loss
    random: Run  # as many examples drawn at random
    found: Found
    epoch: int
    times: dict[str, tuple[float, float]]  # iterations predicted for the fast and the slow feature


def train_paper(seed: int, setting: Setting, num_examples: int) -> Paper:
    task = draw_task(seed, setting, num_examples)
    return Paper(descend(task, setting, select=True), descend(task, setting, 2 - task.train.has_fast.long()))


def train_learnable(seed: int, setting: Setting, num_examples: int) -> Learnable:
    task = draw_task(seed, setting, num_examples)
    plain = descend(task, setting)
    epoch = chosen(plain, setting, KNEE_OF_LOSS) or setting.iterations // setting.every
    # A training that separates begins as the plain one does, so this is that one, up to the epoch.
    found = descend(task, setting._replace(iterations=setting.every * epoch), select=True).selections[-1]
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    random = torch.zeros_like(found.slow)
    random[order[: int(found.slow.sum())]] = True
    slow, other = (descend(task, setting, 1 + mask.long()) for mask in (found.slow, random))
    times = {"plain": predicted(task, setting, 1), "slow": predicted(task, setting, 2)}
    return Learnable(plain, slow, other, found, epoch, times)


RHOS = (0.0, 0.003, 0.01, 0.03)  # lengths of SAM's perturbation, over a norm of the weights of 0.45 at the start
BOTH = (0.0, 0.01)  # those that are also run with upsampling, where the slow feature can be learned


class Sharp(NamedTuple):
    """A seed under SAM: training runs by the length of the perturbation, and by whether examples are shown twice."""

    paper: dict[float, Run]
    learnable: dict[tuple[float, bool], Run]  # twice: those without the fast feature


def train_sharp(seed: int, settings: tuple[Setting, Setting], num_examples: int) -> Sharp:
    task = draw_task(seed, settings[0], num_examples)
    paper = {rho: descend(task, settings[0], rho=rho) for rho in RHOS}
    task = draw_task(seed, settings[1], num_examples)
    counts = {False: None, True: 2 - task.train.has_fast.long()}
    learnable = {(rho, twice): descend(task, settings[1], counts[twice], rho=rho) for rho in BOTH for twice in counts}
    return Sharp(paper, learnable)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval that Student's t gives it; nan for a single value."""
    from scipy.stats import t  # type: ignore[import-untyped]  # comes with scikit-learn

    sample, count = torch.tensor(values, dtype=torch.float64), len(values)
    spread = float(sample.std()) / math.sqrt(count) if count > 1 else math.nan
    return float(sample.mean()), float(t.ppf(0.975, max(count - 1, 1))) * spread


def spreads(rows: Sequence[Sequence[float]], digits: Sequence[int]) -> list[str]:
    """Mean and deviation over seeds of each column."""
    values = torch.tensor(rows, dtype=torch.float64)
    deviations = values.std(0).tolist() if len(rows) > 1 else [math.nan] * len(digits)
    columns = zip(values.mean(0).tolist(), deviations, digits, strict=True)
    return [f"{mean:.{places}f} ± {deviation:.{places}f}" for mean, deviation, places in columns]


def interval(values: Sequence[float], digits: int) -> str:
    """Mean difference and its 95 % interval."""
    mean, half = mean_and_half_width(values)
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"


def paper_tables(runs: Sequence[Paper], setting: Setting) -> str:
    early, late = (mark // setting.every for mark in setting.marks)
    head = f"fast at {setting.marks[0]} | fast at {setting.marks[1]} | slow at {setting.marks[1]} | fast learned at"
    lines = [
        f"| seed | {head} | shown twice: fast at {setting.marks[1]} | precision (%) | recall (%) | held out (%) | "
        "slow only (%) |",
        "|" + "---|" * 10,
    ]
    rows = []
    for plain, doubled in runs:
        products = (plain.fast[early], plain.fast[late], plain.slow[late], learned(plain.fast, setting))
        found = plain.selections[late]
        shares = (found.precision, found.recall, plain.held_out[late], plain.slow_only[late])
        rows.append([*products, doubled.fast[late], *(100 * share for share in shares)])
    digits = (3, 2, 4, 0, 2, 1, 1, 1, 1)
    for seed, row in enumerate(rows):
        lines.append(f"| {seed} | {' | '.join(f'{v:.{places}f}' for v, places in zip(row, digits, strict=True))} |")
    lines += [f"| all | {' | '.join(spreads(rows, digits))} |", ""]

    lines += ["| rule | reads | iteration | precision (%) | recall (%) | seeds with both at 95 % or more |"]
    lines += ["|" + "---|" * 6]
    for rule in RULES:
        epochs = [chosen(run.plain, setting, rule) for run in runs]
        both = [(run.plain.selections[epoch], epoch) for run, epoch in zip(runs, epochs, strict=True) if epoch]
        cells = ["none", "", ""]
        if both:
            where = f"{setting.every * min(epoch for _, epoch in both)} to {setting.every * max(e for _, e in both)}"
            none = f", none for {len(runs) - len(both)}" if len(both) < len(runs) else ""
            percent = [[100 * found.precision, 100 * found.recall] for found, _ in both]
            cells = [where + none, *spreads(percent, (0, 0))]
        good = sum(min(found.precision, found.recall) >= 0.95 for found, _ in both)
        lines.append(f"| {rule.title} | {rule.reads} | {' | '.join(cells)} | {good} of {len(runs)} |")
    return "\n".join(lines)


def learnable_table(runs: Sequence[Learnable], setting: Setting) -> str:
    marks = [mark // setting.every for mark in setting.marks]
    kinds = {"plain": "as drawn", "slow": "slow cluster shown twice", "random": "as many random ones shown twice"}
    titles = [f"log10(slow / fast) at {mark}" for mark in setting.marks]
    titles += [f"slow only at {mark} (%)" for mark in setting.marks]
    titles += ["fast learned at", "slow learned at"]
    digits = (2, 2, 1, 1, 0, 0)

    def measures(run: Run) -> list[float]:
        ratios = [math.log10(run.slow[mark] / run.fast[mark]) for mark in marks]
        right = [100 * run.slow_only[mark] for mark in marks]
        return [*ratios, *right, learned(run.fast, setting), learned(run.slow, setting)]

    values = {kind: [measures(getattr(run, kind)) for run in runs] for kind in kinds}
    lines = [f"| training examples | {' | '.join(titles)} |", "|" + "---|" * (1 + len(titles))]
    for kind, name in kinds.items():
        lines.append(f"| {name} | {' | '.join(spreads(values[kind], digits))} |")
        if kind in runs[0].times:
            times = spreads([run.times[kind] for run in runs], (0, 0))
            lines.append(f"| {name}, predicted | | | | | {' | '.join(times)} |")
    for kind in ("slow", "random"):
        pairs = zip(values[kind], values["plain"], strict=True)
        gains = [[after - before for after, before in zip(*pair, strict=True)] for pair in pairs]
        cells = [interval(gain, places) for gain, places in zip(zip(*gains, strict=True), digits, strict=True)]
        lines.append(f"| {kinds[kind]}, minus as drawn | {' | '.join(cells)} |")
    epochs = [setting.every * run.epoch for run in runs]
    precision, recall = (min(getattr(run.found, name) for run in runs) for name in ("precision", "recall"))
    where = f"Clusters after {min(epochs)} to {max(epochs)} iterations"
    text = f"{where}: precision at least {100 * precision:.1f} %, recall at least {100 * recall:.1f} %."
    return "\n".join([*lines, "", text])


def sharp_tables(runs: Sequence[Sharp], settings: tuple[Setting, Setting]) -> str:
    """When the features are learned, and how far the slow one is at one iteration; medians where some never are."""
    lines = [
        f"| perturbation | fast learned at, median | seeds | fast at {settings[0].marks[0]} | slow over fast there |"
    ]
    lines += ["|" + "---|" * 5]
    mark = settings[0].marks[0] // settings[0].every
    for rho in RHOS:
        taken = [run.paper[rho] for run in runs]
        times = [learned(run.fast, settings[0]) for run in taken]
        where = torch.tensor(times, dtype=torch.float64).median()
        cells = spreads([[run.fast[mark], run.slow[mark] / run.fast[mark]] for run in taken], (3, 3))
        reached = sum(math.isfinite(time) for time in times)
        when = "never" if where.isinf() else f"{where:.0f}"
        lines.append(f"| {rho:g} | {when} | {reached} of {len(runs)} | {' | '.join(cells)} |")
    columns = ["fast learned at", "slow learned at", "slow only, mean over the run (%)"]
    lines += ["", f"| perturbation | shown twice | {' | '.join(columns)} |", "|" + "---|" * 5]

    def measures(run: Run) -> list[float]:
        times = [learned(values, settings[1]) for values in (run.fast, run.slow)]
        return [*times, 100 * sum(run.slow_only) / len(run.slow_only)]

    values = {key: [measures(run.learnable[key]) for run in runs] for key in runs[0].learnable}
    for (rho, twice), rows in values.items():
        shown = "without fast feature" if twice else "none"
        cells = [_or_never(*column) for column in zip(zip(*rows, strict=True), spreads(rows, (0, 0, 1)), strict=True)]
        lines.append(f"| {rho:g} | {shown} | {' | '.join(cells)} |")
    for (rho, twice), rows in values.items():
        if (rho, twice) != (0.0, False):
            gains = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(rows, values[0.0, False], strict=True)]
            columns = zip(zip(*gains, strict=True), (0, 0, 1), strict=True)
            cells = [interval(gain, places) if all(map(math.isfinite, gain)) else "" for gain, places in columns]
            shown = "without fast feature" if twice else "none"
            lines.append(f"| {rho:g}, minus the first line | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _or_never(values: Sequence[float], spread: str) -> str:
    """The spread, or where some runs end before a feature is learned their number, and the median of all."""
    never = sum(math.isinf(value) for value in values)
    median = float(torch.tensor(values, dtype=torch.float64).median())
    return spread if not never else f"median {median:.0f}, not in {never} of {len(values)} runs"


def draw(paper: Sequence[Paper], learnable: Sequence[Learnable], settings: tuple[Setting, Setting], path: Path) -> None:
    """Above, the strengths of the paper: features, one seed, and rules. Below, the slow feature, upsampled and not."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    grid: Any = figure.subplots(2, 3)
    _draw_features(grid[0, 0], [run.plain for run in paper], settings[0])
    _draw_first_seed(grid[0, 1], paper[0].plain, settings[0])
    _draw_rules(grid[0, 2], paper, settings[0])
    _draw_upsampled(grid[1], learnable, settings[1])
    names = ["a   strengths of the paper, 0.2 and 1", "b", "c", "d   slow feature of strength 0.5", "e", "f"]
    for axes, name in zip(grid.flat, names, strict=True):
        axes.set_title(name, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_fontsize(9)
        axes.yaxis.label.set_fontsize(9)
    figure.savefig(path, dpi=160)


def _iterations(values: Sequence[float], setting: Setting) -> list[int]:
    return [setting.every * epoch for epoch in range(len(values))]


def _draw_features(axes: Any, runs: Sequence[Run], setting: Setting) -> None:
    for colour, name in ((COLOURS[1], "fast"), (COLOURS[0], "slow")):
        for number, run in enumerate(runs):
            values = getattr(run, name)
            label = f"{name} feature" if number == 0 else None
            axes.plot(_iterations(values, setting), values, color=colour, linewidth=0.9, alpha=0.8, label=label)
    axes.set(yscale="log", xlabel="iteration, all seeds", ylabel="largest product with a filter")
    axes.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.4))


def _draw_first_seed(axes: Any, run: Run, setting: Setting) -> None:
    precision = [found.precision for found in run.selections]
    curves = {
        "training error": (run.error, COLOURS[0], "-"),
        "training loss": (run.loss, COLOURS[2], "-"),
        "precision of clusters": (precision, COLOURS[6], "--"),
    }
    for label, (values, colour, dashes) in curves.items():
        axes.plot(_iterations(values, setting), values, dashes, color=colour, linewidth=1.3, label=label)
    for rule, values, colour in ((KNEE_OF_ERROR, run.error, COLOURS[0]), (KNEE_OF_LOSS, run.loss, COLOURS[2])):
        epoch = chosen(run, setting, rule)
        if epoch is not None:
            axes.plot(setting.every * epoch, values[epoch], "o", color=colour, markersize=6)
    axes.set(xlabel="iteration, first seed (● knee)", xlim=(0, 0.6 * setting.iterations), ylim=(-0.02, 1.05))
    axes.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.55))


def _draw_rules(axes: Any, runs: Sequence[Paper], setting: Setting) -> None:
    shown = {
        BOUNDED: ("first slow drop of error, 3 to 10 %", COLOURS[3], "s"),
        KNEE_OF_ERROR: ("knee of error", COLOURS[0], "^"),
        KNEE_OF_LOSS: ("knee of loss", COLOURS[2], "o"),
    }
    for rule, (label, colour, mark) in shown.items():
        epochs = [(run, epoch) for run in runs if (epoch := chosen(run.plain, setting, rule)) is not None]
        precision = [100 * run.plain.selections[epoch].precision for run, epoch in epochs]
        where = [setting.every * epoch for _, epoch in epochs]
        axes.plot(where, precision, mark, color=colour, markersize=5, alpha=0.8, label=label)
    axes.axhline(95, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="iteration that the rule takes", ylabel="precision of its clusters (%)", ylim=(0, 104))
    axes.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.68))


def _draw_upsampled(row: Any, runs: Sequence[Learnable], setting: Setting) -> None:
    kinds = {
        "plain": ("as drawn", COLOURS[6]),
        "slow": ("slow cluster twice", COLOURS[2]),
        "random": ("random ones twice", COLOURS[4]),
    }
    for kind, (label, colour) in kinds.items():
        taken = [getattr(run, kind) for run in runs]
        dashes = ":" if kind == "random" else "-"
        values = torch.tensor([run.slow_only for run in taken], dtype=torch.float64)
        quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        low, middle, high = (100 * values.quantile(quarters, dim=0)).tolist()
        where = _iterations(middle, setting)
        row[1].plot(where, middle, dashes, color=colour, linewidth=1.4, label=label)
        if kind == "random":
            continue
        row[1].fill_between(where, low, high, color=colour, alpha=0.2, linewidth=0)
        for number, run in enumerate(taken):
            ratio = [slow / fast for slow, fast in zip(run.slow, run.fast, strict=True)]
            row[0].plot(where, ratio, color=colour, linewidth=0.9, alpha=0.8, label=None if number else label)
    row[0].set(yscale="log", xlabel="iteration, all seeds", ylabel="slow over fast feature", ylim=(2e-3, 4))
    row[1].set(xlabel="iteration", ylabel="accuracy, slow feature only (%)", xlim=(0, setting.iterations / 2))
    row[0].legend(frameon=False, fontsize=8, loc="lower right")
    row[1].legend(frameon=False, fontsize=8, loc="lower right")
    for kind, mark in (("plain", "o"), ("slow", "s")):
        reached = [learned(getattr(run, kind).slow, setting) for run in runs]
        expected = [run.times[kind][1] for run in runs]
        row[2].plot(expected, reached, mark, color=kinds[kind][1], markersize=5, alpha=0.8, label=kinds[kind][0])
    ends = [run.times["plain"][1] for run in runs] + [run.times["slow"][1] for run in runs]
    row[2].plot([0, max(ends)], [0, max(ends)], color="0.6", linewidth=0.8, linestyle=":")
    row[2].set(xlabel="iteration predicted", ylabel="slow feature learned at")
    row[2].legend(frameon=False, fontsize=8, loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="draws of data and first weights")
    parser.add_argument("--fast", "--quick", action="store_true", help="two seeds, few iterations: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/simplicity_bias_theory"))
    parser.add_argument("--sam-only", action="store_true", help="only the tables of SAM")
    arguments = parser.parse_args()
    settings, num_examples = (PAPER, LEARNABLE), 2000
    if arguments.fast:
        arguments.seeds, num_examples = 2, 500
        settings = PAPER._replace(iterations=500), LEARNABLE._replace(iterations=400, marks=(100, 200))

    torch.set_num_threads(1)
    began = time.perf_counter()
    seeds, parts = range(arguments.seeds), list[str]()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.sam_only:
        paper = [train_paper(seed, settings[0], num_examples) for seed in seeds]
        learnable = [train_learnable(seed, settings[1], num_examples) for seed in seeds]
        parts += [paper_tables(paper, settings[0]), learnable_table(learnable, settings[1])]
        draw(paper, learnable, settings, arguments.out / "theory.png")
    parts.append(sharp_tables([train_sharp(seed, settings, num_examples) for seed in seeds], settings))
    taken = time.perf_counter() - began
    text = "\n\n".join(parts)
    (arguments.out / "table.md").write_text(text + "\n")
    print(f"{text}\n\n{taken:.0f} s; all in {arguments.out}")


if __name__ == "__main__":
    main()
