from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_feat.functional.simplicity_bias.blocks import crossed_counts, reliance_of_counts
from lightning_feat.functional.simplicity_bias.reliance import binary_auc
from lightning_feat.joints.data.drawn import paired_loader
from lightning_feat.joints.data.passes import clean_batches, hear
from lightning_feat.joints.data.processes import gather_samples
from lightning_feat.joints.data.shared_pass import Again
from lightning_feat.joints.features.inputs import every_other, floating_inputs, with_inputs
from lightning_feat.joints.features.taps import FeatureTap

if TYPE_CHECKING:
    from lightning_feat.callbacks.simplicity_bias.reliance import FeatureRelianceMonitor

_ALL = "all"  # the data as they are


class RelianceReading:
    """The data as they are, and then pairs of samples, of which the first borrows a block of the second.

    Attributes:
        values: ``<measure>/<block>``, the same on all processes.
    """

    title = "Feature reliance"

    def __init__(self, trainer: Trainer, module: LightningModule, monitor: "FeatureRelianceMonitor") -> None:
        self._trainer, self._module, self._monitor = trainer, module, monitor
        self.taps: Sequence[FeatureTap] = [monitor.logits]
        self._clean = _Outputs()
        self.values: dict[str, Tensor] = {}

    def take(self, batch: Any) -> None:
        logits = self.taps[0].take()
        t = self._monitor.classes(batch, len(logits)).to(logits.device)
        self._clean.add(logits, t, t)

    def finish(self, again: Again) -> None:
        found: dict[str, list[_Outputs]] = {name: [] for name in self._monitor.blocks}
        best: dict[str, _Outputs] = {}
        for repeat in range(self._monitor.repeats):
            for name in found:
                found[name].append(_Outputs())
            self._run_pairs(repeat, {name: outputs[-1] for name, outputs in found.items()}, best)
        # A process that had no sample does not know how many classes there are.
        widths = [outputs.num_classes for outputs in [self._clean, *(o for os in found.values() for o in os)]]
        width = torch.tensor(max(widths), device=self._module.device)
        num_classes = int(self._trainer.strategy.reduce(width, reduce_op="max"))
        self._measures(_ALL, [self._clean], num_classes)
        for name, outputs in found.items():
            self._measures(name, outputs, num_classes)
            counts = self._of_all(torch.stack([o.followed(num_classes) for o in outputs]).sum(0))
            reliance = reliance_of_counts(counts)
            if self.values[f"randomised_accuracy/{name}"].isnan():
                reliance = torch.full_like(reliance, torch.nan)
            self.values[f"reliance/{name}"] = reliance
            if self._monitor.best is not None:
                rule = best.get(name, _Outputs()).followed(num_classes)
                self.values[f"shortcut_bias/{name}"] = reliance - reliance_of_counts(self._of_all(rule))

    def _run_pairs(self, repeat: int, found: "dict[str, _Outputs]", best: "dict[str, _Outputs]") -> None:
        trainer, module, monitor = self._trainer, self._module, self._monitor
        pairs = paired_loader(trainer, monitor.loader(trainer), monitor.data, monitor.seed + repeat)
        for batch in clean_batches(trainer, module, pairs):
            way = monitor.ways.find(trainer, module, batch, monitor.data, self.taps)
            both = floating_inputs(batch, monitor.input_key)
            inputs, others, rest = both[::2], both[1::2], every_other(batch, len(both))
            classes = monitor.classes(batch, len(both)).to(both.device)
            for name, outputs in found.items():
                mixed = monitor.exchanged(name, inputs, others)
                (logits,) = hear(trainer, module, with_inputs(rest, mixed, monitor.input_key), self.taps, way)
                views = len(logits) // max(len(mixed), 1)
                own, lender = (classes[first::2].repeat(views).to(logits.device) for first in (0, 1))
                outputs.add(logits, own, lender)
                chosen = monitor.best_classes(mixed)
                if chosen is not None:
                    own, lender = (classes[first::2].to(chosen.device) for first in (0, 1))
                    best.setdefault(name, _Outputs()).add_chosen(chosen, own, lender, logits.shape[1])

    def _measures(self, name: str, outputs: "list[_Outputs]", num_classes: int) -> None:
        prefix = "" if name == _ALL else "randomised_"
        sums = self._of_all(torch.stack([o.right_and_all() for o in outputs]).sum(0))
        self.values[f"{prefix}accuracy/{name}"] = sums[0] / sums[1]
        if num_classes == 2:
            areas = [self._area(o) for o in outputs]
            self.values[f"{prefix}auc/{name}"] = torch.stack(areas).mean()

    def _area(self, outputs: "_Outputs") -> Tensor:
        scores, targets = outputs.scores(self._module.device)
        index = torch.arange(len(targets), device=targets.device)
        every, classes, _ = gather_samples(scores, targets, index)
        if not every.isfinite().all():
            return torch.tensor(torch.nan, dtype=torch.float64)
        return binary_auc(every[:, 0], classes).cpu()

    def _of_all(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        if self._trainer.world_size == 1:
            return value
        total: Any = self._trainer.strategy.reduce(value.to(self._module.device), reduce_op="sum")
        return total.to(value.device)  # type: ignore[no-any-return]


class _Outputs:
    """What came out for samples, each with its own class and that of the lender of the block."""

    def __init__(self) -> None:
        self.num_classes = 0
        self._chosen: list[Tensor] = []  # predicted, own class, class of the lender
        self._scores: list[Tensor] = []  # of two classes, the difference of the logits
        self._bad = False

    def add(self, logits: Tensor, own: Tensor, lender: Tensor) -> None:
        keep = (own >= 0) & (lender >= 0)
        logits, own, lender = logits[keep].float(), own[keep], lender[keep]
        self._bad = self._bad or not bool(logits.isfinite().all())
        self.add_chosen(logits.argmax(1), own, lender, logits.shape[1])
        if logits.shape[1] == 2:
            self._scores.append((logits[:, 1] - logits[:, 0]).cpu())

    def add_chosen(self, chosen: Tensor, own: Tensor, lender: Tensor, num_classes: int) -> None:
        keep = (own >= 0) & (lender >= 0)
        self._chosen.append(torch.stack([chosen, own, lender])[:, keep].cpu())
        self.num_classes = max(self.num_classes, num_classes)

    def _columns(self) -> Tensor:
        return torch.cat([torch.zeros(3, 0, dtype=torch.long), *self._chosen], dim=1)

    def right_and_all(self) -> Tensor:
        """``(2,)``; nan where a logit is."""
        chosen, own, _ = self._columns()
        right = (chosen == own).sum().double()
        return torch.stack([torch.full_like(right, torch.nan) if self._bad else right, torch.tensor(len(own)).double()])

    def followed(self, num_classes: int) -> Tensor:
        chosen, _, lender = self._columns()
        return crossed_counts(chosen, lender, num_classes)

    def scores(self, device: torch.device) -> tuple[Tensor, Tensor]:
        scores = torch.cat([torch.zeros(0), *self._scores])
        return scores[:, None].to(device), self._columns()[1].to(device)
