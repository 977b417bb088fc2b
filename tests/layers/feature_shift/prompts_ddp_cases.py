"""What two gloo processes do, for ``layers/test_prompts.py``: prompt tuning, each on half of the images."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from lightning_feat.joints.clip.towers import find_clip_towers
from lightning_feat.layers.feature_shift.prompt_hooks import insert_prompts
from lightning_feat.layers.feature_shift.prompts import DeepPrompts
from lightning_feat.layers.feature_shift.surgery import SurgeryBlock, attach_surgery
from tests.joints.clip.models import enlarge, images, logits, make, texts


class Prompted(nn.Module):
    def __init__(self):
        super().__init__()
        self.clip = make().requires_grad_(False)
        towers = find_clip_towers(self)
        self.prompts = enlarge(DeepPrompts.for_towers(towers, depth=3))
        self.prompts.reset_gram_start()
        self.surgery = SurgeryBlock(towers.image.num_features)
        insert_prompts(towers, self.prompts)
        attach_surgery(towers, image=self.surgery)

    def forward(self, images, ids, targets):
        loss = cross_entropy(logits(self.clip, images, ids), targets)
        return loss + self.prompts.gram_consistency_loss()


def train(rows, wrap):
    """The prompts after three steps on these images, as a list."""
    torch.set_num_threads(1)
    rows = torch.tensor([*rows])
    plain = Prompted()
    module = wrap(plain)
    optimizer = torch.optim.SGD([*plain.prompts.parameters(), *plain.surgery.parameters()], lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        module(images(8, seed=step)[rows], texts(), (torch.arange(8) % 5)[rows]).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in plain.prompts.parameters()]).tolist()


if __name__ == "__main__":
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60), rank=rank, world_size=2)
    Path(sys.argv[1]).write_text(json.dumps(train(range(rank, 8, 2), DistributedDataParallel)))
    torch.distributed.destroy_process_group()
