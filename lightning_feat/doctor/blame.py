"""Make a finding of what a trial raised, and say which callback it came from."""

import traceback
import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.utils.data import DataLoader, Dataset

from lightning_feat.doctor.finding import Finding
from lightning_feat.doctor.watch import Watch
from lightning_feat.joints.features.taps import FeatureTap, TapError
from lightning_feat.joints.loss.terms import LossTerm

# By the function that raised: what was looked at, why it matters, and what to do beyond what the message says.
_CHECKS = {
    "find_layer": ("layer-not-found", "Training would stop before its first batch.", "Correct the name."),
    "find_classifier": ("layer-not-found", "Training would stop before its first batch.", "Name the layer."),
    "refuse_twin": ("twin", "Training would stop before its first batch.", "Keep one."),
    "_refuse_bare_backward": ("manual-backward", "The term would never reach the network.", ""),
}
_LABELS = {"targets_of", "_guess", "_entry", "class_indices"}


def name_of(callback: Callback) -> str:
    """What a finding calls it."""
    key = callback.state_key.partition("{")[0]  # some list all their arguments there
    return key if is_ours(callback) else type(callback).__name__


def is_ours(callback: Callback) -> bool:
    """Whether this library brought it, or what it derives from."""
    return any(cls.__module__.startswith("lightning_feat.callbacks") for cls in type(callback).__mro__)


def blame(
    error: BaseException, callbacks: Mapping[int, Callback], module: LightningModule, watch: Watch
) -> tuple[int | None, Finding]:
    """The position of the callback that ``error`` came from, or None, and a finding that says it in a sentence.

    Args:
        error: what the trial raised.
        callbacks: of the trial, by position.
        module: of the trial.
        watch: of the trial.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    functions = [frame.f_code.co_name for frame, _ in frames]
    owners = [frame.f_locals.get("self") for frame, _ in frames]
    position = _position(owners, callbacks)
    if position is None:
        position = _named_in(str(error), callbacks)
    where = _place(owners, module) if position is None else name_of(callbacks[position])
    said = _sentence(error)
    if position is None:
        file, line = _last_line(frames)
        return None, Finding(
            "error",
            "training",
            where,
            f"{type(error).__name__} at {file}:{line}: {said}",
            "It comes from the training itself, which would stop.",
            "Correct it; what comes after was not looked at. In the copy loggers are silent, and fast_dev_run is set.",
        )
    if not is_ours(callbacks[position]):
        what = f"{type(error).__name__} in the copy, which has silent loggers and fast_dev_run set: {said}"
        why = "Training may stop here; the rest was looked at without this callback."
        return position, Finding("warning", "other-callback", where, what, why)
    if isinstance(error, TapError):
        return position, _unheard(owners, module, watch, where, said)
    for function in reversed(functions):
        if function in _CHECKS:
            check, why, remedy = _CHECKS[function]
            return position, Finding("error", check, where, said, why, remedy)
        if function in _LABELS:
            why = (
                "Features without their labels measure nothing; training would stop at the first batch that needs them."
            )
            return position, Finding(
                "error", "labels-not-found", where, said, why, "Set target_key, or change the data."
            )
    kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
    why = "Training would stop here; the rest was looked at without this callback."
    return position, Finding("error", "callback", where, kind + said, why)


def warning_findings(seen: list[warnings.WarningMessage]) -> list[Finding]:
    """Findings of the warnings that came from this library."""
    found = []
    for warned in seen:
        path = warned.filename.replace("\\", "/")
        if "/lightning_feat/" in path and "/lightning_feat/doctor/" not in path:
            said = " ".join(str(warned.message).split())
            key, _, rest = said.partition(": ")
            where, what = (key, rest) if key.endswith("]") else (path.rsplit("/", 1)[-1], said)
            found.append(Finding("warning", "said-by-callback", where, what))
    return found


def _unheard(owners: list[Any], module: LightningModule, watch: Watch, where: str, said: str) -> Finding:
    tap = next((owner for owner in reversed(owners) if isinstance(owner, FeatureTap)), None)
    why = "There are no features to work on; training would stop at its first batch."
    if tap is not None and ("did not run" in said or "without gradient" in said):
        layer = tap.find(module)
        name = next((known.replace("_orig_mod.", "") for known, part in module.named_modules() if part is layer), "")
        if name in watch.ran and tap.keep_graph and name not in watch.differentiable:
            return Finding(
                "error",
                "zero-gradient",
                where,
                f"the layer {name} runs without gradient: under torch.no_grad, or in a block of reentrant "
                "checkpointing.",
                "A loss on its features trains nothing.",
                "Name a layer that is trained, or checkpoint with use_reentrant=False.",
            )
        ran = ", ".join(sorted(watch.ran, key=lambda known: (known.count("."), known))[:8]) or "none"
        return Finding("error", "layer-never-runs", where, said, why, f"Layers that ran in training_step: {ran}.")
    return Finding("error", "layer-never-runs", where, said, why)


def _position(owners: list[Any], callbacks: Mapping[int, Callback]) -> int | None:
    """The callback in whose name the innermost frame worked."""
    keeper: dict[int, int] = {}
    for position, callback in callbacks.items():
        for part in _parts_of(callback):
            keeper.setdefault(id(part), position)
    for owner in reversed(owners):
        if isinstance(owner, Callback) and id(owner) in keeper:
            return keeper[id(owner)]
    for owner in reversed(owners):
        if owner is not None and id(owner) in keeper:
            return keeper[id(owner)]
        named = getattr(owner, "owner", None)  # a link around a method of the module says whose it is
        if isinstance(named, str):
            return next((p for p, callback in callbacks.items() if type(callback).__name__ == named), None)
    return None


def _named_in(said: str, callbacks: Mapping[int, Callback]) -> int | None:
    """The first callback one of whose loss terms is named."""
    for position, callback in callbacks.items():
        if any(isinstance(part, LossTerm) and part.key in said for part in vars(callback).values()):
            return position
    return None


def _parts_of(callback: Callback) -> list[Any]:
    ours = (LossTerm, FeatureTap)
    parts: list[Any] = [callback]
    for value in vars(callback).values():
        if isinstance(value, ours) or type(value).__module__.startswith("lightning_feat."):
            parts.append(value)
            parts += (
                [inner for inner in vars(value).values() if isinstance(inner, ours)]
                if hasattr(value, "__dict__")
                else []
            )
            parts += list(getattr(value, "taps", []))
    return parts


def _place(owners: list[Any], module: LightningModule) -> str:
    for owner in reversed(owners):
        if owner is module or isinstance(owner, (LightningDataModule, Dataset, DataLoader)):
            return type(owner).__name__
        if isinstance(owner, Callback) and not isinstance(owner, Watch):
            return type(owner).__name__
    return type(module).__name__


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _last_line(frames: list[Any]) -> tuple[str, int]:
    """Where the innermost frame of the user's is, as far as it can be told from installed packages."""
    own = [(frame, line) for frame, line in frames if "site-packages" not in frame.f_code.co_filename]
    own = [(frame, line) for frame, line in own if "/lightning_feat/doctor/" not in frame.f_code.co_filename] or frames
    frame, line = own[-1]
    return frame.f_code.co_filename.replace("\\", "/").rsplit("/", 1)[-1], line
