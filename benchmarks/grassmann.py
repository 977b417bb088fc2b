"""Time of one optimizer step on a stack of subspaces, as a multiple of fused SGD on the same numbers.

    python benchmarks/grassmann.py [--quick] [--dtype float64]   # --quick leaves out the largest case and the ResNet-50

One process, threads as found, medians over rounds in which every method takes eight steps in turn (slow ones fewer),
so that whatever else the machine does meets all of them. Every step starts from the gradient that is there: no forward,
no backward.

- ours: ``step()`` of a ``torch.optim.SGD(momentum=0.9, fused=True)`` that ``follow_subspaces`` has hooked; every eighth
  step repairs the basis, so that eight steps are what training pays
- svd: copy of the parameter, the same SGD, one batched thin SVD, of the faster of the two memory orders
- geoopt Grassmann: ``RiemannianSGD(momentum=0.9)`` on ``lightning_feat.manifolds.Grassmann``
- geoopt Stiefel: the same on geoopt's canonical Stiefel manifold, which makes D x D matrices of every class
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import geoopt
import numpy as np
import torch
from torch import Tensor
from turns import add_efforts

from lightning_feat.functional.grassmann import geodesic_, random_basis
from lightning_feat.layers import GrassmannLinear
from lightning_feat.manifolds import Grassmann
from lightning_feat.optim import follow_subspaces

CASES = [(10, 512, 8), (100, 512, 8), (1000, 2048, 8), (1000, 2048, 32)]  # classes, features, subspace_dim
MOMENT = [(4, 64, 4)]
STIEFEL_BYTES = 4 * 2**30  # its D x D matrices: one of them kept, two or three more in flight
GOLDEN = Path(__file__).parents[1] / "tests" / "data" / "grassmann_rsgd.npz"
Step = Callable[[], object]


def svd_geodesic_(moved: Tensor, start: Tensor, rows: bool = False) -> None:
    """What ``geodesic_`` does, by the thin SVD of (C, D, k) or, with ``rows``, of (C, k, D), both contiguous."""
    delta = moved - start
    tangent = delta - (delta @ start.mT) @ start
    if rows:
        v, sigma, ut = torch.linalg.svd(tangent, full_matrices=False)
    else:
        u, sigma, vt = torch.linalg.svd(tangent.mT.contiguous(), full_matrices=False)
        v, ut = vt.mT, u.mT
    moved.copy_((v * sigma.cos()[:, None]) @ (v.mT @ start) + (v * sigma.sin()[:, None]) @ ut)


def check_against_golden(move: Callable[[Tensor, Tensor], object]) -> None:
    """A benchmark of something wrong is worth nothing."""
    golden = np.load(GOLDEN)
    basis = torch.tensor(golden["initial_basis"])
    optimizer = torch.optim.SGD([basis], lr=float(golden["lr"]), momentum=float(golden["momentum"]))
    for gradient in golden["gradients"]:
        basis.grad, start = torch.tensor(gradient), basis.clone()
        optimizer.step()
        move(basis, start)
    error = (basis.mT @ basis - torch.tensor(golden["projectors"][-1])).abs().max().item()
    if error > 1e-10:
        raise SystemExit(f"{move} is off the golden trajectory by {error:.1e}: it is not the method to time.")


def parameter(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> torch.nn.Parameter:
    classes, width, k = shape
    generator = torch.Generator().manual_seed(0)
    basis = torch.nn.Parameter(random_basis(classes, k, width, generator=generator, dtype=dtype).to(device))
    # Rows of length 0.1: with lr 0.1 and momentum 0.9 turns of up to 0.1 rad a step, as in training
    basis.grad = torch.randn(basis.shape, generator=generator, dtype=dtype).to(device) * (0.1 / math.sqrt(width))
    return basis


def fused_sgd(basis: torch.nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD([basis], lr=0.1, momentum=0.9, fused=True)


def our_step(basis: torch.nn.Parameter) -> Step:
    num_classes, k, width = basis.shape
    head = GrassmannLinear(width, num_classes, k, device=basis.device)
    head.basis.data, head.basis.grad = basis.data, basis.grad
    optimizer = fused_sgd(head.basis)
    follow_subspaces(optimizer, head)
    return optimizer.step


def moving_step(basis: torch.nn.Parameter, move: Callable[[Tensor, Tensor], object]) -> Step:
    optimizer, start = fused_sgd(basis), torch.empty_like(basis.detach())

    def step() -> None:
        start.copy_(basis.detach())
        optimizer.step()
        with torch.no_grad():
            move(basis, start)

    return step


def geoopt_step(basis: torch.nn.Parameter, manifold: geoopt.Manifold) -> Step:
    gradient = torch.clone(basis.grad.mT, memory_format=torch.contiguous_format)  # type: ignore[union-attr]
    columns = geoopt.ManifoldParameter(basis.detach().mT.contiguous(), manifold=manifold)
    optimizer = geoopt.optim.RiemannianSGD([columns], lr=0.1, momentum=0.9)

    def step() -> None:
        columns.grad = gradient.clone()  # it edits the gradient in place
        optimizer.step()

    return step


def methods(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> dict[str, Step | None]:
    def new() -> torch.nn.Parameter:
        return parameter(shape, device, dtype)

    svd_rows = moving_step(new(), lambda moved, start: svd_geodesic_(moved, start, rows=True))
    svd_columns = moving_step(new(), svd_geodesic_)
    faster = min((svd_rows, svd_columns), key=lambda step: timings({"": step}, device, rounds=1)[""])
    stiefel_bytes = shape[0] * shape[1] ** 2 * dtype.itemsize
    return {
        "SGD fused": fused_sgd(new()).step,
        "AdamW fused": torch.optim.AdamW([new()], lr=1e-3, fused=True).step,
        "ours": our_step(new()),
        "svd": faster,
        "geoopt Grassmann": geoopt_step(new(), Grassmann()),
        "geoopt Stiefel": geoopt_step(new(), geoopt.Stiefel()) if stiefel_bytes < STIEFEL_BYTES / 4 else None,
    }


def timings(steps: dict[str, Step], device: str, rounds: int = 25, seconds: float = 40.0) -> dict[str, float]:
    """Median seconds of each step, after one round that is not counted; ends early, but not before three rounds."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    began = time.perf_counter()
    for done in range(rounds + 1):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start, count = time.perf_counter(), 0
            while count == 0 or (count < 8 and time.perf_counter() - start < 0.5):
                step()
                count += 1
            if device == "cuda":
                torch.cuda.synchronize()
            taken[name].append((time.perf_counter() - start) / count)
        if done >= min(3, rounds) and time.perf_counter() - began > seconds:
            break
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def slope(shapes: list[tuple[int, int, int]], axis: int, device: str, dtype: torch.dtype) -> float:
    """Exponent of the time of our step in one of classes, features, subspace_dim."""
    steps = {str(shape): our_step(parameter(shape, device, dtype)) for shape in shapes}
    taken = timings(steps, device, rounds=15, seconds=10.0)
    sizes = [shape[axis] for shape in shapes]
    return float(np.polyfit(np.log(sizes), np.log(list(taken.values())), 1)[0])


def share_of_training(device: str, batch_size: int = 16) -> tuple[float, float, float]:
    """Seconds of a ResNet-50 training step with our head, of its optimizer step, and of that with a linear head."""
    import timm

    networks = {}
    for name in ("subspaces", "linear"):
        network = timm.create_model("resnet50", num_classes=1000)
        if name == "subspaces":
            network.fc = GrassmannLinear(2048, 1000, 8)
        network = network.to(device)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True)
        if name == "subspaces":
            follow_subspaces(optimizer, network)
        networks[name] = network, optimizer
    images, targets = torch.randn(batch_size, 3, 224, 224, device=device), torch.arange(batch_size, device=device)

    def backward(name: str) -> None:
        networks[name][1].zero_grad()
        torch.nn.functional.cross_entropy(networks[name][0](images), targets).backward()

    backward("linear")

    def whole() -> None:
        backward("subspaces")
        networks["subspaces"][1].step()

    steps: dict[str, Step] = {"whole": whole}
    steps |= {name: optimizer.step for name, (_, optimizer) in networks.items()}
    taken = timings(steps, device, rounds=5)
    return taken["whole"], taken["subspaces"], taken["linear"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_efforts(parser)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    for move in (geodesic_, svd_geodesic_, lambda moved, start: svd_geodesic_(moved, start, rows=True)):
        check_against_golden(move)

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    print(f"torch {torch.__version__}, {arguments.dtype}, {torch.get_num_threads()} threads; milliseconds a step,")
    print("in brackets as a multiple of fused SGD\n")
    heading: list[str] = []
    for device in devices:
        for shape in MOMENT if arguments.moment else CASES[:-1] if arguments.quick else CASES:
            steps = methods(shape, device, dtype)
            there = {name: step for name, step in steps.items() if step is not None}
            taken = timings(there, device, rounds=1 if arguments.moment else 25)
            if not heading:
                heading = ["device", "C x D x k", *steps]
                print("| " + " | ".join(heading) + " |\n|" + "---|" * len(heading))
            cells = [
                f"{1e3 * taken[name]:.3g} ({taken[name] / taken['SGD fused']:.3g})" if name in taken else "skipped"
                for name in steps
            ]
            print(f"| {device} | {' x '.join(map(str, shape))} | " + " | ".join(cells) + " |", flush=True)
            del steps
    print("\nskipped: the D x D matrices of all classes would not fit into memory\n")
    if arguments.moment:
        return
    print("Exponents of our step (time ~ size^exponent), from four sizes each:\n")
    print(
        "| device | C, 125 to 1000 at 1024 x 8 | D, 512 to 4096 at 250 x 8 | k, 4 to 32 at 100 x 1024 |\n"
        "|---|---|---|---|"
    )
    for device in devices:
        exponents = [
            slope([(c, 1024, 8) for c in (125, 250, 500, 1000)], 0, device, dtype),
            slope([(250, d, 8) for d in (512, 1024, 2048, 4096)], 1, device, dtype),
            slope([(100, 1024, k) for k in (4, 8, 16, 32)], 2, device, dtype),
        ]
        print(f"| {device} | " + " | ".join(f"{exponent:.2f}" for exponent in exponents) + " |", flush=True)
    if arguments.quick:
        return
    print("\nA training step of a ResNet-50 for 1000 classes with 8 dimensions, 16 images of 224 x 224, float32:\n")
    print("| device | whole step | optimizer step | with a linear head | share of the subspaces |")
    print("|---|---|---|---|---|")
    for device in devices:
        whole, ours, linear = share_of_training(device)
        cells = [f"{1e3 * seconds:.3g} ms" for seconds in (whole, ours, linear)]
        print(f"| {device} | " + " | ".join(cells) + f" | {(ours - linear) / whole:.2%} |", flush=True)


if __name__ == "__main__":
    main()
