from torch import Tensor, nn

from lightning_feat.joints.data.processes import full_tensor
from lightning_feat.joints.features.weights import read_weight
from lightning_feat.layers.grassmann import GrassmannLinear
from lightning_feat.layers.neural_collapse import SimplexETF


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
