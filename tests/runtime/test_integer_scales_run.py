"""Layers with integer scales: what they compute is what int64 arithmetic gives, and a false certificate does not run."""

import importlib
import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_folders import logits
from safetensors.torch import load_file, save_file
from torch import Tensor

import halfbyte
from closeness import relative_error
from halfbyte.errors import CheckpointError, FormatError, WeightError
from halfbyte.kernels.w4a8_integer import reference, signed_codes
from halfbyte.layouts.compressed_tensors import OWN
from halfbyte.methods import RTN
from halfbyte.numerics.activations import calibrated, simulate
from halfbyte.numerics.integer_scales import on_integer_grid
from halfbyte.numerics.quantized import QuantizedModule
from halfbyte.recipe import Recipe
from halfbyte.runtime.choice import kernels_here
from halfbyte.runtime.codes import encode
from halfbyte.runtime.integer_linear import IntegerLinear
from halfbyte.runtime.load import load_model
from halfbyte.scheme import (
    ActivationFormat,
    Convention,
    IntegerScale,
    OutlierSplit,
    PerChannel,
    PerGroup,
    WeightFormat,
)
from tiny_models import tiny, tokens
from tiny_tokenizer import prose, tiny_tokenizer

COLUMNS, OUT = 96, 33
INT4 = WeightFormat(granularity=PerGroup(size=16), scale=IntegerScale())
WEIGHTS = {
    "int4": INT4,
    "int4 by row": INT4.model_copy(update={"scale": IntegerScale(amplifier="row")}),
    "int4 asymmetric": INT4.model_copy(update={"convention": Convention.ASYMMETRIC}),
    "int4 per channel": INT4.model_copy(update={"granularity": PerChannel()}),
    "int3": INT4.model_copy(update={"bits": 3}),
    "int8": INT4.model_copy(update={"bits": 8, "stored": "bytes", "scale": IntegerScale(amplifier="row")}),
}
INPUTS = {
    "per token": ActivationFormat(),
    "per token asymmetric": ActivationFormat(symmetric=False),
    "static": ActivationFormat(granularity="tensor", dynamic=False),
    "static asymmetric": ActivationFormat(granularity="tensor", dynamic=False, symmetric=False),
    "4 bits": ActivationFormat(bits=4),
}


def problem(weight: str, inputs: ActivationFormat, seed: int = 0) -> tuple[QuantizedModule, Tensor, Tensor]:
    """A module, a signed bias, tokens with an outlier column."""
    g = torch.Generator().manual_seed(seed)
    whole, x = torch.randn(OUT, COLUMNS, generator=g), torch.randn(5, COLUMNS, generator=g)
    whole[0, :16], x[:, 3] = 0, 20 * x[:, 3]
    rounded = on_integer_grid(lambda w, f: RTN().quantize(w, f, None), whole, WEIGHTS[weight], inputs)
    quantizer = calibrated(inputs, x.amin(dim=0), x.amax(dim=0))
    return QuantizedModule(rounded, quantizer), torch.randn(OUT, generator=g), x


@settings(max_examples=40, deadline=None)
@given(weight=st.sampled_from(sorted(WEIGHTS)), inputs=st.sampled_from(sorted(INPUTS)), seed=st.integers(0, 2**16))
def test_a_layer_computes_what_int64_gives(weight, inputs, seed):
    module, bias, x = problem(weight, INPUTS[inputs], seed)
    assert module.inputs is not None
    layer = IntegerLinear.from_module(module, bias).prepare(torch.float32)
    found = encode(x, module.inputs)
    zeros, stored = module.weight.grid.zero_points, OWN.write(module.weight)
    half = 2 ** (module.weight.format.bits - 1)
    packed = stored.get("weight_packed")
    codes = stored["weight"] if packed is None else signed_codes(packed, module.weight.format.bits, COLUMNS)
    whole = reference.accumulated(
        found.codes, codes, stored["weight_scale"],
        x_zeros=None if found.zeros is None else found.zeros.expand(5, 1).flatten(),
        weight_zeros=None if zeros is None else (zeros - half).to(torch.int8),
    )  # fmt: skip
    factors = 1 / stored["weight_amplifier"].float() * found.scales.expand(5, 1)
    assert torch.equal(layer(x), whole.float() * factors + bias)
    simulated = simulate(x, module.inputs).double() @ module.weight.decode().double().T + bias.double()
    assert relative_error(layer(x), simulated) < 1e-6


def test_the_kernel_is_named():
    module, bias, _ = problem("int4", INPUTS["per token"])
    layer = IntegerLinear.from_module(module, bias).prepare(torch.float32)
    assert "w4a8 integer scales" in layer.kernel
    assert "groups of 16" in layer.kernel


@pytest.mark.parametrize(
    "inputs",
    [ActivationFormat(granularity="group", group_size=32), ActivationFormat(outliers=OutlierSplit(threshold=4.0))],
    ids=["groups", "outliers"],
)
def test_inputs_that_one_integer_sum_cannot_serve_use_the_scales_as_floats(inputs):
    module, bias, x = problem("int4", inputs)
    layer = IntegerLinear.from_module(module, bias).prepare(torch.float32)
    assert "integer scales" not in layer.kernel
    assert module.inputs is not None
    simulated = simulate(x, module.inputs).double() @ module.weight.decode().double().T + bias.double()
    assert relative_error(layer(x), simulated) < 1e-6


def test_casting_and_moving_leave_the_integers_alone():
    module, bias, x = problem("int4 by row", INPUTS["per token"])
    layer = IntegerLinear.from_module(module, bias).prepare(torch.float32)
    before = layer(x)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
    layer.half().float()
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())
    assert relative_error(layer(x), before) < 1e-3  # the bias was rounded


def test_a_certificate_of_other_codes_does_not_run():
    module, _, _ = problem("int4", INPUTS["per token"])
    layer = IntegerLinear.from_module(module)
    assert layer.weight_packed is not None
    layer.weight_packed[4, 1] ^= 0b1000
    with pytest.raises(CheckpointError, match="row 4 has a reach of"):
        layer.prepare(torch.float32)


def test_a_certificate_for_narrower_inputs_does_not_run():
    g = torch.Generator().manual_seed(0)
    whole, four = 300 * torch.randn(3, COLUMNS, generator=g), ActivationFormat(bits=4)
    rounded = on_integer_grid(lambda w, f: RTN().quantize(w, f, None), whole, WEIGHTS["int8"], four)
    wider = QuantizedModule(rounded, calibrated(INPUTS["per token"], torch.zeros(COLUMNS), torch.zeros(COLUMNS)))
    with pytest.raises(CheckpointError, match=r"certificate does not hold: row \d has a reach.*`overflow: shrink`"):
        IntegerLinear.from_module(wider).prepare(torch.float32)


RECIPE = {
    "scheme": {
        "weights": {"bits": 4, "granularity": {"kind": "group", "size": 8}, "scale": {"kind": "integer"}},
        "activations": {},
    },
    "steps": [{"method": "rtn", "ranges": "mse"}],
}


def folder_of(path, kind="llama"):
    tiny(kind).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (path / "text.txt").write_text(prose(600))
    return path


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_a_written_checkpoint_is_the_model_that_is_quantized_while_loading(kind, tmp_path):
    folder = folder_of(tmp_path / "model", kind)
    halfbyte.quantize(folder, RECIPE, tmp_path / "out", device="cpu")
    written, quick = load_model(tmp_path / "out", device="cpu"), load_model(folder, recipe=RECIPE, device="cpu")
    assert torch.equal(logits(quick, tokens()), logits(written, tokens()))
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "halfbyte"
    )
    (kernel,) = kernels_here(tmp_path / "out", device="cpu")
    assert {module.kernel for module in written.modules() if isinstance(module, IntegerLinear)} == {kernel}


STEPS = {
    "gptq": [{"method": "gptq", "ranges": "mse"}],
    "awq": [{"method": "awq"}, {"method": "rtn", "ranges": "output"}],
    "smoothquant": [{"method": "smoothquant"}, {"method": "gptq"}],
    "lkd": [{"method": "rtn"}, {"method": "lkd", "steps": 3}],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("scale", [{}, {"amplifier": "row", "dtype": "uint8"}, {"plug_in": True}], ids=str)
def test_every_method_writes_certified_checkpoints(steps, scale, tmp_path):
    folder = folder_of(tmp_path / "model")
    weights = RECIPE["scheme"]["weights"] | {"scale": {"kind": "integer", **scale}}
    recipe = RECIPE | {"scheme": {"weights": weights, "activations": {}}, "steps": steps}
    calibration = {"calibration": folder / "text.txt", "samples": 6, "length": 24}
    halfbyte.quantize(folder, recipe, tmp_path / "out", device="cpu", **calibration)
    assert halfbyte.inspect(tmp_path / "out").problems == ()
    assert torch.isfinite(logits(load_model(tmp_path / "out", device="cpu"), tokens())).all()


def test_a_damaged_certificate_in_a_folder_is_told_with_the_layer(tmp_path):
    folder = folder_of(tmp_path / "model")
    halfbyte.quantize(folder, RECIPE, tmp_path / "out", device="cpu")
    path = tmp_path / "out" / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight_reach"][3] += 5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.*row 3 has a reach of"):
        load_model(tmp_path / "out", device="cpu")


def test_integer_scales_without_quantized_inputs_are_refused_with_the_remedy(tmp_path):
    recipe = RECIPE | {"scheme": {"weights": RECIPE["scheme"]["weights"]}}
    with pytest.raises(
        FormatError, match=r"q_proj: integer scales are for integer products.*`activations: \{bits: 8\}`"
    ):
        halfbyte.quantize(folder_of(tmp_path / "model"), recipe, tmp_path / "out", device="cpu")


def test_a_row_that_overflows_stops_the_run_with_its_path(tmp_path):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[5] *= 1e7
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.up_proj: row 5 has a .*`overflow: shrink`"):
        halfbyte.quantize(tmp_path / "model", RECIPE, tmp_path / "out", device="cpu")


@pytest.mark.parametrize("name", ["integer-scale-w4a8", "dgq-w4a8"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_the_shipped_recipes_certify_every_expert_and_leave_the_router(name, kind, tmp_path):
    folder = folder_of(tmp_path / "model", kind)
    fields = Recipe.load(name).model_dump(mode="json") | {"starved": "round", "ignore": ["lm_head", "*_gate"]}
    fields["scheme"]["weights"]["granularity"]["size"] = 8
    report = halfbyte.quantize(
        folder, fields, tmp_path / "out", device="cpu", calibration=folder / "text.txt", samples=6, length=24
    )
    found = halfbyte.inspect(tmp_path / "out")
    experts = [module for module in found.modules if ".experts." in module.path]
    assert len(experts) == 2 * 5 * 3
    assert all(module.accumulator is not None for module in found.modules)
    assert found.problems == ()
    assert len({module.tokens for module in report.modules if ".experts." in module.path}) > 1
    assert all(path.rpartition(".")[2] in ("gate", "shared_expert_gate") for path in report.unquantized)
    assert torch.isfinite(logits(load_model(tmp_path / "out", device="cpu"), tokens())).all()


def test_transformers_reads_them_through_the_adapter(tmp_path):
    importlib.import_module("halfbyte.huggingface")
    halfbyte.quantize(folder_of(tmp_path / "model"), RECIPE, tmp_path / "out", device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(theirs, tokens()), logits(load_model(tmp_path / "out", device="cpu"), tokens()))
