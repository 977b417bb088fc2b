"""What two gloo processes do, for ``test_monitor_ddp.py``; and a small CLIP with prompts."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_feat.baselines.clip import SmallClip
from lightning_feat.callbacks.feature_shift.monitor import FeatureShiftMonitor
from lightning_feat.callbacks.feature_shift.regularizer import FeatureShiftRegularizer
from lightning_feat.data import IndexedDataset
from lightning_feat.functional.feature_shift import relative_shift
from lightning_feat.joints.clip.towers import find_clip_towers
from lightning_feat.layers.feature_shift.prompt_hooks import insert_prompts
from lightning_feat.layers.feature_shift.prompts import DeepPrompts
from tests.helpers import points
from tests.joints import ddp_cases
from tests.joints.ddp_cases import Momentum, fit, flat

LAYERS = ["net.body.0", "net.body"]
IDS = torch.tensor([[17, 3, 4, 5, 18, 0, 0], [17, 3, 4, 6, 7, 18, 0], [17, 3, 4, 8, 18, 0, 0]])  # 17 SOS, 18 EOS


class Prompted(pl.LightningModule):
    """Three classes told apart by a frozen CLIP with learned prompts, which it switches off itself."""

    def __init__(self, coupling="maple", depth=2, lr=0.5):
        super().__init__()
        sizes = {"vision_width": 16, "text_width": 12, "vision_layers": 3, "text_layers": 3, "embed_dim": 8}
        self.clip = SmallClip(19, 7, 16, 8, vision_heads=2, text_heads=2, **sizes).requires_grad_(False)
        self.towers = [find_clip_towers(self)]  # a list, so that they are no submodule
        self.lr, self.prompts, self.insertion = lr, None, nullcontext()
        if coupling is not None:
            self.prompts = DeepPrompts.for_towers(self.towers[0], coupling, depth=depth)
            with torch.no_grad():  # far enough from nothing to matter
                for p in self.prompts.parameters():
                    p.mul_(20.0)
            self.insertion = insert_prompts(self.towers[0], self.prompts)
        self.register_buffer("ids", IDS, persistent=False)
        self.passes = {"text": 0, "image": 0}

    def without_prompts(self):
        return self.insertion.paused()

    def prompt_length(self, kind):
        return self.prompts.length_of(kind) if kind in self.prompts.kinds else 0

    def encode_text(self, ids):
        self.passes["text"] += 1
        return self.clip.encode_text(ids)

    def encode_image(self, images):
        self.passes["image"] += 1
        return self.clip.encode_image(images)

    def loss(self, batch):
        text, image = self.encode_text(self.ids), self.encode_image(batch[0])
        return cross_entropy(image @ text.T, batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class HeldByHand(Momentum):
    """The penalty of ``FeatureShiftRegularizer(LAYERS, "relative", 0.5)`` written by hand."""

    def __init__(self):
        super().__init__()
        self.start = [copy.deepcopy(self.net)]

    def training_step(self, batch, batch_idx):
        x, y = batch
        first = self.net.body[0](x)
        second = self.net.body[1](first)
        with torch.no_grad():
            first_start = self.start[0].body[0](x)
            second_start = self.start[0].body[1](first_start)
        shift = (relative_shift(first, first_start) + relative_shift(second, second_start)) / 2
        return cross_entropy(self.net.fc(second), y) + 0.5 * shift


class Indexed(Momentum):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0], batch_idx)

    def forward(self, batch):
        return super().forward(batch[0] if isinstance(batch, list) else batch)


def shift(world):
    _, module = fit(Momentum, [FeatureShiftRegularizer(LAYERS, "relative", 0.5)], world)
    return flat(module)


def by_hand(world):
    _, module = fit(HeldByHand, [], world)
    return flat(module)


def l2_sp(world):
    _, module = fit(Momentum, [FeatureShiftRegularizer(form="l2_sp", weight=0.5)], world)
    return flat(module)


def distillation(world):
    _, module = fit(Momentum, [FeatureShiftRegularizer(LAYERS, "distillation", 0.5)], world)
    return flat(module)


def monitor(world):
    watch = FeatureShiftMonitor(LAYERS)
    run, _ = fit(Momentum, [watch], world)
    return {name: float(value) for name, value in run.callback_metrics.items() if "shift" in name}


def cached(world):
    """Each process looks up examples that the other has run over."""
    data = IndexedDataset(points(43))
    pl.seed_everything(0)
    held = FeatureShiftRegularizer(LAYERS, "relative", 0.5, "cached", index_key=1)
    module = Indexed()
    two = {} if world == 1 else {"strategy": ddp_cases.DDPStrategy(process_group_backend="gloo"), "devices": 2}
    run = ddp_cases.trainer(Path("."), callbacks=[held], max_epochs=1, **two)
    run.fit(module, DataLoader(data, batch_size=8, shuffle=True))
    return torch.cat([rows.flatten() for rows in held.reference.cache.rows.values()]).double().tolist()


def towers(world):
    pl.seed_everything(0)
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(images, torch.arange(16) % 3)
    module = Prompted()
    held = FeatureShiftRegularizer(form="consistency", reference="without_prompts")
    two = {"strategy": ddp_cases.DDPStrategy(process_group_backend="gloo"), "devices": 2} if world == 2 else {}
    run = ddp_cases.trainer(Path("."), callbacks=[held, FeatureShiftMonitor(reference="without_prompts")], **two)
    sampler = DistributedSampler(data, world, run.global_rank, shuffle=False)
    run.fit(module, DataLoader(data, batch_size=8 // world, sampler=sampler))
    logged = {name: float(value) for name, value in run.callback_metrics.items() if "discrepancy" in name}
    return {**logged, "prompts": flat(module.prompts)}


if __name__ == "__main__":
    ddp_cases.CASES[:] = [shift, by_hand, l2_sp, distillation, monitor, cached, towers]
    ddp_cases.main(Path(sys.argv[1]))
