import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_feat.data.selection import Selection
from lightning_feat.functional.common.class_sums import check_target_range
from lightning_feat.functional.common.looks import values_are_at_hand
from lightning_feat.functional.simplicity_bias.clusters import slow_examples
from lightning_feat.functional.simplicity_bias.hard_examples import highest_losses, misclassified, random_examples
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.pass_progress import pass_progress
from lightning_feat.joints.data.passes import clean_batches, hear, try_first_batch
from lightning_feat.joints.data.processes import gather_on_first
from lightning_feat.joints.data.trace import without_trace
from lightning_feat.joints.data.train_loader import one_train_loader
from lightning_feat.joints.data.ways import Ways
from lightning_feat.joints.features.batches import TargetKey, class_indices, targets_of
from lightning_feat.joints.features.kept import remember_generators
from lightning_feat.joints.features.taps import FeatureTap
from lightning_feat.joints.run.loggers import send_file
from lightning_feat.joints.run.spared import run_spared

Choose: TypeAlias = Literal["clusters", "loss", "misclassified", "random"]
Outputs: TypeAlias = Literal["logits", "probabilities", "features"]
Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_CLEAN = "clean_train_dataloader"  # looked for where no other name is given
_MOSTLY_SLOW = 0.7  # share of a class; the paper finds 30 to 40 % of CIFAR slow


class Looked(NamedTuple):
    """What the network says of training examples."""

    outputs: Tensor  # (n, F) to be clustered
    losses: Tensor  # (n,)
    wrong: Tensor  # (n,) bool
    targets: Tensor  # (n,)


def losses_of_each(logits: Tensor, targets: Tensor, criterion: Criterion | None) -> Tensor:
    """Losses ``(n,)``, cross entropy without a ``criterion``. Raises ``ValueError`` where that gives anything else."""
    if values_are_at_hand(targets):  # elsewhere it would make every batch wait for the device
        check_target_range(targets, logits.shape[1])
    losses = cross_entropy(logits, targets, reduction="none") if criterion is None else criterion(logits, targets)
    if losses.shape != targets.shape:
        raise ValueError(
            f"the criterion gives {tuple(losses.shape)} for {len(targets)} examples, but the loss of each is needed: "
            "build it with reduction='none'."
        )
    return losses


class SlowPass:
    """Runs the network over the training data, and chooses the slow examples from what it says.

    Args:
        layer: the classifier; None finds it.
        outputs: what is clustered.
        choose: the rule.
        criterion: the loss of each example.
        target_key: where a batch keeps class indices.
        forward: runs the network on a batch.
        half: keep the outputs in float16.
    """

    def __init__(
        self,
        layer: str | None,
        outputs: Outputs,
        choose: Choose,
        criterion: Criterion | None,
        target_key: TargetKey,
        forward: Forward | None,
        half: bool,
    ) -> None:
        self.outputs, self.choose, self.criterion = outputs, choose, criterion
        self.target_key, self.half = target_key, half
        self.ways = Ways(forward, "SimplicityBiasUpsampler")
        self.num_classes = 0  # seen in a batch
        self.logits = FeatureTap(layer, "output", pools=False)
        self.features = FeatureTap(layer, "input", pools=False)

    def attach(self, module: LightningModule) -> None:
        """Hook the classifier."""
        self.ways.begin()
        self.logits.attach(module)
        self.features.attach(module)

    def try_first_batch(self, trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> None:
        """Run the network on a first batch, so that what is wrong is said now, and not after some epochs."""
        taps = [self.logits, self.features]
        batch = try_first_batch(trainer, module, loader, "training", self.ways, taps)
        if batch is None:
            return
        with without_trace(trainer, module):
            way = self.ways.find(trainer, module, batch, "training", taps)
            logits, features = (heard.float() for heard in hear(trainer, module, batch, taps, way))
            self._refuse_missing(len(logits), min(loader.batch_size or 1, len(loader.dataset)))  # type: ignore[arg-type]
            self._looked(batch, logits, features)

    def remove(self) -> None:
        """Take the hooks away."""
        self.logits.remove()
        self.features.remove()

    def choose_slow(
        self,
        trainer: Trainer,
        module: LightningModule,
        loader: DataLoader[Any],
        size: int,
        epochs: int,
        factor: int,
        seed: int,
    ) -> Selection:
        """One pass over ``loader``, this process's share of ``size`` examples, after so many epochs; the same selection
        on all processes.

        Raises:
            ValueError: on all processes, where the outputs cannot be clustered.
        """
        looked = self._look(trainer, module, loader)
        index = trainer.global_rank + trainer.world_size * torch.arange(len(looked.targets))
        columns = [gather_on_first(trainer, column, index) for column in looked]
        told: tuple[dict[str, Any] | None, str] = (None, "")
        if trainer.is_global_zero:
            rows, indices = Looked(*(column[0] for column in columns if column)), columns[0][1] if columns[0] else index
            try:
                if not getattr(trainer, "fast_dev_run", False):
                    self._refuse_missing(len(rows.targets), size)
                found = self._chosen(rows, module.device, seed)
                told = self._spread(*found, rows.targets, indices, size, epochs, factor, seed), ""
            except ValueError as error:
                told = None, str(error)  # said to all, or the others would wait for ever
        state, wrong = trainer.strategy.broadcast(told)
        if state is None:
            raise ValueError(wrong)
        return Selection.from_state_dict(state)

    def _refuse_missing(self, looked: int, size: int) -> None:
        # Rows are told apart by their place: one that is left out would give its name to the next.
        if looked != size:
            raise ValueError(
                f"{looked} rows of logits came out of a pass in eval mode over {size} training examples, but one of "
                "each is needed to tell which are slow: a collate_fn must leave none out, and a network that gives "
                "several rows of an example, or none, needs forward= (forward(module, batch)), which runs it once on "
                "each."
            )

    def _look(self, trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> Looked:
        parts: list[Looked] = []
        with without_trace(trainer, module), pass_progress(trainer) as progress:
            progress.start("Slow examples, training data", len(loader))
            for batch in clean_batches(trainer, module, loader):
                taps = [self.logits, self.features]
                way = self.ways.find(trainer, module, batch, "training", taps)
                logits, features = (heard.float() for heard in hear(trainer, module, batch, taps, way))
                parts.append(self._looked(batch, logits, features))
                self.num_classes = logits.shape[1]
                progress.step()
        if not parts:
            nothing = torch.zeros(0)
            return Looked(torch.zeros(0, 1), nothing, nothing.bool(), nothing.long())
        return Looked(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _looked(self, batch: Any, logits: Tensor, features: Tensor) -> Looked:
        found = class_indices(targets_of(batch, self.target_key), len(logits), "the targets").to(logits.device)
        if len(found) and (found.min() < 0 or found.max() >= logits.shape[1]):
            raise ValueError(
                f"targets go from {int(found.min())} to {int(found.max())}, but there are {logits.shape[1]} "
                "logits: every training example needs a class of its own."
            )
        outputs = {"logits": logits, "probabilities": logits.softmax(1), "features": features}[self.outputs]
        losses = losses_of_each(logits, found, self.criterion)
        kept = outputs.half() if self.half else outputs
        return Looked(*(t.cpu() for t in (kept, losses.float(), misclassified(logits, found), found)))

    def _chosen(self, rows: Looked, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the rows: which are slow, their clusters, and the losses of these."""
        found = slow_examples(rows.outputs, rows.losses, rows.targets, self.num_classes, seed=seed, device=device)
        per_class = (rows.targets[found.slow]).bincount(minlength=self.num_classes)
        slow = {
            "clusters": lambda: found.slow,
            "loss": lambda: highest_losses(rows.losses, rows.targets, per_class),
            "random": lambda: random_examples(rows.targets, per_class, seed),
            "misclassified": lambda: rows.wrong,
        }[self.choose]()
        share = per_class / rows.targets.bincount(minlength=self.num_classes)
        large = (share > _MOSTLY_SLOW).nonzero()[:, 0].tolist()
        if self.choose == "clusters" and large:
            rank_zero_warn(
                f"of {len(large)} classes ({', '.join(map(str, large[:8]))}) more than {_MOSTLY_SLOW:.0%} are slow: "
                "the clusters may mean little; another separating epoch may tell them apart better."
            )
        if not slow.any():
            rank_zero_warn("no example is slow: nothing is shown more often.")
        return slow, found.cluster, found.loss

    def _spread(
        self,
        slow: Tensor,
        cluster: Tensor,
        loss: Tensor,
        targets: Tensor,
        indices: Tensor,
        size: int,
        epoch: int,
        factor: int,
        seed: int,
    ) -> dict[str, Any]:
        """The selection over the whole data set; under ``fast_dev_run`` not all of it was looked at."""

        def whole(fill: int | bool, values: Tensor) -> Tensor:
            column = torch.full((size,), fill)
            column[indices] = values
            return column

        spread = whole(False, slow), whole(-1, targets), whole(0, cluster)
        return Selection(*spread, loss, epoch, factor, seed, self.choose).state_dict()


def clean_training_loader(
    trainer: Trainer, module: LightningModule, clean: str | None, name: str | int | None
) -> DataLoader[Any]:
    """A loader of the training examples as they are: what the method ``clean`` of the datamodule or module returns,
    ``clean_train_dataloader`` where it is None; without such a method the training loader.

    Raises:
        ValueError: if there is no method of the name given, or it gives other examples.
    """
    trained = one_train_loader(trainer, name)
    method = clean or _CLEAN
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    found = next((owner for owner in (datamodule, module) if callable(getattr(owner, method, None))), None)
    if found is None and clean is not None:
        raise ValueError(f"clean={method!r}: neither the datamodule nor the module has a method of that name.")
    loader = trained if found is None else getattr(found, method)()
    if found is not None and len(loader.dataset) != len(trained.dataset):
        raise ValueError(
            f"{method} gives {len(loader.dataset)} examples, but the training data have {len(trained.dataset)}: give "
            "the same examples in the same order."
        )
    return loader  # type: ignore[no-any-return]


def warn_of_augmentation(loader: DataLoader[Any], owner: str) -> None:
    """Warn where the first examples are not the same at a second look."""
    some = range(min(4, len(loader.dataset)))  # type: ignore[arg-type]
    put_back = remember_generators(loader.dataset)
    with isolate_rng():
        looks = [[leaf for i in some for leaf in tree_leaves(loader.dataset[i])] for _ in range(2)]
    put_back()
    pairs = zip(*looks, strict=False)
    if not all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)):
        rank_zero_warn(
            f"{owner}: the training data differ from one look to the next, by augmentation it seems, and slow examples "
            "should be found without it: give the datamodule or module a method clean_train_dataloader that returns "
            "a loader of the same examples as they are (argument `clean` for another name)."
        )


def write_selection(trainer: Trainer, selection: Selection, folder: str, owner: str) -> None:
    """Write ``selection.pt`` into the folder of the run and give it to the loggers, by one process. What goes wrong is
    a warning.
    """
    path = os.path.join(folder, "selection.pt")
    try:
        get_filesystem(path).makedirs(folder, exist_ok=True)
        selection.save(path)
    except OSError as error:
        rank_zero_warn(f"{owner} could not write {path}: {error}. The checkpoint holds it too.")
        return
    with run_spared(owner, "give the selection to the loggers"):
        send_file(trainer, path)
