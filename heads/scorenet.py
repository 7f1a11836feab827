"""ScoreNet: a small transformer on the thumbnail says which places are worth their full resolution.

Stegmüller et al.: ScoreNet: Learning Non-Uniform Attention and Augmentation for Transformer-Based Histopathological
Image Classification, WACV 2023 (arXiv 2202.07570). Reads pixels (`Picture`), no features.

    scorer, ViT-tiny on the image at an eighth:  p = Σ_h softmax(v)_h softmax(rows of the class token)_h,  one for each
    place of 128 px; its class tokens of the last x blocks, 96 x
    the k places with the highest p, in full, through a second ViT-tiny: 96 each, the mean over its tokens
    encoder, 4 blocks over those k without places; its class tokens of the last y blocks, 96 y
    logits = classifier([scorer's tokens, encoder's tokens])

A class token is the mean of the others, put before them for the last blocks only. "ScoreNet/x/y" is tokens=(x, y).

While training, each of the k rows is a share of all places: the mean over draws of the choice under normal noise, whose
gradient is estimated from the same draws (`PerturbedTopK`). `selection="straight_through"` looks at the chosen places
and has that gradient.

What differs from the paper's print: the encoder's MLP has four times the width, as the printed total demands. From the
released code: k is k, and not a tenth of the places; the gradient is whole, not its diagonal; the weights of the heads
are a softmax; tokens keep their own value beside the convolution that tells places; hard and soft rows have one order.

Parameters: 2 · 673,248 for the ViT-tinies, 446,400 for the encoder, 4: 1,792,900; and the classifier's 128 (96 (x + y)
+ 1) + C 129.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .augment import colours
from .bag import Bag, Prediction, TileScores
from .head import Head, Needs
from .picture import MEAN, SD, Picture, Pixels
from .recipe import Recipe

WIDTH, HEADS = 96, 4
SMALLER, PATCH = 8, 16  # the thumbnail's factor, and pixels of a token: a token of the thumbnail is a place of 128 px
PLACE = SMALLER * PATCH

SELECTIONS = ("soft", "straight_through")


class Block(nn.Module):
    """(B, n, 96) → the same. Pre-norm; parameters 96² (4 + 2 ratio) + 96 (7 + ratio), without qkv_bias 288 fewer."""

    def __init__(self, ratio: int, qkv_bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=qkv_bias), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, ratio * WIDTH), nn.GELU(), nn.Linear(ratio * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._parts(x)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        after: Tensor = x + self.mlp(self.norm2(x))
        return after

    def first_row(self, x: Tensor) -> Tensor:
        """(B, heads, n): what the first token says of each before the softmax."""
        q, k, _ = self._parts(x)
        return (q[:, :, :1] @ k.mT)[:, :, 0] * q.shape[-1] ** -0.5

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class Tokens(nn.Module):
    """Blocks over tokens, the last `count` of which also have a class token, the mean of the tokens before them."""

    def __init__(self, depth: int, ratio: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(ratio, qkv_bias) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, 96) → the same, normed."""
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def class_tokens(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(B, n, 96) → (B, 96 count), and the last one's scores of the n tokens before the softmax (B, heads, n)."""
        first, last = self.blocks[: len(self.blocks) - count], self.blocks[len(self.blocks) - count :]
        for block in first:
            x = block(x)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        tokens = []
        for block in last:
            before, x = x, block(x)
            tokens.append(self.norm(x[:, 0]))
        scores: Tensor = last[-1].first_row(before)[..., 1:]  # type: ignore[operator]
        return torch.cat(tokens, dim=-1), scores


class ViTTiny(Tokens):
    """Images (B, 3, H, W), normalised → tokens (B, H W / 256, 96), row by row. A convolution over neighbouring tokens
    tells them their places. Parameters: 673,248."""

    def __init__(self, depth: int = 8) -> None:
        super().__init__(depth, ratio=2)
        self.embedding = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.place = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def tokens(self, images: Tensor) -> Tensor:
        x = self.embedding(images)
        x = x + self.place(x)
        return x.flatten(2).mT


class PerturbedTopK(torch.autograd.Function):
    """The mean over draws of which k scores are highest under noise (Berthet et al., NeurIPS 2020; Cordonnier et al.,
    CVPR 2021).

    scores (N,), noise (S, N) standard normal → (k, N), each row sums to 1: row j is the j-th place of those chosen, in
    the order of the places. Gradient: 1 / (S σ) Σ_s (Σ_j G[j, place j of draw s]) noise_s.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, noise: Tensor, k: int, sigma: float) -> Tensor:
        chosen = (scores + sigma * noise).topk(k, dim=1).indices.sort(dim=1).values  # (S, k)
        ctx.save_for_backward(noise, chosen)
        ctx.sigma = sigma
        cells = chosen + torch.arange(k, device=scores.device) * len(scores)
        shares = torch.bincount(cells.flatten(), minlength=k * len(scores)).to(scores) / len(noise)
        return shares.unflatten(0, (k, len(scores)))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        noise, chosen = ctx.saved_tensors
        rows = torch.arange(chosen.shape[1], device=noise.device)
        each = slopes[0][rows, chosen].sum(1)  # (S,)
        return each @ noise / (len(noise) * ctx.sigma), None, None, None


class ScoreNet(Head):
    """k: places looked at in full. tokens: class tokens of the scorer and of the encoder. draws, sigma: the noise.

    weights: a safetensors file to begin with, of all but the classifier, or of a ViT-tiny for scorer and places alike.
    """

    needs = Needs(pixels=True)
    mean: Tensor
    sd: Tensor
    recipes: ClassVar = {
        "paper": Recipe(
            optimizer="sgd", lr=3.125e-4, weight_decay=0.0, momentum=0.9, schedule="cosine", final_lr=1e-6, epochs=15,
            keep="last", class_weights=False, accumulation=8, augment=True, mix="scoremix",
        )
    }  # fmt: skip

    def __init__(
        self,
        dim: int = 3,
        classes: int = 2,
        *,
        k: int = 20,
        tokens: tuple[int, int] = (4, 1),
        draws: int = 100,
        sigma: float = 1e-3,
        selection: str = "soft",
        weights: str | None = None,
    ) -> None:
        # `weights` is no option to be kept: once trained, a head has its own
        super().__init__(dim, classes, k=k, tokens=list(tokens), draws=draws, sigma=sigma, selection=selection)
        if dim != 3:
            raise ValueError(f"ScoreNet reads the three colours of pixels, not {dim} features")
        if selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, not {selection!r}")
        if k < 1 or draws < 1 or sigma <= 0:
            raise ValueError(f"k and draws must be at least 1 and sigma above 0, not {k}, {draws} and {sigma}")
        if not (1 <= tokens[0] <= 8 and 1 <= tokens[1] <= 4):
            raise ValueError(f"tokens are 1 to 8 of the scorer and 1 to 4 of the encoder, not {tuple(tokens)}")
        self.scorer, self.patches = ViTTiny(), ViTTiny()
        self.encoder = Tokens(4, ratio=4, qkv_bias=False)
        self.mixture = nn.Parameter(torch.zeros(HEADS))
        width = WIDTH * sum(tokens)
        self.classifier = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, classes))
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("sd", torch.tensor(SD)[:, None, None], persistent=False)
        if weights is not None:
            self._begin_with(weights)

    def _begin_with(self, weights: str) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"ScoreNet: {weights} is no safetensors file that can be read: {error}") from error
        if "embedding.weight" in state:
            state = {f"{part}.{key}": value for part in ("scorer", "patches") for key, value in state.items()}
        parts = {key.split(".")[0] for key in state}
        known = {key: value.shape for key, value in self.state_dict().items() if key.split(".")[0] in parts}
        if (
            {key: value.shape for key, value in state.items()} != known
            or "scorer" not in parts
            or "classifier" in parts
        ):
            raise ValueError(
                f"ScoreNet: {weights} holds neither its weights without a classifier nor those of a ViT-tiny"
            )
        self.load_state_dict(state, strict=False)

    def forward(self, picture: Bag | Pixels) -> Prediction:
        self.check(picture)
        assert not isinstance(picture, Bag)
        picture = picture.trimmed(PLACE)
        share, tokens, across = self.score(picture.thumbnail(SMALLER))
        chosen = share.detach().topk(min(self.options["k"], len(share))).indices.sort().values
        looked = self._looked_at(picture, share, chosen) if self.training else picture.crops(chosen, PLACE)
        z = torch.cat([tokens, self.aggregate(looked)])
        parts = {"chosen": chosen, "places": torch.tensor([len(share) // across, across, *picture.size])}
        return Prediction(
            self.classifier(z),
            z,
            (TileScores(share.clamp(min=torch.finfo(share.dtype).tiny).log(), share),),
            parts=parts,
        )

    def score(self, thumbnail: Tensor) -> tuple[Tensor, Tensor, int]:
        """(3, h, w) in 0..1 → the places' shares (h w / 256,), row by row; (96 x,); how many places lie in a row."""
        x = self.scorer.tokens(self._normalised(thumbnail)[None])
        tokens, scores = self.scorer.class_tokens(x, self.options["tokens"][0])
        share = self.mixture.softmax(0) @ scores[0].softmax(-1)
        return share, tokens[0], thumbnail.shape[2] // PATCH

    def augment(self, picture: Picture) -> Picture:
        return colours(picture)

    @torch.no_grad()
    def attention_map(self, picture: Pixels, edge: int) -> Tensor:
        if edge != PLACE:
            raise ValueError(f"ScoreNet's map is of places of {PLACE} px, not {edge}")
        share, _, across = self.score(picture.thumbnail(SMALLER))
        return share.unflatten(0, (-1, across))

    def aggregate(self, places: Tensor) -> Tensor:
        """(k, 3, 128, 128) in 0..1, in any order → (96 y,)."""
        each = self.patches(self.patches.tokens(self._normalised(places))).mean(1)
        return self.encoder.class_tokens(each[None], self.options["tokens"][1])[0][0]

    def _looked_at(self, picture: Pixels, share: Tensor, chosen: Tensor) -> Tensor:
        """Mixtures of all places, so that a gradient tells which of them should have been chosen."""
        noise = torch.randn(self.options["draws"], len(share), device=share.device)
        rows: Tensor = PerturbedTopK.apply(share, noise, len(chosen), self.options["sigma"])
        if self.options["selection"] == "straight_through":
            hard = torch.zeros_like(rows).scatter(1, chosen[:, None], 1.0)
            rows = hard + rows - rows.detach()
        every = picture.crops(torch.arange(len(share), device=share.device), PLACE)
        return (rows @ every.flatten(1)).unflatten(1, every.shape[1:])

    def _normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.sd


build = ScoreNet
