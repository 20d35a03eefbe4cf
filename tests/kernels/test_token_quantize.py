"""Per-token quantization: every kernel against the float64 reference, and fused against one step after the other."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from closeness import relative_error
from halfbyte.errors import WeightError
from halfbyte.kernels import token_quantize as tq
from halfbyte.kernels.token_quantize import cpu, reference, strip, triton_norm, triton_pointwise, triton_static
from halfbyte.kernels.token_quantize.strip import Strip

EPSILON = 1e-5
STRIPS = {
    "built-in": None,
    "in-turns": Strip(programs=2, rows=2, block=32, chunks=4, warps=1, stages=1),
    "walked": Strip(programs=3, rows=2, block=64, chunks=0, warps=1, stages=1),
    "even": Strip(programs=5, rows=1, block=64, chunks=2, warps=1, stages=1),
}


def tokens(count: int, ins: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    """Signed, of uneven size, off centre; one token is all zero and one all positive."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, ins, generator=g) * torch.rand(count, 1, generator=g).mul(4).exp() + 0.2
    x[count // 2] = 0
    x[-1] = x[-1].abs() + 1
    return x.to(dtype)


def vector(ins: int, dtype: torch.dtype = torch.float16, seed: int = 7) -> Tensor:
    return torch.randn(ins, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same_tokens(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    """Codes, scales and zeros, element for element; an op has empty zeros where the reference has none."""
    assert found[0].dtype == torch.int8
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    if expected[2] is None:
        assert found[2] is None or not found[2].numel()
    else:
        assert torch.equal(found[2], expected[2])


def assert_nearly_same_tokens(found: tuple[Any, ...], expected: tuple[Any, ...], dtype: torch.dtype) -> None:
    """But for a few values that sums in another order round to the neighbour in `dtype`, and their codes with them."""
    off = (found[0].int() - expected[0].int()).abs()
    assert int(off.max()) <= 1
    assert float(off.float().mean()) <= 0.01
    torch.testing.assert_close(found[1], expected[1], rtol=2 * torch.finfo(dtype).eps, atol=0)
    if expected[2] is not None and expected[2].numel():
        assert int((found[2] - expected[2]).abs().max()) <= 1


def assert_close_tokens(found: tuple[Any, ...], y: Tensor, symmetric: bool, dtype: torch.dtype) -> None:
    """Within one step of `dtype` of y, and half a step of the grid beside."""
    zeros = found[2] if found[2] is not None and found[2].numel() else None
    values = reference.dequantize(found[0], found[1], zeros)
    reach = y.abs().amax(dim=1) if symmetric else y.amax(dim=1).clamp(min=0) - y.amin(dim=1).clamp(max=0)
    steps = reach / (127 if symmetric else 255)
    # an asymmetric zero is rounded too, and may cost the top of the range half a step more
    allowed = (0.5 if symmetric else 1) * steps[:, None] + 4 * torch.finfo(dtype).eps * y.abs() + 1e-6
    assert bool(((values - y).abs() <= allowed).all())


def test_the_reference_quantizes_what_was_quantized_by_hand() -> None:
    x = torch.tensor([[12.7, -6.31, 0.04, 0.16], [0.0, 0.0, 0.0, 0.0], [-1.0, 254.0, 2.0, 0.5]])
    codes, scales, zeros = reference.quantize(x)
    assert codes.tolist() == [[127, -63, 0, 2], [0, 0, 0, 0], [0, 127, 1, 0]]
    assert scales.tolist() == pytest.approx([0.1, 1.0, 2.0])
    assert zeros is None
    codes, scales, zeros = reference.quantize(x, symmetric=False)
    assert zeros is not None
    assert zeros.tolist() == [-43, -128, -127]
    assert scales.tolist() == pytest.approx([19.01 / 255, 1.0, 1.0])
    assert codes[1:].tolist() == [[-128, -128, -128, -128], [-128, 127, -125, -127]]
    assert reference.static(x, torch.tensor([0.1])).tolist()[2] == [-10, 127, 20, 5]


@pytest.mark.parametrize("tiling", STRIPS.values(), ids=STRIPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_triton_quantizes_as_the_reference(tiling: Strip | None, dtype: torch.dtype, symmetric: bool) -> None:
    for count, ins in [(5, 99), (1, 1), (4, 128)]:
        x = tokens(count, ins, dtype)
        found = triton_pointwise.pointwise_quantize(x, symmetric, strip=tiling)
        if tiling is STRIPS["even"] and ins != 128:
            continue
        assert_same_tokens(found, cpu.quantize(x, symmetric))
        # the float32 difference of the range's ends is rounded, and may move the last bit of an asymmetric scale
        compare = assert_same_tokens if symmetric else partial(assert_nearly_same_tokens, dtype=torch.float32)
        compare(found, reference.quantize(x, symmetric))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_the_op_quantizes_as_the_reference(dtype: torch.dtype, symmetric: bool) -> None:
    x = tokens(6, 77, dtype)
    compare = assert_same_tokens if symmetric else partial(assert_nearly_same_tokens, dtype=torch.float32)
    compare(tuple(tq.quantize_tokens(x, symmetric)), reference.quantize(x, symmetric))


@given(count=st.integers(1, 4), ins=st.integers(1, 40), exponent=st.integers(-30, 30), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_values_come_back_within_half_a_step(count: int, ins: int, exponent: int, seed: int) -> None:
    x = torch.randn(count, ins, generator=torch.Generator().manual_seed(seed)).mul(2.0**exponent)
    for symmetric in (True, False):
        found = tq.quantize_tokens(x, symmetric)
        back = reference.dequantize(*found)
        # asymmetric: the zero's own rounding may push the far end of the range out by half a step
        assert ((back - x).abs() <= (0.5 if symmetric else 1.0) * 1.0001 * found.scales[:, None]).all()
        assert (reference.dequantize(found.codes, found.scales, found.zeros)[x == 0] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_triton_breaks_ties_to_even(symmetric: bool) -> None:
    x = torch.arange(-127, 128).float()[None] / 2
    x = torch.cat((x, torch.tensor([[-128.0, 127.0]] if not symmetric else [[-127.0, 127.0]])), dim=1)
    assert_same_tokens(triton_pointwise.pointwise_quantize(x, symmetric), reference.quantize(x, symmetric))


def test_the_far_end_of_an_asymmetric_range_stays_in_the_codes() -> None:
    """Scale 1: 101.5 rounds to 102 and the zero, 25.5, to 26, which is 128 together."""
    x = torch.tensor([[-153.5, 101.5, 0.0]])
    for found in (triton_pointwise.pointwise_quantize(x, False), tuple(tq.quantize_tokens(x, False))):
        assert_same_tokens(found, reference.quantize(x, False))
        assert found[0].tolist() == [[-128, 127, 26]]


def test_tiny_and_huge_tokens_have_finite_scales() -> None:
    x = torch.tensor([[1e-45, 0.0, -1e-45], [1e-38, -3e-38, 0.0], [3e38, -3e38, 1e38], [0.0, -0.0, 0.0]])
    for found in (triton_pointwise.pointwise_quantize(x, True), tq.quantize_tokens(x)):
        assert found[1].isfinite().all()
        assert (found[1] >= torch.finfo(torch.float32).tiny).all()
        assert_same_tokens(tuple(found), reference.quantize(x))


@pytest.mark.parametrize("scale", [0.01, 0.3, 100.0, 2.0**-126])
def test_static_codes_are_the_reference_s(scale: float) -> None:
    x, one = tokens(5, 99, torch.float32), torch.tensor([scale])
    tiling = Strip(programs=0, rows=2, block=32, chunks=1, warps=1, stages=1)
    for codes in (triton_static.static_quantize(x, one), triton_static.static_quantize(x, one, tiling)):
        assert torch.equal(codes, reference.static(x, one))
    assert torch.equal(tq.quantize_static(x, one), reference.static(x, one))


@pytest.mark.parametrize("tiling", [None, STRIPS["in-turns"], STRIPS["walked"]], ids=["built-in", "in-turns", "walked"])
@pytest.mark.parametrize(
    ("centred", "symmetric", "residual"),
    [(True, False, True), (True, True, False), (False, True, True), (False, False, False)],
    ids=["layer-norm-asymmetric-residual", "layer-norm", "rms-norm-residual", "rms-norm-asymmetric"],
)
def test_a_fused_norm_gives_the_codes_of_its_steps(
    tiling: Strip | None, symmetric: bool, residual: bool, centred: bool
) -> None:
    x, other, weight, bias = tokens(5, 99), tokens(5, 99, seed=1), vector(99), vector(99, seed=8)
    arguments = (weight, bias if centred else None, other if residual else None, EPSILON, centred)
    *found, hidden = triton_norm.norm_quantize(x, *arguments, symmetric=symmetric, strip=tiling)
    y, expected_hidden = cpu.norm(x, *arguments, 0.0, False)
    assert_nearly_same_tokens(tuple(found), cpu.quantize(y, symmetric), torch.float16)
    if residual:
        assert torch.equal(hidden, x + other)
        assert torch.equal(hidden, expected_hidden)
    exact = reference.norm(x + other if residual else x, weight, arguments[1], EPSILON, centred)
    assert_close_tokens(tuple(found), exact, symmetric, torch.float16)


@pytest.mark.parametrize("rounds", [True, False], ids=["rounds-before", "rounds-once"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_fused_rms_norm_has_the_forms_of_llama_and_gemma(rounds: bool, offset: float) -> None:
    x, weight = tokens(5, 99), vector(99)
    *found, _ = triton_norm.norm_quantize(x, weight, None, None, EPSILON, False, offset, rounds)
    h = x.float() * torch.rsqrt(x.float().square().mean(dim=1, keepdim=True) + EPSILON)
    y = (h.half() if rounds else h).float() * (weight.float() + offset)
    assert_nearly_same_tokens(tuple(found), cpu.quantize(y.half(), True), torch.float16)
    public, same = tq.rms_norm_quantize(x, weight, EPSILON, weight_offset=offset, rounds_before_weight=rounds)
    assert_nearly_same_tokens(tuple(public), cpu.quantize(y.half(), True), torch.float16)
    assert same is x


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_norm_ops_give_the_codes_of_torch_s_norms(dtype: torch.dtype, residual: bool) -> None:
    x, other, weight, bias = tokens(5, 99, dtype), tokens(5, 99, dtype, 1), vector(99, dtype), vector(99, dtype, 8)
    h = x + other if residual else x
    found, hidden = tq.rms_norm_quantize(x, weight, EPSILON, other if residual else None)
    assert torch.equal(hidden, h)
    assert_close_tokens(tuple(found), reference.norm(h, weight, None, EPSILON, False), True, dtype)
    found, hidden = tq.layer_norm_quantize(x, weight, bias, EPSILON, other if residual else None, symmetric=False)
    assert torch.equal(hidden, h)
    assert_close_tokens(tuple(found), reference.norm(h, weight, bias, EPSILON, True), False, dtype)
    if dtype == torch.float32:
        y = torch.nn.functional.layer_norm(h, (99,), weight, bias, EPSILON)
        assert relative_error(reference.dequantize(*found), reference.dequantize(*reference.quantize(y, False))) < 1e-3


@pytest.mark.parametrize("tiling", [None, STRIPS["in-turns"], STRIPS["walked"]], ids=["built-in", "in-turns", "walked"])
@pytest.mark.parametrize(
    ("function", "symmetric"), [("silu_mul", True), ("silu_mul", False), ("gelu", True), ("gelu_tanh", False)]
)
def test_a_fused_activation_gives_the_codes_of_its_steps(
    tiling: Strip | None, symmetric: bool, function: triton_pointwise.Function
) -> None:
    x, up, bias = tokens(5, 99), tokens(5, 99, seed=1), vector(99)
    if function == "silu_mul":
        found = triton_pointwise.pointwise_quantize(x, symmetric, function, up, strip=tiling)
        y, exact = cpu.silu_mul(x, up), reference.silu_mul(x, up)
    else:
        approximate = "none" if function == "gelu" else "tanh"
        found = triton_pointwise.pointwise_quantize(x, symmetric, function, bias=bias, strip=tiling)
        y, exact = cpu.gelu(x, bias, approximate), reference.gelu(x + bias, approximate)
    assert_nearly_same_tokens(found, cpu.quantize(y, symmetric), torch.float16)
    assert_close_tokens(found, exact, symmetric, torch.float16)


@pytest.mark.parametrize("function", ["silu_mul", "gelu", "gelu_tanh"])
def test_a_kernel_s_activation_is_exact_to_a_few_units_of_float32(function: triton_pointwise.Function) -> None:
    """With one element a token, the scale is its magnitude / 127 to the last bit, and the code ±127."""
    x = torch.linspace(-9, 9, 301)[:, None]
    tiling = Strip(5, 64, 16, 1, 1, 1)
    found = triton_pointwise.pointwise_quantize(x, True, function, torch.ones_like(x), strip=tiling)
    exact = {
        "silu_mul": reference.silu_mul(x, torch.ones_like(x)),
        "gelu": reference.gelu(x, "none"),
        "gelu_tanh": reference.gelu(x, "tanh"),
    }[function]
    assert float((reference.dequantize(found[0], found[1]) - exact).abs().max()) < 2e-7 * 9


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_activation_ops_agree_with_the_reference(approximate: tq.Approximation) -> None:
    x, bias = tokens(5, 64, torch.float32), vector(64, torch.float32)
    assert_close_tokens(
        tuple(tq.gelu_quantize(x, bias, approximate)), reference.gelu(x + bias, approximate), True, x.dtype
    )
    found = tq.silu_mul_quantize(x[:, :32], x[:, 32:])
    assert_close_tokens(tuple(found), reference.silu_mul(x[:, :32], x[:, 32:]), True, x.dtype)
    assert_same_tokens(tuple(tq.silu_mul_quantize(x)), tuple(found))


def test_triton_reads_and_writes_only_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = tokens(3, 50), vector(50)
    around = torch.full((5, 120), float("nan"), dtype=torch.float16)
    around[1:4, 7:57] = x
    inner = around[1:4, 7:57]
    empty = torch.empty

    def poisoned(*shape: int, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        return made.fill_(float("nan") if made.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poisoned)
    plain = triton_pointwise.pointwise_quantize(inner, False)
    normed = triton_norm.norm_quantize(inner, weight, None, inner, EPSILON, False)
    fixed = triton_static.static_quantize(inner, torch.tensor([0.1]))
    monkeypatch.undo()
    assert_same_tokens(plain, cpu.quantize(x, False))
    y, hidden = cpu.norm(x, weight, None, x, EPSILON, False, 0.0, False)
    assert_nearly_same_tokens(normed[:3], cpu.quantize(y, True), torch.float16)
    assert torch.equal(normed[3], hidden)
    assert torch.equal(fixed, reference.static(x, torch.tensor([0.1])))


def test_rows_may_lie_apart_and_columns_too() -> None:
    x, weight = tokens(4, 64), vector(64)
    transposed = x.T.contiguous().T
    assert_same_tokens(triton_pointwise.pointwise_quantize(transposed, True), reference.quantize(x))
    found = triton_norm.norm_quantize(transposed, weight, None, transposed, EPSILON, False)
    assert torch.equal(found[0], triton_norm.norm_quantize(x, weight, None, x, EPSILON, False)[0])
    gate_up = tokens(4, 128)
    found = triton_pointwise.pointwise_quantize(gate_up[:, :64], True, "silu_mul", gate_up[:, 64:])
    y = cpu.silu_mul(gate_up[:, :64], gate_up[:, 64:])
    assert_nearly_same_tokens(found, cpu.quantize(y, True), torch.float16)


def test_no_tokens_make_no_codes() -> None:
    x = torch.zeros(0, 40)
    assert triton_pointwise.pointwise_quantize(x, True)[0].shape == (0, 40)
    assert triton_norm.norm_quantize(x, torch.ones(40), None, x, EPSILON, False)[3].shape == (0, 40)
    assert triton_static.static_quantize(x, torch.ones(1)).shape == (0, 40)
    assert tq.quantize_tokens(x, False).codes.shape == (0, 40)


@pytest.mark.parametrize("ins", [1, 7, 64, 1000, 1025, 4096, 5120, 11008, 16384, 28672, 32768, 40000])
def test_every_strip_covers_its_rows(ins: int) -> None:
    for found in (strip.at_once(77, ins), strip.in_turns(77, ins, 2 * ins, torch.device("cpu"))):
        assert found.chunks * found.block >= ins or not found.chunks
        assert (found.chunks == 0) == (ins > strip.WIDEST_IN_REGISTERS)
        assert found.block * found.rows % (found.warps * strip.LANES) == 0 or found.block <= 512
        assert found.programs * found.rows >= 77 or found.stages == 2


def quantized_as_uint8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, _ = cpu.quantize(x, True)
    return codes.abs(), scales, torch.empty(0)


def one_scale_for_all(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = x.float().abs().max() / 127
    return (x.float() / scale).round().to(torch.int8), scale.expand(len(x)), torch.empty(0)


def truncated(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, scales, none = cpu.quantize(x, True)
    return (x.float() / scales[:, None]).to(torch.int8), scales, none


def divided_by_128(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales = x.float().abs().amax(dim=1) / 128
    return (x.float() / scales[:, None]).round().clamp(-128, 127).to(torch.int8), scales, torch.empty(0)


def neighbour_s_scale(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, none = cpu.quantize(x, True)
    return codes, scales.roll(1), none


@pytest.mark.parametrize("bug", [quantized_as_uint8, one_scale_for_all, truncated, divided_by_128, neighbour_s_scale])
def test_the_comparison_notices(bug: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
    """A gate that no bug can fail is no gate."""
    x = tokens(5, 99)
    with pytest.raises(AssertionError):
        assert_same_tokens(bug(x), reference.quantize(x))
    with pytest.raises(AssertionError):
        assert_nearly_same_tokens(bug(x), reference.quantize(x), x.dtype)
    if bug is not divided_by_128:  # codes that fit the values, but are not those that were promised
        with pytest.raises(AssertionError):
            assert_close_tokens(bug(x), x.double(), True, x.dtype)


@pytest.mark.parametrize(
    "bug",
    [
        lambda x, w: cpu.norm(x, w, None, None, EPSILON, True, 0.0, False)[0],
        lambda x, w: cpu.norm(x, w, None, None, 1.0, False, 0.0, False)[0],
        lambda x, w: cpu.norm(x, w, None, None, EPSILON, False, 1.0, False)[0],
        lambda x, w: cpu.norm(x, w.roll(1), None, None, EPSILON, False, 0.0, False)[0],
        lambda x, w: cpu.norm(x, w, w, None, EPSILON, False, 0.0, False)[0],
        lambda x, w: cpu.norm(x, w, None, x, EPSILON, False, 0.0, False)[0] + 0.01,
    ],
    ids=["centred", "epsilon", "offset", "shifted-weight", "bias", "shifted"],
)
def test_the_comparison_of_norms_notices(bug: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, weight = tokens(5, 99), vector(99)
    with pytest.raises(AssertionError):
        assert_close_tokens(
            cpu.quantize(bug(x, weight), True), reference.norm(x, weight, None, EPSILON, False), True, x.dtype
        )


def test_the_ops_are_good_citizens_of_torch() -> None:
    x, weight = tokens(3, 32, torch.float32), vector(32, torch.float32)
    ops = torch.ops.halfbyte
    torch.library.opcheck(ops.quantize_tokens.default, (x, True))
    torch.library.opcheck(ops.quantize_tokens.default, (x, False))
    torch.library.opcheck(ops.quantize_static.default, (x, torch.ones(1)))
    torch.library.opcheck(ops.rms_norm_quantize.default, (x, weight, EPSILON, x.clone(), 1.0, True, True))
    torch.library.opcheck(ops.rms_norm_quantize.default, (x, weight, EPSILON, None, 0.0, False, False))
    torch.library.opcheck(ops.layer_norm_quantize.default, (x, weight, weight.clone(), EPSILON, None, True))
    torch.library.opcheck(ops.silu_mul_quantize.default, (x, x.clone(), True))
    torch.library.opcheck(ops.gelu_quantize.default, (x, weight, "tanh", False))


def test_the_functions_compile_whole() -> None:
    x, weight = tokens(3, 32, torch.float32), vector(32, torch.float32)

    def block(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        found, hidden = tq.rms_norm_quantize(x, weight, EPSILON, x + 1)
        return found.codes, tq.silu_mul_quantize(hidden).scales, tq.quantize_tokens(x, False).zeros

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (3, 2):
        for found, expected in zip(compiled(x[:count]), block(x[:count]), strict=True):
            assert found is not None
            assert expected is not None
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x: tq.quantize_tokens(x.long()), "x is torch.int64"),
        (lambda x: tq.quantize_tokens(x[0]), "give .tokens, in."),
        (lambda x: tq.quantize_tokens(x[:, :0]), "at least one input"),
        (lambda x: tq.quantize_static(x, torch.ones((), device=x.device)), "one number"),
        (lambda x: tq.rms_norm_quantize(x, x[0, :5], EPSILON), "the weight is"),
        (lambda x: tq.rms_norm_quantize(x, x[0].int(), EPSILON), "one real number"),
        (lambda x: tq.rms_norm_quantize(x, x[0], EPSILON, x.half()), "the residual is torch.float16"),
        (lambda x: tq.layer_norm_quantize(x, x[0], x[0, :5], EPSILON), "the bias is"),
        (lambda x: tq.silu_mul_quantize(x, x[:, :5]), "the up is"),
        (lambda x: tq.silu_mul_quantize(x[:, :5]), "odd number"),
        (lambda x: tq.gelu_quantize(x, x[0, :5]), "the bias is"),
        (lambda x: tq.gelu_quantize(x, None, "erf"), "no approximation 'erf'"),
    ],
)
def test_arguments_that_disagree_are_refused(call: Callable[[Tensor], Any], why: str) -> None:
    for x in (torch.ones(2, 8), torch.ones(2, 8, device="meta")):
        with pytest.raises(WeightError, match=why):
            call(x)


def test_the_ops_are_there_without_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import halfbyte.kernels.token_quantize"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
