"""AWQ tensors against a reader written from the description alone, number by number."""

import pytest
import torch
from export_samples import ASYMMETRIC, INT4, same, sample
from transformers import AwqConfig

from halfbyte.errors import CheckpointError, FormatError
from halfbyte.layouts import LAYOUTS
from halfbyte.scheme import Convention, FloatScale, PerChannel, PerGroup, WeightFormat

AWQ = LAYOUTS["awq"]
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble in which output 8w + i lies


def described(tensors):
    """scales * (q - zero), one element at a time."""
    qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    columns, out = qweight.shape[0], scales.shape[1]
    weight = torch.empty(out, columns)
    for row in range(out):
        shift = 4 * ORDER[row % 8]
        for column in range(columns):
            group = column * len(scales) // columns
            code = int(qweight[column, row // 8]) >> shift & 15
            zero = int(qzeros[group, row // 8]) >> shift & 15
            weight[row, column] = float(scales[group, row]) * (code - zero)
    return weight


@pytest.mark.parametrize("granularity", [PerGroup(size=5), PerChannel()], ids=["group", "channel"])
@pytest.mark.parametrize("convention", [Convention.AWQ, Convention.ASYMMETRIC])
def test_a_reader_written_from_the_description_decodes_the_same_weights(convention, granularity):
    format = INT4.model_copy(update={"convention": convention, "granularity": granularity})
    weight = sample(format, 24, 35)
    tensors = AWQ.write(weight)
    assert torch.equal(described(tensors), weight.decode())
    dtypes = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dtypes


def outputs_in_plain_order(tensors):
    for name in ("qweight", "qzeros"):
        nibbles = torch.stack([tensors[name] >> 4 * ORDER[i] & 15 for i in range(8)], -1)
        tensors[name] = torch.stack([nibbles[..., i] << 4 * i for i in range(8)]).sum(0, dtype=torch.int32)


def zero_point_minus_one(tensors):
    tensors["qzeros"] -= 0x11111111


def nibbles_the_other_way_round(tensors):
    word = tensors["qweight"].view(torch.uint8)
    tensors["qweight"] = (word >> 4 | word << 4).view(torch.int32)


def scales_transposed(tensors):
    tensors["scales"] = tensors["scales"].reshape(-1, len(tensors["scales"])).T.contiguous()


@pytest.mark.parametrize(
    "bug", [outputs_in_plain_order, zero_point_minus_one, nibbles_the_other_way_round, scales_transposed]
)
def test_the_comparison_with_the_description_notices(bug):
    weight = sample(ASYMMETRIC, 32, 64)
    tensors = AWQ.write(weight)
    bug(tensors)
    assert not torch.equal(described(tensors), weight.decode())


def test_symmetric_weights_carry_zero_point_8_and_are_read_either_way():
    weight = sample(INT4, 64, 96)
    tensors = AWQ.write(weight)
    assert tensors["qzeros"].unique().tolist() == [0x88888888 - 2**32]
    assert same(AWQ.read(tensors, INT4), weight)
    assert torch.equal(AWQ.read(tensors, ASYMMETRIC).decode(), weight.decode())


def test_an_asymmetric_weight_is_not_read_as_a_symmetric_one():
    with pytest.raises(CheckpointError, match="other than 8"):
        AWQ.read(AWQ.write(sample(ASYMMETRIC, 64, 96)), INT4)


def test_the_configuration_is_read_by_transformers_and_by_us():
    formats = {"model.layers.0.up": INT4, "model.layers.1.up": ASYMMETRIC}
    ignored = ["model.layers.0.down", "lm_head"]
    config = AWQ.config(formats, ignored)
    parsed = AwqConfig(**{key: value for key, value in config.items() if key != "quant_method"})
    assert (parsed.bits, parsed.group_size, parsed.zero_point, parsed.format) == (4, 32, True, "gemm")
    assert parsed.modules_to_not_convert == ignored
    expected = WeightFormat(bits=4, convention=Convention.ASYMMETRIC, granularity=PerGroup(size=32), scale=FloatScale())
    assert AWQ.formats(config, [*formats, *ignored]) == dict.fromkeys(formats, expected)


def test_configurations_of_other_writers_are_read():
    autoawq = {
        "w_bit": 4,
        "q_group_size": 64,
        "zero_point": True,
        "version": "GEMM",
        "modules_to_not_convert": ["gate"],
    }
    expected = WeightFormat(bits=4, convention=Convention.ASYMMETRIC, granularity=PerGroup(size=64))
    assert AWQ.formats(autoawq, ["layers.0.w1", "layers.0.gate"]) == {"layers.0.w1": expected}


def test_two_group_sizes_cannot_be_told_apart():
    with pytest.raises(FormatError, match="one group size"):
        AWQ.config({"a.0.up": INT4, "a.1.up": INT4.model_copy(update={"granularity": PerChannel()})}, [])


def test_an_ignored_path_inside_a_quantized_one_is_refused():
    with pytest.raises(FormatError, match=r"a\.0\.gate would leave a\.0\.gate_proj unread"):
        AWQ.config({"a.0.gate_proj": INT4}, ["a.0.gate"])


@pytest.mark.parametrize("change", [{"version": "gemv"}, {"bits": 8}, {"group_size": 0}])
def test_what_we_cannot_read_is_told(change):
    with pytest.raises(CheckpointError, match="reads version gemm"):
        AWQ.formats(AWQ.config({"a.0.up": INT4}, []) | change, ["a.0.up"])
