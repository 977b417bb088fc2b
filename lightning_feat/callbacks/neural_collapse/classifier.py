from torch import Tensor, nn

from lightning_feat.functional.grassmann import orthonormality_error
from lightning_feat.joints.data.processes import full_tensor
from lightning_feat.joints.features.weights import read_weight
from lightning_feat.layers.grassmann import LOST, GrassmannLinear, off_the_manifold
from lightning_feat.layers.neural_collapse import SimplexETF
from lightning_feat.metrics.neural_collapse import NeuralCollapse


def classifier_tensors(head: nn.Module, num_classes: int, num_features: int) -> dict[str, Tensor]:
    """What of a classifier NC0, NC2 and NC3 compare with: arguments of ``NeuralCollapse.set_classifier``.

    The ``basis`` of a ``GrassmannLinear``; the prototypes of a ``SimplexETF``; of any other head its ``weight``
    ``(C, D)``, or ``(C, D, 1, 1)``, as it stands, and its ``bias`` ``(C,)``. A cosine classifier normalises its rows
    only when it runs: of its measures take those that know directions alone, such as ``nc3_cosine``. Empty where the
    head has nothing of the kind.
    """
    if isinstance(head, GrassmannLinear):
        return {"basis": full_tensor(head.basis)}
    weight = head.prototypes if isinstance(head, SimplexETF) else read_weight(head)
    if not isinstance(weight, Tensor) or weight.shape != (num_classes, num_features, *[1] * (weight.ndim - 2)):
        return {}
    found, bias = {"weight": full_tensor(weight).flatten(1)}, read_weight(head, "bias")
    if isinstance(bias, Tensor) and bias.shape == (num_classes,):
        found["bias"] = full_tensor(bias)
    return found


def tell_classifier(metric: NeuralCollapse, name: str, head: nn.Module) -> str:
    """Give the metric what it compares features with, and say what is left out, if anything.

    Args:
        metric: of the layer that feeds the head.
        name: of the head.
        head: the classifier.
    """
    classifier = classifier_tensors(head, metric.num_classes, metric.num_features)
    lacking = ""
    if "basis" in classifier and (error := float(orthonormality_error(classifier["basis"]).max())) > LOST:
        lacking = f"{name}: {off_the_manifold(error)} What compares features with them is left out."
        classifier = {}
    elif not classifier:
        lacking = (
            f"the classifier {name}, a {type(head).__name__}, has no weight ({metric.num_classes}, "
            f"{metric.num_features}): what needs one (NC0, NC3, the geometry of its rows) is left out."
        )
    metric.set_classifier(**classifier)
    return lacking
