"""What the neural-collapse monitor costs, beside the training step and beside an evaluation of the same network.

    python benchmarks/neural_collapse.py [--quick]   # --quick leaves out the case of 1000 classes

One process, threads as found. Both modes run in a real fit, images of 32 x 32 in memory, batches of 128:

- online: seconds inside the monitor's hooks for one batch, beside the whole training step, medians
- exact: seconds of the monitor's end of an epoch, beside one bare pass of the network in eval mode over the same data,
  and beside three passes written from the definitions (class means, then within-class covariance and NC1 by
  pseudo-inverse, then decisions); all three in turns at the end of each epoch, medians
- memory: of the monitor's sums, without the second moment
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from turns import effort_asked, pick

from lightning_feat.callbacks import NeuralCollapseMonitor
from lightning_feat.metrics import NeuralCollapse

Case = tuple[str, int, int]  # network, classes, images
CASES: list[Case] = [("resnet18", 10, 1280), ("resnet50", 1000, 4000)]
MOMENT: list[Case] = [("test_resnet", 10, 256)]
HOOKS = ("on_train_batch_start", "on_before_backward", "on_train_batch_end")


class Network(LightningModule):
    """A timm network with cross-entropy and SGD."""

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        self.network = timm.create_model(name, num_classes=num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Timed(Callback):
    """Seconds of each training step, of the hooks of ``monitor``, and of evaluations at the end of each epoch."""

    def __init__(self, monitor: NeuralCollapseMonitor, evaluations: dict[str, Callable[..., object]]) -> None:
        self.steps: list[float] = []
        self.hooks: list[float] = []
        self.evaluations = evaluations
        self.taken: dict[str, list[float]] = {name: [] for name in ["monitor", *evaluations]}
        self.began = self.in_hooks = 0.0
        for hook in HOOKS:
            setattr(monitor, hook, self._timed(getattr(monitor, hook)))
        self.report = monitor.on_train_epoch_end
        monitor.on_train_epoch_end = lambda *_: None  # type: ignore[method-assign]  # called below, in turn

    def _timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            began = time.perf_counter()
            hook(*args)
            self.in_hooks += time.perf_counter() - began

        return timed

    def on_train_batch_start(self, *_: Any) -> None:
        now = time.perf_counter()
        if self.began:
            self.steps.append(now - self.began)
            self.hooks.append(self.in_hooks)
        self.began, self.in_hooks = now, 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, evaluate in {"monitor": self.report, **self.evaluations}.items():
            began = time.perf_counter()
            evaluate(trainer, pl_module)
            self.taken[name].append(time.perf_counter() - began)
        self.began = 0.0


@torch.no_grad()
def bare_pass(trainer: Trainer, module: Network) -> None:
    module.eval()
    for images, _ in _in_order(trainer):
        module(images)
    module.train()


@torch.no_grad()
def by_definition(trainer: Trainer, module: Network) -> None:
    """NC1 and NC4 by separate passes over the data."""
    module.eval()
    network: Any = module.network
    num_classes, width = network.num_classes, network.num_features

    def features(images: Tensor) -> Tensor:
        return network.forward_head(network.forward_features(images), pre_logits=True).double()

    means_CD, counts_C = torch.zeros(num_classes, width, dtype=torch.float64), torch.zeros(num_classes)
    for images, targets in _in_order(trainer):
        means_CD.index_add_(0, targets, features(images))
        counts_C += targets.bincount(minlength=num_classes)
    means_CD /= counts_C[:, None]
    within_DD = torch.zeros(width, width, dtype=torch.float64)
    for images, targets in _in_order(trainer):
        centred_ND = features(images) - means_CD[targets]
        within_DD += centred_ND.T @ centred_ND
    between_CD = means_CD - means_CD.mean(0)
    torch.trace(within_DD @ torch.linalg.pinv(between_CD.T @ between_CD / num_classes, hermitian=True))
    differ = 0
    for images, _ in _in_order(trainer):
        nearest_N = torch.cdist(features(images), means_CD).argmin(1)
        differ += int((nearest_N != module(images).argmax(1)).sum())
    module.train()


def _in_order(trainer: Trainer) -> DataLoader[Any]:
    loader: Any = trainer.train_dataloader
    return DataLoader(loader.dataset, loader.batch_size)


def loader_of(case: Case) -> DataLoader[Any]:
    _, num_classes, size = case
    images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(size) % num_classes), batch_size=128, shuffle=True)


def online(case: Case, epochs: int) -> Timed:
    """Steps, and the seconds of each that are the online monitor's."""
    monitor = NeuralCollapseMonitor()
    timed = Timed(monitor, {})
    fit(Network(*case[:2]), monitor, timed, loader_of(case), epochs)
    return timed


def exact(case: Case, epochs: int, evaluations: dict[str, Callable[..., object]]) -> Timed:
    """Seconds of the exact monitor and of other evaluations at the end of each epoch."""
    monitor = NeuralCollapseMonitor(mode="exact")
    timed = Timed(monitor, evaluations)
    fit(Network(*case[:2]), monitor, timed, loader_of(case), epochs)
    return timed


def state_bytes(num_classes: int, num_features: int) -> int:
    """Of the online monitor without the second moment."""
    sums = NeuralCollapse(num_classes, num_features, second_moment=False)
    return sum(getattr(sums, name).nbytes for name in sums._defaults)


def fit(module: Network, monitor: NeuralCollapseMonitor, timed: Timed, loader: DataLoader[Any], epochs: int) -> None:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[monitor, timed],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)


def main() -> None:
    effort = effort_asked(__doc__)
    of_online, of_exact = [], []
    for case in pick(effort, CASES, CASES[:1], MOMENT):
        name, num_classes, size = case
        told = f"{name}, {num_classes} x {Network(name, num_classes).network.num_features}"
        timed = online(case, epochs=pick(effort, 3, 3, 2))
        step, hooks = statistics.median(timed.steps[1:]), statistics.median(timed.hooks[1:])
        of_online.append(f"| {told} | {1e3 * step:.0f} | {1e3 * hooks:.2f} | {hooks / step:.2%} |")

        evaluations: dict[str, Callable[..., object]] = {"bare": bare_pass, "definition": by_definition}
        timed = exact(case, pick(effort, 5 if num_classes < 100 else 3, 5, 1), evaluations)
        ours, bare, definition = (statistics.median(timed.taken[way]) for way in ("monitor", "bare", "definition"))
        of_exact.append(
            f"| {told}, {size} images | {bare:.2f} | {ours:.2f} ({ours / bare:.2f}) | "
            f"{definition:.2f} ({definition / bare:.2f}) |"
        )
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    print("| online | training step (ms) | monitor (ms) | share |\n|---|---|---|---|")
    print("\n".join(of_online))
    print("\n| exact | bare pass (s) | monitor (s) | three passes by definition (s) |\n|---|---|---|---|")
    print("\n".join(of_exact))
    print(f"\nsums of 1000 classes of 2048 features: {state_bytes(1000, 2048) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
