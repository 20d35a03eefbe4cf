"""Quantize activations on one grid that is known beforehand: no range to find, so elements in any order.

x [tokens, in] ─► codes = round(x / scale), within ±127
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# triton's decorators change signatures in ways that types do not tell

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.token_quantize.strip import Strip, at_once
from halfbyte.kernels.token_quantize.triton_codes import divide, nearest


@triton.jit(do_not_specialize=["tokens"])
def _static_quantize_kernel(
    x_ptr, scale_ptr, codes_ptr, tokens, ins, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < tokens)[:, None] & (k < ins)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr)
    # clamped before it is divided: `divide` and `nearest` do not hold for huge numbers
    x = tl.minimum(tl.maximum(x, -127.0 * scale), 127.0 * scale)
    codes = nearest(divide(x, scale, tl.div_rn(1.0, scale)))
    tl.store(codes_ptr + row[:, None] * ins + k[None, :], codes.to(tl.int8), mask=mask)


def static_quantize(x: Tensor, scale: Tensor, strip: Strip | None = None) -> Tensor:
    """Codes of x on the grid of `scale`."""
    tokens, ins = x.shape
    codes = torch.empty(tokens, ins, dtype=torch.int8, device=x.device)
    if not tokens:
        return codes
    x = x if x.stride(1) == 1 else x.contiguous()
    strip = strip or at_once(tokens, min(ins, 2048))
    _static_quantize_kernel[(triton.cdiv(tokens, strip.rows), triton.cdiv(ins, strip.block))](
        x, scale, codes, tokens, ins, x.stride(0), strip.rows, strip.block, num_warps=strip.warps
    )
    return codes
