from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_folders import INT4, INT8, quantized, quantizer_of
from torch import Tensor, nn

from closeness import assert_close, relative_error
from halfbyte.errors import CheckpointError, WeightError
from halfbyte.layouts import LAYOUTS
from halfbyte.layouts.inputs import write_inputs
from halfbyte.numerics.activations import outlier_columns, simulate
from halfbyte.numerics.quantized import QuantizedModule
from halfbyte.runtime import outliers, products
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.scheme import ActivationFormat, Convention, FloatScale, OutlierSplit, PerChannel, PerGroup, PerTensor

COLUMNS = 48
ASYMMETRIC = {"convention": Convention.ASYMMETRIC}
WEIGHTS = {
    "int8 per channel": INT8.model_copy(update={"convention": Convention.ODYSSEY}),
    "int8 per tensor": INT8.model_copy(update={"granularity": PerTensor()}),
    "int8 groups": INT8.model_copy(update={"granularity": PerGroup(size=16)}),
    "int8 asymmetric": INT8.model_copy(update=ASYMMETRIC),
    "int8 asymmetric groups": INT8.model_copy(update={"granularity": PerGroup(size=16), **ASYMMETRIC}),
    "int8 words": INT8.model_copy(update={"stored": "words"}),
    "int4 groups": INT4,
    "int4 per channel": INT4.model_copy(update={"granularity": PerChannel()}),
    "int4 asymmetric": INT4.model_copy(update=ASYMMETRIC),
    "int3 asymmetric per channel": INT4.model_copy(update={"bits": 3, "granularity": PerChannel(), **ASYMMETRIC}),
}
INPUTS = {
    "per token": ActivationFormat(),
    "per token asymmetric": ActivationFormat(symmetric=False),
    "static": ActivationFormat(granularity="tensor", dynamic=False),
    "static asymmetric": ActivationFormat(granularity="tensor", dynamic=False, symmetric=False),
    "per call": ActivationFormat(granularity="tensor"),
    "per call asymmetric": ActivationFormat(granularity="tensor", symmetric=False),
    "groups": ActivationFormat(granularity="group", group_size=12),
    "5 bits": ActivationFormat(bits=5),
    "4 bits asymmetric": ActivationFormat(bits=4, symmetric=False),
    "4 bits static": ActivationFormat(bits=4, granularity="tensor", dynamic=False),
    "6 bits in groups": ActivationFormat(bits=6, granularity="group", group_size=16),
}


def split(threshold: float = 2.5, symmetric: bool = True, **fields: Any) -> ActivationFormat:
    return ActivationFormat(symmetric=symmetric, outliers=OutlierSplit(threshold=threshold, **fields))


def inputs_of(*leading: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Signed, the columns of uneven size, two of them with outliers, a token of zeros, one of them all positive."""
    x = torch.randn(*leading, COLUMNS, generator=torch.Generator().manual_seed(seed))
    x = x * torch.linspace(0.2, 1.5, COLUMNS)
    x[..., 3] *= 20
    x[..., 40] *= 4
    flat = x.view(-1, COLUMNS)
    flat[1:2] = 0
    flat[2:3].abs_()
    return x.to(dtype)


def problem(
    weight: str, activations: ActivationFormat, out: int = 33, seed: int = 0
) -> tuple[QuantizedModule, Tensor, Tensor]:
    """The module, the weight it was made of, and a signed bias."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(out, COLUMNS, generator=generator)
    whole[0, :16] = 0
    return quantized(whole, WEIGHTS[weight], activations), whole, torch.randn(out, generator=generator)


def weight_of(module: QuantizedModule, whole: Tensor, x: Tensor) -> Tensor:
    """The decoded weight in float64, with the model's own in kept columns."""
    assert module.inputs is not None
    weight, splits = module.weight.decode().double(), module.inputs.format.outliers
    if module.kept is not None and splits is not None:
        listed = module.inputs.outlier_columns
        columns = (outlier_columns(x, splits) if listed is None else listed).long()
        weight[:, columns] = whole[:, columns].double()
    return weight


def exact(module: QuantizedModule, whole: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """The definition, in float64: simulated inputs times the decoded weight."""
    assert module.inputs is not None
    return simulate(x, module.inputs).double() @ weight_of(module, whole, x).T + bias.double()


def expected(module: QuantizedModule, whole: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return exact(module, whole, bias, x).to(x.dtype)


def assert_as_simulated(found: Tensor, module: QuantizedModule, whole: Tensor, bias: Tensor, x: Tensor) -> None:
    """Element by element: a few roundings to float32 of the products and their sums, which may cancel."""
    assert module.inputs is not None
    magnitude = simulate(x, module.inputs).abs().double() @ weight_of(module, whole, x).abs().T + bias.abs()
    off = (found - exact(module, whole, bias, x)).abs()
    assert bool((off <= 8 * torch.finfo(torch.float32).eps * magnitude).all())


def ran(module: QuantizedModule, bias: Tensor, x: Tensor) -> Tensor:
    return IntegerLinear.from_module(module, bias).prepare(x.dtype)(x)


@settings(max_examples=80, deadline=None)
@given(
    weight=st.sampled_from(sorted(WEIGHTS)),
    activations=st.sampled_from(sorted(INPUTS)),
    out=st.sampled_from([1, 7, 33]),
    leading=st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 0), (2, 1, 3)]),
)
def test_it_computes_what_simulation_says(weight, activations, out, leading):
    module, whole, bias = problem(weight, INPUTS[activations], out)
    x = inputs_of(*leading)
    found = ran(module, bias, x)
    assert found.shape == (*leading, out)
    if found.numel():
        assert_as_simulated(found, module, whole, bias, x)


@settings(max_examples=60, deadline=None)
@given(
    weight=st.sampled_from(sorted(WEIGHTS)),
    symmetric=st.booleans(),
    threshold=st.sampled_from([0.0, 0.5, 2.5, 6.0, float("inf")]),
    columns=st.sampled_from(["dynamic", "static"]),
    weights=st.sampled_from(["dequantized", "kept"]),
    leading=st.sampled_from([(1,), (5,), (2, 3), (0,)]),
)
def test_it_splits_outliers_as_simulation_says(weight, symmetric, threshold, columns, weights, leading):
    module, whole, bias = problem(weight, split(threshold, symmetric, columns=columns, weights=weights))
    x = inputs_of(*leading)
    found = ran(module, bias, x)
    assert found.shape == (*leading, 33)
    if found.numel():
        assert_as_simulated(found, module, whole, bias, x)


@pytest.mark.parametrize("threshold", [0.0, float("inf")])
@pytest.mark.parametrize("columns", ["dynamic", "static"])
@pytest.mark.parametrize("weight", ["int8 per channel", "int4 groups"])
def test_without_outliers_a_split_is_plain_quantization(weight, columns, threshold):
    x = inputs_of(5)
    plain, _, bias = problem(weight, ActivationFormat())
    module, _, _ = problem(weight, split(threshold, columns=columns))
    assert_close(ran(module, bias, x), ran(plain, bias, x), rounding_steps=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", ["int8 per channel", "int4 asymmetric"])
@pytest.mark.parametrize(
    "activations",
    [ActivationFormat(), INPUTS["static asymmetric"], split(), split(columns="static", weights="kept")],
    ids=str,
)
def test_sixteen_bits_cost_one_rounding_or_two(weight, activations, dtype):
    """Codes and sums are the same as of the widened input; the split columns and the result are rounded to 16 bits."""
    module, whole, bias = problem(weight, activations)
    x = inputs_of(5, dtype=dtype)
    right = expected(module, whole, bias.to(dtype).float(), x.float()).to(dtype)
    assert_close(ran(module, bias, x), right, rounding_steps=2)


@pytest.mark.parametrize(
    ("weight", "activations", "kernel"),
    [
        ("int8 per channel", ActivationFormat(), "w8a8 torch int8"),
        ("int8 words", INPUTS["static asymmetric"], "w8a8 torch int8"),
        ("int4 per channel", ActivationFormat(), "w8a8 torch int8"),
        ("int4 groups", ActivationFormat(), "w4a8 torch int8, 8 inputs a run"),
        ("int8 asymmetric", ActivationFormat(), "w4a8 torch int8, 48 inputs a run"),
        ("int8 per tensor", INPUTS["groups"], "w4a8 torch int8, 12 inputs a run"),
        ("int8 per channel", split(), "llm_int8 torch int8"),
        ("int4 groups", split(), "w4a8 torch int8, 8 inputs a run, and split columns"),
    ],
)
def test_the_kernel_is_named_before_it_runs(weight, activations, kernel):
    linear = IntegerLinear.from_module(problem(weight, activations)[0])
    assert linear.kernel == "none: not prepared"
    assert linear.prepare(torch.float32).kernel == kernel
    assert kernel in repr(linear)


@pytest.mark.parametrize(
    ("weight", "activations", "op"),
    [
        ("int8 per channel", ActivationFormat(), "int8_matmul"),
        ("int8 per channel", split(), "llm_int8_matmul"),
        ("int8 per channel", split(columns="static"), "static_outlier_matmul"),
    ],
)
def test_the_named_kernel_is_the_one_that_runs(weight, activations, op, monkeypatch):
    room = products if op == "int8_matmul" else outliers
    calls, real = [], getattr(room, op)
    monkeypatch.setattr(room, op, lambda *a, **k: (calls.append(op), real(*a, **k))[1])
    module, _, bias = problem(weight, activations)
    ran(module, bias, inputs_of(5))
    assert calls == [op]


@pytest.mark.parametrize("weight", ["int4 groups", "int4 asymmetric", "int4 per channel"])
def test_where_the_kernel_unpacks_words_the_weight_stays_packed(weight, monkeypatch):
    module, whole, bias = problem(weight, ActivationFormat())
    monkeypatch.setattr(IntegerLinear, "_readable_words", True)
    linear = IntegerLinear.from_module(module, bias).prepare(torch.float32)
    assert linear.product.weight is linear.weight_packed
    x = inputs_of(5)
    assert_close(linear(x), expected(module, whole, bias, x), rounding_steps=8)


def test_activations_of_another_dtype_are_refused():
    linear = IntegerLinear.from_module(problem("int4 groups", ActivationFormat())[0])
    with pytest.raises(WeightError, match="prepared for nothing"):
        linear(inputs_of(2))
    with pytest.raises(WeightError, match=r"are torch.float32 and this linear is prepared for torch.bfloat16"):
        linear.prepare(torch.bfloat16)(inputs_of(2))


def test_casting_the_module_prepares_it_again_and_keeps_the_scales():
    module, whole, bias = problem("int4 groups", INPUTS["static"])
    linear = nn.Sequential(IntegerLinear.from_module(module, bias).prepare(torch.float32)).to(torch.bfloat16)[0]
    assert isinstance(linear, IntegerLinear)
    assert linear.weight_scale.dtype == torch.float32
    assert linear.input_scale is not None
    assert linear.input_scale.dtype == torch.float32
    x = inputs_of(5, dtype=torch.bfloat16)
    right = expected(module, whole, bias.bfloat16().float(), x.float()).bfloat16()
    assert_close(linear(x), right, rounding_steps=2)
    linear.to("meta")


@pytest.mark.parametrize("weight", ["int8 asymmetric", "int4 asymmetric", "int8 per tensor"])
@pytest.mark.parametrize(
    "activations",
    [INPUTS["static asymmetric"], split(columns="static", weights="kept"), split(weights="kept")],
    ids=str,
)
def test_its_state_is_that_of_the_checkpoint(weight, activations):
    module, _, bias = problem(weight, activations)
    linear = IntegerLinear.from_module(module, bias).prepare(torch.float32)
    tensors = LAYOUTS["compressed-tensors"].write(module.weight) | write_inputs(module)
    state = linear.state_dict()
    assert set(state) == {*tensors, "bias"}
    assert all(
        torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    columns = len(tensors.get("outlier_columns", ()))
    again = IntegerLinear(COLUMNS, 33, WEIGHTS[weight], activations, bias=True, outliers=columns)
    again.load_state_dict(state)
    x = inputs_of(5)
    assert torch.equal(again.prepare(torch.float32)(x), linear(x))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weight": torch.zeros(40, COLUMNS, dtype=torch.int8)}, "weight_scale is float32"),
        ({"weight": torch.zeros(33, COLUMNS)}, "weight is float32"),
        ({"input_scale": torch.ones(2)}, r"input_scale is \[2\] instead of \[1\]"),
        ({"input_scale": None}, "input_scale is missing"),
        ({"outlier_columns": torch.zeros(1, dtype=torch.int32)}, "outlier_columns is there"),
    ],
)
def test_tensors_of_other_formats_do_not_fill_it(change, complaint):
    module, _, _ = problem("int8 per channel", INPUTS["static"])
    tensors = LAYOUTS["compressed-tensors"].write(module.weight) | write_inputs(module) | change
    linear = IntegerLinear(COLUMNS, 33, module.weight.format, INPUTS["static"], bias=False)
    with pytest.raises(CheckpointError, match=complaint):
        linear.fill({name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(CheckpointError, match="33x48 and the model asks for 40x48"):
        IntegerLinear(COLUMNS, 40, module.weight.format, ActivationFormat(), bias=False).fill(
            LAYOUTS["compressed-tensors"].write(module.weight)
        )


def test_a_scale_dtype_left_open_is_the_stored_one():
    module, _, _ = problem("int8 per channel", ActivationFormat())
    open_format = WEIGHTS["int8 per channel"].model_copy(update={"scale": FloatScale()})
    linear = IntegerLinear(COLUMNS, 33, open_format, ActivationFormat(), bias=False, device="meta")
    linear.fill(LAYOUTS["compressed-tensors"].write(module.weight))
    assert linear.format.scale == FloatScale(dtype="float32")


@pytest.mark.parametrize(
    ("weight", "activations"),
    [("int8 per channel", ActivationFormat()), ("int4 asymmetric", INPUTS["static"]), ("int8 per channel", split())],
    ids=["w8a8", "w4a8", "llm_int8"],
)
def test_it_compiles_without_breaks(weight, activations):
    module, _, bias = problem(weight, activations)
    linear = IntegerLinear.from_module(module, bias).prepare(torch.float32)
    x = inputs_of(5)
    assert_close(torch.compile(linear, backend="eager", fullgraph=True)(x), linear(x))


def forgotten_zero_points(linear):
    linear.product = replace(linear.product, zeros=None)


def neighbours_scales(linear):
    linear.product = replace(linear.product, scales=linear.product.scales.roll(1, dims=1))


def another_input_grid(linear):
    linear.input_scale = linear.input_scale * 1.1
    linear.prepare(torch.float32)


def forgotten_input_zero_point(linear):
    linear.input_zero_point = linear.input_zero_point * 0
    linear.prepare(torch.float32)


def forgotten_bias(linear):
    linear.bias.zero_()


@pytest.mark.parametrize(
    "bug",
    [forgotten_zero_points, neighbours_scales, another_input_grid, forgotten_input_zero_point, forgotten_bias],
)
def test_the_comparison_notices(bug):
    module, whole, bias = problem("int4 asymmetric", INPUTS["static asymmetric"])
    linear = IntegerLinear.from_module(module, bias).prepare(torch.float32)
    x, right = inputs_of(17), expected(module, whole, bias, inputs_of(17))
    assert_close(linear(x), right, rounding_steps=8)
    bug(linear)
    assert relative_error(linear(x), right) > 1e-3


def forgotten_split(linear):
    listed = outliers.static_outliers(linear.outlier_columns[:0], linear.outlier_weight[:, :0], COLUMNS)
    linear._split = replace(linear._split, listed=listed)


def decoded_in_place_of_kept(linear):
    weight = linear.weight[:, linear.outlier_columns.long()] * linear.weight_scale
    linear._split = replace(linear._split, listed=outliers.static_outliers(linear.outlier_columns, weight, COLUMNS))


@pytest.mark.parametrize("bug", [forgotten_split, decoded_in_place_of_kept])
def test_the_comparison_of_splits_notices(bug):
    module, whole, bias = problem("int8 per channel", split(columns="static", weights="kept"))
    assert len(quantizer_of(split(columns="static"), COLUMNS).outlier_columns) > 3
    linear = IntegerLinear.from_module(module, bias).prepare(torch.float32)
    x, right = inputs_of(17), expected(module, whole, bias, inputs_of(17))
    bug(linear)
    assert relative_error(linear(x), right) > 1e-3
