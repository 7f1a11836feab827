"""HATNet: attention among the words of each bag, then among the bags; each is weighed by the energy of what came out.

Mehta et al.: End-to-End Diagnosis of Breast Biopsy Images with Transformers (Holistic Attention Network, HATNet), arXiv
2007.13007. A region is n × n bags of n × n words; a word is a tile, or the mean of some.

    P = W x + a                                                   words of D → d features
    S = FFN4(P + MHA(LN P))                                       word to word (eqs 1 to 3)
    c(Z) = softmax(e(Z) β),  e(Z) = Ψ(Z) / d                      Ψ: the L2 norm, the L1 norm or the mean of a row
    Bs = FFN½(Σ c(S) S),  Bc = FFN½(Σ c(P) P)                     words to bags (eqs 4 and 5)
    Q = LN(Bc + MHA(LN Bc)),  G = FFN4(Bc + MHA(Q, LN Bs, LN Bs)) bag to bag (eqs 6 and 7)
    logits = W FFN½(Σ c(G) G) + b                                 bags to the region (eqs 8 and 9)

FFN4 and FFN½ have four times the width and half of it, a norm before and a path around them, as in the released code:
the printed number of parameters is met with them only. What differs from that code: attention stays inside a bag, as
eq. 3 says (`scope="slide"`: among all words); bags and words are read row by row; places without tissue are masked.

Stored tiles are laid out as the paper lays out pixels: the box around them is divided into the n² × n² words, and a
word is the mean of the tiles whose centres lie in it. A region with fewer tiles than words is enlarged, so one tile
fills several words.

With `cnn` the head reads pixels (`Picture`): the image is divided likewise, each word resized to `word_px` whatever its
shape, and the network of that name in timm makes its features. It is trained with the rest (`train_cnn=False`: not), a
few words at a time: they go through it once without a gradient and, when the head has theirs, once more with it, so
that memory does not grow with the number of words. Its batch norms keep their means. Of the paper's three networks timm
has two, mobilenetv2_100 and mnasnet_100, both of 1,280 features; ESPNetv2 it has not.

Parameters (width d): d (D + 1) + 12 d² + 13 d + 16 d² + 21 d + 3 (d² + 7 d / 2) + n⁴ + C (d + 1); with `separate_beta`
2 n⁴ more.
"""

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import turns
from .bag import Bag, Prediction, TileScores
from .head import Head, Needs
from .picture import Picture, Pixels
from .recipe import Recipe
from .words import Words

PSI = {
    "l2": lambda z: z.norm(dim=-1),
    "l1": lambda z: z.abs().sum(-1),
    "mean": lambda z: z.sum(-1),
}
SCOPES = ("bag", "slide")


class FeedForward(nn.Module):
    """x + W2 ReLU(W1 LN x). Parameters (d, inner h): 2 d h + h + 3 d."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        first, second = nn.Linear(width, inner), nn.Linear(inner, width)
        self.inner = nn.Sequential(first, nn.ReLU(), nn.Dropout(dropout), second, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = x + self.inner(self.norm(x))
        return mixed


class Coefficients(nn.Module):
    """How much each of n² things counts, by the energies of all of them."""

    def __init__(self, count: int, psi: str, dropout: float) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.empty(count, count))
        nn.init.xavier_uniform_(self.beta)
        self.psi, self.dropout = psi, nn.Dropout(dropout)

    def forward(self, z: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (…, n², d), there (…, n²) bool → Σ c z (…, d), the energies and the coefficients (…, n²).

        What is not there has no energy and no weight.
        """
        energy = (PSI[self.psi](z) / z.shape[-1]).masked_fill(~there, 0.0)
        weight = (energy @ self.beta).masked_fill(~there, -torch.inf).softmax(-1)
        mixed = (self.dropout(weight)[..., None, :] @ z)[..., 0, :]
        return mixed, energy, weight


class HATNet(Head):
    """side: n. scope: words see those of their bag or those of the whole slide. psi: what measures a word: l2, l1 or
    mean. separate_beta: a matrix for the words after attention, one for those before and one for the bags."""

    needs = Needs(grid=True)
    presets: ClassVar = {"paper": {"vary": 0.25}}
    recipes: ClassVar = {
        "paper": Recipe(
            weight_decay=4e-6,
            eps=1e-9,
            epochs=104,
            warmup_epochs=4,
            schedule="step",
            step_epoch=50,
            step_factor=0.5,
            keep="average5",
            accumulation=8,
            augment=True,
        )
    }

    def __init__(
        self,
        dim: int | None = None,
        classes: int = 4,
        *,
        side: int = 7,
        width: int = 256,
        heads: int = 4,
        dropout: float = 0.4,
        coefficient_dropout: float = 0.2,
        attention_dropout: float = 0.1,
        scope: str = "bag",
        psi: str = "l2",
        separate_beta: bool = False,
        cnn: str | None = None,
        cnn_weights: str = "hub",
        train_cnn: bool = True,
        word_px: int = 256,
        vary: float = 0.0,
        at_a_time: int = 16,
    ) -> None:
        network = None if cnn is None else Words(cnn, cnn_weights, train_cnn, word_px, at_a_time, vary)
        if network is not None and dim not in (None, network.dim):
            raise ValueError(f"{cnn} makes {network.dim} features of a word, not {dim}")
        dim = network.dim if network is not None else dim
        if dim is None:
            raise ValueError("hatnet reads features, so dim must be given, or pixels through a network: cnn=")
        super().__init__(
            dim,
            classes,
            side=side,
            width=width,
            heads=heads,
            dropout=dropout,
            coefficient_dropout=coefficient_dropout,
            attention_dropout=attention_dropout,
            scope=scope,
            psi=psi,
            separate_beta=separate_beta,
            cnn=cnn,
            cnn_weights="random",  # a saved head brings its own
            train_cnn=train_cnn,
            word_px=word_px,
            vary=vary,
            at_a_time=at_a_time,
        )
        self.needs = Needs(grid=network is None, pixels=network is not None)
        if network is None:  # there is no picture to turn
            self.recipes = {name: replace(recipe, augment=False) for name, recipe in self.recipes.items()}  # type: ignore[misc]
        for name, value, known in (("scope", scope, SCOPES), ("psi", psi, tuple(PSI))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if side < 1 or width % (2 * heads):
            raise ValueError(f"side must be at least 1, width a multiple of twice the heads, not {side} and {width}")

        def attention() -> nn.MultiheadAttention:
            return nn.MultiheadAttention(width, heads, dropout=attention_dropout, batch_first=True)

        def forward_(inner: int) -> FeedForward:
            return FeedForward(width, inner, dropout)

        def coefficients() -> Coefficients:
            return Coefficients(side**2, psi, coefficient_dropout)

        self.projection = nn.Linear(dim, width)
        self.drop = nn.Dropout(dropout)
        self.word_norm, self.word_attention, self.words = (
            nn.LayerNorm(width, eps=1e-6),
            attention(),
            forward_(4 * width),
        )
        self.bag_norm, self.bag_attention = nn.LayerNorm(width, eps=1e-6), attention()
        self.query_norm, self.context_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width)
        self.context_attention, self.bags = attention(), forward_(4 * width)
        self.after_words, self.before_words, self.after_bags = (forward_(width // 2) for _ in range(3))
        # of words, of words before attention, of bags: one for all of them, or each its own
        self.coefficients = nn.ModuleList(coefficients() for _ in range(3 if separate_beta else 1))
        self.classifier = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.cnn = network

    @classmethod
    def reads_pixels(cls, options: dict[str, Any]) -> bool:
        return options.get("cnn") is not None

    def forward(self, bag: Bag | Pixels) -> Prediction:
        self.check(bag)
        if not isinstance(bag, Bag):
            return self.read_picture(bag)
        layout = lay_out(bag.grid[bag.valid], self.options["side"])
        words, there = layout.words(bag.valid_features)
        read = self.read(words, there)
        weight = read.parts["bag_weight"][:, None] * read.parts["word_weight"]
        raw, share = layout.tiles(read.parts["word_energy"].flatten(), weight.flatten())
        tiles = TileScores.place(bag.valid, raw, share)
        return Prediction(read.logits, read.embedding, (tiles,), read.regions, read.parts)

    def read_picture(self, picture: Pixels) -> Prediction:
        """The scores of its words stand row by row of the picture, n² in each."""
        side = self.options["side"]
        assert self.cnn is not None
        words = by_bag(self.cnn(picture, side**2), side)
        read = self.read(words, torch.ones(words.shape[:2], dtype=torch.bool, device=words.device))
        weight = read.parts["bag_weight"][:, None] * read.parts["word_weight"]
        tiles = TileScores(by_row(read.parts["word_energy"], side), by_row(weight, side))
        parts = {**read.parts, "places": torch.tensor([side**2, side**2, *picture.size])}
        return Prediction(read.logits, read.embedding, (tiles,), read.regions, parts)

    def augment(self, picture: Picture) -> Picture:
        return turns(picture)

    @torch.no_grad()
    def attention_map(self, picture: Pixels, edge: int) -> Tensor:
        """Of its words' weights, spread over the places."""
        words = self.read_picture(picture).tiles[0].weight.unflatten(0, (self.options["side"] ** 2, -1))
        return F.interpolate(words[None, None], [side // edge for side in picture.size], mode="area")[0, 0]

    def read(self, words: Tensor, there: Tensor) -> Prediction:
        """Words (n², n², D), there (n², n²) bool: bags, and words in each, row by row. Scores of the bags as `regions`;
        word_energy, word_weight (n², n²), bag_energy, bag_weight (n²,) as `parts`, NaN where nothing is."""
        full = there.any(1)
        if not bool(full.any()):
            raise ValueError("no word of this region has any tissue")
        seen = there[full]
        p = self.projection(words[full].masked_fill(~seen[..., None], 0.0))  # 0 · NaN is NaN: masks alone let it in
        s = self.words(p + self.drop(self._among_words(self.word_norm(p), seen)))
        of_words, of_raw_words, of_bags = list(self.coefficients) * (3 // len(self.coefficients))
        after, word_energy, word_weight = of_words(s, seen)
        before, raw_energy, _ = of_raw_words(p, seen)
        context, b = self.after_words(after), self.before_words(before)
        normed = self.bag_norm(b)[None]
        query = self.query_norm(b + self.drop(self.bag_attention(normed, normed, normed, need_weights=False)[0][0]))
        normed = self.context_norm(context)[None]
        mixed = self.context_attention(query[None], normed, normed, need_weights=False)[0][0]
        g = self.bags(b + self.drop(mixed))
        whole, bag_energy, bag_weight = of_bags(spread(g, full, 0.0), full)
        z = self.after_bags(whole)
        bag_weight = bag_weight.masked_fill(~full, torch.nan)
        bag_energy = bag_energy.masked_fill(~full, torch.nan)
        parts = {
            "word_energy": spread((word_energy + raw_energy).masked_fill(~seen, torch.nan), full, torch.nan),
            "word_weight": spread(word_weight.masked_fill(~seen, torch.nan), full, torch.nan),
            "bag_energy": bag_energy,
            "bag_weight": bag_weight,
        }
        return Prediction(self.classifier(z), z, (), (TileScores(bag_energy, bag_weight),), parts)

    def _among_words(self, normed: Tensor, there: Tensor) -> Tensor:
        """(bags, n², d) → the same; words that are not there are seen by none."""
        if self.options["scope"] == "bag":
            mixed: Tensor = self.word_attention(normed, normed, normed, key_padding_mask=~there, need_weights=False)[0]
            return mixed
        only = normed[there][None]
        mixed = self.word_attention(only, only, only, need_weights=False)[0][0]
        return torch.zeros_like(normed).masked_scatter(there[..., None], mixed)


def spread(x: Tensor, rows: Tensor, elsewhere: float) -> Tensor:
    """(k, …) → (len(rows), …): to the rows that are True."""
    out = x.new_full((len(rows), *x.shape[1:]), elsewhere)
    out[rows] = x
    return out


def by_bag(rows: Tensor, side: int) -> Tensor:
    """(n⁴, …) row by row of the whole → (n², n², …) by bags and the words in each."""
    return rows.unflatten(0, (side, side, side, side)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def by_row(words: Tensor, side: int) -> Tensor:
    """The way back."""
    return words.unflatten(1, (side, side)).unflatten(0, (side, side)).transpose(1, 2).flatten(0, 3)


class Layout(NamedTuple):
    """Which tiles make which words: pairs of them, and the share of the tile in the word."""

    tile: Tensor  # (P,)
    cell: Tensor  # (P,) bag · n² + word
    share: Tensor  # (P,) of a word they sum to 1
    side: int
    tiles_total: int

    def words(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) → (n², n², D), 0 where no tile is, and where one is (n², n²) bool."""
        bags = self.side**2
        flat = features.new_zeros(bags * bags, features.shape[1])
        flat = flat.index_add(0, self.cell, features[self.tile] * self.share[:, None].to(features))
        there = torch.zeros(len(flat), dtype=torch.bool, device=features.device).index_fill(0, self.cell, True)
        return flat.unflatten(0, (bags, bags)), there.unflatten(0, (bags, bags))

    def tiles(self, energy: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of words (n⁴,) → of tiles (N,): the mean energy of a tile's words; its share of their weights."""
        share = self.share.to(energy)
        nothing = energy.new_zeros(self.tiles_total)
        mean = nothing.index_add(0, self.tile, energy[self.cell] * share) / nothing.index_add(0, self.tile, share)
        return mean, nothing.index_add(0, self.tile, weight[self.cell] * share)


def lay_out(grid: Tensor, side: int) -> Layout:
    """(N, 2) column and row → the box around them as n² × n² words."""
    words = side**2
    place = grid - grid.amin(0)
    extent = place.amax(0) + 1
    copies = -(-words // extent)  # along each axis, so that no word is without a tile for being too small
    steps = torch.cartesian_prod(*(torch.arange(int(n), device=grid.device) for n in copies)).reshape(-1, 2)
    fine = (place[:, None] * copies + steps).flatten(0, 1)
    column, row = ((2 * fine + 1) * words // (2 * extent * copies)).T  # of the word in which the centre lies
    bag, word = row // side * side + column // side, row % side * side + column % side
    cell = bag * words + word
    tile = torch.arange(len(grid), device=grid.device).repeat_interleave(len(steps))
    share = 1 / cell.bincount(minlength=words**2)[cell]
    return Layout(tile, cell, share, side, len(grid))


build = HATNet
