"""Which training examples were chosen, why and when: what a run finds and another can use."""

from dataclasses import asdict, dataclass
from io import BytesIO
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """The slow examples of a training set of N examples and C classes.

    Args:
        slow: ``(N,)`` bool, what was chosen, in the order of the data set.
        targets: ``(N,)`` class indices, -1 for an example that was not looked at.
        cluster: ``(N,)`` 0 or 1, the cluster of each example within its class.
        loss: ``(C, 2)`` mean loss of both clusters; nan for an empty one.
        epoch: epochs that the network had been trained.
        factor: how often a slow example is shown.
        seed: of clustering and of drawing.
        choose: the rule, see ``callbacks.SimplicityBiasUpsampler``.
    """

    slow: Tensor
    targets: Tensor
    cluster: Tensor
    loss: Tensor
    epoch: int
    factor: int
    seed: int
    choose: str

    def counts(self) -> Tensor:
        """How often each example is shown, ``(N,)``."""
        return 1 + (self.factor - 1) * self.slow.long()

    def per_class(self) -> dict[int, Tensor]:
        """Indices of the slow examples of each class."""
        return {c: (self.slow & (self.targets == c)).nonzero()[:, 0] for c in range(len(self.loss))}

    def state_dict(self) -> dict[str, Any]:
        """All of it, in small types."""
        return {**asdict(self), "targets": self.targets.int(), "cluster": self.cluster.to(torch.uint8)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Selection":
        """The inverse of ``state_dict``."""
        return cls(**{**state, "targets": state["targets"].long(), "cluster": state["cluster"].long()})

    def save(self, path: str) -> None:
        """Write it, to be read by ``load``."""
        content = BytesIO()
        torch.save(self.state_dict(), content)
        files, unfinished = get_filesystem(path), f"{path}.part"
        with files.open(unfinished, "wb") as file:
            file.write(content.getvalue())
        files.mv(unfinished, path)  # in one step where the disk is local: what has this name is whole

    @classmethod
    def load(cls, path: str) -> "Selection":
        """Read what ``save`` wrote.

        Raises:
            ValueError: if the file is missing, torn, or holds something else.
        """
        files = get_filesystem(path)
        if not files.exists(path):
            raise ValueError(f"there is no selection at {path}: a run with the callback writes selection.pt.")
        with files.open(path, "rb") as file:
            try:
                state = torch.load(file, weights_only=True)
            except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
                raise ValueError(f"{path} is torn or no file of torch.save: choose anew ({error}).") from error
        if not isinstance(state, dict) or not {"slow", "targets", "cluster", "loss"} <= state.keys():
            raise ValueError(f"{path} holds no selection: a run with the callback writes selection.pt.")
        return cls.from_state_dict(state)
