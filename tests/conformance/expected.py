"""What callbacks should have logged, from what ``Written`` has taken down: its own features, not those of a tap."""

from typing import Any

import torch
import torch.distributed
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn.functional import normalize

from lightning_feat.functional.common.class_sums import class_sums
from lightning_feat.functional.neural_collapse import cdnv_matrix, collapse_measures
from lightning_feat.functional.neural_collapse.regression import nrc1, nrc2
from lightning_feat.functional.transfer.class_separation import (
    class_separation_r2,
    direction_sums,
    pair_angle_sums,
    within_class_variability,
)
from lightning_feat.functional.transfer.few_shot import few_shot_error
from lightning_feat.functional.transfer.probe import hold_out, linear_probe
from tests.conformance.modules import NUM_CLASSES

Values = dict[str, float]


def nothing(module: Any) -> Values:
    return {}


def everywhere(value: Any) -> list[Any]:
    """The value of each process."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def terms(module: Any) -> Values:
    """Terms are logged as the mean over the batches of an epoch, and over the processes."""
    found = everywhere({name: float(torch.stack([*values.values()]).mean()) for name, values in module.terms.items()})
    return {name: sum(values[name] for values in found) / len(found) for name in found[0]}


def seen(module: Any) -> list[tuple[Tensor, Tensor]]:
    """Features and targets of the training batches as they passed."""
    return [batch for batches in everywhere([*module.seen.values()]) for batch in batches]


def joined(parts: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def measured(module: Any, part: str) -> list[Tensor]:
    """Features, targets and logits at the end of the epoch. Of several processes, each with statistics of BatchNorm of
    its own, each measures every n-th sample.
    """
    found = everywhere(module.measured[part])
    world = len(found)
    order = torch.cat([torch.arange(len(found[0][0]))[rank::world] for rank in range(world)]).argsort()
    return [column[order] for column in joined([tuple(t[rank::world] for t in of) for rank, of in enumerate(found)])]


def collapse(features: Tensor, targets: Tensor) -> Values:
    values = collapse_measures(class_sums(features, targets, NUM_CLASSES))
    names = ("cdnv", "nc1_quotient", "nc2_equinorm", "nc2_equiangularity")
    return {f"neural_collapse/{name}/penultimate": float(values[name]) for name in names}


def collapse_online(module: Any) -> Values:
    return collapse(*joined(seen(module)))


def collapse_exact(module: Any) -> Values:
    features, targets, _ = measured(module, "train")
    if targets.ndim == 2:
        return collapse(features, targets)
    mean_CD = torch.stack([features[targets == c].double().mean(0) for c in range(NUM_CLASSES)])
    nearest = torch.cdist(features.double(), mean_CD).argmin(1)
    accuracy = {"neural_collapse/ncc_accuracy/penultimate": float((nearest == targets).double().mean())}
    return {**collapse(features, targets), **accuracy}


def head_angles(module: Any) -> Values:
    angles = subspace_angles(module)
    return {"grassmann/smallest_angle/net.fc": float(angles.min())}


def subspaces(module: Any) -> Values:
    """Angles of the subspaces; variability inside each batch, and R^2 of all samples."""
    features, targets = joined(seen(module))
    parts = [pair_angle_sums(h, t, NUM_CLASSES) for h, t in seen(module)]
    pairs = type(parts[0])(*(torch.stack(column).sum(0) for column in zip(*parts, strict=True)))
    return {
        "grassmann/angle_mean/net.fc": float(subspace_angles(module).mean()),
        "grassmann/r2/net.fc": float(class_separation_r2(direction_sums(features, targets, NUM_CLASSES))),
        "grassmann/variability/net.fc": float(within_class_variability(pairs)),
    }


def subspace_angles(module: Any) -> Tensor:
    """Principal angles of all pairs, in degrees."""
    basis = module.head["basis"].double()
    pairs = [basis[i] @ basis[j].T for i in range(len(basis)) for j in range(i)]
    return torch.linalg.svdvals(torch.stack(pairs)).clamp(max=1).arccos().rad2deg()


def calibration(module: Any) -> Values:
    """Expected calibration error of the validation data in 15 bins."""
    _, targets, logits = measured(module, "val")
    confidence, chosen = logits.float().softmax(1).max(1)
    right = (chosen == targets).float()
    which = (confidence * 15).ceil().clamp(min=1)
    gaps = [(confidence[which == b].sum() - right[which == b].sum()).abs() for b in which.unique()]
    return {"mixup_geometry/calibration_error/penultimate": float(torch.stack(gaps).sum() / len(targets))}


def regression(module: Any) -> Values:
    features, targets, _ = measured(module, "train")
    return {
        "regression_collapse/nrc1/penultimate": float(nrc1(features, targets.shape[1])),
        "regression_collapse/nrc2/penultimate": float(nrc2(features, module.head["weight"])),
    }


def probe(module: Any) -> Values:
    """Fitted on four fifths of the training data, penalty by the last, tested on the validation data."""
    features, targets, _ = measured(module, "train")
    held = hold_out(targets)
    test = measured(module, "val")[:2]
    parts = features[~held], targets[~held], features[held], targets[held]
    found = linear_probe(*parts, *test, penalties=(0.01, 0.1))
    return {"linear_probe/accuracy/penultimate": float(found.accuracy)}


def neighbours(module: Any) -> Values:
    """Votes of three neighbours among the training data, by all cosines."""
    features, targets, _ = measured(module, "train")
    test, classes, _ = measured(module, "val")
    cosines = normalize(test.float()) @ normalize(features.float()).T
    near = cosines.argsort(1, descending=True)[:, :3]
    votes = torch.zeros(len(test), NUM_CLASSES)
    votes.scatter_add_(1, targets[near], (cosines.gather(1, near) / 0.07).softmax(1))
    return {"neighbour_probe/accuracy/penultimate": float((votes.argmax(1) == classes).double().mean())}


def nearest_mean(module: Any) -> Values:
    features, targets, _ = measured(module, "train")
    test, classes, _ = measured(module, "val")
    means = torch.stack([features[targets == c].double().mean(0) for c in range(NUM_CLASSES)])
    nearest = (normalize(test.double()) @ normalize(means).T).argmax(1)
    return {"nearest_mean_probe/accuracy/penultimate": float((nearest == classes).double().mean())}


def support_vectors(module: Any) -> Values:
    features, targets, _ = measured(module, "train")
    test, classes, _ = measured(module, "val")
    kept = ~hold_out(targets)
    machine = LinearSVC(C=1.0, max_iter=10_000, random_state=0)
    machine.fit(normalize(features[kept].double()).numpy(), targets[kept].numpy())
    accuracy = machine.score(normalize(test.double()).numpy(), classes.numpy())
    return {"linear_svm_probe/accuracy/penultimate": float(accuracy)}


def spectrum(module: Any) -> Values:
    """RankMe of the validation data, by its definition."""
    singular = torch.linalg.svdvals(measured(module, "val")[0].double())
    share = singular / singular.sum()
    return {"spectrum_val/rankme/penultimate": float(torch.special.entr(share).sum().exp())}


def few_shots(module: Any) -> Values:
    """Three episodes of one shot from the validation data."""
    features, targets, _ = measured(module, "val")
    found = few_shot_error(features, targets, 1, episodes=3, generator=torch.Generator().manual_seed(0))
    return {
        "few_shot/error_1_shot/penultimate": float(found.mean),
        "few_shot/cdnv/penultimate": float(cdnv_matrix(class_sums(features, targets, NUM_CLASSES)).nanmean()),
    }


def accuracy(module: Any, part: str) -> float:
    _, targets, logits = measured(module, part)
    return float((logits.argmax(1) == targets).double().mean())


def real_accuracy(module: Any) -> Values:
    return {"distributional_simplicity/accuracy_real/logits": accuracy(module, "train")}


def clean_accuracy(module: Any) -> Values:
    return {"feature_reliance/accuracy/all": accuracy(module, "val")}


def prompts(module: Any) -> Values:
    """The term, and the norms of Gram matrices at the end of the epoch."""
    found = module.own_at_end
    norms = {f"prompts/gram_norm/{kind}": float(found[f"{kind} norms"].mean()) for kind in ("text", "image")}
    discrepancy = (found["text ratios"] - found["image ratios"]).abs().mean()
    return {**terms(module), **norms, "prompts/discrepancy": float(discrepancy)}
