"""The network of `vit_tiny_scorenet`: a ViT of 673,248 parameters whose tokens are told their places by a convolution.

Stegmüller et al., ScoreNet, WACV 2023 (arXiv 2202.07570), section 3.2 and appendix: width 96, 8 blocks, 4 heads, MLP of
twice the width, 16 px a token; no class token and no table of positions, so images of any multiple of 16 px fit. Keys
and outputs are those of ScoreNet's own (heads/scorenet.py): what is trained here is a scorer or a patch model there.
"""

from __future__ import annotations

from torch import Tensor, nn

WIDTH, HEADS, DEPTH, PATCH = 96, 4, 8, 16


class Block(nn.Module):
    """(B, n, 96) → the same. Pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        after: Tensor = x + self.mlp(self.norm2(x))
        return after


class ViTTiny(nn.Module):
    """Images (B, 3, H, W), normalised → (B, 96), the mean of the tokens after the last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.place = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, H W / 256, 96), row by row."""
        x = self.embedding(images)
        x = (x + self.place(x)).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def forward(self, images: Tensor) -> Tensor:
        return self.tokens(images).mean(1)
