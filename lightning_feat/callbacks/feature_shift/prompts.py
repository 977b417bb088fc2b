import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_feat.joints.arguments import checked
from lightning_feat.joints.clip.towers import ClipTowers, find_clip_towers
from lightning_feat.joints.loss.engine import add_loss_term, remove_loss_term
from lightning_feat.joints.loss.terms import LossTerm, WeightSchedule
from lightning_feat.joints.module import own_parameters
from lightning_feat.joints.module.brings_parameters import BringsParameters
from lightning_feat.joints.module.wraps import add_link, overrides, remove_link
from lightning_feat.joints.reference.runs import refuse_sharding
from lightning_feat.joints.run.averaging import refuse_averaging_before
from lightning_feat.joints.run.twins import refuse_twin
from lightning_feat.layers.feature_shift.insertion import Insertion
from lightning_feat.layers.feature_shift.prompt_hooks import insert_prompts
from lightning_feat.layers.feature_shift.prompts import Coupling, DeepPrompts, Kind
from lightning_feat.layers.feature_shift.surgery import SurgeryBlock, attach_surgery

_STRENGTHEN: dict[Kind, float] = {"text": 0.02, "image": 0.005}  # RESTORE's code
_KEY = "prompts"


class PromptLearner(BringsParameters):
    """Teach a CLIP-like model prompts in its towers, in any LightningModule that holds one: CoOp, independent
    vision-language prompts, MaPLe, and RESTORE with its consistency by Gram norms and its surgery blocks.

    The model is found (``clip_towers.find_clip_towers``) and prompted by hooks, in every stage; its class, parameters
    and state dict stay as they are. Freeze it in your module. The prompts are trained by the module's optimizer, in an
    existing group. A checkpoint keeps them apart from the module's weights, so that it loads without this callback too.
    When the run is over the model is as it was, and prompted again in the next stage with the same callback.

    Logged after each epoch: ``prompts/gram_norm/<tower>``, the mean Gram norm of the deep prompts, and
    ``prompts/discrepancy``, the mean of ``|s_t - s_v|`` where both towers have such; with a weight also
    ``prompt_gram/loss`` and ``prompt_gram/share``; with surgery ``prompts/ratio/<tower>``.

    Args:
        coupling: which towers, and how: ``"maple"``, ``"independent"``, ``"text"``, ``"vision"``; see
            ``layers.DeepPrompts``, and there the next four.
        depth: number of blocks with prompts.
        length: number of prompts in each.
        image_depth: of independent image prompts, by default ``depth``.
        image_length: of independent image prompts, by default ``length``.
        template: text whose first words are the start of the first text prompt, and which prompts replace, by the
            ``tokenizer`` of the module. Texts that begin with other words keep all of theirs, behind the prompts, where
            the tower has room. None for a random start: prompts replace what all texts of the first pass begin with.
        gram_weight: weight of the consistency by Gram norms (RESTORE: 1); a number or a ``WeightSchedule``.
        text_surgery: ratio of a surgery block on the text features (RESTORE: 0.1 or 0.05); None for none.
        image_surgery: the same for the image features.
        strengthen: let the ratios grow once, after a third of the epochs, as RESTORE's code does.
        layers: dotted names of a model of another layout, see ``joints.clip.towers.find_clip_towers``.
        backward_index: with manual optimization, which ``manual_backward`` the consistency joins, from 0.
        eos_token_id: the id at which text features are read.
        batch_first: whether blocks get samples first.
        start_token: whether texts begin with a token that is no word. None asks the ``tokenizer`` of the module, if it
            has one.
    """

    @checked
    def __init__(
        self,
        coupling: Coupling = "maple",
        depth: int = 9,
        length: int = 2,
        image_depth: int | None = None,
        image_length: int | None = None,
        template: str | None = "a photo of a",
        gram_weight: float | WeightSchedule = 0.0,
        text_surgery: float | None = None,
        image_surgery: float | None = None,
        strengthen: bool = True,
        layers: dict[str, str] | None = None,
        backward_index: int = 0,
        eos_token_id: int | None = None,
        batch_first: bool | None = None,
        start_token: bool | None = None,
    ) -> None:
        weighed = gram_weight.peak if isinstance(gram_weight, WeightSchedule) else gram_weight
        if weighed and (coupling in ("text", "vision") or depth < 2 or (image_depth or depth) < 2):
            raise ValueError(
                f"gram_weight={weighed:g} compares deep prompts of both towers, which coupling={coupling!r} with "
                f"{depth=} has not: choose 'maple' or 'independent' and a depth of 2 or more."
            )
        self.coupling, self.depth, self.length = coupling, depth, length
        self.image_depth, self.image_length, self.template = image_depth, image_length, template
        self.gram_weight, self.strengthen, self.layers = gram_weight, strengthen, layers
        self.surgery: dict[Kind, float | None] = {"text": text_surgery, "image": image_surgery}
        self.backward_index = backward_index
        self.eos_token_id, self.batch_first, self.start_token = eos_token_id, batch_first, start_token
        self.learned: nn.ModuleDict | None = None  # prompts and blocks, kept between stages
        self._of: weakref.ref[LightningModule] | None = None
        self._insertions: list[Insertion] = []
        self._term: _GramTerm | None = None

    @property
    def state_key(self) -> str:
        return "PromptLearner"

    def brought(self) -> tuple[str, nn.Module] | None:
        return None if self.learned is None else (_KEY, self.learned)

    @property
    def prompts(self) -> DeepPrompts:
        """The prompts, from ``setup`` on."""
        if self.learned is None:
            raise RuntimeError("there are no prompts yet: they are made for the model of a run, in setup.")
        return cast(DeepPrompts, self.learned[_KEY])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_twin(trainer, self)
        refuse_averaging_before(trainer, self)
        refuse_sharding(trainer, "PromptLearner", "computes with whole prompts inside the towers")
        self._take_out(pl_module)
        if overrides(pl_module, "configure_model"):
            add_link(pl_module, "configure_model", self.state_key, _BringIn(self, stage))
        else:
            self.bring_in(pl_module, stage)

    def bring_in(self, module: LightningModule, stage: str) -> None:
        """Put prompts and blocks into the model; nothing happens where they are in place."""
        if self._insertions:
            return
        towers = find_clip_towers(
            module, self.layers, self.batch_first, self.eos_token_id, self._has_start_token(module)
        )
        if self.learned is None or self._of is None or self._of() is not module:
            self.learned, self._of = self._new(module, towers), weakref.ref(module)
        self._insertions.append(insert_prompts(towers, self.prompts))
        blocks = {kind: cast(SurgeryBlock, block) for kind, block in self.learned.items() if kind != _KEY}
        if blocks:
            self._insertions.append(attach_surgery(towers, **blocks))
        if stage == "fit":
            self._term = _GramTerm(self.learned, self.gram_weight, self.backward_index)
            add_loss_term(module, self._term)  # which brings the parameters along too
        else:
            own_parameters.adopt(module, _KEY, self.learned)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.strengthen and trainer.current_epoch == (trainer.max_epochs or 0) // 3:
            for kind, block in self._blocks():
                if kind in self.prompts.kinds and self.prompts.depth_of(kind) > 1:
                    block.strengthen(_STRENGTHEN[kind], self.prompts.gram_norms(kind))
        deep = [kind for kind in self.prompts.kinds if self.prompts.depth_of(kind) > 1]
        for kind in deep:
            norm = self.prompts.gram_norms(kind).detach().mean().float()
            pl_module.log(f"prompts/gram_norm/{kind}", norm, sync_dist=True)
        if len(deep) == 2:
            pl_module.log("prompts/discrepancy", self.prompts.gram_discrepancy().detach().mean(), sync_dist=True)
        for kind, block in self._blocks():
            pl_module.log(f"prompts/ratio/{kind}", block.ratio.float(), sync_dist=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint[self.state_key] = {**self._options(), "words": [*self.prompts.words]}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        now = self._options()
        then_words = checkpoint.get(self.state_key, {}).get("words")
        if then_words:  # where prompts stand is a part of what was trained
            self.prompts.words[:] = then_words
        for name, then in checkpoint.get(self.state_key, {}).items():
            # A test meets the blocks as they were trained; a run that goes on would keep their ratio without a word.
            counts = trainer.state.fn == TrainerFn.FITTING or not name.endswith("surgery") or None in (then, now[name])
            if counts and name in now and then != now[name]:
                raise ValueError(
                    f"the checkpoint has prompts with {name}={then!r}, and PromptLearner asks for {name}="
                    f"{now[name]!r}: ask for what was trained, or begin a new run."
                )
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._take_out(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._take_out(pl_module)  # after an exception Lightning does not call teardown

    @contextmanager
    def without_prompts(self) -> Iterator[None]:
        """Inside the block the model computes as it did without prompts and blocks, for a reference pass."""
        if not self._insertions:
            yield
            return
        first, *rest = self._insertions
        with first.paused():
            if rest:
                with rest[0].paused():
                    yield
            else:
                yield

    def prompt_length(self, kind: Kind) -> int:
        """Number of prompts in a tower, zero where it has none."""
        return self.prompts.length_of(kind) if kind in self.prompts.kinds else 0

    def _options(self) -> dict[str, Any]:
        """What the shapes of prompts and blocks, and what the buffers in a checkpoint depend on."""
        text, vision = self.coupling != "vision", self.coupling in ("independent", "vision")
        return {
            "coupling": self.coupling,
            **({"depth": self.depth, "length": self.length} if text else {}),
            **({"image_depth": self.image_depth or self.depth} if vision else {}),
            **({"image_length": self.image_length or self.length} if vision else {}),
            "text_surgery": self.surgery["text"],
            "image_surgery": self.surgery["image"],
        }

    def _new(self, module: LightningModule, towers: ClipTowers) -> nn.ModuleDict:
        ids = self._template_ids(module) if self.coupling != "vision" else None
        prompts = DeepPrompts.for_towers(
            towers, self.coupling, self.depth, self.length, self.image_depth, self.image_length, ids
        )
        learned: dict[str, nn.Module] = {_KEY: prompts}
        for kind, ratio in self.surgery.items():
            if ratio is not None:
                width = (towers.text if kind == "text" else towers.image).num_features
                if width is None:
                    raise ValueError(f"the width of the {kind} features is not known: leave {kind}_surgery out.")
                learned[kind] = SurgeryBlock(width, ratio).to(next(towers.model.parameters()).device)
        return nn.ModuleDict(learned)

    def _has_start_token(self, module: LightningModule) -> bool | None:
        tokenizer: Any = getattr(module, "tokenizer", None)
        if self.start_token is not None or not callable(tokenizer) or self.coupling == "vision":
            return self.start_token
        try:
            firsts = [int(tokenizer([text])[0][0]) for text in ("a", "dog", "the sky")]
        except (TypeError, KeyError, ValueError):  # one that gives something else than ids
            return None
        return len(set(firsts)) == 1

    def _template_ids(self, module: LightningModule) -> Tensor | None:
        if self.template is None:
            return None
        tokenizer: Any = getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                f"template={self.template!r} needs a tokenizer, and {type(module).__name__} has no attribute of that "
                "name: set template=None for a random start."
            )
        ids: Tensor = tokenizer([self.template])[0]
        return ids

    def _blocks(self) -> list[tuple[Kind, SurgeryBlock]]:
        if self.learned is None:
            return []
        return [(kind, cast(SurgeryBlock, self.learned[kind])) for kind in self.surgery if kind in self.learned]

    def _take_out(self, module: LightningModule) -> None:
        while self._insertions:
            self._insertions.pop().remove()
        remove_link(module, "configure_model", self.state_key)
        if self._term is not None:
            remove_loss_term(module, self._term)
            self._term = None
        own_parameters.release(module, _KEY)


class _GramTerm(LossTerm):
    """The consistency of the deep prompts; with weight zero it only brings the parameters along."""

    def __init__(self, learned: nn.ModuleDict, weight: float | WeightSchedule, backward_index: int) -> None:
        super().__init__("prompt_gram", weight, [], learned, backward_index)
        self.prompts = cast(DeepPrompts, learned[_KEY])

    @property
    def key(self) -> str:
        return _KEY

    def value(self, module: LightningModule, batch: Any) -> Tensor:
        return self.prompts.gram_consistency_loss()


class _BringIn:
    """The link around ``configure_model``. A copy or a pickle of the module has its prompts already."""

    def __init__(self, callback: PromptLearner | None = None, stage: str = "") -> None:
        self.callback, self.stage = callback, stage

    def __call__(self, module: LightningModule, call: Callable[..., Any]) -> None:
        call()
        if self.callback is not None:
            self.callback.bring_in(module, self.stage)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_BringIn, ())
