"""By which sampler a loader draws, and another in its place."""

import copy
import itertools
from typing import Any

from lightning.fabric.utilities.data import _reinstantiate_wrapped_cls
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.data import _get_dataloader_init_args_and_kwargs
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

# What a DataLoader makes of shuffle=True or False; that of torchdata has a RandomSampler of its own.
_PLAIN = {
    ("torch.utils.data.sampler", "RandomSampler"),
    ("torch.utils.data.sampler", "SequentialSampler"),
    ("torchdata.stateful_dataloader.sampler", "RandomSampler"),
}


def sampler_of(loader: DataLoader[Any]) -> Any:
    """The sampler that ``loader`` draws by: where it was given a batch sampler, the one inside of that, if it has any.

    Lightning hands loaders like torchdata's a batch sampler, whose place ``loader.sampler`` does not show.
    """
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def batch_size_of(loader: DataLoader[Any]) -> int | None:
    """Examples in a batch; None where the loader does not say."""
    size = loader.batch_size if loader.batch_size is not None else getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None


def is_plain(sampler: Any) -> bool:
    """Whether a DataLoader has made it of ``shuffle=True`` or False, or might have."""
    return (type(sampler).__module__, type(sampler).__name__) in _PLAIN


def takes_all(loader: DataLoader[Any]) -> bool:
    """Whether it shows each example of its map-style data set once in an epoch, shuffled or in order."""
    sampler = sampler_of(loader)
    once = is_plain(sampler) and not getattr(sampler, "replacement", False)
    return once and len(sampler) == len(loader.dataset)  # type: ignore[arg-type]


def processes_share(trainer: Trainer, loader: DataLoader[Any]) -> bool:
    """Whether the processes of the run share the data set of this loader, each taking its part.

    Not so where the user does without Lightning's distributed sampler and has none of his own: then each process goes
    through the data that it was given, files of its own as a rule.
    """
    ours = getattr(trainer._accelerator_connector, "use_distributed_sampler", True)
    sampler = sampler_of(loader)
    return trainer.world_size == 1 or ours or (isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1)


def with_sampler(loader: DataLoader[Any], sampler: Sampler[Any]) -> DataLoader[Any]:
    """The same loader, of the same class and with the same options, that draws by ``sampler``.

    One that restores a position of its own, as torchdata's ``StatefulDataLoader``, does not: where to go on is then the
    sampler's to say.

    Raises:
        ValueError: if it has no map-style data set, or a sampler of its own that would be lost.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        what = type(loader).__name__ if not isinstance(loader, DataLoader) else "a DataLoader over an IterableDataset"
        raise ValueError(
            f"a sampler needs a DataLoader over a map-style data set, got {what}: its examples have no index. Weigh "
            "their losses, or hand over a map-style data set."
        )
    if loader.batch_size is None:
        what = "nothing" if loader.batch_sampler is None else f"a {type(loader.batch_sampler).__name__}"
        raise ValueError(
            f"the {type(loader).__name__} has {what} in the place of a batch size, which would be lost: give it "
            "batch_size and shuffle."
        )
    if type(loader.sampler) is not type(sampler) and not takes_all(loader):
        how, instead = _own_way(loader)
        raise ValueError(
            f"the {type(loader).__name__} draws by a {type(loader.sampler).__name__}{how} of its own, which would be "
            f"lost: {instead}."
        )
    args, kwargs = _get_dataloader_init_args_and_kwargs(loader, sampler)
    names = getattr(loader, "__pl_saved_arg_names", ())  # of arguments that the user has not named
    args, kwargs = args[len(names) :], {**dict(zip(names, args, strict=False)), **kwargs}
    if kwargs.get("batch_sampler") is not None:
        # For a class that makes batch samplers of its own kind Lightning gives one, in which it would not find ours.
        size = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        kwargs |= {"sampler": sampler, "batch_sampler": None, **size}
    changed: Any = _reinstantiate_wrapped_cls(loader, *args, **kwargs)
    if hasattr(changed, "load_state_dict"):
        changed.load_state_dict = _nothing
    return changed  # type: ignore[no-any-return]


def _own_way(loader: DataLoader[Any]) -> tuple[str, str]:
    """What the sampler of this loader is told to do, and what to do in its place, where each example comes as often as
    a plan says.
    """
    sampler, size = loader.sampler, len(loader.dataset)  # type: ignore[arg-type]
    if isinstance(sampler, WeightedRandomSampler):
        return "", (
            "give it shuffle=True in its place, and the weights to the loss; or, as whole numbers, to a "
            "DataPlan(counts, length='keep') that is the only plan"
        )
    if isinstance(sampler, SubsetRandomSampler):
        return "", "give it a torch.utils.data.Subset of these examples, and shuffle=True in its place"
    if is_plain(sampler):
        number = len(sampler)  # type: ignore[arg-type]
        how = ", with replacement," if getattr(sampler, "replacement", False) else ""
        how = f" of num_samples={number}{how}" if number != size or not how else how
        fewer = ", and short epochs by limit_train_batches" if number < size else ""
        more = ", and more epochs in the place of longer ones" if number > size else ""
        return how, f"give it shuffle=True in its place, which shows each example once{fewer or more}"
    return "", (
        "give it shuffle=True in its place, and where that leaves examples out a torch.utils.data.Subset of those that "
        "are to be shown"
    )


def draws_all(loader: DataLoader[Any], sampler: Any) -> bool:
    """Whether a sampler, or a batch sampler, of the user's draws every example of the data set at least once in an
    epoch. A copy of it is asked, so that it draws the same afterwards; not so, too, where it cannot be copied.
    """
    size = len(loader.dataset)  # type: ignore[arg-type]
    kept = {id(loader.dataset): loader.dataset}  # too large to copy
    left, most = set(range(size)), 10 * size  # one without an end
    try:
        with isolate_rng():
            drawn = itertools.chain.from_iterable(
                entry if isinstance(entry, (list, tuple)) else (entry,) for entry in copy.deepcopy(sampler, kept)
            )
            for index in itertools.islice(drawn, most):
                left.discard(int(index))
                if not left:
                    return True
    except Exception:  # whatever a user's class does when it is copied
        return False
    return not left


def _nothing(state: dict[str, Any]) -> None:
    pass
