"""Features that are known, and what is on a page about them."""

import json
import re

import torch

N, D, CLASSES = 60, 6, 3


def made(seed=0, n=N):
    """Features around class means, targets, and logits that are mostly right."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % CLASSES
    mean = 3 * torch.randn(CLASSES, D, generator=generator)
    features = mean[targets] + torch.randn(n, D, generator=generator)
    logits = torch.nn.functional.one_hot(targets, CLASSES) * 2.0 + torch.randn(n, CLASSES, generator=generator)
    return features, targets, logits


def data_of(path):
    """What the script of the page gets."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def body_of(path):
    """The page without its scripts and styles."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"<(script|style).*?</\1>", "", text, flags=re.S)
