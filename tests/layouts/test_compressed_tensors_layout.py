"""The oracle is compressed-tensors itself, and transformers with it: they read our tensors to the bit."""

import json
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle import apply_quantization_config
from export_samples import ASYMMETRIC, INT4, INT8, checkpoint, linears, same, sample
from safetensors.torch import load_file

from halfbyte.errors import CheckpointError
from halfbyte.layouts import LAYOUTS
from halfbyte.numerics.grid import SCALE_DTYPES
from halfbyte.scheme import Convention, FloatScale, PerChannel, PerGroup, PerTensor, WeightFormat
from tiny_models import tiny, tokens

LAYOUT = LAYOUTS["compressed-tensors"]
STORABLE = [convention for convention in Convention if convention is not Convention.OMNIQUANT]


def scheme(format):
    """What the library makes of our configuration."""
    group = LAYOUT.config({"model.layers.0.mlp.up_proj": format}, [])["config_groups"]["group_0"]
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]))


def decompressed(tensors, format):
    return PackedQuantizationCompressor.decompress(tensors, scheme(format))["weight"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(size=11), PerGroup(size=1)], ids=str)
@pytest.mark.parametrize("convention", [Convention.GPTQ, Convention.ASYMMETRIC])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_library_decodes_our_tensors_to_the_same_weights(bits, convention, granularity, dtype):
    format = WeightFormat(bits=bits, convention=convention, granularity=granularity, scale=FloatScale(dtype=dtype))
    weight = sample(format, 7, 33)
    # the library multiplies in the scales' type; the product is exact in float32, so that is one rounding
    assert torch.equal(decompressed(LAYOUT.write(weight), format), weight.decode().to(SCALE_DTYPES[dtype]))


@pytest.mark.parametrize("convention", STORABLE)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_library_packs_our_weights_into_the_same_bytes(bits, convention):
    format = INT4.model_copy(update={"bits": bits, "convention": convention})
    weight = sample(format, 40, 96)
    ours = LAYOUT.write(weight)
    theirs = {"weight": weight.decode(), "weight_scale": weight.grid.scales}
    if weight.grid.zero_points is not None:
        theirs["weight_zero_point"] = (weight.grid.zero_points - 2 ** (bits - 1)).to(torch.int8)
    theirs = PackedQuantizationCompressor.compress(theirs, scheme(format))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_one_scale_per_tensor_is_read_by_the_library():
    format = INT4.model_copy(update={"granularity": PerTensor()})
    weight = sample(format, 5, 24)
    assert torch.equal(decompressed(LAYOUT.write(weight), format), weight.decode())


def zero_point_off_by_one(tensors):
    tensors["weight_zero_point"] += 0x11111111


def nibbles_the_other_way_round(tensors):
    word = tensors["weight_packed"].view(torch.uint8)
    tensors["weight_packed"] = (word >> 4 | word << 4).view(torch.int32)


def words_across(tensors):
    packed = tensors["weight_packed"]
    tensors["weight_packed"] = packed.T.reshape(packed.shape)


def scales_transposed(tensors):
    scales = tensors["weight_scale"]
    tensors["weight_scale"] = scales.T.reshape(scales.shape)


def zero_points_transposed(tensors):
    points = tensors["weight_zero_point"]
    tensors["weight_zero_point"] = points.T.reshape(points.shape)


def signed_codes(tensors):
    tensors["weight_packed"] ^= -0x77777778  # the highest bit of every code


@pytest.mark.parametrize(
    "bug",
    [
        zero_point_off_by_one,
        nibbles_the_other_way_round,
        words_across,
        scales_transposed,
        zero_points_transposed,
        signed_codes,
    ],
)
def test_the_comparison_with_the_library_notices(bug):
    weight = sample(ASYMMETRIC, 64, 96)
    tensors = LAYOUT.write(weight)
    bug(tensors)
    assert not torch.equal(decompressed(tensors, ASYMMETRIC), weight.decode())


def mixed_formats(paths):
    """Three formats: first block in 8 bits, every down projection asymmetric, one module left alone."""
    formats = {path: INT8 if ".layers.0." in path else INT4 for path in paths}
    formats |= {path: ASYMMETRIC for path in paths if path.endswith("down_proj")}
    del formats["model.layers.1.self_attn.o_proj"]
    return formats


def test_the_library_gives_every_module_the_format_that_we_gave_it():
    model = tiny("llama", hidden_size=64, intermediate_size=128)
    formats = mixed_formats(linears(model))
    config = LAYOUT.config(formats, ["model.layers.1.self_attn.o_proj", "lm_head"])
    assert all("Linear" not in group["targets"] for group in config["config_groups"].values())
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    for path, module in linears(model).items():
        given = getattr(module, "quantization_scheme", None)
        assert (given and given.weights) == (scheme(formats[path]).weights if path in formats else None), path
    assert not hasattr(model.get_submodule("lm_head"), "quantization_scheme")


def test_formats_are_read_back_from_the_configuration():
    formats = mixed_formats(linears(tiny("llama", hidden_size=64, intermediate_size=128)))
    expected = {path: format.model_copy(update={"scale": FloatScale()}) for path, format in formats.items()}
    ignored = ["model.layers.1.self_attn.o_proj", "lm_head"]
    assert LAYOUT.formats(LAYOUT.config(formats, ignored), [*ignored, *formats]) == expected


def test_one_format_is_one_group_of_every_linear_layer():
    config = LAYOUT.config({"model.layers.0.a": INT4, "model.layers.0.b": INT4}, ["lm_head"])
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    awq = INT4.model_copy(update={"convention": Convention.AWQ})
    same_to_readers = LAYOUT.config({"model.layers.0.a": INT4, "model.layers.0.b": awq}, ["lm_head"])
    assert same_to_readers == config


# as llm-compressor 0.14 writes it
FOREIGN = json.loads("""
{"config_groups": {"group_0": {"format": "pack-quantized", "input_activations": null, "output_activations": null,
  "targets": ["Linear"], "weights": {"actorder": "static", "block_structure": null, "dynamic": false, "group_size": 128,
  "num_bits": 4, "observer": "memoryless_minmax", "observer_kwargs": {}, "scale_dtype": null, "strategy": "group",
  "symmetric": false, "type": "int", "zp_dtype": "torch.int8"}}},
 "format": "pack-quantized", "global_compression_ratio": null, "ignore": ["lm_head", "re:.*mlp.gate$"],
 "kv_cache_scheme": null, "quant_method": "compressed-tensors", "quantization_status": "compressed",
 "sparsity_config": {}, "transform_config": {}, "version": "0.19.0"}
""")


def changed(**weights):
    group = FOREIGN["config_groups"]["group_0"]
    return FOREIGN | {"config_groups": {"group_0": group | {"weights": group["weights"] | weights}}}


def test_configurations_of_other_writers_are_read():
    modules = ["model.layers.3.mlp.experts.0.up_proj", "model.layers.3.mlp.gate", "lm_head"]
    expected = WeightFormat(bits=4, convention=Convention.ASYMMETRIC, granularity=PerGroup(size=128))
    assert LAYOUT.formats(FOREIGN, modules) == {modules[0]: expected}
    per_channel = LAYOUT.formats(changed(strategy=None, group_size=-1, num_bits=8, symmetric=True), modules)
    assert per_channel == {modules[0]: WeightFormat(bits=8, granularity=PerChannel())}
    assert LAYOUT.beyond_weights(FOREIGN) == ()
    assert LAYOUT.beyond_weights(FOREIGN | {"kv_cache_scheme": {"num_bits": 8}}) == ("a quantized cache",)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (changed(type="float", num_bits=8), "type float"),
        (changed(strategy="block"), "per block"),
        (changed(actorder="group"), "scattered"),
        (FOREIGN | {"config_groups": {"W4A16": ["Linear"]}}, "preset"),
        (FOREIGN | {"ignore": ["re:(unclosed"]}, "regular expression"),
    ],
    ids=["float8", "block", "actorder", "preset", "expression"],
)
def test_what_we_cannot_read_is_told(config, word):
    with pytest.raises(CheckpointError, match=word):
        LAYOUT.formats(config, ["model.layers.0.mlp.up_proj"])


@torch.no_grad()
def logits(folder, **arguments):
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, report = load(folder, output_loading_info=True, **arguments)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return model(input_ids=tokens()).logits


G128 = INT4.model_copy(update={"granularity": PerGroup(size=128)})
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
DEQUANTIZED = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    ("format", "arguments"),
    [
        (INT4, {}),
        (G128, {}),
        (INT4.model_copy(update={"bits": 3, "granularity": PerChannel()}), {}),
        (ASYMMETRIC, DEQUANTIZED),  # without it transformers 5.23 finds zero points of another shape
    ],
    ids=["g32", "g128", "3-bit-channel", "asymmetric"],
)
@torch.no_grad()
def test_transformers_computes_what_the_decoded_model_computes(tmp_path, format, arguments):
    dense = checkpoint(tmp_path, format, **WIDE)
    assert torch.equal(logits(tmp_path, **arguments), dense(input_ids=tokens()).logits)


@torch.no_grad()
def test_transformers_reads_mixed_formats(tmp_path):
    paths = list(linears(tiny("llama", hidden_size=64, intermediate_size=128)))
    formats = {path: INT8 if ".layers.0." in path else INT4 for path in paths if not path.endswith("1.mlp.up_proj")}
    dense = checkpoint(tmp_path, formats, shards=2)
    assert torch.equal(logits(tmp_path), dense(input_ids=tokens()).logits)


@pytest.mark.parametrize(
    ("change", "reader"),
    [
        ({"granularity": PerTensor()}, "vLLM"),
        ({"bits": 3}, "0.19"),
        ({"convention": Convention.ASYMMETRIC}, "transformers"),
    ],
)
def test_readers_that_refuse_a_format_are_named(change, reader):
    assert LAYOUT.caveat(INT4) is None
    assert reader in str(LAYOUT.caveat(INT4.model_copy(update=change)))


def test_a_written_file_reads_back(tmp_path):
    checkpoint(tmp_path, ASYMMETRIC)
    stored = load_file(tmp_path / "model.safetensors")
    path = "model.layers.0.self_attn.q_proj"
    tensors = {suffix: stored[f"{path}.{suffix}"] for suffix in LAYOUT.names(ASYMMETRIC)}
    assert same(LAYOUT.read(tensors, ASYMMETRIC), sample(ASYMMETRIC, 64, 64, seed=0))
