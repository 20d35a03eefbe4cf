"""GPTQ tensors against a reader written from the description alone, number by number."""

import re

import pytest
import torch
from export_samples import ASYMMETRIC, INT4, INT8, same, sample

from halfbyte.errors import CheckpointError, FormatError
from halfbyte.layouts import LAYOUTS
from halfbyte.numerics.grid import Grid
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.scheme import Convention, FloatScale, PerChannel, PerGroup, WeightFormat

GPTQ, GPTQ_V2 = LAYOUTS["gptq"], LAYOUTS["gptq_v2"]
BOTH = pytest.mark.parametrize("layout", [GPTQ, GPTQ_V2], ids=["v1", "v2"])


def field(words, position, bits):
    """The code at `position` of a list of int32 words, as bits of one long number."""
    string = sum((word % 2**32) << (32 * index) for index, word in enumerate(words))
    return string >> (position * bits) & (2**bits - 1)


def described(tensors, bits, version):
    """scales * (q - zero), one element at a time; version 1 stores zero - 1."""
    qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    columns, out = len(tensors["g_idx"]), qweight.shape[1]
    weight = torch.empty(out, columns)
    for row in range(out):
        for column in range(columns):
            group = int(tensors["g_idx"][column])
            zero = field(qzeros[group].tolist(), row, bits) + (1 if version == 1 else 0)
            code = field(qweight[:, row].tolist(), column, bits)
            weight[row, column] = float(scales[group, row]) * (code - zero)
    return weight


@BOTH
@pytest.mark.parametrize("granularity", [PerGroup(size=16), PerChannel()], ids=["group", "channel"])
@pytest.mark.parametrize("convention", [Convention.GPTQ, Convention.ASYMMETRIC])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_reader_written_from_the_description_decodes_the_same_weights(bits, convention, granularity, layout):
    format = INT4.model_copy(update={"bits": bits, "convention": convention, "granularity": granularity})
    weight = sample(format, 32, 32)
    tensors = layout.write(weight)
    assert torch.equal(described(tensors, bits, layout.version), weight.decode())
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }


def zero_points_of_version_2(tensors):
    tensors["qzeros"] += 0x11111111


def nibbles_the_other_way_round(tensors):
    word = tensors["qweight"].view(torch.uint8)
    tensors["qweight"] = (word >> 4 | word << 4).view(torch.int32)


def scales_transposed(tensors):
    tensors["scales"] = tensors["scales"].reshape(-1, len(tensors["scales"])).T.contiguous()


def packed_along_the_outputs(tensors):
    tensors["qweight"] = tensors["qweight"].T.reshape(tensors["qweight"].shape)


def groups_shifted(tensors):
    tensors["g_idx"] = tensors["g_idx"].roll(1)


@pytest.mark.parametrize(
    "bug",
    [
        zero_points_of_version_2,
        nibbles_the_other_way_round,
        scales_transposed,
        packed_along_the_outputs,
        groups_shifted,
    ],
)
def test_the_comparison_with_the_description_notices(bug):
    format = ASYMMETRIC.model_copy(update={"granularity": PerGroup(size=16)})
    weight = sample(format, 32, 32)
    tensors = GPTQ.write(weight)
    bug(tensors)
    assert not torch.equal(described(tensors, 4, 1), weight.decode())


def test_symmetric_int4_is_compressed_tensors_transposed_with_one_word_of_zero_points():
    weight = sample(INT4, 64, 96)
    tensors = GPTQ.write(weight)
    assert torch.equal(tensors["qweight"], LAYOUTS["compressed-tensors"].write(weight)["weight_packed"].T)
    assert tensors["qzeros"].unique().tolist() == [0x77777777]
    assert GPTQ_V2.write(weight)["qzeros"].unique().tolist() == [0x88888888 - 2**32]


def test_a_checkpoint_without_g_idx_is_read():
    tensors = GPTQ.write(sample(INT4, 64, 96))
    del tensors["g_idx"]
    assert same(GPTQ.read(tensors, INT4), sample(INT4, 64, 96))


def test_scattered_groups_are_refused():
    tensors = GPTQ.write(sample(INT4, 64, 96))
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(FormatError, match="desc_act"):
        GPTQ.read(tensors, INT4)


def test_zero_points_of_the_other_version_are_noticed_in_symmetric_weights():
    with pytest.raises(CheckpointError, match="version 1"):
        GPTQ.read(GPTQ_V2.write(sample(INT4, 64, 96)), INT4)


def test_a_zero_point_of_zero_has_no_version_1():
    weight = sample(ASYMMETRIC, 64, 96)
    none = QuantizedWeight(weight.codes, Grid(weight.grid.scales), ASYMMETRIC)
    with pytest.raises(FormatError, match="version 1"):
        GPTQ.write(none)
    read = GPTQ_V2.read(GPTQ_V2.write(none), ASYMMETRIC)
    assert torch.equal(read.decode(), none.decode())


def test_the_configuration_of_one_format():
    paths = [f"model.layers.{block}.{name}" for block in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")]
    config = GPTQ.config(dict.fromkeys(paths, INT4), ["lm_head", "model.layers.0.mlp.gate"])
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False}
    assert {key: config[key] for key in expected} == expected
    assert config["checkpoint_format"] == config["format"] == "gptq"
    assert config["modules_in_block_to_quantize"] == [["mlp.up_proj"], ["self_attn.q_proj"]]
    assert "dynamic" not in config


def test_modules_of_other_formats_and_skipped_ones_have_rules():
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    formats = {f"model.layers.{block}.{name}": INT4 for block in range(12) for name in names}
    channel = INT8.model_copy(update={"granularity": PerChannel()})
    formats |= {path: channel for path in formats if ".1." in path}
    skipped = ["model.layers.11.mlp.gate_proj", "model.layers.11.mlp.up_proj"]
    formats = {path: format for path, format in formats.items() if path not in skipped}
    config = GPTQ.config(formats, [*skipped, "lm_head"])
    expected = {path: format.model_copy(update={"scale": FloatScale()}) for path, format in formats.items()}
    assert GPTQ.formats(config, [*formats, *skipped, "lm_head"]) == expected
    assert (config["bits"], config["group_size"]) == (4, 32)

    def rule(path):
        """As vLLM and GPTQModel look one up: the first that matches decides."""
        return next((key[:2] for key in config["dynamic"] if re.match(key[2:], path)), None)

    assert rule("model.layers.1.self_attn.k_proj") == "+:"
    assert rule("model.layers.1.self_attn.qkv_proj") == rule("model.layers.1.mlp.gate_up_proj") == "+:"
    assert rule("model.layers.11.mlp.gate_up_proj") == "-:"
    assert rule("model.layers.10.self_attn.qkv_proj") is rule("model.layers.0.mlp.gate_up_proj") is None


def test_configurations_of_other_writers_are_read():
    foreign = {
        "bits": 4, "checkpoint_format": "gptq", "desc_act": False, "group_size": 64, "sym": True, "lm_head": False,
        "dynamic": {r"+:.*\.(?:1[0-5])\..*": {"bits": 8}, r"-:.*\.moe\..*": {}}, "quant_method": "gptq",
        "meta": {"damp_percent": 0.05, "mse": 0.0, "quantizer": ["gptqmodel:7.7.0"], "true_sequential": True},
    }  # fmt: skip
    modules = ["model.layers.2.up", "model.layers.12.up", "model.layers.3.moe.up", "lm_head"]
    assert GPTQ.formats(foreign, modules) == {
        "model.layers.2.up": WeightFormat(bits=4, granularity=PerGroup(size=64)),
        "model.layers.12.up": WeightFormat(bits=8, granularity=PerGroup(size=64)),
    }
    assert list(GPTQ.formats(foreign | {"lm_head": True}, modules))[-1] == "lm_head"


@pytest.mark.parametrize(
    ("change", "word"),
    [({"checkpoint_format": "marlin"}, "marlin"), ({"bits": 5}, "bits: 5"), ({"group_size": 0}, "group_size: 0")],
)
def test_what_we_cannot_read_is_told(change, word):
    config = GPTQ.config({"model.layers.0.up": INT4}, []) | change
    with pytest.raises(CheckpointError, match=word):
        GPTQ.formats(config, ["model.layers.0.up"])


def test_readers_that_refuse_a_format_are_named():
    assert GPTQ.caveat(INT4) is None
    assert "vLLM" in str(GPTQ.caveat(ASYMMETRIC))
    assert "vLLM" in str(GPTQ.caveat(INT4.model_copy(update={"bits": 3})))
