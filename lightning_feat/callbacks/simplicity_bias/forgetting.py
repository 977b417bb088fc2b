import os
from io import BytesIO
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_feat.callbacks.simplicity_bias.slow_pass import clean_training_loader
from lightning_feat.callbacks.simplicity_bias.upsampler import SimplicityBiasUpsampler
from lightning_feat.data.selection import Selection
from lightning_feat.functional.common.class_sums import check_target_range
from lightning_feat.functional.simplicity_bias.forgetting import LearningTimes, no_looks, with_look
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.epoch_ends import EpochEnds, MeasuresAtEpochEnds
from lightning_feat.joints.data.passes import clean_loader, hear, try_first_batch, whole_set
from lightning_feat.joints.data.processes import gather_samples
from lightning_feat.joints.data.shared_pass import Again, read_clean
from lightning_feat.joints.data.trace import without_trace
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey, class_indices, targets_of
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.module.head_check import check_found, forget_check
from lightning_feat.joints.run.averaging import WhichWeights
from lightning_feat.joints.run.folder import run_folder
from lightning_feat.joints.run.loggers import send_file
from lightning_feat.joints.run.spared import run_spared
from lightning_feat.joints.run.twins import callbacks_of, refuse_twin

_DATA = "training"


class ForgettingMonitor(MeasuresAtEpochEnds):
    """Take down when each training example is learned and how often it is forgotten again, and write
    ``forgetting.npz`` into the run's own folder (``joints.run.folder``).

    At the end of each epoch, in eval mode, the network looks at each training example once, in the order of the data
    set: no index is needed in the batches, all processes know the same, and a run that is resumed goes on exactly. It
    leaves no trace in the training. Logged are

    - ``forgetting/events/<which>``: forgetting events of an example so far, the mean;
    - ``forgetting/learned/<which>``: the share of examples that have been right once;
    - ``forgetting/first_epoch/<which>``: the epoch, from 1, of the first time, the mean over these,

    ``which`` being ``all``, and where a selection is known ``slow`` and ``fast``: that of a ``SimplicityBiasUpsampler``
    of the same run, from the moment it has chosen, or the one in ``selection``.

    The file holds an array for each entry of ``functional.simplicity_bias.LearningTimes`` (``forgetting``,
    ``first_learned``, ``always_learned``, ``last_right``), each ``(N,)`` in the order of the data set, ``looks``, the
    epochs looked at, and with a selection ``slow``; ``numpy.load`` reads it. Without a logger it goes into
    ``default_root_dir`` if ``table`` is True.

    Cost: a pass over the training data without gradient in each epoch that is looked at; three numbers and a bit for
    each example.

    Args:
        every_n_epochs: look after every n-th epoch, the first and the last. What is forgotten and learned again in
            between is not seen.
        selection: path of a ``selection.pt`` of another run on the same data.
        clean: name of the method of the datamodule or module that returns a loader of the same examples without
            augmentation, see ``SimplicityBiasUpsampler``.
        table: write the file. None where there is a logger.
        layer: dotted name of the classifier, whose output are the logits; None finds it.
        loader: which of several training loaders: its key in a dict, or its position in a list.
        target_key: where a batch keeps class indices, see ``joints.features.batches``; an example with a target below
            zero has none, is never right, and is left out of what is logged.
        forward: ``forward(module, batch)`` that runs the network; None runs it as the module's own step does, see
            ``joints.data.ways``.
        weights: which weights to look at: the ``"current"`` ones, or those that are ``"averaged"`` by an
            ``EMAWeightAveraging`` or another ``WeightAveraging`` of the Trainer, which validates and saves them.

    Attributes:
        times: the ``LearningTimes`` so far, the same on all processes; None before.

    Source: Toneva, Sordoni, des Combes, Trischler, Bengio, Gordon, ICLR 2019, arXiv 1812.05159, who look at an example
    when it is trained on, in train mode. Here all are looked at by one network, at the end of an epoch.
    """

    @checked
    def __init__(
        self,
        every_n_epochs: int | Literal["log"] = 1,
        selection: str | None = None,
        clean: str | None = None,
        table: bool | None = None,
        layer: str | None = None,
        loader: str | int | None = None,
        target_key: TargetKey = None,
        forward: Forward | None = None,
        weights: WhichWeights = "current",
    ) -> None:
        if every_n_epochs != "log" and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs} must be at least 1, or 'log'.")
        self.every_n_epochs, self.path, self.clean, self.table = every_n_epochs, selection, clean, table
        self.loader, self.target_key, self.weights = loader, target_key, weights
        self.logits = FeatureTap(layer, "output", pools=False)
        self.ends, self.ways = EpochEnds(every_n_epochs), Ways(forward, self.state_key)
        self.times: LearningTimes | None = None
        self.looks: list[int] = []
        self._labelled = torch.zeros(0, dtype=torch.bool)
        self._selection: Selection | None = None
        self._clean_loader: Any = None
        self._size = 0  # examples
        self._folder = ""
        self._said: set[str] = set()

    @property
    def state_key(self) -> str:
        where = self.logits.label if self.loader is None else f"{self.loader}, {self.logits.label}"
        return f"ForgettingMonitor[{where}]"

    def state_dict(self) -> dict[str, Any]:
        times = None if self.times is None else [entry.clone() for entry in self.times]
        return {"times": times, "looks": list(self.looks), "labelled": self._labelled.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        times = state_dict["times"]
        self.times = None if times is None else LearningTimes(*times)
        self.looks, self._labelled = list(state_dict["looks"]), state_dict["labelled"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        if stage != "fit":
            return
        if trainer.global_step == 0:
            self.times, self.looks = None, []
        writes = bool(trainer.loggers) if self.table is None else self.table
        self._folder = run_folder(trainer) if writes and not getattr(trainer, "fast_dev_run", False) else ""
        self._selection = None if self.path is None else Selection.load(self.path)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._clean_loader, self._said = None, set()
        self.ways.begin()
        self.logits.attach(pl_module)
        check_found(pl_module, self.state_key, [self.logits], only_reads=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = self._clean_loader = clean_training_loader(trainer, pl_module, self.clean, self.loader)
        _, dataset, shared = whole_set(trainer, loader, _DATA)
        if not shared:
            raise ValueError(
                f"{self.state_key}: with use_distributed_sampler=False each process has data of its own, "
                "whose examples have no common order: leave it True, and give all processes the same data set."
            )
        size = self._size = len(dataset)
        batch = try_first_batch(
            trainer, pl_module, clean_loader(trainer, loader, _DATA), _DATA, self.ways, [self.logits]
        )
        if batch is not None:
            self._check_first(trainer, pl_module, batch)
        for what, length in (
            ("the selection is of", None if self._selection is None else len(self._selection.slow)),
            ("what was seen so far is of", None if self.times is None else len(self.times.forgetting)),
        ):
            if length is not None and length != size:
                raise ValueError(
                    f"{self.state_key}: {what} {length} examples, but the training data have {size}: give the data it "
                    "was made for, or make a new callback for others."
                )

    def _check_first(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        targets = targets_of(batch, self.target_key)
        class_indices(targets, targets.numel(), f"the targets of {self.state_key}")
        with without_trace(trainer, module):
            (logits,) = hear(trainer, module, batch, [self.logits], self.ways.known(_DATA))
        if len(logits) != targets.numel():
            raise ValueError(
                f"{self.state_key}: {len(logits)} rows of logits for {targets.numel()} examples, but one of each is "
                "needed: give forward=, a function forward(module, batch) that runs the network once on each."
            )

    def wanted(self, trainer: Trainer) -> dict[str, Any]:
        return {_DATA: self._clean_loader} if self.ends.is_due(trainer) else {}

    def new_reading(self, trainer: Trainer, module: LightningModule, name: str) -> "_Looks":
        return _Looks(trainer, module, self)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        look = trainer.current_epoch + 1
        reading: _Looks = read_clean(trainer, pl_module, self, _DATA, self._clean_loader)
        if len(reading.right) != self._size and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"{self.state_key}: {len(reading.right)} rows of logits came out of a pass over {self._size} training "
                "examples: which is whose cannot be told, and this epoch is left out. Does collate_fn leave some out?"
            )
            return
        if look in self.looks:  # a checkpoint of that very end of an epoch
            return
        self.looks.append(look)
        before = no_looks(len(reading.right)) if self.times is None else self.times
        self._labelled = reading.labelled
        self.times = with_look(before, reading.right, look)
        for name, value in self._values(trainer, self.times).items():
            # All processes have the same value; sync_dist only spares the reader a warning from Lightning.
            pl_module.log(f"forgetting/{name}", value.float().to(pl_module.device), sync_dist=True)
        if trainer.is_global_zero and self._folder:
            with run_spared(self.state_key, "write forgetting.npz", self._said):
                self._write(trainer, self.times)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._folder and self.looks:
            with run_spared(self.state_key, "give forgetting.npz to the loggers", self._said):
                send_file(trainer, os.path.join(self._folder, "forgetting.npz"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def _let_go(self, pl_module: LightningModule) -> None:
        self.logits.remove()
        forget_check(pl_module, self.state_key)

    def _slow(self, trainer: Trainer) -> Tensor | None:
        """Which examples are slow, as far as that is known."""
        found = self._selection
        for other in callbacks_of(trainer):
            if found is None and isinstance(other, SimplicityBiasUpsampler) and other.loader == self.loader:
                found = other.selection
        return None if found is None else found.slow

    def _values(self, trainer: Trainer, times: LearningTimes) -> dict[str, Tensor]:
        groups, slow = {"all": self._labelled}, self._slow(trainer)
        if slow is not None and len(slow) == len(self._labelled):
            groups |= {"slow": self._labelled & slow, "fast": self._labelled & ~slow}
        values = {}
        for which, of in groups.items():
            first = times.first_learned[of]
            values[f"events/{which}"] = times.forgetting[of].double().mean()
            values[f"learned/{which}"] = (first > 0).double().mean()
            values[f"first_epoch/{which}"] = first[first > 0].double().mean()
        return values

    def _write(self, trainer: Trainer, times: LearningTimes) -> None:
        arrays = {name: entry.numpy() for name, entry in times._asdict().items()}
        arrays["looks"] = np.array(self.looks)
        slow = self._slow(trainer)
        if slow is not None:
            arrays["slow"] = slow.numpy()
        content = BytesIO()
        np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
        path = os.path.join(self._folder, "forgetting.npz")
        files, unfinished = get_filesystem(path), f"{path}.part"
        files.makedirs(self._folder, exist_ok=True)
        with files.open(unfinished, "wb") as file:
            file.write(content.getvalue())
        files.mv(unfinished, path)  # in one step where the disk is local: what has this name is whole


class _Looks:
    """Whether each example is right, of all processes, in the order of the data set.

    Attributes:
        right: ``(N,)`` bool; never where there is no class.
        labelled: ``(N,)`` bool, whether there is one.
    """

    title = "Forgetting"

    def __init__(self, trainer: Trainer, module: LightningModule, monitor: ForgettingMonitor) -> None:
        self._trainer, self._module, self._monitor = trainer, module, monitor
        self.taps = [monitor.logits]
        self._parts: list[Tensor] = []
        self.right = self.labelled = torch.zeros(0, dtype=torch.bool)

    def take(self, batch: Any) -> None:
        logits = self.taps[0].take()
        where = f"the targets of {self._monitor.state_key}"
        t = class_indices(targets_of(batch, self._monitor.target_key), len(logits), where).to(logits.device)
        check_target_range(t[t >= 0], logits.shape[1])
        right = (logits.argmax(1) == t) & logits.isfinite().all(1)
        self._parts.append(torch.stack([right, t >= 0], dim=1).cpu())

    def finish(self, again: Again) -> None:
        trainer, device = self._trainer, self._module.device
        rows = torch.cat([torch.zeros(0, 2, dtype=torch.bool), *self._parts]).float().to(device)
        index = trainer.global_rank + trainer.world_size * torch.arange(len(rows), device=device)
        found, _, _ = gather_samples(rows, index, index)
        self.right, self.labelled = (column.bool() for column in found.cpu().T)
