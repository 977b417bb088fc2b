from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_feat.callbacks.data_plan import DataPlan
from lightning_feat.callbacks.simplicity_bias.loss_knee import LossKnee
from lightning_feat.callbacks.simplicity_bias.separating import SeparatingEpoch, When
from lightning_feat.callbacks.simplicity_bias.slow_loss import SlowLossTerm
from lightning_feat.callbacks.simplicity_bias.slow_pass import (
    Choose,
    Criterion,
    Outputs,
    SlowPass,
    clean_training_loader,
    warn_of_augmentation,
    write_selection,
)
from lightning_feat.data.plan import Length
from lightning_feat.data.selection import Selection
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.data.passes import clean_loader
from lightning_feat.joints.data.restart import (
    Beginning,
    begin_again,
    refuse_averaging_within,
    run_fit_as_before,
    run_fit_by,
    states_of_callbacks,
    warn_of_lost_hooks,
)
from lightning_feat.joints.data.samplers import processes_share
from lightning_feat.joints.data.train_loader import one_train_loader, part_of_batch
from lightning_feat.joints.features.batches import TargetKey, class_indices, targets_of
from lightning_feat.joints.loss.engine import add_loss_term, remove_loss_term
from lightning_feat.joints.module.head_check import check_found, forget_check
from lightning_feat.joints.run.folder import run_folder


class SimplicityBiasUpsampler(DataPlan):
    """Find the training examples that the network learns late, and show them more often: USEFUL (Nguyen et al.,
    NeurIPS 2024), the whole method in one ``trainer.fit``.

    1. The network trains on the data as they are, up to the separating epoch. 2. In eval mode it looks at each training
    example once, without augmentation; the outputs of each class are cut in two clusters, and the one with the higher
    mean loss is slow (``slow_examples``). 3. Training starts again from the initial weights, with
    fresh optimizers, schedules, averages, states of callbacks and all its epochs, on data in which each slow example
    comes ``factor`` times; or it goes on with these data.

    From the second start on, the run is bit for bit that of the same initial weights with ``DataPlan`` and
    ``seed_everything(seed)`` before it. All processes take the same examples; a run that is cut off, before, during or
    after the choice, resumes where it was, for which a checkpoint of the first part also holds the initial weights. The
    step that loggers show goes on over both parts. Where there is a logger, the selection is written to
    ``selection.pt`` in the run's own folder (``joints.run.folder``), and its size logged as
    ``simplicity_bias/slow_share``.

    Args:
        separating_epoch: when to choose: a share of ``max_epochs``, at least one epoch; a number of epochs; or
            ``"knee"``, the epoch from which the loss on the training batches falls more slowly
            (``functional.simplicity_bias``); of an epoch that is resumed in its middle, the batches since then.
        factor: how often a slow example is shown; the paper finds 2 best.
        restart: start again (the paper), or go on from the separating epoch.
        choose: ``"clusters"``; or, for comparison, as many of each class by the highest ``"loss"`` or at ``"random"``,
            or what is ``"misclassified"``.
        show: slow examples as ``"copies"``, or their loss times ``factor`` (``"weights"``), for comparison.
        outputs: what is clustered: ``"logits"``, ``"probabilities"``, or the ``"features"`` that the classifier gets.
        layer: dotted name of the classifier, whose output are the logits; None finds it.
        criterion: gives the loss of each example, ``criterion(logits, targets)`` to ``(N,)``; None is cross entropy.
        clean: name of the method of the datamodule or the module that returns a loader of the same examples without
            augmentation, in the same order. None takes ``clean_train_dataloader`` if there is one, and else the
            training data as they come.
        selection: path of a selection that another run has written: used from the first epoch, without a first part.
        length: ``"grow"`` lengthens the epochs, ``"keep"`` takes the counts as weights, see ``data.PlanSampler``.
        half: keep the outputs in float16 while they are collected: half the memory, for logits off by up to 0.05 %.
        seed: of the orders, of clustering, and of all random numbers at the second start.
        loader: which of several training loaders, see ``DataPlan``.
        target_key: where a batch keeps class indices, see ``joints.features.batches``.
        forward: ``forward(module, batch)`` that runs the network; None runs it as the module's own step does, see
            ``joints.data.ways``.

    Attributes:
        selection: the ``data.Selection``; None before.

    Cost: the epochs of the first part, one pass without gradient, and clustering. The first process holds ``4 N F``
    bytes of outputs in the memory of the host.
    """

    @checked
    def __init__(
        self,
        separating_epoch: When = 0.05,
        factor: int = 2,
        restart: bool = True,
        choose: Choose = "clusters",
        show: Literal["copies", "weights"] = "copies",
        outputs: Outputs = "logits",
        layer: str | None = None,
        criterion: Criterion | None = None,
        clean: str | None = None,
        selection: str | None = None,
        length: Length = "grow",
        half: bool = False,
        seed: int = 0,
        loader: str | int | None = None,
        target_key: TargetKey = None,
        forward: Forward | None = None,
    ) -> None:
        if show == "weights" and loader is not None:
            raise ValueError(f"{show=}, {loader=}: choose 'copies' or, with one training loader, 'weights'.")
        if factor < 2:
            raise ValueError(f"factor={factor} must be at least 2: how often a slow example is shown.")
        super().__init__(self._counts_in, length, seed, loader)
        self.factor, self.restart, self.show = factor, restart, show
        self.clean, self.criterion, self.target_key, self.path = clean, criterion, target_key, selection
        self.look = SlowPass(layer, outputs, choose, criterion, target_key, forward, half)
        self.term = SlowLossTerm(layer, factor, criterion, target_key) if show == "weights" else None
        self.selection: Selection | None = None
        self._stage: Literal["searching", "found", "using"] = "searching"
        self.knee = LossKnee(self.look.logits, criterion, target_key)
        self.separating = SeparatingEpoch(separating_epoch, self.knee)
        self.separating_epoch = self.separating.given
        self._beginning: Beginning | None = None
        self._step_hooks: list[list[str]] = []  # of the first start
        self._first_weights: dict[str, Tensor] | None = None  # where a checkpoint brings them
        self._first_states: dict[str, Any] | None = None
        self._folder = ""

    @property
    def state_key(self) -> str:
        return f"SimplicityBiasUpsampler[{'train' if self.loader is None else self.loader}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_step == 0:
            self.selection, self._stage, self.knee.losses = None, "searching", []
            self._beginning = self._first_weights = self._first_states = None
            if self.path is not None:
                self.selection, self._stage = Selection.load(self.path), "using"
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        logs = trainer.loggers and not getattr(trainer, "fast_dev_run", False)
        self._folder = run_folder(trainer) if logs else ""
        if self.restart and type(trainer.strategy).__name__ in ("ModelParallelStrategy", "FSDPStrategy"):
            raise ValueError(f"{self.state_key}: sharded parameters cannot start again; set restart=False.")
        if self.term is not None:
            self.term.use(self.selection if self._stage == "using" else None)
            add_loss_term(pl_module, self.term)
        run_fit_by(trainer, self, self._fit(trainer, pl_module))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._first_states is None:  # those of the checkpoint come after this
            self._first_states = states_of_callbacks(trainer)
        if self.restart and self._stage == "searching" and self.state_key not in checkpoint.get("callbacks", {}):
            raise ValueError(
                f"the checkpoint was written without {self.state_key}, which cannot tell the weights it began with: "
                "set restart=False, give it a selection, or begin from the start."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.look.attach(pl_module)
        check_found(pl_module, self.state_key, [self.look.logits])
        if self._stage == "using":
            return
        self.separating.begin(trainer, followed=not self.restart)
        if self.restart:
            refuse_averaging_within(trainer, self.separating.until, self.state_key)
            self._beginning = Beginning(trainer, pl_module, self._first_weights, self._first_states)
            self._beginning.callbacks.pop(self.state_key, None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = one_train_loader(trainer, self.loader)
        if not processes_share(trainer, loader):
            raise ValueError(
                f"{self.state_key}: with use_distributed_sampler=False each process has data of its own, of which no "
                "common selection can be made: leave it True, and give all processes the same data set."
            )
        if self._beginning is not None and trainer.global_step == 0:
            self._beginning.see_optimizers(trainer)  # a search for a learning rate may have set it since
        size = len(loader.dataset)
        if self.selection is not None:
            if len(self.selection.slow) != size:
                raise ValueError(self._of_other_data(len(self.selection.slow), size))
        else:
            clean = self._clean(trainer, pl_module)  # what is wrong with the data is said now
            if trainer.is_global_zero:
                warn_of_augmentation(clean, self.state_key)
            self.look.try_first_batch(trainer, pl_module, clean)
            # Lightning does not end an epoch again that was cut off after its last batch.
            if 0 < self.separating.until <= trainer.current_epoch:
                self._select(trainer, pl_module, trainer.current_epoch)
        super().on_train_start(trainer, pl_module)
        self.knee.begin_epoch(pl_module.device)  # an epoch resumed in its middle does not start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.knee.begin_epoch(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and self._stage == "searching":  # what is wrong with the targets is said now
            targets = targets_of(part_of_batch(trainer, batch, self.loader), self.target_key)
            class_indices(targets, targets.numel(), "the targets")
        if self._step_hooks:
            warn_of_lost_hooks(trainer, self._step_hooks)
            self._step_hooks = []
        if self._seeks_knee:
            self.knee.listen()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.knee.hold()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._seeks_knee:
            self.knee.take(part_of_batch(trainer, batch, self.loader))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.selection is not None:
            share = self.selection.slow.float().mean().to(pl_module.device)
            pl_module.log("simplicity_bias/slow_share", share, sync_dist=True)
        if self._stage == "searching" and self.separating.is_over(trainer):
            self._select(trainer, pl_module, trainer.current_epoch + 1)
            if self.restart:
                return
        super().on_train_epoch_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._leave(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._leave(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        first = self._first_weights if self._beginning is None else self._beginning.weights
        return {
            "stage": self._stage,
            "losses": list(self.knee.losses),
            "selection": None if self.selection is None else self.selection.state_dict(),
            "first_weights": None if self._stage == "using" else first,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.path is not None:
            return  # the selection given counts
        self._stage, self.knee.losses = state_dict["stage"], list(state_dict["losses"])
        found = state_dict["selection"]
        self.selection = None if found is None else Selection.from_state_dict(found)
        self._first_weights = state_dict["first_weights"]
        if self.term is not None:
            self.term.use(self.selection if self._stage == "using" else None)

    @property
    def _seeks_knee(self) -> bool:
        return self.separating.by_knee and self._stage == "searching"

    def _counts_in(self, epoch: int) -> Tensor | None:
        """The plan of an epoch."""
        if self.selection is None or self.term is not None or self._stage != "using":
            return None
        begins = 0 if self.restart or self.path is not None else self.selection.epoch
        return self.selection.counts() if epoch >= begins else None

    def _fit(self, trainer: Trainer, module: LightningModule) -> Callable[[Callable[[], None]], None]:
        def run(loop: Callable[[], None]) -> None:
            limits = trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps
            if self._stage != "found":  # a checkpoint may have been written between the two parts
                loop()
                trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = limits
            if self._stage == "found" and self._beginning is not None:
                self._use()
                self._step_hooks = begin_again(trainer, module, self._beginning, self.seed)
                self._beginning = self._resume = None
                loop()
            elif self._stage == "searching":
                rank_zero_warn(f"{self.state_key}: training ended before the separating epoch; no example was chosen.")

        return run

    def _select(self, trainer: Trainer, module: LightningModule, epochs: int) -> None:
        size = len(one_train_loader(trainer, self.loader).dataset)
        clean = self._clean(trainer, module)
        self.selection = self.look.choose_slow(trainer, module, clean, size, epochs, self.factor, self.seed)
        share = self.selection.slow.float().mean()
        rank_zero_info(
            f"{self.state_key}: {share:.0%} of {size} training examples are slow after {self.selection.epoch} epochs."
        )
        self._stage = "found"
        if self.restart:  # the fit loop ends, whatever min_epochs and min_steps say, and begins again in `_fit`
            trainer.should_stop, trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = True, 0, None
        else:
            self._use()
        if trainer.is_global_zero and self._folder:
            write_selection(trainer, self.selection, self._folder, self.state_key)

    def _of_other_data(self, number: int, size: int, epoch: int = 0) -> str:
        return (
            f"{self.state_key}: the selection is of {number} examples, but the training data have {size}: give the "
            "data it was made for, or choose anew, by a new callback."
        )

    def _use(self) -> None:
        self._stage = "using"
        if self.term is not None:
            self.term.use(self.selection)

    def _clean(self, trainer: Trainer, module: LightningModule) -> DataLoader[Any]:
        """This process's share of the training examples, as they are."""
        loader = clean_training_loader(trainer, module, self.clean, self.loader)
        return clean_loader(trainer, loader, "training")

    def _leave(self, trainer: Trainer, module: LightningModule) -> None:
        self.look.remove()
        forget_check(module, self.state_key)
        run_fit_as_before(trainer)
        if self.term is not None:
            remove_loss_term(module, self.term)
