"""Runs without training."""

from lightning_feat.compare.records import Record


def run(arm, seed, value, metric="val/accuracy", status="finished", **more):
    values = value if isinstance(value, list) else [value]
    curve = [(epoch + 1.0, float(y)) for epoch, y in enumerate(values)]
    return Record(arm, seed, {metric: curve}, {"status": status, **more})


def runs(metric="val/accuracy", **arms):
    """``runs(base=[0.1, 0.2], other=[...])``: seeds are places."""
    return [run(arm, seed, value, metric) for arm, values in arms.items() for seed, value in enumerate(values)]
