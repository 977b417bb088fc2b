"""What each callback does to a training, as its author would write it into the module: the other side of a cell.

They call the functions and layers of the library, which have tests of their own. What is compared is the way there:
scaling, order, precision, hooks, optimizers, checkpoints.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_feat.data import PlanSampler
from lightning_feat.functional.neural_collapse.losses import (
    between_class_push,
    dot_regression,
    scale_gradient,
    within_class_pull,
)
from lightning_feat.functional.simplicity_bias.clusters import slow_examples
from lightning_feat.functional.simplicity_bias.sharpness import sharpness_step
from lightning_feat.functional.spectrum import wasserstein_uniformity
from lightning_feat.layers import DeepPrompts, GrassmannLinear, SimplexETF
from tests.conformance.expected import measured
from tests.conformance.modules import NUM_CLASSES, WIDTH

SPREAD_WEIGHT, PULL_WEIGHT, PUSH_WEIGHT, GRAM_WEIGHT, UNIFORMITY_WEIGHT = 0.3, 0.2, 0.1, 0.01, 0.1


def spread(features: Tensor, targets: Tensor) -> Tensor:
    """A loss that a user gives to ``FeatureRegularizer``; not the same for every order of the targets."""
    return (features - features.mean(0)).square().sum(1)[targets > 0].mean()


def plan(epoch: int) -> Tensor | Sequence[int] | None:
    """Four examples more in each epoch come twice. Annotated as ``DataPlan`` says: jsonargparse holds it to that."""
    return [2] * (4 * epoch) + [1] * (32 - 4 * epoch) if epoch else None


class Method:
    """Nothing: what a monitor does to a training. Others override what they need.

    Attributes:
        replaces_loss: the loss of the module shall train nothing.
        changes_loader: from epoch to epoch; the author lets Lightning ask for it before each.
        tolerance: of the final weights, and why it is not zero.
    """

    replaces_loss = False
    changes_loader = False
    tolerance = 0.0

    def prepare(self, module: Any) -> None:
        """Put in layers and parameters."""

    def arguments(self, module: Any) -> dict[str, Any]:
        """What the network shall get beside its inputs."""
        return {}

    def loss(self, module: Any, loss: Tensor, features: Tensor, targets: Tensor, batch_idx: int) -> Tensor:
        """The loss with what is to be added."""
        return loss

    def closure(self, optimizer: Any, closure: Any) -> Any:
        """What the optimizer gets in the place of its closure."""
        return closure

    def before_step(self, module: Any) -> Callable[[], None]:
        """What is to be done after the optimizer step that now begins."""
        return lambda: None

    def loader(self, module: Any, loader: Any) -> Any:
        """The training loader of the epoch that begins."""
        return loader

    def at_start(self, module: Any) -> None:
        """The weights are those that training begins or goes on with."""

    def saved(self) -> Any:
        """What belongs into a checkpoint beside parameters."""

    def load(self, saved: Any) -> None:
        """What ``saved`` gave; None from a run without the method."""

    def at_epoch_end(self, module: Any) -> None:
        """The end of a training epoch."""

    def tidy(self, module: Any) -> None:
        """Before validation and at the end of the fit: weights may have been averaged."""

    def own(self, module: Any) -> list[Tensor]:
        """Parameters that are not part of the network."""
        return []


class Spread(Method):
    """``FeatureRegularizer(spread, weight=0.3)``."""

    def loss(self, module: Any, loss: Tensor, features: Tensor, targets: Tensor, batch_idx: int) -> Tensor:
        value = spread(features, targets)
        module.note("spread/loss/penultimate", batch_idx, value)
        return loss + SPREAD_WEIGHT * value


class Uniformity(Method):
    """``UniformityRegularizer(weight=0.1)``."""

    def loss(self, module: Any, loss: Tensor, features: Tensor, targets: Tensor, batch_idx: int) -> Tensor:
        value = wasserstein_uniformity(features.float())
        module.note("uniformity_wasserstein/loss/penultimate", batch_idx, value)
        return loss + UNIFORMITY_WEIGHT * value


class CollapseLosses(Method):
    """``NeuralCollapseRegularizer(pull_weight=0.2)``: means of its own, a pull and a push."""

    def prepare(self, module: Any) -> None:
        drawn = torch.randn(NUM_CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
        module.own = nn.ParameterList([drawn])  # a submodule, for its place: behind the network
        if module.habits.sharded:  # FSDP2 does not know them
            module.own[0].register_post_accumulate_grad_hook(average)

    def loss(self, module: Any, loss: Tensor, features: Tensor, targets: Tensor, batch_idx: int) -> Tensor:
        pull = within_class_pull(features, targets, scale_gradient(module.own[0], 1 / PULL_WEIGHT))
        push = between_class_push(scale_gradient(module.own[0], 1.0))
        module.note("collapse_pull/loss/penultimate", batch_idx, pull)
        module.note("collapse_push/loss/penultimate", batch_idx, push)
        return loss + PULL_WEIGHT * pull + PUSH_WEIGHT * push

    def own(self, module: Any) -> list[Tensor]:
        return [*module.own]


class Prompts(Method):
    """``PromptLearner("maple", depth=2, length=2, template=None, gram_weight=0.01)``."""

    def prepare(self, module: Any) -> None:
        with torch.random.fork_rng(enabled=not module.active):  # as if they had not been drawn
            module.own = nn.ModuleList([DeepPrompts("maple", WIDTH, WIDTH, depth=2, length=2)])

    def arguments(self, module: Any) -> dict[str, Any]:
        return {"prompts": module.own[0]}

    def loss(self, module: Any, loss: Tensor, features: Tensor, targets: Tensor, batch_idx: int) -> Tensor:
        value = module.own[0].gram_consistency_loss()
        module.note("prompt_gram/loss", batch_idx, value)
        return loss + GRAM_WEIGHT * value

    def at_epoch_end(self, module: Any) -> None:
        """Norms and ratios of Gram matrices from their definition."""
        learned = module.own[0]
        for kind in ("text", "image"):
            deep = [learned.prompt(kind, index).double() for index in range(1, learned.depth_of(kind))]
            norms = torch.stack([torch.linalg.matrix_norm(p.T @ p) for p in deep])
            module.own_at_end[f"{kind} norms"] = norms
            module.own_at_end[f"{kind} ratios"] = norms / learned.get_buffer(f"{kind}_gram_start")

    def own(self, module: Any) -> list[Tensor]:
        return [*module.own.parameters(), *module.own.buffers()]


class Grassmann(Method):
    """``GrassmannHead(2)``: each optimizer step becomes one along the geodesic, here by an SVD in float64."""

    tolerance = 1e-4  # float32 bases, moved by another formula; the network follows them

    def prepare(self, module: Any) -> None:
        module.network.fc = GrassmannLinear(WIDTH, NUM_CLASSES, 2)

    @torch.no_grad()
    def before_step(self, module: Any) -> Callable[[], None]:
        start = local(module.network.fc.basis).clone()

        @torch.no_grad()
        def after() -> None:
            basis = local(module.network.fc.basis)
            x_CkD = start.double()
            delta_CkD = basis.double() - x_CkD
            delta_CkD -= delta_CkD @ x_CkD.mT @ x_CkD
            if delta_CkD.any():
                u_Ckk, s_Ck, vt_CkD = torch.linalg.svd(delta_CkD, full_matrices=False)
                turned = u_Ckk @ (s_Ck.cos()[..., None] * (u_Ckk.mT @ x_CkD) + s_Ck.sin()[..., None] * vt_CkD)
                basis.copy_(turned)

        return after

    @torch.no_grad()
    def tidy(self, module: Any) -> None:
        basis = local(module.network.fc.basis)
        if basis.numel():
            u_Ckk, _, vt_CkD = torch.linalg.svd(basis.double(), full_matrices=False)
            basis.copy_(u_Ckk @ vt_CkD)


class Simplex(Method):
    """``SimplexETFHead()``: a classifier that is fixed."""

    def prepare(self, module: Any) -> None:
        module.network.fc = SimplexETF(WIDTH, NUM_CLASSES)


class StartingPoint(Method):
    """``FeatureShiftRegularizer(form="l2_sp", weight=0.1)``: half the squared distance to the first weights."""

    tolerance = 1e-4  # the squares are added up in another order

    start: list[Tensor] | None = None

    def at_start(self, module: Any) -> None:
        if self.start is None or module.trainer.global_step == 0:  # of each fit anew, unless it is resumed
            self.start = [p.detach().clone() for p in module.network.parameters()]

    def saved(self) -> Any:
        return self.start

    def load(self, saved: Any) -> None:
        self.start = saved

    def loss(self, module: Any, loss: Tensor, features: Tensor, targets: Tensor, batch_idx: int) -> Tensor:
        pairs = zip(module.network.parameters(), self.start, strict=True)
        value = 0.5 * torch.stack([(p - p0).square().sum() for p, p0 in pairs]).sum()
        module.note("feature_shift/loss/l2_sp", batch_idx, value)
        return loss + 0.1 * value


class StartingFeatures(Method):
    """``FeatureShiftRegularizer(form="distillation", weight=0.1)``: the features stay near those of a frozen copy."""

    frozen: Any = None
    weights: Any = None  # of a checkpoint, until there is a module to copy

    def at_start(self, module: Any) -> None:
        if self.frozen is None or module.trainer.global_step == 0:  # of each fit anew, unless it is resumed
            self.frozen = copy.deepcopy(module.network).requires_grad_(False).eval()
        if self.weights is not None:
            self.frozen.load_state_dict(self.weights)
            self.weights = None

    def saved(self) -> Any:
        return None if self.frozen is None else self.frozen.state_dict()

    def load(self, saved: Any) -> None:
        self.weights = saved

    def loss(self, module: Any, loss: Tensor, features: Tensor, targets: Tensor, batch_idx: int) -> Tensor:
        precision = module._trainer.precision_plugin.forward_context() if module._trainer else nullcontext()
        with torch.no_grad(), precision:
            reference = self.frozen.body(module.inputs).float()
        value = (features - reference).square().sum(1).mean()
        module.note("feature_shift/loss/distillation", batch_idx, value)
        return loss + 0.1 * value


class DotRegression(Method):
    """``DotRegressionRegularizer()`` in the place of the loss."""

    replaces_loss = True

    def loss(self, module: Any, loss: Tensor, features: Tensor, targets: Tensor, batch_idx: int) -> Tensor:
        value = dot_regression(features, targets, module.network.fc.prototypes)
        module.note("dot_regression/loss/penultimate", batch_idx, value)
        return loss + value


class Plan(Method):
    """``DataPlan(plan)``: a sampler in the author's own loader."""

    changes_loader = True
    length: Literal["grow", "keep"] = "grow"

    def plan(self, epoch: int) -> Tensor | Sequence[int] | None:
        return plan(epoch)

    def loader(self, module: Any, loader: Any) -> Any:
        trainer = module.trainer
        counts = self.plan(trainer.current_epoch)
        counts = [1] * len(loader.dataset) if counts is None else counts
        sampler = PlanSampler(counts, self.length, num_replicas=trainer.world_size, rank=trainer.global_rank)
        sampler.set_epoch(trainer.current_epoch)
        return DataLoader(loader.dataset, loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn)


class Upsample(Plan):
    """``SimplicityBiasUpsampler``, going on after the first epoch with slow examples twice as likely."""

    changes_loader = False  # but once, and then at once: else the loader draws other random numbers than the callback's
    length = "keep"
    counts: Tensor | None = None

    def plan(self, epoch: int) -> Tensor | Sequence[int] | None:
        return None if epoch == 0 else self.counts

    def at_epoch_end(self, module: Any) -> None:
        if module.trainer.current_epoch == 0:
            _, targets, logits = measured(module, "train")
            losses = cross_entropy(logits.float(), targets, reduction="none")
            self.counts = 1 + slow_examples(logits.float(), losses, targets, NUM_CLASSES).slow.long()
            module.trainer.fit_loop._combined_loader = None


class WorstPoint(Method):
    """``SharpnessAwareMinimization()``: the gradient is that of a second pass, which counts nowhere."""

    def prepare(self, module: Any) -> None:
        self.module = module

    def closure(self, optimizer: Any, closure: Any) -> Any:
        def both() -> Any:
            random = torch.get_rng_state()
            loss, outputs = closure(), closure._result
            if loss is None:
                return None
            trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            buffers = [*self.module.buffers()]
            before, statistics = [p.detach().clone() for p in trained], [b.clone() for b in buffers]
            for p, step in zip(trained, sharpness_step([p.grad for p in trained]), strict=True):
                p.data.add_(step)
            torch.set_rng_state(random)
            closure()
            for tensor, old in zip([*trained, *buffers], [*before, *statistics], strict=True):
                tensor.data.copy_(old)
            closure._result = outputs
            return loss

        return both


class Stop(Method):
    """A threshold that is passed from the second epoch on: the run ends there."""

    def at_epoch_end(self, module: Any) -> None:
        if module.trainer.current_epoch >= 1:
            module.trainer.should_stop = True


def average(parameter: Tensor) -> None:
    """Of the gradients of all processes. What has been averaged before, with accumulation, stays as it is."""
    if parameter.grad is not None:
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= torch.distributed.get_world_size()


def local(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter, sharing memory."""
    data: Any = parameter.detach()
    return data.to_local() if hasattr(data, "to_local") else data
