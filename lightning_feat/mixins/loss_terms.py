from torch import Tensor

from lightning_feat.joints.loss.engine import waiting_loss_terms


class LossTermsMixin:
    """For a LightningModule that adds the terms of regularizer callbacks to its loss itself, and calls backward as it
    likes.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> class Mine(LossTermsMixin, LightningModule):
        ...     def training_step(self, batch, batch_idx):
        ...         loss = self.compute_loss(batch) + self.loss_terms()
        ...         loss.backward()  # under fp16 use self.manual_backward(loss)
    """

    def loss_terms(self) -> Tensor:
        """The weighted sum of all terms that callbacks have for this ``training_step``, after its forward; a scalar.

        Zero without such callbacks. What is asked for here is not added a second time.
        """
        return waiting_loss_terms(self)  # type: ignore[arg-type]
