"""The bars of the single methods: what each promised to cost at most, and what it costs here.

    python benchmarks/bars.py [--quick]   # the bars are for the full sizes; a quick run shows smaller ones, without

The measurements are those of ``grassmann.py``, ``neural_collapse.py``, ``simplicity.py`` and ``prompts.py``, which tell
more.
"""

import math
from functools import partial

import classes
import grassmann
import neural_collapse
import simplicity
import torch
from fits import quietly
from prompts import BAR as GRAM_BAR
from prompts import gram_shares
from sklearn.linear_model import LogisticRegression
from turns import Effort, Row, Step, effort_asked, in_turns, pick, ratios, spread_of, table, timed

from lightning_feat.baselines import MLPClassifier
from lightning_feat.functional.transfer.probe import PENALTIES, linear_probe

STEP, STEP_AIM, SVD = 6.0, 3.0, 8.0  # times fused SGD, and times as fast as the step by SVD
ONLINE, EXACT, STATE_MB = 0.02, 1.15, 60.0
SELECTION = 1.0  # epochs
PROBE = 1.0


def grassmann_rows(effort: Effort, device: str) -> list[Row]:
    """Eight steps are a turn: every eighth repairs the basis. Of the SVD the faster of two memory orders, two steps."""
    shape = pick(effort, (1000, 2048, 8), (100, 512, 8), (4, 64, 4))

    def new() -> torch.nn.Parameter:
        return grassmann.parameter(shape, device, torch.float32)

    svd = [grassmann.moving_step(new(), partial(grassmann.svd_geodesic_, rows=rows)) for rows in (True, False)]
    steps: dict[str, Step] = {"sgd": grassmann.fused_sgd(new()).step, "ours": grassmann.our_step(new())}
    ways = {name: timed(step, device, count=8) for name, step in steps.items()}
    ways["svd"] = min((timed(step, device, count=2) for step in svd), key=lambda way: (way(), way())[1])
    for way in ways.values():
        way()
    taken = in_turns(ways, seconds=35, effort=effort)
    size = " x ".join(map(str, shape))
    step, speed = ratios(taken["ours"], taken["sgd"]), ratios(taken["svd"], taken["ours"])
    return [
        Row(
            f"SGD and our step, {size}",
            "fused SGD",
            step,
            bar=f"<= {STEP:g}, aim {STEP_AIM:g}",
            holds=step.middle <= STEP,
        ),
        Row(f"step by SVD, {size}", "SGD and our step", speed, bar=f">= {SVD:g}", holds=speed.middle >= SVD),
    ]


def collapse_rows(effort: Effort) -> list[Row]:
    case = pick(effort, neural_collapse.CASES[0], ("test_resnet", 10, 512), neural_collapse.MOMENT[0])
    with quietly():
        online = neural_collapse.online(case, epochs=pick(effort, 4, 2, 2))
        exact = neural_collapse.exact(case, pick(effort, 6, 2, 1), {"bare": neural_collapse.bare_pass})
    share = ratios(online.hooks[1:], online.steps[1:])
    over = ratios(exact.taken["monitor"], exact.taken["bare"])
    state = neural_collapse.state_bytes(1000, 2048) / 1e6
    return [
        Row(
            "NeuralCollapseMonitor (online), its hooks",
            f"{case[0]} step",
            share,
            bar=f"<= {ONLINE:g}",
            holds=share.middle <= ONLINE,
        ),
        Row(
            "NeuralCollapseMonitor (exact), its pass",
            f"{case[0]} bare pass",
            over,
            bar=f"<= {EXACT:g}",
            holds=over.middle <= EXACT,
        ),
        Row(
            "sums of 1000 classes x 2048",
            f"{STATE_MB:g} MB",
            memory=spread_of([state / STATE_MB]),
            bar="<= 1",
            holds=state <= STATE_MB,
        ),
        *classes.rows(effort),
    ]


def selection_row(effort: Effort) -> Row:
    size = pick(effort, 20_000, 2_000, 400)
    with quietly():
        rounds = simplicity.selection_rounds(
            lambda: MLPClassifier(64, 10), torch.randn(size, 64), 10, pick(effort, 5, 1, 1)
        )
    ratio = spread_of([ratio for _, _, ratio in rounds])
    return Row(
        f"selection of slow examples, {size:,} x 64",
        "MLP 128-64 epoch",
        ratio,
        bar=f"< {SELECTION:g}",
        holds=ratio.middle < SELECTION,
    )


def probe_row(effort: Effort) -> Row:
    """All penalties: ours to the minimum, scikit-learn's at the tolerance that it has by default."""
    size, width = pick(effort, (5000, 512), (1000, 64), (100, 8))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(size, width, generator=generator)  # classes overlap, as those of real features do
    teacher = torch.randn(width, 10, generator=generator)
    noise = math.sqrt(width) * torch.randn(size, 10, generator=generator)
    targets = (features @ teacher + noise).argmax(1)
    standard = ((features - features.mean(0)) / features.std(0)).double().numpy()

    def theirs() -> None:
        for penalty in PENALTIES:
            LogisticRegression(C=1 / (penalty * size), max_iter=1000).fit(standard, targets.numpy())

    part = features, targets
    ways = {"ours": timed(lambda: linear_probe(*part, *part, *part), count=1), "theirs": timed(theirs, count=1)}
    for way in ways.values():
        way()
    taken = in_turns(ways, seconds=20, effort=effort)
    ratio = ratios(taken["ours"], taken["theirs"])
    return Row(
        f"linear probe, {len(PENALTIES)} penalties, {size:,} x {width} x 10",
        "scikit-learn's L-BFGS",
        ratio,
        bar=f"<= {PROBE:g}",
        holds=ratio.middle <= PROBE,
    )


def gram_row(effort: Effort, device: str) -> Row:
    name, taken = gram_shares(effort, device)
    share = ratios(taken["term"], taken["step"])
    return Row(
        "Gram term of prompts, alone", f"{name} step", share, bar=f"<= {GRAM_BAR:g}", holds=share.middle <= GRAM_BAR
    )


def measure(effort: Effort, device: str) -> list[Row]:
    """On a GPU those that have a device of their own; the others stay on the CPU and are left out there."""
    rows = grassmann_rows(effort, device)
    if device == "cpu":
        rows += [*collapse_rows(effort), selection_row(effort), probe_row(effort)]
    rows.append(gram_row(effort, device))
    return rows if effort == "full" else [row._replace(bar="", holds=True) for row in rows]


def main() -> None:
    rows = measure(effort_asked(__doc__), "cpu")
    cells = ((row.what, row.beside, row.time or row.memory, row.bar, "yes" if row.holds else "no") for row in rows)
    print(table(("what", "beside", "ratio", "bar", "holds"), cells))


if __name__ == "__main__":
    main()
