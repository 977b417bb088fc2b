"""Which layer is taken for the classifier, in a line that a user can check."""

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_feat.doctor.finding import Finding
from lightning_feat.joints.features.candidates import head_sizes, within
from lightning_feat.joints.features.heads import find_classifier
from lightning_feat.joints.features.last_layers import LastLayers


class ClassifierEar:
    """Hears one training step: what the classifier got, and which layers made what the loss got.

    Attributes:
        features: shape of the first input of the classifier.
    """

    def __init__(self, module: LightningModule) -> None:
        self.question = ""
        self.features: tuple[int, ...] | None = None
        self.head: tuple[str, nn.Module] | None = None
        try:
            self.head = find_classifier(module)
        except ValueError as error:
            self.question = str(error)
        self.follower = LastLayers(module, () if self.head is None else (self.head[0],))

    def hear(self, layer: nn.Module, args: Any) -> None:
        """A forward pre-hook of the classifier."""
        if self.features is None and args and isinstance(args[0], Tensor):
            self.features = tuple(args[0].shape)

    def note(self) -> Finding:
        """What was heard, in one line."""
        calls = [call for call in self.follower.calls if call.layers]
        of_head = [] if self.head is None else [self.head[0]]
        of_it = [call for call in calls if any(within(layer, of_head) for layer in call.layers)]
        loss = next(iter(of_it or calls), None)  # of another loss, which may come first, nothing is asked
        last = [] if loss is None else sorted(loss.layers)
        if self.head is None:
            ran = f" The layer that ran last before the loss: {', '.join(last)}." if last else ""
            return Finding("note", "classifier", "no layer", f"no classifier is found by its name.{ran}", self.question)
        name, head = self.head
        width, classes = head_sizes(head)
        others = [layer for layer in last if not within(layer, of_head)]
        after = "whether it makes what the loss gets was not seen"
        if last:
            after = "nothing with weights runs after it, before the loss"
            if others:
                after = f"before the loss {', '.join(others[:4])} runs after it, beside it or in its place"
        got = f"features are its input {self.features}"
        if self.features is None:
            got = "its weight is used without a call of it, and nothing hears it" if of_it else "it did not run"
        seen = classes if loss is None else loss.num_classes
        outputs = f"{classes} classes" if seen in (classes, None) else f"{classes} outputs, {seen} classes in the loss"
        what = f"{type(head).__name__}, {width} features wide, {outputs}; {after}; {got}."
        return Finding("note", "classifier", name, what)
