"""Time of the selection of slow examples, beside scikit-learn's k-means on the same outputs.

    python benchmarks/simplicity.py [--quick]   # --quick leaves out the largest case

One process, threads as found, medians of three rounds taken in turns. Both cut every class in two with ten starts; the
inertias that they reach are printed, as a sum over classes, relative to scikit-learn's.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from lightning_feat.functional.simplicity import two_means

CASES = [(10_000, 10, 10), (50_000, 100, 100), (100_000, 100, 100)]  # examples, classes, outputs


def outputs_of(size: int, num_classes: int, width: int) -> tuple[Tensor, Tensor]:
    """Logits of a network early in training: a class and a part of it that is further along, with noise."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(size) % num_classes
    easy = (torch.rand(size, generator=generator) < 0.7).float()
    outputs = torch.randn(size, width, generator=generator)
    outputs[torch.arange(size), targets % width] += 1 + 4 * easy
    return outputs, targets


def by_scikit_learn(outputs: Tensor, targets: Tensor, num_classes: int) -> float:
    inertia = 0.0
    for label in range(num_classes):
        mine = outputs[targets == label].numpy()
        inertia += float(KMeans(2, n_init=10, random_state=0, max_iter=100, tol=0).fit(mine).inertia_)
    return inertia


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the largest case")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    print(
        "| examples x classes x outputs | ours (s) | scikit-learn (s) | inertia, ours over theirs |\n|---|---|---|---|"
    )
    for case in CASES[:-1] if arguments.quick else CASES:
        outputs, targets = outputs_of(*case)
        ways: dict[str, Callable[[], float]] = {
            "ours": lambda o=outputs, t=targets, c=case[1]: float(two_means(o, t, c).inertia.sum()),  # type: ignore[misc]
            "theirs": lambda o=outputs, t=targets, c=case[1]: by_scikit_learn(o, t, c),  # type: ignore[misc]
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        inertia = {}
        for _ in range(3):
            for name, way in ways.items():
                began = time.perf_counter()
                inertia[name] = way()
                seconds[name].append(time.perf_counter() - began)
        cells = [f"{statistics.median(taken):.2f}" for taken in seconds.values()]
        print(
            f"| {' x '.join(map(str, case))} | " + " | ".join(cells) + f" | {inertia['ours'] / inertia['theirs']:.6f} |"
        )


if __name__ == "__main__":
    main()
