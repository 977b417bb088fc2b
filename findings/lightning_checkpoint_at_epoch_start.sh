#!/usr/bin/env bash
# A checkpoint that a callback saves in on_train_epoch_start resumes with one batch of that epoch, numbered past its end.
#
# lightning 2.6.6, torch 2.13.0. Three epochs of two batches; a callback saves at the start of epoch 1.
# Guessed: the resumed fit runs epoch 1 whole, since none of its batches had run: steps 3 to 6.
# Seen: it runs one batch of epoch 1, with batch_idx 2 (there are 0 and 1), and ends after five steps in place of six.
# By reading its source: the batch counters of the epoch before stand in the checkpoint as if they were this epoch's.
# The same save at the end of epoch 0 resumes in full.
#
# Prints:
#   whole   [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)] steps 6
#   resumed [(1, 2), (2, 0), (2, 1)] steps 5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 lightning==2.6.6 numpy
cd "$folder"
cat > run.py <<'PYTHON'
import logging
import warnings

import lightning
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(4, 1), []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx))
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAt(pl.Callback):
    """Saves once, in one of two hooks."""

    def __init__(self, path, start):
        self.path, self.start = path, start

    def on_train_epoch_start(self, trainer, module):
        if self.start and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, module):
        if not self.start and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def fit(callbacks=(), path=None):
    module = Net()
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[*callbacks],
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4), ckpt_path=path)
    return module.seen, trainer.global_step


whole = fit([SaveAt("start.ckpt", True), SaveAt("end.ckpt", False)])
print("whole  ", *whole[:1], "steps", whole[1])
resumed, after_end = fit(path="start.ckpt"), fit(path="end.ckpt")
print("resumed", *resumed[:1], "steps", resumed[1])
print("lightning", lightning.__version__, "torch", torch.__version__)
assert resumed == ([(1, 2), (2, 0), (2, 1)], 5), resumed
assert after_end == (whole[0][2:], 6), after_end
PYTHON
"$folder/env/bin/python" run.py
