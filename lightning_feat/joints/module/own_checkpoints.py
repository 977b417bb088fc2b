"""Own parameters in checkpoints: under a key of their own, with their optimizer state, and with their averages."""

import functools
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_feat.joints.module.own_parameters import NAME, in_order, keep_in_optimizers, keys_stay_visible, safe
from lightning_feat.joints.run.averaging import averaged_copies, shows_average

_KEY = "lightning_feat_own_parameters"


def save(trainer: Trainer, checkpoint: dict[str, Any], key: str, submodule: nn.Module) -> None:
    """Store the submodule and split its optimizer state off; for ``on_save_checkpoint`` of the callback that brought
    it.

    Where an averaging callback shows its average as the weights of the checkpoint, so do the own parameters.
    """
    if keys_stay_visible(trainer):
        return
    stored = checkpoint.setdefault(_KEY, {"modules": {}})
    stored["modules"][safe(key)] = submodule.state_dict()
    for shown, copied in _copies(trainer, key):
        if shown:
            stored.setdefault("current", {})[safe(key)] = submodule.state_dict()
            stored["modules"][safe(key)] = copied.state_dict()
        else:
            stored.setdefault("averages", {})[safe(key)] = copied.state_dict()
    _forget_names(checkpoint)
    if "optimizers" in stored or "optimizer_states" not in checkpoint:
        return  # an earlier callback has split off the state of all own parameters
    stored["optimizers"] = []
    for i, (optimizer, state) in enumerate(zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True)):
        if "state" not in state:  # of optimizers that spread it over processes the first gathers it, and writes
            stored["optimizers"].append({})
            continue
        order = in_order(optimizer)
        new = {old: i for i, old in enumerate(old for old, p in enumerate(order) if not hasattr(p, "_feat_own"))}
        mine = {old: p._feat_own for old, p in enumerate(order) if hasattr(p, "_feat_own")}
        stored["optimizers"].append({name: state["state"][old] for old, name in mine.items() if old in state["state"]})
        groups = [{**g, "params": [new[old] for old in g["params"] if old in new]} for g in state["param_groups"]]
        kept = {new[old]: entry for old, entry in state["state"].items() if old in new}
        checkpoint["optimizer_states"][i] = {"state": kept, "param_groups": groups}


def load(trainer: Trainer, checkpoint: dict[str, Any], key: str, submodule: nn.Module) -> None:
    """Undo ``save``; for ``on_load_checkpoint``. A checkpoint without the submodule leaves it as it is."""
    if keys_stay_visible(trainer):
        return
    stored = checkpoint.get(_KEY, {})
    shown_state = stored.get("modules", {}).get(safe(key))
    if shown_state is not None:
        copies = _copies(trainer, key) if trainer.state.fn == TrainerFn.FITTING else []
        goes_on = any(shown for shown, _ in copies)  # the average goes on beside the weights it is of
        current = stored.get("current", {}).get(safe(key)) if goes_on else None
        submodule.load_state_dict(shown_state if current is None else current)
        for shown, copied in copies:
            copied.load_state_dict(shown_state if shown else stored.get("averages", {}).get(safe(key), shown_state))
    strategy = trainer.strategy
    if "load_optimizer_state_dict" not in strategy.__dict__:
        # The optimizers do not exist yet, so their part waits until Lightning loads theirs.
        strategy.load_optimizer_state_dict = functools.partial(_load_optimizers, trainer)  # type: ignore[method-assign]


def _load_optimizers(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    strategy = trainer.strategy
    del strategy.__dict__["load_optimizer_state_dict"]
    keep_in_optimizers(strategy.optimizers, trainer.lightning_module)
    stored: list[dict[str, Any]] = checkpoint.get(_KEY, {}).get("optimizers", [])
    states = []
    for i, (optimizer, state) in enumerate(zip(strategy.optimizers, checkpoint["optimizer_states"], strict=False)):
        order = in_order(optimizer)
        users = [position for position, p in enumerate(order) if not hasattr(p, "_feat_own")]
        entries = {users[old]: entry for old, entry in state["state"].items()}
        mine = stored[i] if i < len(stored) else {}
        entries |= {
            position: mine[p._feat_own] for position, p in enumerate(order) if getattr(p, "_feat_own", None) in mine
        }
        groups, start = [], 0
        for saved, live in zip(state["param_groups"], optimizer.param_groups, strict=False):
            groups.append({**saved, "params": list(range(start, start + len(live["params"])))})
            start += len(live["params"])
        states.append({"state": entries, "param_groups": groups})
    strategy.load_optimizer_state_dict({**checkpoint, "optimizer_states": states})


def _copies(trainer: Trainer, key: str) -> list[tuple[bool, nn.Module]]:
    """The submodule in the copies of averaging callbacks, and whether the copy is shown as the weights."""
    copies = [(shows_average(callback), copied._modules.get(NAME)) for callback, copied in averaged_copies(trainer)]
    return [(shown, own[safe(key)]) for shown, own in copies if isinstance(own, nn.ModuleDict) and safe(key) in own]


def _forget_names(checkpoint: dict[str, Any]) -> None:
    """Fine-tuning callbacks write down the groups of the optimizer by name, and look these up in the module when a run
    resumes, with or without what is ours.
    """
    states = checkpoint.get("callbacks", {})
    for callback, state in states.items():
        if not isinstance(state, dict) or "internal_optimizer_metadata" not in state:
            continue
        groups_of = {
            index: [{**g, "params": [n for n in g["params"] if not n.startswith(f"{NAME}.")]} for g in groups]
            for index, groups in state["internal_optimizer_metadata"].items()
        }
        states[callback] = {**state, "internal_optimizer_metadata": groups_of}
