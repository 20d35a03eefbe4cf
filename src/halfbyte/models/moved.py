"""Scales and shifts moved along a link within a set of parameters: what fold.py does to modules, with slopes.

    y = (x - shift)/scale        W·x + b = (W·diag scale)·y + (b + W·shift)

OmniQuant, https://arxiv.org/abs/2308.13137, section 3.3, equation 3: a learned equivalent transformation. The block computes
what it computed before, whatever scale > 0 and shift are, and they can learn.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from halfbyte.models.architecture import Rows
from halfbyte.models.fold import ResolvedLink


def can_shift(link: ResolvedLink) -> bool:
    """Whether a shift can move out of the writer too: all have biases, and nothing multiplies what the writer writes.

    Values may be shifted: the weights of attention sum to one.
    """
    norm = not isinstance(link.writer, nn.Linear)
    plain = norm or link.rows in (Rows.VALUES, Rows.VALUES_PER_HEAD)
    return plain and all(getattr(module, "bias", None) is not None for module in (link.writer, *link.readers.values()))


def moved(
    parameters: Mapping[str, Tensor],
    link: ResolvedLink,
    scale: Float[Tensor, "written"],
    shift: Float[Tensor, "written"] | None = None,
) -> dict[str, Tensor]:
    """The link's parameters, by their names in the block, after the move. One positive scale per channel that is read."""
    writer, channels = link.writer_name, link.written.to(scale.device)
    weight = parameters[f"{writer}.weight"]
    divisor = torch.ones(len(weight), dtype=scale.dtype, device=scale.device).index_copy(0, channels, scale)
    offset = link.norm_offset if weight.dim() == 1 else 0.0
    result = {f"{writer}.weight": (weight + offset) / divisor.view(-1, *[1] * (weight.dim() - 1)) - offset}
    bias = parameters.get(f"{writer}.bias")
    if bias is not None:
        away = torch.zeros_like(divisor) if shift is None else torch.zeros_like(divisor).index_copy(0, channels, shift)
        result[f"{writer}.bias"] = (bias - away) / divisor
    for reader in link.readers:
        read = parameters[f"{reader}.weight"]
        result[f"{reader}.weight"] = read * _as_read(scale, link)
        if shift is not None:
            result[f"{reader}.bias"] = parameters[f"{reader}.bias"] + read @ _as_read(shift, link)
    return result


def _as_read(own: Float[Tensor, "written"], link: ResolvedLink) -> Float[Tensor, "in"]:
    """One entry per input of the readers: a KV head's for every query head that shares it."""
    if link.repeats == 1:
        return own
    shared = own.view(link.kv_heads, 1, link.head_dim)
    return shared.expand(-1, link.repeats, -1).flatten()
