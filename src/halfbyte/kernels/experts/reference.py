"""What the experts of a mixture compute, in float64 but for what is rounded: inputs, gates and what a token writes.

codes, s  = int8 of a token                                          token_quantize; kind "half": the token itself
gate | up = Σ codes · W_up[expert] · s          rounded to its dtype
codes, t  = int8 of silu(gate) · up             both steps rounded   likewise
written   = Σ codes · W_down[expert] · t        rounded
y         = Σ over the token's experts of weight · written           rounded once
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from halfbyte.kernels.experts.prepared import ExpertWeight, values
from halfbyte.kernels.token_quantize import cpu

Decode = Callable[[ExpertWeight, int], Tensor]


def gated_experts(
    x: Float[Tensor, "tokens hidden"],
    index: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
    up: ExpertWeight,
    down: ExpertWeight,
    decode: Decode = values,
) -> Float[Tensor, "tokens hidden"]:
    """The sum, over a token's experts, of weight · down(silu(gate) · up), in the dtype of x. `decode`: one expert's weight."""
    y = torch.zeros(x.shape[0], down.outs, dtype=torch.float64, device=x.device)
    for expert in range(up.experts):
        token, choice = torch.where(index == expert)
        if len(token):
            gate, inner = product(x[token], up, expert, decode).chunk(2, dim=1)
            written = product(cpu.silu_mul(gate, inner), down, expert, decode)
            y.index_add_(0, token, written.double() * weights[token, choice, None].double())
    return y.to(x.dtype)


def product(
    x: Float[Tensor, "rows in"], weight: ExpertWeight, expert: int, decode: Decode
) -> Float[Tensor, "rows out"]:
    """Rows of one expert times its weight, rounded to their dtype."""
    if weight.kind == "half":
        return (x.double() @ decode(weight, expert).T).to(x.dtype)
    codes, scales, _ = cpu.quantize(x, symmetric=True)
    return (codes.double() @ decode(weight, expert).T * scales.double()[:, None]).to(x.dtype)
