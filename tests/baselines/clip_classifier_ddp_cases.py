"""What two gloo processes do, for ``baselines/test_clip_classifier_ddp.py``: tune the prompts of a small CLIP."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_feat.baselines.clip_classifier import ClipClassifier
from lightning_feat.baselines.clip_pretraining import SmallClipPretraining
from lightning_feat.callbacks import PromptLearner
from tests.joints import ddp_cases

BASE, NOVEL = ["red one", "blue two", "red two"], ["blue one", "green one"]


class Seeded(PromptLearner):
    """Draws the same prompts in every process and in one: Lightning seeds anew for DDP, after modules are built."""

    def setup(self, trainer, pl_module, stage):
        if self.learned is None:
            pl.seed_everything(3)
        super().setup(trainer, pl_module, stage)


def classifier(folder):
    """With a CLIP of random weights, the same for all."""
    pl.seed_everything(0)
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 8, "width": 16, "layers": 2, "heads": 2}
    module = SmallClipPretraining(["a photo of picture the . red blue green one two"], **sizes)
    run = ddp_cases.trainer(folder)
    run.strategy.connect(module)
    path = folder / f"clip{run.global_rank}.ckpt"
    run.save_checkpoint(path)
    return ClipClassifier(BASE, NOVEL, source="small", model=str(path), warmup_epochs=0, lr=0.05)


def data(world, rank, num_classes, num=17):
    """Batches of the pair that, taken together, are the batches of one process; 17 is no multiple of two."""
    images = torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(num_classes))
    examples = TensorDataset(images, torch.arange(num) % num_classes)
    if world == 1:
        return DataLoader(examples, 8)
    return DataLoader(examples, 4, sampler=DistributedSampler(examples, world, rank, shuffle=False))


def tuned(world):
    """The prompts after two epochs, and what was logged in training, validation and test."""
    module = classifier(Path("."))
    two = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2} if world == 2 else {}
    prompts = Seeded(depth=2, gram_weight=0.01)
    options = {"max_epochs": 2, "use_distributed_sampler": False, "callbacks": [prompts], **two}
    run = ddp_cases.trainer(Path("."), **options)
    rank = run.global_rank
    run.fit(module, data(world, rank, 3, 16), data(world, rank, 3))
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    # without DDP's copies of a last sample, so that both count the same
    examples = [data(1, 0, 3).dataset, data(1, 0, 2).dataset]
    parts = [torch.utils.data.Subset(part, range(rank, len(part), world)) for part in examples]
    tested = run.test(module, [DataLoader(part, 4) for part in parts], verbose=False)
    learned = torch.cat([p.detach().flatten() for p in prompts.learned.parameters()]).double().tolist()
    return {"prompts": learned, **logged, **{k: v for part in tested for k, v in part.items()}}


if __name__ == "__main__":
    ddp_cases.CASES[:] = [tuned]
    ddp_cases.main(Path(sys.argv[1]))
