"""Which examples an epoch shows, how often and in which order, as a plan."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_feat.joints.arguments import checked

Length = Literal["grow", "keep"]


class PlanSampler(DistributedSampler[Any]):
    """Shows example i ``counts[i]`` times in an epoch, shuffled; the order depends on nothing but the arguments, the
    epoch and the process.

    So the same epoch can be dealt again: in a run that is resumed, and on each process its share of one order.
    Lightning leaves a ``DistributedSampler`` in its place, and tells it the epoch. New counts, by ``set_counts``, hold
    from the next iteration on; a loader that is in use keeps its number of batches until it is made anew.

    Args:
        counts: ``(N,)`` how often each example of the data set comes, zero or more.
        length: ``"grow"`` shows every example as often as its count says: the epoch has ``sum(counts)`` examples.
            ``"keep"`` leaves the epoch at N examples, as schedules expect that were sized in advance, and takes the
            counts as weights: example i comes ``N counts[i] / sum(counts)`` times, rounded up in some epochs and down
            in others.
        num_replicas: number of processes. The last examples of uneven shares are filled up from the beginning.
        rank: index of this process.
        seed: of the order.
        skip: examples of this process that the first iteration leaves out: those it had before a run was cut off.

    Raises:
        ValueError: if a count is negative or no whole number, or all are zero.

    Example:
        >>> sampler = PlanSampler([1, 0, 2])
        >>> sorted(sampler), len(sampler)
        ([0, 2, 2], 3)
    """

    @checked
    def __init__(
        self,
        counts: Tensor | Sequence[int],
        length: Length = "grow",
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        skip: int = 0,
    ) -> None:
        self.counts = _checked(counts)
        super().__init__(range(len(self.counts)), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.length = length
        self.resume(skip)
        self._cut_epoch: int | None = None  # the epoch that `skip` belongs to; None for that of the first iteration

    def resume(self, skip: int, shown: int | None = None) -> None:
        """Leave out of this epoch, in its first iteration, what was shown of it before a run was cut off.

        Args:
            skip: examples that this process had. They count in the length, so that batches keep their numbers.
            shown: examples that all processes had together; None for ``skip`` on each. Where they were other processes,
                what is left is dealt out among those of today.
        """
        if skip < 0 or (shown is not None and shown < 0):
            raise ValueError(f"skip={skip} and shown={shown} must not be negative.")
        self.skip, self.shown = skip, skip * self.num_replicas if shown is None else shown
        self._first, self._cut_epoch = True, self.epoch

    def set_counts(self, counts: Tensor | Sequence[int]) -> None:
        """Replace the counts, for the same examples."""
        counts = _checked(counts)
        if len(counts) != len(self.counts):
            raise ValueError(f"{len(counts)} counts for {len(self.counts)} examples: give one for each.")
        self.counts = counts

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; one that was not cut off is shown whole."""
        if self._cut_epoch not in (None, epoch):
            self.skip = self.shown = 0
        super().set_epoch(epoch)

    @property
    def num_shown(self) -> int:
        """Examples in an epoch, over all processes, before shares are filled up."""
        return len(self.counts) if self.length == "keep" else int(self.counts.sum())

    def order(self) -> Tensor:
        """Indices ``(num_shown,)`` of the examples in the order of this epoch, over all processes."""
        # Not seed + epoch, which two runs would share but for a shift; and torch's generator takes 32 bits.
        digest = hashlib.blake2b(f"{self.seed}, {self.epoch}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        if self.length == "grow":
            shown = torch.arange(len(self.counts)).repeat_interleave(self.counts)
        else:  # systematic sampling: evenly spaced points along the counts, from a random start; in whole numbers
            size, total = len(self.counts), int(self.counts.sum())
            start = min(int(torch.rand((), generator=generator, dtype=torch.float64) * total), total - 1)
            points = (torch.arange(size) * total + start) // size
            shown = torch.searchsorted(self.counts.cumsum(0), points, right=True)
        return shown[torch.randperm(len(shown), generator=generator)]

    def places(self, first: int = 0, size: int | None = None) -> Tensor:
        """Where in the order what this process sees in this epoch stands, in turn, from the ``first`` on and at most
        ``size``. Places from ``num_shown`` on are filled up from the beginning of the order.
        """
        index = torch.arange(first, len(self) if size is None else max(first, min(first + size, len(self))))
        had = index < self.skip
        left = self.shown + (index - self.skip) * self.num_replicas
        return torch.where(had, index * self.num_replicas, left) + self.rank

    def share(self) -> Tensor:
        """Indices ``(len(self),)`` of what this process sees in this epoch, in that order, all of it."""
        order = self.order()
        return order[self.places() % len(order)]

    def shown_after(self, num_had: int) -> int:
        """Examples of this epoch that all processes have had together when this one has had ``num_had``."""
        return min(self.num_shown, self.shown + max(0, num_had - self.skip) * self.num_replicas)

    def repeats(self, first: int, size: int) -> Tensor:
        """Mask of the examples from ``first`` on, at most ``size``, that this process sees to fill up its share."""
        return self.places(first, size) >= self.num_shown

    def __iter__(self) -> Iterator[int]:
        skip, self._first = self.skip if self._first else 0, False
        self._cut_epoch = self.epoch if self._cut_epoch is None else self._cut_epoch
        yield from self.share()[skip:].tolist()

    def __len__(self) -> int:
        """Examples of an epoch on each process."""
        return self.skip + -(-max(0, self.num_shown - self.shown) // self.num_replicas)


def _checked(counts: Tensor | Sequence[int]) -> Tensor:
    found = torch.as_tensor(counts).cpu()
    if found.ndim != 1 or found.is_floating_point() or found.is_complex():
        raise ValueError(f"counts must be whole numbers (N,), got {found.dtype} {tuple(found.shape)}.")
    if len(found) == 0 or found.min() < 0 or found.sum() == 0:
        least = int(found.min()) if len(found) else "none"
        raise ValueError(f"counts must not be negative, and not all zero; the least is {least}.")
    return found.long()
