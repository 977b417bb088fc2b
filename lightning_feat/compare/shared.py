"""What the arms really shared in the runs of one seed, and what not: read off the fingerprints of ``pairing``."""

from collections.abc import Sequence
from typing import Any

from lightning_feat.compare.records import Record


def unpaired(base: dict[str, Any], arm: dict[str, Any]) -> dict[str, str]:
    """What two runs of one seed did not share, each with what is known of it; empty where they shared all.

    Args:
        base: fingerprint of the run of the base.
        arm: fingerprint of the other run.
    """
    found: dict[str, str] = {}
    ours, theirs = arm["weights"], base["weights"]
    common = [name for name in theirs if name in ours]
    differ = [name for name in common if ours[name] != theirs[name]]
    if differ:
        found["first weights"] = f"{len(differ)} of {len(common)} tensors that both have differ ({differ[0]}, ...)"
    elif not common:
        found["first weights"] = "the arms have no tensor in common"
    if arm["batches"] != base["batches"]:
        same_order = arm["targets"] == base["targets"] and all(base["targets"])
        found["batches"] = (
            "the first ones hold the same targets with other inputs: the order is shared, the augmentation is not"
            if same_order
            else "the first ones differ: neither their order nor augmentation is shared"
        )
    if arm.get("training batches") != base.get("training batches"):
        found["amount of training data"] = f"{arm.get('training batches')} batches, {base.get('training batches')}"
    if arm.get("validation") != base.get("validation"):
        found["validation data"] = "its amount or its first batches differ"
    if arm["generators"] != base["generators"]:
        found["random numbers in training"] = "the arms draw different ones (dropout, augmentation in the main process)"
    return found


def own_weights(base: dict[str, Any], arm: dict[str, Any]) -> tuple[int, int, int]:
    """Tensors that both have, that the base alone has, that the arm alone has."""
    ours, theirs = arm["weights"].keys(), base["weights"].keys()
    return len(ours & theirs), len(theirs - ours), len(ours - theirs)


def pairing_report(records: Sequence[Record], base: str) -> list[str]:
    """A sentence for each arm: what it shared with the base at the start, and what could not be paired."""
    prints = {(r.arm, r.seed): r.status["fingerprint"] for r in records if r.finished and "fingerprint" in r.status}
    sentences = []
    for arm in dict.fromkeys(record.arm for record in records if record.arm != base):
        seeds = [seed for name, seed in prints if name == arm and (base, seed) in prints]
        if not seeds:
            continue
        both, lost, new = own_weights(prints[base, seeds[0]], prints[arm, seeds[0]])
        found: dict[str, list[str]] = {}
        for seed in seeds:
            for what, how in unpaired(prints[base, seed], prints[arm, seed]).items():
                found.setdefault(what, []).append(how)
        shared = [what for what in _ALL if what not in found]
        own = f" ({both} tensors; {lost} of {base} alone, {new} of {arm} alone)" if "first weights" in shared else ""
        said = ", ".join(what + own if what == "first weights" else what for what in shared)
        sentence = f"{arm} shares with {base} at the start, seed by seed: {said or 'nothing'}."
        for what, each in found.items():
            times = "" if len(each) == len(seeds) else f" in {len(each)} of {len(seeds)} seeds"
            sentence += f" Not paired{times}: {what}: {each[0]}."
        sentences.append(sentence)
    return sentences


_ALL = ("first weights", "batches", "amount of training data", "validation data", "random numbers in training")
