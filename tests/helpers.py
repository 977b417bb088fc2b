"""Small LightningModules as users write them, and loaders and trainers for them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

try:
    from lightning.pytorch.callbacks import EMAWeightAveraging
except ImportError:  # Lightning 2.5 has none
    EMAWeightAveraging = None

NUM_CLASSES, WIDTH = 3, 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU())
        self.fc = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


class Plain(pl.LightningModule):
    """Knows nothing of the library. ``returns`` is the form of what training_step gives back."""

    def __init__(self, returns: str = "tensor", manual: bool = False, lr: float = 0.1) -> None:
        super().__init__()
        self.net = Net()
        self.returns, self.lr = returns, lr
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = cross_entropy(self(x), y)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        if self.returns == "dict":
            return {"loss": loss, "y": y}
        if self.returns == "none" and batch_idx % 2:
            return None
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", cross_entropy(self(x), y))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Momentum(Plain):
    """SGD with momentum, decay and a schedule."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class BuiltLate:
    """Before a module: it has its layers only when Lightning asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.built, self.net = [self.net], None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.built[0]


class Disturbed(Plain):
    """BatchNorm and dropout: what a careless pass over the data would disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.net.body = nn.Sequential(nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.3))


@dataclass
class Example:
    x: Tensor
    target: Tensor


class DictBatches(Dataset):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.data[index]
        return {"image": x, "label": y}


def points(n: int = 32, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, torch.randint(0, NUM_CLASSES, (n,), generator=generator))


def loader(n: int = 32, batch_size: int = 8, **kwargs: Any) -> DataLoader:
    return DataLoader(points(n), batch_size=batch_size, **kwargs)


def trainer(root: Path, **kwargs: Any) -> pl.Trainer:
    """A quiet trainer on one CPU for one epoch; ``kwargs`` come before."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    short = {"max_epochs": 1, "num_sanity_val_steps": 0, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(default_root_dir=root, **{**quiet, **short, **kwargs})


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
