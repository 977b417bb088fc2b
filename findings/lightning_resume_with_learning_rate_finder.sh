#!/usr/bin/env bash
# A fit that resumes from a checkpoint with a LearningRateFinder among its callbacks starts over, and says nothing.
#
# lightning 2.6.6, torch 2.13.0. Two epochs are trained and saved; a third shall follow by fit(ckpt_path=...).
# Guessed: the search runs at the start of the resumed fit, and training goes on in epoch 2.
# Seen: with the finder the fit has the weights of the checkpoint, but begins at epoch 0 and step 0: three epochs are
# trained where one was asked for, by an optimizer without its momentum. By reading its source: the search loads a
# checkpoint of its own in between, and what was read of the user's is gone when loops and optimizers ask for it.
#
# Prints (the last line with the finder):
#   without: epoch 2, step 4, momentum True, weights of the checkpoint True
#   with finder: epoch 0, step 0, momentum False, weights of the checkpoint True
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
from lightning.pytorch.callbacks import LearningRateFinder
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.lr = torch.nn.Linear(4, 1), 0.1

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Look(pl.Callback):
    def on_train_start(self, trainer, module):
        momentum = any("momentum_buffer" in state for state in trainer.optimizers[0].state.values())
        same = torch.equal(module.layer.weight, torch.load("two.ckpt", weights_only=True)["state_dict"]["layer.weight"])
        self.seen = (trainer.current_epoch, trainer.global_step, momentum, same)


def fit(epochs, callbacks=(), path=None):
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[*callbacks],
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Net(), DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4), ckpt_path=path)
    return trainer


fit(2).save_checkpoint("two.ckpt")
seen = {}
for name, finders in (("without", []), ("with finder", [LearningRateFinder(1e-4, 1e-1, num_training_steps=5)])):
    look = Look()
    fit(3, [*finders, look], "two.ckpt")
    seen[name] = look.seen
    print(f"{name}: epoch {look.seen[0]}, step {look.seen[1]}, momentum {look.seen[2]}, weights of the checkpoint {look.seen[3]}")
print("lightning", lightning.__version__, "torch", torch.__version__)
assert seen == {"without": (2, 4, True, True), "with finder": (0, 0, False, True)}, seen
PYTHON
"$folder/env/bin/python" run.py
