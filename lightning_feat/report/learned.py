"""When each sample was right for good, from several looks at the same samples."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_feat.report.feature_set import FeatureSet


@dataclass
class Learned:
    """What several looks have shown.

    Attributes:
        ids: of the samples, see ``FeatureSet.ids``.
        since: ``(N,)`` the look from which on a sample was right in all; -1 where it was wrong in the last.
        times: when was looked, in words and in order.
    """

    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    since: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    times: list[str] = field(default_factory=list)

    def note(self, rows: FeatureSet, when: str) -> None:
        """One more look. Other samples than before begin anew; without classes and predictions there is none."""
        if rows.kind != "classes" or rows.predicted is None or rows.targets is None:
            return
        if not torch.equal(self.ids, rows.ids):
            self.ids, self.since, self.times = rows.ids, torch.full_like(rows.ids, -1), []
        now = torch.full_like(self.since, len(self.times))
        right = rows.predicted == rows.targets
        self.since = torch.where(right, torch.where(self.since >= 0, self.since, now), -1)
        self.times = [*self.times, when]

    def of(self, rows: FeatureSet) -> "Learned | None":
        """This, where it is about these samples, and there were two looks at least."""
        return self if len(self.times) > 1 and torch.equal(self.ids, rows.ids) else None

    def take(self, rows: Tensor) -> "Learned":
        """That of these rows alone."""
        return Learned(self.ids[rows], self.since[rows], self.times)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"ids": self.ids, "since": self.since, "times": self.times}
