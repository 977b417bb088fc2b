#!/usr/bin/env bash
# An error in train_dataloader leaves torch's DataLoader patched for the rest of the process, and breaks a later predict.
#
# lightning 2.6.6, torch 2.13.0. A module whose train_dataloader raises is fitted, and the error caught, as a notebook or
# a sweep would; then a sound module predicts with DataLoader(data, 4), the batch size given by position.
# Guessed: the second call has nothing to do with the first.
# Seen: it works before, and ends in a MisconfigurationException about the user's DataLoader after. Lightning wraps
# DataLoader.__init__ while it asks a module for its loaders; an exception there passes by the code that takes the wrap off.
#
# Prints:
#   before: works
#   wrapped after the error: True
#   after: MisconfigurationException
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
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()

    def predict_step(self, batch, batch_idx):
        return self.layer(batch[0])

    def train_dataloader(self):
        raise FileNotFoundError("no data here")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer():
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )


def predict():
    try:
        trainer().predict(Net(), DataLoader(TensorDataset(torch.randn(8, 4)), 4))
    except Exception as error:
        return type(error).__name__
    return "works"


before = predict()
try:
    trainer().fit(Net())
except FileNotFoundError:
    pass
wrapped, after = hasattr(DataLoader, "__old__init__"), predict()
print(f"before: {before}\nwrapped after the error: {wrapped}\nafter: {after}")
print("lightning", lightning.__version__, "torch", torch.__version__)
assert (before, wrapped, after) == ("works", True, "MisconfigurationException")
PYTHON
"$folder/env/bin/python" run.py
