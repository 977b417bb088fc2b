import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_feat.functional.feature_shift import (
    cosine_shift,
    feature_distillation,
    l2_sp,
    relative_shift,
    shift_consistency_loss,
)
from lightning_feat.joints.arguments import checked
from lightning_feat.joints.data.calls import Forward
from lightning_feat.joints.features.batches import TargetKey
from lightning_feat.joints.features.pooling import Pooling
from lightning_feat.joints.features.taps import FeatureTap, Read
from lightning_feat.joints.loss.engine import add_loss_term, remove_loss_term
from lightning_feat.joints.loss.terms import LossTerm, Weight, WeightSchedule
from lightning_feat.joints.reference import (
    CachedStart,
    Compared,
    Comparison,
    FrozenStart,
    StartWeights,
    TowerComparison,
    WithoutPrompts,
    compare_towers,
    find_brings,
    is_new_run,
    refuse_sharding,
    warn_of_missing_start,
)
from lightning_feat.joints.run.inside import InsideFit
from lightning_feat.joints.run.twins import refuse_twin

Form: TypeAlias = Literal["relative", "distillation", "cosine", "l2_sp", "consistency"]
ReferenceKind: TypeAlias = Literal["live", "cached", "without_prompts"]

PENALTIES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "relative": relative_shift,
    "distillation": feature_distillation,
    "cosine": cosine_shift,
}


class FeatureShiftRegularizer(Callback):
    """Hold a network near its start while it is fine-tuned, by its features or by its weights; or hold the two towers
    of a CLIP together.

    Forms, all defined in ``functional.feature_shift``; of several layers the mean is taken:

    - ``"relative"``: distance of the features to their reference, as a share of the reference's length;
    - ``"distillation"``: mean squared distance, in the unit of the features;
    - ``"cosine"``: one minus the cosine, blind to lengths;
    - ``"l2_sp"``: half the squared distance of the weights of ``layers`` (None: of the whole module) to their start;
      ``weight`` is the alpha of the paper. ``new_layers`` have no start, are left out of it and pulled to zero with
      ``new_weight``, its beta: name a new head there. Switch the optimizer's own weight decay off.
    - ``"consistency"``: of two towers, the squared difference of their relative shifts, summed over pairs of blocks.

    The reference is ``"live"``, a frozen copy run on what the network is run on; ``"cached"``, the features of every
    training example, kept by index, which no augmentation may change; or ``"without_prompts"``, the same model with its
    prompts switched off (see ``joints.reference`` for memory and time of each). It runs in eval mode, the
    network as it is trained: dropout and batch statistics are part of the shift, which is then not zero at the start.

    The start is that of the run. It is part of the checkpoint, so that a resumed run is held to it bit for bit; with
    ``start`` it is a file instead. Logs ``feature_shift/loss/<form>``, the value without weight, and
    ``feature_shift/share/<form>``, its weighted share of the loss.

    Under DDP each process takes the shift of its own batch. FSDP2 is refused.

    Args:
        layers: dotted name or names; None for the input of the classifier. With two towers leave it out.
        form: see above.
        weight: factor of the term, a number or a ``WeightSchedule``.
        reference: see above.
        text_layers: blocks of the text tower, for two towers; None for all, in a CLIP of a known layout.
        image_layers: blocks of the image tower, as many.
        read: the ``"output"`` or the ``"input"`` of ``layers``.
        pooling: see ``joints.features.pooling.pool``; by default every token and position counts by itself.
        mask_key: where a batch keeps which tokens count ``(N, T)``, an attention mask say; see
            ``joints.features.batches``.
        trunk: submodule to copy, see ``joints.reference.FrozenStart``.
        start: file with the weights of the reference, a state dict or a checkpoint.
        forward: ``forward(module, batch)`` that runs the network, where the reference cannot run it by itself.
        index_key: for ``"cached"``, where a batch keeps the index of each example.
        cache_dtype: for ``"cached"``, what features are kept in.
        new_layers: for ``"l2_sp"``, see above.
        new_weight: for ``"l2_sp"``, see above.
        backward_index: with manual optimization, which ``manual_backward`` of a step the term joins, from 0.
    """

    @checked
    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        form: Form = "relative",
        weight: Weight = 1.0,
        reference: ReferenceKind = "live",
        text_layers: Sequence[str] | None = None,
        image_layers: Sequence[str] | None = None,
        read: Read | None = None,
        pooling: Pooling | None = "tokens",
        mask_key: TargetKey = None,
        trunk: str | None = None,
        start: str | None = None,
        forward: Forward | None = None,
        index_key: TargetKey = None,
        cache_dtype: Literal["float16", "float32"] = "float32",
        new_layers: Sequence[str] | None = None,
        new_weight: float = 0.0,
        backward_index: int = 0,
    ) -> None:
        schedule = weight if isinstance(weight, WeightSchedule) else WeightSchedule(float(weight))
        if schedule.peak < 0 or new_weight < 0:
            raise ValueError(f"weight={schedule.peak} and {new_weight=}: neither can be negative.")
        if form != "l2_sp" and (new_layers or new_weight):
            raise ValueError(f"new_layers and new_weight belong to form='l2_sp', not to form={form!r}.")
        self.towers = form == "consistency" or reference == "without_prompts" or bool(text_layers or image_layers)
        if self.towers and (layers is not None or form == "l2_sp" or reference == "cached"):
            raise ValueError(
                f"{layers=}, {form=}, {reference=} with two towers: give text_layers and image_layers in place of "
                "layers, a form of features, and reference='live' or 'without_prompts'."
            )
        if (start is not None or trunk is not None) and (form == "l2_sp" or reference != "live"):
            raise ValueError(f"{start=} and {trunk=} belong to a live reference of features.")
        self.layers = [layers] if layers is None or isinstance(layers, str) else list(layers)
        if len(set(self.layers)) < len(self.layers) or not self.layers:
            raise ValueError(f"layers={layers}: name each layer once, and at least one.")
        self.form, self.weight, self.backward_index = form, schedule, backward_index
        self.text_layers, self.image_layers = text_layers, image_layers
        self.without_prompts, self.trunk, self.start, self.forward = (
            reference == "without_prompts",
            trunk,
            start,
            forward,
        )
        self.reference: FrozenStart | CachedStart | WithoutPrompts | StartWeights | None = None
        self.term: LossTerm | None = None  # of two towers it is made when a fit begins
        self._of: weakref.ref[LightningModule] | None = None  # whose start it is
        self._inside = InsideFit()
        if form == "l2_sp":
            names = None if layers is None else [str(name) for name in self.layers]
            self.reference = StartWeights(names, new_layers or [])
            self.term = _WeightTerm(self.reference, schedule, new_weight, backward_index)
        elif not self.towers:
            if reference == "cached":
                self.reference = CachedStart(self.layers, read, pooling, index_key, cache_dtype, forward)
            else:
                self.reference = FrozenStart(self.layers, read, pooling, trunk, forward, start, keep_graph=True)
            comparison = Comparison(self.layers, self.reference, read, pooling, mask_key, keep_graph=True)
            self.term = _FeatureTerm(comparison, form, schedule, backward_index)

    @property
    def state_key(self) -> str:
        return f"FeatureShiftRegularizer[{self.form}]"

    # Not by state_dict: of two stateful callbacks with one key Lightning complains before refuse_twin can say why.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.reference is not None and not isinstance(self.reference, WithoutPrompts):
            checkpoint[self.state_key] = self.reference.state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.reference is None or isinstance(self.reference, WithoutPrompts) or trainer.state.fn != "fit":
            return
        self._inside.load(trainer)
        if self._inside:
            return  # a search goes back to where it began; the start of the run is known
        if not checkpoint.get(self.state_key) and self.start is None:
            warn_of_missing_start(self.state_key)
        self.reference.restore(checkpoint.get(self.state_key, {}))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        if stage != "fit":
            return
        self._inside.setup(trainer)
        refuse_sharding(trainer, self.state_key)
        if self.towers and self.term is None:
            comparison = compare_towers(
                pl_module, self.text_layers, self.image_layers, self.without_prompts, self.forward, self.trunk,
                self.start, keep_graph=True,
            )  # fmt: skip
            self.reference = comparison.reference
            self.term = _TowerTerm(comparison, self.form, self.weight, self.backward_index)
        if isinstance(self.term, _TowerTerm):
            brings = find_brings(trainer, pl_module) if self.without_prompts else None
            self.term.comparison.begin(pl_module, brings)
        if self.reference is not None and is_new_run(trainer, pl_module, self._of):
            self.reference.begin()  # of an earlier run; a checkpoint, if any, is loaded after this
        self._of = weakref.ref(pl_module)
        if self.term is not None:
            add_loss_term(pl_module, self.term)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inside.train_start()
        if isinstance(self.reference, CachedStart):
            self.reference.fill(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if isinstance(self.reference, CachedStart):
            self.reference.check(trainer, pl_module, batch)
        elif isinstance(self.reference, FrozenStart):
            self.reference.prepare(trainer, pl_module, batch)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # after an exception Lightning does not call teardown

    def _let_go(self, pl_module: LightningModule) -> None:
        if self.term is not None:
            remove_loss_term(pl_module, self.term)
        if self.reference is not None:
            self.reference.remove()


class _ShiftTerm(LossTerm):
    """Logged under the name of its form, whatever its layers."""

    def __init__(self, form: str, weight: WeightSchedule, taps: Sequence[FeatureTap], backward_index: int) -> None:
        super().__init__("feature_shift", weight, taps, backward_index=backward_index)
        self.form = form

    @property
    def key(self) -> str:
        return f"feature_shift@{self.form}"

    def log_name(self, measure: str) -> str:
        return f"feature_shift/{measure}/{self.form}"


def _penalty(form: str, pair: Compared) -> Tensor:
    """Zero where the penalty is not defined, as the loss is not to become nan: no token counts, or the reference has no
    length that a shift could be a share of.
    """
    counted = pair.reference if pair.mask is None else pair.reference[pair.mask]
    defined = bool(counted.any()) if form == "relative" else len(counted) > 0
    return PENALTIES[form](*pair) if defined else pair.features[:0].sum()


class _FeatureTerm(_ShiftTerm):
    def __init__(self, comparison: Comparison, form: str, weight: WeightSchedule, backward_index: int) -> None:
        super().__init__(form, weight, comparison.all_taps, backward_index)
        self.comparison = comparison

    def value(self, module: LightningModule, batch: Any) -> Tensor:
        compared = self.comparison.take(module, batch).values()
        return torch.stack([_penalty(self.form, pair) for pair in compared]).mean()


class _TowerTerm(_ShiftTerm):
    def __init__(self, comparison: TowerComparison, form: str, weight: WeightSchedule, backward_index: int) -> None:
        super().__init__(form, weight, comparison.all_taps, backward_index)
        self.comparison = comparison

    def value(self, module: LightningModule, batch: Any) -> Tensor:
        compared = self.comparison.take(module, batch)
        if self.form != "consistency":
            return torch.stack([_penalty(self.form, pair) for pair in compared.values()]).mean()
        still = torch.zeros((), device=module.device)  # of a text tower that has no prompts, and did not run
        shift = {label: _penalty("relative", pair) for label, pair in compared.items()}
        text, image = ([shift.get(tap.label, still) for tap in taps] for taps in self.comparison.pairs)
        return shift_consistency_loss(torch.stack(text), torch.stack(image))


class _WeightTerm(_ShiftTerm):
    def __init__(self, start: StartWeights, weight: WeightSchedule, new_weight: float, backward_index: int) -> None:
        super().__init__("l2_sp", weight, [start.tap], backward_index)
        self.start = start
        self.ratio = new_weight / weight.peak if weight.peak else 0.0  # so that a schedule moves both

    def value(self, module: LightningModule, batch: Any) -> Tensor:
        old, new = self.start.split(module)
        held = l2_sp(list(old.values()), [self.start.start[name] for name in old])
        return held + self.ratio * l2_sp(list(new.values()), [None] * len(new))
