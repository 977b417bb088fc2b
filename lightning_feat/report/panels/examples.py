"""Single examples: those of largest loss, and those that were learned last."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_feat.report.feature_set import FeatureSet, known
from lightning_feat.report.panels.panel import Panel, number

_SHOWN = 24


def hardest_panel(rows: FeatureSet) -> Panel:
    """The samples of largest loss."""
    losses = known(rows.losses, "targets and logits")
    loss = torch.where(losses.isfinite(), losses, torch.inf)
    order = [int(i) for i in loss.argsort(descending=True, stable=True)[:_SHOWN]]
    unit = "cross-entropy in nats" if rows.kind == "classes" else "squared error"
    chance = f"; guessing among {rows.num_classes} classes costs {number(torch.tensor(rows.num_classes).log().item())}"
    text = (
        f"The largest loss is {number(float(loss[order[0]]))}, the median {number(float(losses.median()))}"
        f"{chance if rows.kind == 'classes' else ''}. Look here for wrong labels and samples of another kind."
    )
    return Panel(
        "hardest",
        "Hardest examples",
        f"the {len(order)} samples of largest loss; loss: {unit}.",
        text,
        heads=["sample", "target", "predicted", f"loss ({unit})"],
        rows=[[said_of(rows, i), *truth_and_guess(rows, i), number(float(loss[i]))] for i in order],
        wide=True,
        data={"gallery": [{"row": i, "note": f"loss {number(float(loss[i]))}"} for i in order]},
    )


def latest_panel(rows: FeatureSet, learned: Tensor, times: Sequence[str]) -> Panel | None:
    """The samples that were right for good last.

    Args:
        rows: the set.
        learned: ``(N,)`` place in ``times`` from which on a sample is right; -1 where it is wrong at the end.
        times: when was looked, in order.
    """
    late = [int(i) for i in (learned > 0).nonzero()[:, 0]]
    never = int((learned < 0).sum())
    if len(times) < 2:
        return None
    loss = rows.losses if rows.losses is not None else torch.zeros(len(rows))
    late.sort(key=lambda i: (-int(learned[i]), -float(loss[i]), i))
    text = (
        f"Of {len(rows):,} samples {int((learned == 0).sum()):,} were right from {times[0]} on, {len(late):,} were "
        f"learned later, and {never:,} are wrong at the end."
    )
    shown = late[:_SHOWN]
    return Panel(
        "latest",
        "Latest learned examples",
        f"samples that are right at the end, by when they were right for good, the latest first; looked at: "
        f"{', '.join(times[:12])}{', ...' if len(times) > 12 else ''}.",
        text,
        heads=["sample", "target", "right since"],
        rows=[[said_of(rows, i), truth_and_guess(rows, i)[0], times[int(learned[i])]] for i in shown],
        wide=True,
        data={"gallery": [{"row": i, "note": f"right since {times[int(learned[i])]}"} for i in shown]},
    )


def said_of(rows: FeatureSet, i: int) -> str:
    """What a sample is called."""
    name = f"{rows.names[i]} " if rows.names and rows.names[i] else ""
    token = "" if rows.tokens is None else f", token {int(rows.tokens[i])}"
    return f"{name}#{int(rows.indices[i])}{token}"


def truth_and_guess(rows: FeatureSet, i: int) -> tuple[str, str]:
    """Target and prediction, in words."""
    found = []
    for values in (rows.targets, rows.predicted):
        if values is None:
            found.append("")
        elif rows.kind == "classes":
            found.append(rows.label(int(values[i])))
        else:
            found.append(", ".join(number(float(v)) for v in values[i]))
    return found[0], found[1]
