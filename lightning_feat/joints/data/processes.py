"""What is spread over the processes of a run, as one."""

from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_feat.functional.common.class_sums import repeated_by_sampler
from lightning_feat.joints.data.samplers import batch_size_of, sampler_of

_SENT_BYTES = 64 * 2**20


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole of a parameter that FSDP2 has sharded, on every process and without its gradient."""
    data: Any = parameter.detach()
    full: Tensor = data.full_tensor() if hasattr(data, "full_tensor") else data
    return full


def repeated_rows(trainer: Trainer, batch_idx: int, num_rows: int, device: torch.device) -> Tensor | None:
    """Mask ``(num_rows,)`` of the samples of a training batch that the distributed sampler has put in twice.

    None where there is no such sampler, or a row is not a sample.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or (batch_size := batch_size_of(loader)) is None or num_rows > batch_size:
        return None
    sampler, first = sampler_of(loader), batch_idx * batch_size
    if hasattr(sampler, "repeats"):  # of a plan
        repeated: Tensor = sampler.repeats(first, num_rows)
        return repeated.to(device)
    if type(sampler) is not DistributedSampler or sampler.drop_last:
        return None
    size = len(sampler.dataset)  # type: ignore[arg-type]
    return repeated_by_sampler(first, num_rows, trainer.global_rank, trainer.world_size, size, device)


def gather_on_first(trainer: Trainer, rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows of all processes in ascending order of their indices, in the memory of the host of the first process.

    Rows ``(n, ...)`` may lie in the memory of the host, and processes may hold unequal numbers of them. 64 MiB travel
    at once. None on the other processes.
    """
    if trainer.world_size == 1:
        return rows.cpu(), indices.cpu()
    strategy, device = trainer.strategy, trainer.strategy.root_device
    most = torch.tensor([len(rows), rows[:1].numel(), _code(rows)], device=device)
    length, width, code = (int(n) for n in strategy.reduce(most, reduce_op="max"))
    rows = rows.to(_of_code(code, rows))
    shape = rows.shape[1:] if len(rows) else ((width,) if rows.ndim > 1 else ())
    step = max(1, _SENT_BYTES // max(1, width * rows.element_size()))
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, length, step):
        size = min(step, length - start)
        sent = torch.zeros(size, *shape, dtype=rows.dtype, device=device)
        named = torch.full((size,), -1, dtype=torch.long, device=device)
        piece = rows[start : start + size]
        if len(piece):  # a process without rows does not know how wide they are
            sent[: len(piece)], named[: len(piece)] = piece.to(device), indices[start : start + size].to(device)
        all_sent, all_named = strategy.all_gather(sent), strategy.all_gather(named)
        if trainer.is_global_zero:
            there = all_named >= 0
            parts.append((all_sent[there].cpu(), all_named[there].cpu()))
    if not trainer.is_global_zero:
        return None
    gathered, index = (torch.cat(column) for column in zip(*parts, strict=True))
    order = index.argsort()
    return gathered[order], index[order]


def gather_samples(features: Tensor, targets: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The samples of all processes in ascending order of their indices; the processes may hold unequal numbers."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return features, targets, indices
    code = torch.tensor(_code(features), device=features.device)
    torch.distributed.all_reduce(code, torch.distributed.ReduceOp.MAX)
    features = features.to(_of_code(int(code), features))
    columns = [gather_all_tensors(column) for column in (features, targets, indices)]
    # A process without a sample does not know how wide a feature is.
    h, t, index = (torch.cat([part for part in column if len(part)] or [*column[:1]]) for column in columns)
    order = index.argsort()
    return h[order], t[order], index[order]


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _code(rows: Tensor) -> int:
    """A number for the precision of the rows, zero where there are none: such a process does not know that of others,
    and a collective call of tensors of two kinds would mix up their bits.
    """
    return _DTYPES.index(rows.dtype) + 1 if len(rows) and rows.dtype in _DTYPES else 0


def _of_code(code: int, rows: Tensor) -> torch.dtype:
    return _DTYPES[code - 1] if code else rows.dtype
