"""Which examples an epoch shows, how often and in which order, as a plan."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

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

    def __init__(
        self,
        counts: Tensor | Sequence[int],
        length: Length = "grow",
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        skip: int = 0,
    ) -> None:
        if length not in get_args(Length):
            raise ValueError(f"length={length!r}: choose 'grow' or 'keep'.")
        if skip < 0:
            raise ValueError(f"skip={skip} must not be negative.")
        self.counts = _checked(counts)
        super().__init__(range(len(self.counts)), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.length, self.skip = length, skip

    def set_counts(self, counts: Tensor | Sequence[int]) -> None:
        """Replace the counts, for the same examples."""
        counts = _checked(counts)
        if len(counts) != len(self.counts):
            raise ValueError(f"{len(counts)} counts for {len(self.counts)} examples: give one for each.")
        self.counts = counts

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
        else:  # systematic sampling: evenly spaced points along the counts, from a random start
            start = torch.rand((), generator=generator, dtype=torch.float64)
            points = (torch.arange(len(self.counts)) + start) * (self.counts.sum() / len(self.counts))
            shown = torch.searchsorted(self.counts.cumsum(0).double(), points, right=True)
        return shown[torch.randperm(len(shown), generator=generator)]

    def share(self) -> Tensor:
        """Indices ``(len(self),)`` of what this process sees in this epoch, in that order, all of it."""
        order = self.order()
        return order[torch.arange(self.num_replicas * len(self)) % len(order)][self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        return iter(self.share()[skip:].tolist())

    def __len__(self) -> int:
        """Examples of an epoch on each process."""
        return -(-self.num_shown // self.num_replicas)


def _checked(counts: Tensor | Sequence[int]) -> Tensor:
    found = torch.as_tensor(counts).cpu()
    if found.ndim != 1 or found.is_floating_point() or found.is_complex():
        raise ValueError(f"counts must be whole numbers (N,), got {found.dtype} {tuple(found.shape)}.")
    if len(found) == 0 or found.min() < 0 or found.sum() == 0:
        least = int(found.min()) if len(found) else "none"
        raise ValueError(f"counts must not be negative, and not all zero; the least is {least}.")
    return found.long()
