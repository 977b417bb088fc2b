"""Time of the consistency of prompts by Gram norms, beside a step of the CLIP that holds the prompts.

    python benchmarks/prompts.py [--quick]   # --quick takes a small CLIP in place of ViT-B/16

MaPLe's prompts, two in each of the first nine blocks, batches of four images and ten class names, as RESTORE has them
but with random weights and fewer names: with more the step grows and the term does not. The term is timed alone, with a
backward pass of its own, which is more than it costs inside a step; step and term take turns.
"""

import torch
from fits import quietly, small_clip
from lightning import LightningModule
from torch.nn.functional import cross_entropy
from turns import Effort, effort_asked, in_turns, spread_of, table, timed

from lightning_feat.baselines.clip_classifier import ClipClassifier
from lightning_feat.joints.clip.towers import find_clip_towers
from lightning_feat.layers.feature_shift.prompt_hooks import insert_prompts
from lightning_feat.layers.feature_shift.prompts import DeepPrompts

BAR = 0.02
CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def new_clip(effort: Effort) -> tuple[str, LightningModule, int, int]:
    """Its name, itself, the side of its images and the depth of the prompts."""
    if effort != "full":
        return "small CLIP", small_clip(), 32, 3
    with quietly():
        return "CLIP ViT-B/16", ClipClassifier(CLASSES, source="open_clip", model="ViT-B-16"), 224, 9


def gram_shares(effort: Effort, device: str = "cpu", seconds: float = 40.0) -> tuple[str, dict[str, list[float]]]:
    """Name of the CLIP, and seconds of term and step in each round."""
    torch.manual_seed(0)
    name, module, side, depth = new_clip(effort)
    module.to(device).requires_grad_(False)
    towers = find_clip_towers(module)
    prompts = DeepPrompts.for_towers(towers, "maple", depth, 2).to(device)
    images, targets = torch.randn(4, 3, side, side, device=device), torch.arange(4, device=device)
    optimizer = torch.optim.SGD(prompts.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(module(images), targets).backward()
        optimizer.step()

    def term() -> None:
        prompts.gram_consistency_loss().backward()

    insertion = insert_prompts(towers, prompts)
    step()
    term()
    taken = in_turns({"term": timed(term, device), "step": timed(step, device, count=1)}, seconds, effort)
    insertion.remove()
    return name, taken


def main() -> None:
    name, taken = gram_shares(effort_asked(__doc__))
    share = spread_of([a / b for a, b in zip(taken["term"], taken["step"], strict=True)])
    cells = [f"{1000 * spread_of(taken[which]).middle:.3g}" for which in ("step", "term")]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    print(table(("model", "step (ms)", "Gram term (ms)", "share"), [(name, *cells, share)]))


if __name__ == "__main__":
    main()
