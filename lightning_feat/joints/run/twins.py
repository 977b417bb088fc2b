from lightning.pytorch import Callback, Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The callbacks of the trainer, in their order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def refuse_twin(trainer: Trainer, callback: Callback) -> None:
    """Raise a ``ValueError`` if a callback of the same class works on the same layer (the same ``state_key``)."""
    twins = [other for other in callbacks_of(trainer) if type(other) is type(callback) and other is not callback]
    if any(other.state_key == callback.state_key for other in twins):
        raise ValueError(f"the Trainer has {callback.state_key} twice: keep one, or give them different layers.")
