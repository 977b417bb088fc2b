"""Parameters that a callback brings along: trained with the user's, kept out of the user's checkpoint entries.

They live in a submodule of the LightningModule (so that DDP, devices and ``self.parameters()`` know them) and in an
existing parameter group (a group of their own would break schedulers and rename what ``LearningRateMonitor`` logs).
In a checkpoint they stand under a key of their own, and so does their optimizer state, so that checkpoints written
with and without them can be exchanged: see ``own_checkpoints``.

Under FSDP2 they come in when the user has sharded his module, each process holds all of them, and their gradients are
averaged as DDP does. Until the fit ends they are DTensors, since neither clipping nor an optimizer that works on lists
takes tensors of two kinds. Sharded checkpoints are written from the module itself, so there the keys stay visible:
resume such a run with the same callbacks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

NAME = "_feat_own"  # of the submodule


class _OwnParameters(nn.ModuleDict):
    """The submodule that holds them, and the marks that find them in an optimizer."""

    def marked(self) -> None:
        for name, parameter in self.named_parameters():
            parameter._feat_own = name  # type: ignore[attr-defined]


def adopt(module: LightningModule, key: str, submodule: nn.Module) -> None:
    """Make ``submodule`` a part of ``module`` that the state dict does not show. Call it before optimizers are
    configured.

    Under FSDP2 nothing happens yet: see ``adopt_sharded``.

    Raises:
        ValueError: under FSDP1 and DeepSpeed.
    """
    trainer = getattr(module, "_trainer", None)
    strategy = "" if trainer is None else type(trainer.strategy).__name__
    if strategy in ("FSDPStrategy", "DeepSpeedStrategy"):
        raise ValueError(
            f"{strategy} flattens or offloads parameters, so that those of {key} cannot be kept apart: use "
            "strategy='ddp', or FSDP2 by ModelParallelStrategy."
        )
    if not _visible(module):
        _adopt(module, key, submodule)


def adopt_sharded(module: LightningModule, key: str, submodule: nn.Module) -> None:
    """Under FSDP2 what ``adopt`` does else; to be called when the user has sharded ``module`` and before optimizers are
    configured.
    """
    if not _visible(module):
        return
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor  # torch.distributed is not everywhere

    _adopt(module, key, submodule)
    mesh: Any = module.device_mesh  # there is one: the strategy has made it
    spread: dict[int, nn.Parameter] = {}  # one that stands in two places stays one
    for holder, name, parameter in _held(submodule):
        if not isinstance(parameter, DTensor):
            if id(parameter) not in spread:
                data = distribute_tensor(parameter.detach(), mesh["data_parallel"], [Replicate()])
                spread[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
            holder._parameters[name] = spread[id(parameter)]
    module._modules[NAME].marked()  # type: ignore[union-attr,operator]


@contextmanager
def in_use(submodules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the parameters of adopted modules are plain tensors, whose gradients come out averaged over the processes
    under FSDP2. Each of them must take part in the loss on all processes or on none.
    """
    with ExitStack() as stack:
        for submodule in submodules:
            for holder, name, parameter in _held(submodule):
                if hasattr(parameter, "to_local"):
                    holder._parameters[name] = _AveragedGradient.apply(parameter.to_local(), parameter.device_mesh)
                    stack.callback(holder._parameters.__setitem__, name, parameter)
        yield


class _AveragedGradient(torch.autograd.Function):
    """The tensor itself; its gradient is averaged over the processes of a mesh."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: Any) -> Tensor:
        ctx.mesh = mesh
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous() / ctx.mesh.size()
        torch.distributed.all_reduce(gradient, group=ctx.mesh.get_group())
        return gradient, None


def _held(submodule: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The parameters of a module, each with the module that holds it and its name there."""
    parts = submodule.modules()
    return [(part, name, p) for part in parts for name, p in part._parameters.items() if p is not None]


def _adopt(module: LightningModule, key: str, submodule: nn.Module) -> None:
    own = module._modules.get(NAME)
    if not isinstance(own, _OwnParameters):
        own = _OwnParameters()
        module.add_module(NAME, own)
        module.__dict__["_feat_own_handles"] = (
            module.register_state_dict_post_hook(_hide),
            module.register_load_state_dict_pre_hook(_fill),
        )
    own[safe(key)] = submodule.to(module.device)
    own.marked()


def release(module: LightningModule, key: str) -> None:
    """Undo ``adopt``; the submodule keeps its values. Nothing happens if it is not there."""
    own = module._modules.get(NAME)
    if not isinstance(own, _OwnParameters) or safe(key) not in own:
        return
    plain: dict[int, nn.Parameter] = {}
    for holder, name, parameter in _held(own[safe(key)]):
        if hasattr(parameter, "to_local"):  # every process has all of it
            if id(parameter) not in plain:
                plain[id(parameter)] = nn.Parameter(parameter.detach().to_local(), parameter.requires_grad)
            holder._parameters[name] = plain[id(parameter)]
    del own[safe(key)]
    if not len(own):
        del module._modules[NAME]
        for handle in module.__dict__.pop("_feat_own_handles", ()):
            handle.remove()


def append_to_optimizer(own: nn.Module, configured: Any, near: nn.Module) -> None:
    """Append the own parameters that no optimizer holds yet to the last group of the optimizer that trains ``near``, or
    else of the first: another one would zero their gradients, or never see them.

    Raises:
        ValueError: if that optimizer has dealt its parameters out to processes already.
    """
    optimizers = optimizers_in(configured)
    if not optimizers:
        return
    held = {id(p): optimizer for optimizer in optimizers for p in in_order(optimizer)}
    optimizer = next((held[id(p)] for p in near.parameters() if id(p) in held), optimizers[0])
    _append(optimizer, -1, [p for p in own.parameters() if id(p) not in held])
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if hasattr(p, "_feat_own"):
                    p._feat_place = i, j


def keep_in_optimizers(optimizers: Sequence[Optimizer], module: nn.Module) -> None:
    """Put own parameters back where they stood, should somebody have made new groups without them, as fine-tuning
    callbacks do when a run resumes. Nothing happens to those that an optimizer holds.
    """
    own = module._modules.get(NAME)
    if own is None or not optimizers:
        return
    held = {id(p) for optimizer in optimizers for p in in_order(optimizer)}
    for p in own.parameters():
        if id(p) not in held:
            i, j = getattr(p, "_feat_place", (0, -1))
            optimizer = optimizers[min(i, len(optimizers) - 1)]
            _append(optimizer, min(j, len(optimizer.param_groups) - 1), [p])


def _append(optimizer: Optimizer, index: int, parameters: list[nn.Parameter]) -> None:
    if parameters and type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise ValueError(
            "ZeroRedundancyOptimizer deals parameters out to the processes when it is made, so that none can join it "
            "later: make it of self.parameters() in configure_optimizers, which has those of callbacks too."
        )
    optimizer.param_groups[index]["params"] += parameters


def optimizers_in(configured: Any) -> list[Optimizer]:
    """The optimizers in what ``configure_optimizers`` returned, whichever of Lightning's forms that has."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return optimizers_in(configured.get("optimizer"))
    if isinstance(configured, Sequence):
        found = [optimizer for entry in configured for optimizer in optimizers_in(entry)]
        return list(dict.fromkeys(found))
    return []


def keys_stay_visible(trainer: Trainer) -> bool:
    return type(trainer.strategy).__name__ == "ModelParallelStrategy"


def in_order(optimizer: Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def safe(key: str) -> str:
    return key.replace(".", "/")  # the name of a submodule has no dots


def _hide(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    if not _visible(module):
        for name in [name for name in state_dict if name.startswith(f"{prefix}{NAME}.")]:
            del state_dict[name]


def _fill(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = module._modules.get(NAME)
    if own is not None:
        for name, value in own.state_dict(prefix=f"{prefix}{NAME}.").items():
            state_dict.setdefault(name, value)


def _visible(module: nn.Module) -> bool:
    trainer = getattr(module, "_trainer", None)
    return trainer is not None and keys_stay_visible(trainer)
