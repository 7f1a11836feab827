"""Where the class token of a ViT looks: its attention to the tokens of a tile, in the last block.

    looking = attending(load_encoder("vit_small_dino"), tile_px=224)
    x = looking.load("cpu").encode(tiles)              # (B, dim + side²): the features, then where they come from
    x[:, -looking.side**2:]                            # softmax over keys of row CLS, the mean of the heads, row by row

Both come from one pass, so that a tile is read and encoded once. Keys of CLS and of registers have their part of the
softmax and are left out: the shares of a tile sum to less than 1.
"""

import threading
from dataclasses import replace
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from . import Encoder, EncoderError
from .network import NetworkEncoder


class Attending(NetworkEncoder):
    """Another encoder's features, and after them side × side shares of attention. `facts.dim` counts both.

    margin: tokens between an edge of the tile and those that are seen, where the encoder crops.
    """

    def __init__(self, encoder: NetworkEncoder, side: int, margin: int) -> None:
        facts = replace(encoder.facts, dim=encoder.facts.dim + side**2)
        super().__init__(facts, encoder.make, encoder.weights, encoder.drop)
        self.side, self.margin = side, margin

    def _build(self) -> nn.Module:
        return _WithAttention(super()._build())


def attending(encoder: Encoder, tile_px: int) -> Attending:
    """The encoder with its attention, not loaded. Raises EncoderError if it is no ViT of timm with a class token."""
    network: Any = None
    if isinstance(encoder, NetworkEncoder):
        with torch.device("meta"):  # shapes without numbers
            network = encoder.make()
    known = isinstance(network, VisionTransformer) and network.has_class_token
    if not known or not isinstance(getattr(network.blocks[-1], "attn", None), Attention):
        raise EncoderError(
            f"{encoder.facts.name} is no ViT of timm with a class token: it has no attention within its tiles to show"
        )
    assert isinstance(encoder, NetworkEncoder)
    token = network.patch_embed.patch_size[0]
    cropped = min(tile_px, encoder.facts.crop_px or tile_px)
    if tile_px % token or cropped % token or (tile_px - cropped) % (2 * token):
        raise EncoderError(
            f"{encoder.facts.name} takes {cropped} of {tile_px} px: its tokens of {token} px do not fit into a tile"
        )
    return Attending(encoder, cropped // token, (tile_px - cropped) // (2 * token))


class _WithAttention(nn.Module):
    """(B, 3, H, W) → features and attention (B, dim + tokens). Threads may run it at the same time."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self._seen = threading.local()
        network.blocks[-1].attn.qkv.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, qkv: Tensor) -> None:
        self._seen.qkv = qkv

    def forward(self, images: Tensor) -> Tensor:
        features = self.network(images).float()
        qkv = self._seen.qkv.float()
        del self._seen.qkv
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([features, self._attention(qkv)], dim=1)

    def _attention(self, qkv: Tensor) -> Tensor:
        """As in timm's Attention.forward, of which only the row of CLS is wanted; in 32 bits."""
        attention: Any = self.network.blocks[-1].attn
        q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q[:, :, :1]), attention.k_norm(k)
        weight: Tensor = (q * attention.scale @ k.mT).softmax(-1)[:, :, 0, self.network.num_prefix_tokens :].mean(1)
        return weight
