"""Batch norms go into the convolutions before them, so that a trained network has fewer steps to the same features."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from torch import fx, nn


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """The network with one convolution wherever a batch norm alone uses what a convolution gives.

    At evaluation a batch norm is γ (x - μ) / √(σ² + ε) + β, a line for each channel, which the weights and the bias of
    the convolution can draw (Jacob et al., CVPR 2018, arXiv:1712.05877, section 3.2): features differ by rounding only.
    `network` is in evaluation mode and stays as it is; unchanged layers are shared. torch.fx has to be able to trace
    it, and what it traces is the network for any number and size of images. Raises what torch.fx raises.
    """
    from torch import fx, nn
    from torch.nn.utils import fuse_conv_bn_eval

    traced = fx.symbolic_trace(network)
    layers = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")

    def once(node: object, kind: type[nn.Module]) -> TypeGuard[fx.Node]:
        """Is it a layer of just that kind, used nowhere else?"""
        return (
            isinstance(node, fx.Node)
            and node.op == "call_module"
            and type(layers[str(node.target)]) is kind
            and calls[node.target] == 1
        )

    for norm in list(traced.graph.nodes):
        before = norm.args[0] if norm.args else None
        if not (once(norm, nn.BatchNorm2d) and once(before, nn.Conv2d) and len(before.users) == 1):
            continue
        if layers[str(norm.target)].track_running_stats:
            place = str(before.target)
            traced.set_submodule(place, fuse_conv_bn_eval(layers[place], layers[str(norm.target)]))
            norm.replace_all_uses_with(before)
            traced.graph.erase_node(norm)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced
