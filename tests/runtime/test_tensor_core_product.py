"""W4A8 linears on a GPU with tensor cores of Hopper's kind: prepared words, the same result, the checkpoint's state."""

import pytest
import torch
from torch import Tensor

from halfbyte.methods import RTN
from halfbyte.numerics.activations import calibrated
from halfbyte.numerics.integer_scales import on_integer_grid
from halfbyte.numerics.quantized import QuantizedModule
from halfbyte.runtime import fused, products
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.scheme import (
    ActivationFormat,
    Convention,
    FloatScale,
    IntegerScale,
    PerGroup,
    Scale,
    WeightFormat,
)

OUT, COLUMNS = 40, 384
TOKEN = ActivationFormat()
STATIC = ActivationFormat(granularity="tensor", dynamic=False)
SCALES: dict[str, Scale] = {
    "float": FloatScale(dtype="bfloat16"),
    "integer": IntegerScale(),
    "weight": IntegerScale(product="int8", amplifier="row"),
}


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on such a GPU: the op computes in float64 on a CPU."""
    monkeypatch.setattr(products.tensor_cores, "runs_on", lambda _device: True)


def module_of(format: WeightFormat, inputs: ActivationFormat = TOKEN, out: int = OUT) -> QuantizedModule:
    g = torch.Generator().manual_seed(out)
    whole = torch.randn(out, COLUMNS, generator=g)
    whole[0, :128] = 0
    if format.scale.kind == "integer":
        rounded = on_integer_grid(lambda w, f: RTN().quantize(w, f, None), whole, format, inputs)
    else:
        rounded = RTN().quantize(whole, format, None)
    return QuantizedModule(rounded, calibrated(inputs, -3 * torch.ones(COLUMNS), 3 * torch.ones(COLUMNS)))


def format_of(kind: str, **fields: object) -> WeightFormat:
    return WeightFormat(granularity=PerGroup(size=128), scale=SCALES[kind]).model_copy(update=fields)


def tokens(*leading: int) -> Tensor:
    return torch.randn(*leading, COLUMNS, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


@pytest.mark.parametrize("inputs", [TOKEN, STATIC], ids=["per token", "static"])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.usefixtures("_hopper")
def test_the_result_is_that_of_the_checkpoint_elsewhere(kind: str, inputs: ActivationFormat, monkeypatch):
    module, bias = module_of(format_of(kind), inputs), torch.linspace(-1, 1, OUT)
    linear = IntegerLinear.from_module(module, bias).prepare(torch.bfloat16)
    assert linear.kernel == f"w4a8 tensor cores, {kind} scales, groups of 128"
    found = {shape: linear(tokens(*shape)) for shape in ((1,), (2, 5), (0,))}
    monkeypatch.setattr(products.tensor_cores, "runs_on", lambda _device: False)
    elsewhere = IntegerLinear.from_module(module, bias).prepare(torch.bfloat16)
    assert "tensor cores" not in elsewhere.kernel
    for shape, y in found.items():
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, elsewhere(tokens(*shape)), rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.usefixtures("_hopper")
def test_its_state_stays_the_checkpoints(kind: str):
    module = module_of(format_of(kind))
    stored = IntegerLinear.from_module(module).state_dict()
    linear = IntegerLinear.from_module(module).prepare(torch.bfloat16)
    assert linear.weight_packed is not None
    assert linear.weight_packed.numel() == 0
    state = linear.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    # float32 has no tensor cores, and is prepared from the checkpoint's words again
    linear.to(torch.float32)
    assert "tensor cores" not in linear.kernel
    assert torch.equal(linear.weight_packed, stored["weight_packed"])


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.usefixtures("_hopper")
def test_linears_that_are_prepared_can_be_joined(kind: str):
    parts = [IntegerLinear.from_module(module_of(format_of(kind), out=out)).prepare(torch.bfloat16) for out in (40, 8)]
    whole = fused._concatenated(parts)
    assert isinstance(whole, IntegerLinear)
    assert "tensor cores" in whole.kernel
    assert torch.equal(whole(tokens(3)), torch.cat([part(tokens(3)) for part in parts], dim=-1))


@pytest.mark.parametrize(
    ("format", "inputs"),
    [
        (format_of("float", granularity=PerGroup(size=64)), TOKEN),
        (format_of("float", bits=3), TOKEN),
        (format_of("float", scale=FloatScale(dtype="float32")), TOKEN),
        (format_of("float", convention=Convention.ASYMMETRIC), TOKEN),
        (format_of("integer"), ActivationFormat(symmetric=False)),
        (format_of("float"), ActivationFormat(granularity="group", group_size=128)),
    ],
    ids=["small groups", "3 bits", "float32 scales", "zero points", "asymmetric inputs", "input groups"],
)
@pytest.mark.usefixtures("_hopper")
def test_what_the_kernels_do_not_take_runs_as_elsewhere(format: WeightFormat, inputs: ActivationFormat):
    linear = IntegerLinear.from_module(module_of(format, inputs)).prepare(torch.bfloat16)
    assert "tensor cores" not in linear.kernel
    assert linear(tokens(2)).shape == (2, OUT)


@pytest.mark.usefixtures("_hopper")
def test_a_row_near_the_end_of_int32_runs_as_elsewhere():
    """The certificate is for codes up to 127, what these kernels add up for 128."""
    module = module_of(format_of("integer"))
    linear = IntegerLinear.from_module(module)
    reach = linear.weight_reach
    assert reach is not None
    linear.weight_reach = torch.full_like(reach, 2**31 // 128)
    assert linear._on_tensor_cores() is None
    linear.weight_reach = torch.full_like(reach, 2**31 // 128 - 1)
    linear._dtype = torch.empty(0, dtype=torch.bfloat16)
    assert linear._on_tensor_cores() is not None
