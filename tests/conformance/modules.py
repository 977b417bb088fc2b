"""What users write: one LightningModule with many habits, and the same module with the method of a callback written in
by its author. A cell of the matrix holds one against the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, mse_loss, normalize
from torch.utils.checkpoint import checkpoint

from lightning_feat.baselines.clip import SmallClip
from lightning_feat.mixins import CallbacksMixin, LossTermsMixin
from tests.joints.clip import models as clip_models

NUM_CLASSES, WIDTH = 3, 8


@dataclass(frozen=True)
class Habits:
    """How a user writes his module, and what his data look like."""

    task: Literal["classes", "regression", "clip"] = "classes"
    batch: Literal["tuple", "list", "dict", "dataclass", "two inputs"] = "tuple"
    soft: bool = False
    returns: Literal["tensor", "dict", "none"] = "tensor"
    optimization: Literal["automatic", "manual", "bare", "mixin"] = "automatic"
    optimizer: Literal["sgd", "sam", "two"] = "sgd"
    checkpointing: bool = False
    compiled: Literal["", "module", "network"] = ""
    dropout: float = 0.2
    sharded: bool = False
    forward: bool = True

    def but(self, **changes: Any) -> "Habits":
        return replace(self, **changes)


class Net(nn.Module):
    """BatchNorm and dropout are there to notice a callback that leaves a trace in statistics or random numbers."""

    def __init__(self, habits: Habits) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(habits.dropout), nn.Linear(WIDTH, WIDTH)
        )
        self.fc = nn.Linear(WIDTH, 2 if habits.task == "regression" else NUM_CLASSES)
        self.checkpointing = habits.checkpointing

    def forward(self, x: Tensor, with_features: bool = False) -> Any:
        again = self.checkpointing and self.training
        features = checkpoint(self.body, x, use_reentrant=False) if again else self.body(x)
        logits = self.fc(features)
        return (logits, features) if with_features else logits


class ClipNet(nn.Module):
    """A frozen CLIP between trained layers: points become images of three by four by four pixels, and classes have
    texts. ``prompts``: those of an author, put into the blocks by hand.
    """

    texts: Tensor

    def __init__(self, habits: Habits) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 48), nn.BatchNorm1d(48), nn.Dropout(habits.dropout), nn.Unflatten(1, (3, 4, 4))
        )
        towers = dict.fromkeys(("vision_width", "text_width"), WIDTH) | dict.fromkeys(("vision_heads", "text_heads"), 2)
        layers = dict.fromkeys(("vision_layers", "text_layers"), 3)
        vocabulary = clip_models.EOS + 1
        self.clip = SmallClip(vocabulary, clip_models.LENGTH, 4, 2, embed_dim=WIDTH, **towers, **layers)
        self.clip.requires_grad_(False)
        self.clip.set_grad_checkpointing(habits.checkpointing)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("texts", clip_models.texts(NUM_CLASSES))

    def forward(self, x: Tensor, with_features: bool = False, prompts: Any = None) -> Any:
        images = self.body(x)
        if prompts is None:
            features, classes = clip_models.features(self.clip, images, self.texts)
        else:
            put_in = clip_models.lists(prompts)
            features, classes = clip_models.features_by_hand(self.clip, images, self.texts, **put_in)
        logits = self.clip.logit_scale.exp() * normalize(self.fc(features), dim=-1) @ normalize(classes, dim=-1).T
        return (logits, features) if with_features else logits


class SAM(torch.optim.SGD):
    """Runs the closure twice: at the weights, and at the worst point near them."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        closure = torch.enable_grad()(closure)
        loss = closure()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        length = torch.stack([p.grad.norm() for p in moved]).norm()
        before = [p.clone() for p in moved]
        for p in moved:
            p.add_(p.grad, alpha=0.05 / float(length))
        closure()
        for p, old in zip(moved, before, strict=True):
            p.copy_(old)
        super().step()
        return loss


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter that FSDP2 may have sharded."""
    data: Any = tensor.detach()
    return data.full_tensor() if isinstance(data, DTensor) else data


class UserCode:
    """Knows nothing of the library. A LightningModule once ``User`` gives it that base."""

    def __init__(self, habits: Habits = Habits()) -> None:  # frozen
        super().__init__()
        self.habits = habits
        self.net = ClipNet(habits) if habits.task == "clip" else Net(habits)
        if habits.compiled == "network":
            self.net = torch.compile(self.net, backend="eager")
        self.automatic_optimization = habits.optimization == "automatic"

    @property
    def network(self) -> Any:
        """The network, without the wrapper of ``torch.compile``."""
        return getattr(self.net, "_orig_mod", self.net)

    def forward(self, batch: Any, scale: Tensor | None = None) -> Tensor:
        """Of inputs, or of a batch that is no tuple: as others are called with keywords of a dict."""
        if scale is not None:
            batch = batch * scale
        return self.run(batch if isinstance(batch, Tensor) else self.unpack(batch)[0])

    def run(self, x: Tensor) -> Tensor:
        """The logits, by whatever the inputs have become."""
        return self.net(x, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Of the network, beside the inputs."""
        return {}

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        if self.habits.batch == "dict":
            return batch["image"], batch["label"]
        if self.habits.batch == "dataclass":
            return batch.x, batch.target
        if self.habits.batch == "two inputs":
            return batch[0] * batch[2], batch[1]
        return batch[0], batch[1]

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(logits, targets) if self.habits.task == "regression" else cross_entropy(logits, targets)

    def loss(self, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
        return self.criterion(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(*self.unpack(batch), batch_idx)
        if not self.automatic_optimization:
            return self.step_by_hand(loss)
        if self.habits.returns == "dict":
            return {"loss": loss, "more": 1}
        return None if self.habits.returns == "none" and batch_idx % 2 else loss

    def step_by_hand(self, loss: Tensor) -> None:
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        for optimizer in optimizers:
            optimizer.zero_grad()
        if isinstance(self, LossTermsMixin):
            loss = loss + self.loss_terms()
        if self.habits.optimization == "manual":
            self.manual_backward(loss)
        else:
            loss.backward()
        self.step_all(optimizers)

    def step_all(self, optimizers: Sequence[Any]) -> None:
        for optimizer in optimizers:
            optimizer.step()

    def on_train_epoch_end(self) -> None:
        if not self.automatic_optimization:
            found = self.lr_schedulers()
            for scheduler in found if isinstance(found, list) else [found]:
                scheduler.step()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = self.unpack(batch)
        self.log("val/loss", self.criterion(self.run(x), y), add_dataloader_idx=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.run(self.unpack(batch)[0])

    def configure_optimizers(self) -> Any:
        lr = 0.002 if self.habits.task == "clip" else 0.1  # more than that, and prompts of a CLIP diverge
        if self.habits.optimizer == "two":
            first = list(self.network.body[0].parameters())
            rest = [p for p in self.parameters() if not any(p is q for q in first)]
            optimizers = [torch.optim.SGD(first, lr=lr, momentum=0.9), torch.optim.SGD(rest, lr=lr / 2, momentum=0.9)]
        else:
            kind = SAM if self.habits.optimizer == "sam" else torch.optim.SGD
            optimizers = [kind(self.parameters(), lr=lr, momentum=0.9)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in optimizers]


class WrittenCode(UserCode):
    """The same module, with methods written into it; and it takes down what monitors should have seen.

    Attributes:
        seen: of the last epoch, by batch: features and targets as they were when the loss was computed.
        measured: at the end of the last epoch: features, targets and logits of the training and the validation data.
        head: parameters of the classifier at that moment; weights may be averaged later.
        inputs: of the network, while the terms are computed.
        own_at_end: what a method has taken down of its own parameters at that moment.
        terms: of the last epoch, by logged name and batch: the values of the terms, without weight.
    """

    def __init__(self, habits: Habits, methods: Sequence[Any], data: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__(habits)
        self.methods, self.data, self.active, self.adds_terms = list(methods), data, True, True
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.terms: dict[str, dict[int, Tensor]] = {}
        self.measured: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.head: dict[str, Tensor] = {}
        self.own_at_end: dict[str, Tensor] = {}
        self.inputs: Tensor | None = None
        self.prepared = False
        self.searching = False  # for a learning rate or a batch size: nothing is measured then

    def setup(self, stage: str) -> None:
        self.prepare()

    def prepare(self) -> None:
        """Put in what the methods bring along, drawn from the same random numbers as on the other side."""
        if not self.prepared:
            self.prepared = True
            for method in self.methods:
                method.prepare(self)

    def loss(self, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
        logits, features = self.net(x, with_features=True, **self.arguments())
        self.inputs = x
        active = self.methods if self.active and self.adds_terms else []
        loss = self.criterion(logits.detach() if any(m.replaces_loss for m in active) else logits, y)
        with torch.autocast("cpu", enabled=False):
            for method in active:
                loss = method.loss(self, loss, features.float(), y, batch_idx)
        self.inputs = None
        self.seen.setdefault(batch_idx, (features.detach(), y))  # not again in the second closure of SAM
        return loss

    def arguments(self) -> dict[str, Any]:
        methods = self.methods if self.active else []
        return {name: value for method in methods for name, value in method.arguments(self).items()}

    def note(self, name: str, batch_idx: int, value: Tensor) -> None:
        if not (self.habits.returns == "none" and batch_idx % 2):
            self.terms.setdefault(name, {}).setdefault(batch_idx, value.detach())

    def step_all(self, optimizers: Sequence[Any]) -> None:
        self._around(super().step_all, optimizers)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        for method in self.methods if self.active else []:
            closure = method.closure(optimizer, closure)
        self._around(super().optimizer_step, epoch, batch_idx, optimizer, closure)

    def _around(self, step: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        afters = [method.before_step(self) for method in self.methods]
        step(*args, **kwargs)
        for after in afters:
            after()

    def train_dataloader(self) -> Any:
        loader = self.given_loader
        for method in self.methods if self.active else []:
            loader = method.loader(self, loader)
        return loader

    def on_train_start(self) -> None:
        for method in self.methods:
            method.at_start(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["written"] = [method.saved() for method in self.methods] if self.active else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for method, saved in zip(self.methods, checkpoint["written"] or [None] * len(self.methods), strict=True):
            method.load(saved)

    def on_train_epoch_start(self) -> None:
        self.seen, self.terms = {}, {}

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.searching:
            return
        modes = [(part, part.training) for part in self.modules()]
        self.eval()
        for name, (x, y) in self.data.items():
            with self.trainer.precision_plugin.forward_context():
                parts = [self.network(chunk, with_features=True, **self.arguments()) for chunk in x.split(8)]
            logits, features = (torch.cat(column) for column in zip(*parts, strict=True))
            self.measured[name] = features, y, logits
        for part, training in modes:
            part.training = training
        self.head = {name: whole(p).clone() for name, p in self.network.fc.named_parameters()}
        for method in self.methods if self.active else []:
            method.at_epoch_end(self)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        for method in self.methods:
            method.tidy(self)

    def on_fit_end(self) -> None:
        for method in self.methods:
            method.tidy(self)


class Sharding:
    """Shards itself as users of FSDP2 do."""

    def configure_model(self) -> None:
        if not isinstance(self.net.body[0].weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.fc, mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class User(UserCode, pl.LightningModule):
    pass


class WithoutForward(User):
    """All is in its steps, which is legal."""

    forward = pl.LightningModule.forward


class Mixed(LossTermsMixin, User):
    pass


class ShardedUser(Sharding, User):
    pass


class Written(WrittenCode, pl.LightningModule):
    pass


class ShardedWritten(Sharding, Written):
    pass


class Bringing(CallbacksMixin, User):
    """Brings the callbacks itself."""


class BringingMixed(CallbacksMixin, Mixed):
    """Brings the callbacks itself, and asks for their loss terms."""


class BringingSharded(CallbacksMixin, ShardedUser):
    """Brings the callbacks itself, and shards its network."""


class BringingWithoutForward(CallbacksMixin, WithoutForward):
    """Brings the callbacks itself, and has all in its steps."""


BRINGING = {
    User: Bringing,
    Mixed: BringingMixed,
    ShardedUser: BringingSharded,
    WithoutForward: BringingWithoutForward,
}


def user(habits: Habits, root: Any = pl, by_mixin: bool = False) -> Any:
    """The module of a user who has callbacks. ``root`` is the package his LightningModule comes from."""
    if root is not pl:
        bases = (CallbacksMixin, UserCode) if by_mixin else (UserCode,)
        return type("User", (*bases, root.LightningModule), {})(habits)
    kind = Mixed if habits.optimization == "mixin" else ShardedUser if habits.sharded else User
    kind = kind if habits.forward else WithoutForward
    return (BRINGING[kind] if by_mixin else kind)(habits)


def written(habits: Habits, methods: Sequence[Any], data: dict[str, tuple[Tensor, Tensor]], root: Any = pl) -> Any:
    """The module of an author who has written the methods in."""
    if root is not pl:
        return type("Written", (WrittenCode, root.LightningModule), {})(habits, methods, data)
    return (ShardedWritten if habits.sharded else Written)(habits, methods, data)
