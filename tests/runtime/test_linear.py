from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_folders import rounded
from torch import Tensor, nn

from closeness import assert_close, relative_error
from halfbyte.errors import CheckpointError, WeightError
from halfbyte.layouts import LAYOUTS
from halfbyte.runtime import linear as linear_room
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.scheme import Convention, FloatScale, Granularity, PerChannel, PerGroup, PerTensor, WeightFormat

GROUPS = PerGroup(size=32)


def format_of(bits: int, granularity: Granularity = GROUPS, **changes: Any) -> WeightFormat:
    return WeightFormat(**{"bits": bits, "granularity": granularity, "scale": FloatScale(dtype="float32"), **changes})


def problem(format: WeightFormat, out: int = 48, columns: int = 64, seed: int = 0):
    """A weight with an all-zero group and a spike, and a signed bias."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    weight[1, :32], weight[2, 5] = 0, 30
    return rounded(weight, format), torch.randn(out, generator=generator)


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(weight, bias: Tensor, x: Tensor) -> Tensor:
    return (x.double() @ weight.decode().double().T + bias.double()).to(x.dtype)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    granularity=st.sampled_from([GROUPS, PerChannel(), PerTensor()]),
    asymmetric=st.booleans(),
    out=st.sampled_from([1, 7, 33, 48]),
    leading=st.sampled_from([(), (1,), (3,), (2, 5), (0,), (2, 0), (2, 1, 3)]),
)
def test_it_computes_with_the_decoded_weight_whatever_the_shape(bits, granularity, asymmetric, out, leading):
    if asymmetric and granularity == PerTensor():
        granularity = PerChannel()
    format = format_of(bits, granularity, convention=Convention.ASYMMETRIC if asymmetric else Convention.AWQ)
    weight = rounded(torch.randn(out, 64, generator=torch.Generator().manual_seed(bits)), format)
    bias = torch.linspace(-1, 1, out)
    x = activations(*leading, 64)
    found = QuantizedLinear.from_weight(weight, bias).prepare(torch.float32)(x)
    assert found.shape == (*leading, out)
    if found.numel():
        assert_close(found, expected(weight, bias, x), rounding_steps=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 130])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_kernel_agrees_with_the_decoded_weight(bits, tokens, dtype):
    weight, bias = problem(format_of(bits, PerChannel() if bits == 8 else GROUPS))
    linear = QuantizedLinear.from_weight(weight, bias).prepare(dtype)
    x = activations(tokens, 64, dtype=dtype)
    # scales, decoded weights, bias and result are rounded to the dtype, and the 64 products are summed in it or better
    assert_close(linear(x), expected(weight, bias, x), rounding_steps=8 if dtype != torch.float32 else 32)


@pytest.mark.parametrize(
    ("bits", "granularity", "dtype", "kernel"),
    [
        (4, GROUPS, torch.bfloat16, "torch int4pack up to 64 tokens, decode for more"),
        (8, PerChannel(), torch.bfloat16, "torch int8pack up to 32 tokens, decode for more"),
        (8, GROUPS, torch.bfloat16, "decode"),
        (4, PerGroup(size=8), torch.bfloat16, "decode"),
        (3, GROUPS, torch.bfloat16, "decode"),
        (4, GROUPS, torch.float32, "decode"),
        (8, PerChannel(), torch.float16, "decode"),
    ],
)
def test_the_kernel_is_named_before_it_runs(bits, granularity, dtype, kernel):
    linear = QuantizedLinear.from_weight(problem(format_of(bits, granularity))[0])
    assert linear.kernel == "none: not prepared"
    assert linear.prepare(dtype).kernel == kernel
    assert kernel in repr(linear)


def test_the_named_kernel_is_the_one_that_runs(monkeypatch):
    ran = []

    def spy(name, real):
        return lambda *arguments: (ran.append(name), real(*arguments))[1]

    linear = QuantizedLinear.from_weight(problem(format_of(4))[0]).prepare(torch.bfloat16)
    monkeypatch.setattr(linear_room.cpu, "matmul", spy("torch", linear_room.cpu.matmul))
    monkeypatch.setattr(linear_room, "wna16_matmul", spy("op", linear_room.wna16_matmul))
    for tokens in (64, 65):
        linear(activations(tokens, 64, dtype=torch.bfloat16))
    assert ran == ["torch", "op"]


def test_activations_of_another_dtype_are_refused():
    linear = QuantizedLinear.from_weight(problem(format_of(4))[0])
    with pytest.raises(WeightError, match="prepared for nothing"):
        linear(activations(2, 64))
    with pytest.raises(WeightError, match=r"are torch.float32 and this linear is prepared for torch.bfloat16"):
        linear.prepare(torch.bfloat16)(activations(2, 64))


def test_casting_the_module_prepares_it_again_and_keeps_the_scales():
    weight, bias = problem(format_of(4))
    linear = nn.Sequential(QuantizedLinear.from_weight(weight, bias).prepare(torch.float32)).to(torch.bfloat16)[0]
    assert isinstance(linear, QuantizedLinear)
    assert linear.kernel.startswith("torch int4pack")
    assert torch.equal(linear.weight_scale, weight.grid.scales)
    x = activations(3, 64, dtype=torch.bfloat16)
    assert_close(linear(x), expected(weight, bias, x), rounding_steps=8)
    linear.to("meta")


def test_its_state_is_that_of_the_checkpoint_layout():
    weight, bias = problem(format_of(4, convention=Convention.ASYMMETRIC, scale=FloatScale(dtype="bfloat16")))
    linear = QuantizedLinear.from_weight(weight, bias).prepare(torch.float32)
    tensors = LAYOUTS["compressed-tensors"].write(weight)
    state = linear.state_dict()
    assert set(state) == {*tensors, "bias"}
    assert all(
        torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    again = QuantizedLinear(64, 48, weight.format, bias=True)
    again.load_state_dict(state)
    x = activations(3, 64)
    assert torch.equal(again.prepare(torch.float32)(x), linear(x))


def test_a_weight_of_another_shape_does_not_fill_it():
    tensors = LAYOUTS["compressed-tensors"].write(problem(format_of(4))[0])
    with pytest.raises(CheckpointError, match="48x64 and the model asks for 40x64"):
        QuantizedLinear(64, 40, format_of(4), bias=False).fill(tensors)


def test_a_scale_dtype_left_open_is_the_stored_one():
    tensors = LAYOUTS["compressed-tensors"].write(problem(format_of(4, scale=FloatScale(dtype="bfloat16")))[0])
    linear = QuantizedLinear(64, 48, format_of(4, scale=FloatScale()), bias=False, device="meta").fill(tensors)
    assert linear.weight_scale.dtype == torch.bfloat16
    assert linear.format.scale == FloatScale(dtype="bfloat16")


def test_it_compiles_without_breaks():
    weight, bias = problem(format_of(4))
    linear = QuantizedLinear.from_weight(weight, bias).prepare(torch.float32)
    x = activations(3, 64)
    assert_close(torch.compile(linear, backend="eager", fullgraph=True)(x), linear(x))


def swapped_codes(linear, x):
    linear.weight_packed.copy_(linear.weight_packed.roll(1, dims=0))
    return linear.prepare(x.dtype)(x)


def forgotten_zero_points(linear, x):
    linear._points.fill_(8)
    return linear(x)


def neighbours_scales(linear, x):
    linear.weight_scale.copy_(linear.weight_scale.roll(1, dims=1))
    return linear.prepare(x.dtype)(x)


def forgotten_bias(linear, x):
    linear.bias.zero_()
    return linear(x)


@pytest.mark.parametrize("bug", [swapped_codes, forgotten_zero_points, neighbours_scales, forgotten_bias])
def test_the_comparison_notices(bug):
    weight, bias = problem(format_of(4, convention=Convention.ASYMMETRIC))
    x = activations(17, 64)
    right = expected(weight, bias, x)
    linear = QuantizedLinear.from_weight(weight, bias).prepare(torch.float32)
    assert relative_error(bug(linear, x), right) > 1e-2


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_tensor_cores_run_another_order_of_the_words(asymmetric: bool, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU of theirs: the op decodes on a CPU."""
    monkeypatch.setattr(linear_room.tensor_cores, "runs_on", lambda _device: True)
    monkeypatch.setattr(QuantizedLinear, "_torch_pays", lambda _linear: False)
    format = format_of(4, convention=Convention.ASYMMETRIC if asymmetric else Convention.AWQ)
    weight, bias = problem(format)
    linear = QuantizedLinear.from_weight(weight, bias).prepare(torch.bfloat16)
    assert linear.kernel == "stream up to 16 tokens, blocks for more"
    assert linear.weight_packed.numel() == 0
    for shape in ((3,), (2, 5), (0,)):
        x = activations(*shape, 64, dtype=torch.bfloat16)
        assert_close(linear(x), expected(weight, bias, x), rounding_steps=8) if x.numel() else None
        assert linear(x).shape == (*shape, 48)
    packed = LAYOUTS["compressed-tensors"].write(weight)["weight_packed"]
    assert torch.equal(linear.state_dict()["weight_packed"], packed)
    # float32 has no tensor cores, and is prepared from the checkpoint's words again
    linear.to(torch.float32)
    assert linear.kernel == "decode"
    assert torch.equal(linear.weight_packed, packed)
    x, cast = activations(3, 64), bias.to(torch.bfloat16).float()
    assert_close(linear(x), expected(weight, cast, x), rounding_steps=32)
