"""How long a fused layer's step on the packed 4-bit cache takes on the GPU of this machine: RoPE, codes and attention.

    python benchmarks/kv_step.py

Heads are those of Llama-2-7B and Llama-3-8B; "kept" has four sinks, a window of 64, and keys before RoPE. "apart" is RoPE in
torch, `write_tokens` and `decode_attention`, which is what runs where layers are not fused, without sinks and window. The
op is first compared with what the CPU computes of the same numbers, and nothing is timed that disagrees. A time is the
median over replays of a CUDA graph that goes through so many caches that together they exceed the L2 cache.
"""

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels import kv_attention as kv
from halfbyte.kernels.kv_attention.cuts import NEAR
from halfbyte.kernels.kv_attention.kept import rows_of
from halfbyte.kernels.kv_attention.step import attend_new_token, in_parts
from kv_attention import COPIES_BYTES, DIM, DTYPE, TOLERANCE, microseconds, relative_error, turns

DEVICE = "cuda"
SHAPES = [(heads, batch, context) for heads in (32, 8) for batch in (1, 16, 64) for context in (640, 2048)]
SINKS, WINDOW = 4, 64
DIFFERING = 1e-3  # of bytes of codes: a key that RoPE rounds the other way


def case(kv_heads: int, batch: int, context: int, kept: bool, seed: int) -> dict[str, Any]:
    """Arguments of `attend_new_token`, at the last place of the cache."""
    g = torch.Generator(DEVICE).manual_seed(seed)

    def packed() -> kv.PackedTokens:
        shape = (batch, kv_heads, context)
        codes = torch.randint(0, 256, (*shape, DIM // 2), dtype=torch.uint8, device=DEVICE, generator=g)
        steps = torch.rand((*shape, 1), device=DEVICE, generator=g).mul(0.2).add(0.2)
        return kv.PackedTokens(codes, steps.half(), (steps * -7.3).half())

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, generator=g).to(DTYPE)

    cos, sin = turns(torch.arange(context, device=DEVICE))
    given = {
        "qkv": normal(batch, (32 + 2 * kv_heads) * DIM),
        "cos": cos[-1:].repeat(1, 2).to(DTYPE),
        "sin": sin[-1:].repeat(1, 2).to(DTYPE),
        "keys": packed(),
        "values": packed(),
        "position": torch.tensor([context - 1], device=DEVICE),
    }
    if not kept:
        return given
    room = (batch, kv_heads, rows_of(SINKS, WINDOW), DIM)
    first = torch.full((batch,), SINKS, device=DEVICE)
    old = [part.half().expand(batch, -1, -1).contiguous() for part in (cos, sin)]
    return given | {
        "smoothing": kv.Smoothing(*(torch.rand(kv_heads, DIM, device=DEVICE, generator=g) + 0.5 for _ in range(4))),
        "kept": kv.KeptTokens(normal(*room), normal(*room), SINKS, first),
        "rotation": kv.KeyRotation(old[0], old[1], turns(torch.arange(NEAR, device=DEVICE))),
    }


def on_cpu(part: Any) -> Any:
    if isinstance(part, Tensor):
        return part.cpu()
    return type(part)(*map(on_cpu, part)) if isinstance(part, tuple) else part


def wrong(given: dict[str, Any]) -> str | None:
    """In what the op disagrees with the CPU."""
    other = {name: on_cpu(part) for name, part in given.items()}
    error = relative_error(attend_new_token(**given).cpu(), attend_new_token(**other).double())
    if not error < TOLERANCE:
        return f"relative error {error:.1e}"
    for name in ("keys", "values"):
        differing = float((given[name].codes.cpu() != other[name].codes).float()[:, :, -1].mean())
        past = torch.equal(given[name].codes[:, :, :-1].cpu(), other[name].codes[:, :, :-1])
        steps = relative_error(given[name].scales.cpu(), other[name].scales.double())
        if differing > DIFFERING or not past or steps > DIFFERING:
            return f"{name}: {differing:.1e} of the codes, steps by {steps:.1e}"
    if "kept" in given and not all(relative_error(a.cpu(), b.double()) < 1e-3 for a, b in zip(
        given["kept"][:2], other["kept"][:2], strict=True
    )):  # fmt: skip
        return "exact tokens"
    return None


def apart(given: dict[str, Any]) -> Tensor:
    return in_parts(**given, smoothing=kv.NO_SMOOTHING, scaling=DIM**-0.5, kept=None, rotation=None)


def main() -> None:
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n{'heads':>6} {'batch':>6} {'context':>8}", end=""
    )
    print(f"{'in one':>9} {'kept':>9} {'apart':>9}   µs")
    for kv_heads, batch, context in SHAPES:
        found = []
        for kept in (False, True):
            if (why := wrong(case(kv_heads, batch, min(context, 700), kept, 0))) is not None:
                sys.exit(f"WRONG: {kv_heads} heads of keys, batch {batch}, {'kept' if kept else 'bare'}: {why}")
            copies = max(2, int(COPIES_BYTES / (2 * batch * kv_heads * context * (DIM // 2 + 4))))
            cases = [case(kv_heads, batch, context, kept, seed) for seed in range(min(copies, 64))]
            found.append(microseconds([partial(attend_new_token, **given) for given in cases]))
            if not kept:
                found.append(microseconds([partial(apart, given) for given in cases]))
        print(
            f"32/{kv_heads:<3} {batch:>6} {context:>8} {found[0]:>8.1f} {found[2]:>9.1f} {found[1]:>9.1f}", flush=True
        )


if __name__ == "__main__":
    main()
