"""A small CLIP: an image and a text transformer with features in a common space.

Submodules and parameters have the names that open_clip gives them, so that what reads or changes a tower there does so
here. Architecture: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.

Shapes: N images or texts, L tokens of a text, P patches of an image, W width of a tower, E features.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_feat.joints.arguments import checked


class Block(nn.Module):
    """Attention and a perceptron, each on the normalised input and added to it: ``(N, L, W)`` to ``(N, L, W)``.

    Weights start with the standard deviations of the released CLIP, in which the residual sum keeps its size with the
    number of blocks, ``layers``.
    """

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        widen, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict([("c_fc", widen), ("gelu", nn.GELU()), ("c_proj", narrow)]))
        into_sum = (2 * layers * width) ** -0.5
        nn.init.normal_(self.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(self.attn.out_proj.weight, std=into_sum)
        nn.init.normal_(widen.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(narrow.weight, std=into_sum)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=attn_mask)[0]
        widened: Tensor = self.mlp(self.ln_2(x))
        return x + widened


class Transformer(nn.Module):
    """Blocks one after the other, on ``(N, L, W)``."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        if min(width, layers, heads) < 1 or width % heads:
            raise ValueError(f"{width=}, {layers=} and {heads=} are at least 1, and the heads share the width evenly.")
        self.resblocks = nn.ModuleList([Block(width, heads, layers) for _ in range(layers)])
        self.grad_checkpointing = False

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attn_mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=attn_mask)
        return x


class ImageTower(nn.Module):
    """A vision transformer that is read at its class token: images ``(N, 3, S, S)`` to features ``(N, E)``."""

    def __init__(self, image_size: int, patch_size: int, width: int, layers: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"{image_size=} is no multiple of {patch_size=}: patches must tile the image.")
        scale = width**-0.5
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images are {tuple(images.shape)}, but this tower reads (N, 3, {self.image_size}, {self.image_size})."
            )
        patch_NPW = self.conv1(images).flatten(2).transpose(1, 2)
        class_N1W = self.class_embedding.to(patch_NPW.dtype).expand(len(images), 1, -1)
        x = torch.cat([class_N1W, patch_NPW], dim=1) + self.positional_embedding.to(patch_NPW.dtype)
        x = self.transformer(self.ln_pre(x))
        features: Tensor = self.ln_post(x[:, 0]) @ self.proj
        return features


class SmallClip(nn.Module):
    """Two transformers of a few layers, one for images and one for texts, with features of one width.

    The text tower is causal and read at the end token, which must be the first place of the largest id in its row.

    Args:
        vocab_size: number of token ids.
        context_length: longest text in tokens.
        image_size: height and width of the images in pixels.
        patch_size: height and width of a patch, a divisor of ``image_size``.
        embed_dim: width E of the common space.
        vision_width: width of the image tower.
        vision_layers: its blocks.
        vision_heads: its attention heads.
        text_width: width of the text tower.
        text_layers: its blocks.
        text_heads: its attention heads.

    Example:
        >>> clip = SmallClip(vocab_size=10, context_length=6)
        >>> images, ids = torch.zeros(2, 3, 32, 32), torch.tensor([[2, 3, 9, 0, 0, 0]])
        >>> clip.encode_image(images).shape, clip.encode_text(ids).shape
        (torch.Size([2, 64]), torch.Size([1, 64]))
    """

    attn_mask: Tensor

    @checked
    def __init__(
        self,
        vocab_size: int,
        context_length: int = 16,
        image_size: int = 32,
        patch_size: int = 8,
        embed_dim: int = 64,
        vision_width: int = 64,
        vision_layers: int = 4,
        vision_heads: int = 4,
        text_width: int = 64,
        text_layers: int = 4,
        text_heads: int = 4,
    ) -> None:
        super().__init__()
        self.context_length, self.vocab_size, self.embed_dim = context_length, vocab_size, embed_dim
        self.visual = ImageTower(image_size, patch_size, vision_width, vision_layers, vision_heads, embed_dim)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, text_width))
        self.transformer = Transformer(text_width, text_layers, text_heads)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(text_width**-0.5 * torch.randn(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # the start of Radford et al.
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        causal = torch.full((context_length, context_length), -torch.inf).triu(1)
        self.register_buffer("attn_mask", causal, persistent=False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block, and compute the block again in the backward pass."""
        self.transformer.grad_checkpointing = self.visual.transformer.grad_checkpointing = enable

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Features ``(N, E)`` of images ``(N, 3, S, S)``, of length one if asked."""
        features: Tensor = self.visual(image)
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Features ``(N, E)`` of token ids ``(N, L)``, of length one if asked."""
        length = text.shape[1]
        if length > self.context_length:
            raise ValueError(f"texts of {length} tokens are longer than context_length={self.context_length}.")
        x = self.token_embedding(text)
        x = x + self.positional_embedding[:length].to(x.dtype)
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask[:length, :length]))
        features: Tensor = x[torch.arange(len(x), device=x.device), text.argmax(1)] @ self.text_projection
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of images and of texts, each of length one, and the factor of their cosines in the logits."""
        return self.encode_image(image, True), self.encode_text(text, True), self.logit_scale.exp()
