"""Checkpoints with integer scales: read back to the bit, certified when read, and exported exactly or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_samples import linears, save_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import CheckpointError, FormatError
from halfbyte.layouts import LAYOUTS, layout_of
from halfbyte.layouts.compressed_tensors import OWN
from halfbyte.layouts.convert import export
from halfbyte.layouts.inspect import inspect
from halfbyte.layouts.integer_scales import check_inputs
from halfbyte.layouts.shards import Shards
from halfbyte.methods import RTN
from halfbyte.numerics.certificate import largest_reach
from halfbyte.numerics.grid import Grid
from halfbyte.numerics.integer_scales import on_integer_grid, row_reach
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.scheme import ActivationFormat, Convention, IntegerScale, PerGroup, WeightFormat
from tiny_models import tiny

A8 = ActivationFormat(bits=8)
FORMAT = WeightFormat(granularity=PerGroup(size=32), scale=IntegerScale())
ASYMMETRIC = FORMAT.model_copy(update={"convention": Convention.ASYMMETRIC})
BYTES = FORMAT.model_copy(update={"bits": 8, "stored": "bytes"})
ROWS = FORMAT.model_copy(update={"scale": IntegerScale(amplifier="row")})
NARROW = FORMAT.model_copy(update={"scale": IntegerScale(amplifier="row", dtype="uint8")})


def of(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
    return on_integer_grid(lambda w, f: RTN().quantize(w, f, None), weight.float(), format, A8)


def sample(format: WeightFormat, out: int = 7, columns: int = 96, seed: int = 0) -> QuantizedWeight:
    return of(0.05 * torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)), format)


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    tensors = [(one.codes, other.codes), (one.grid.scales, other.grid.scales)]
    tensors += [(one.grid.zero_points, other.grid.zero_points), (one.grid.amplifiers, other.grid.amplifiers)]
    return one.format == other.format and all(
        mine is theirs if mine is None or theirs is None else mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        for mine, theirs in tensors
    )


@settings(max_examples=40, deadline=None)
@given(
    format=st.sampled_from([FORMAT, ASYMMETRIC, BYTES, ROWS, NARROW]),
    out=st.sampled_from([1, 7, 33]),
    groups=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_reading_returns_what_was_written(format, out, groups, seed):
    weight = sample(format, out, 32 * groups, seed)
    tensors = OWN.write(weight)
    assert set(tensors) == set(OWN.names(format))
    assert set(tensors) <= {*OWN.suffixes, "weight"}
    assert OWN.shape(tensors, format) == (out, 32 * groups)
    assert same(OWN.read(tensors, format), weight)
    assert torch.equal(tensors["weight_reach"].long(), row_reach(weight))


def test_scales_take_a_byte_where_they_fit():
    narrow, wide = OWN.write(sample(FORMAT)), OWN.write(of(torch.randn(7, 96), FORMAT))
    assert narrow["weight_scale"].dtype == torch.uint8
    assert wide["weight_scale"].dtype == torch.int16
    assert OWN.write(of(torch.randn(7, 96), NARROW))["weight_scale"].dtype == torch.uint8


def another_scale(tensors: dict[str, Tensor]) -> None:
    tensors["weight_scale"][3, 1] += 1


def another_code(tensors: dict[str, Tensor]) -> None:
    tensors["weight_packed"][2, 5] ^= 0b1000


def a_larger_certificate(tensors: dict[str, Tensor]) -> None:
    tensors["weight_reach"][4] += 1


def a_zero_scale(tensors: dict[str, Tensor]) -> None:
    tensors["weight_scale"][3, 1] = 0


def negative_scales(tensors: dict[str, Tensor]) -> None:
    tensors["weight_scale"] = -tensors["weight_scale"].to(torch.int16)


def no_amplifier(tensors: dict[str, Tensor]) -> None:
    tensors["weight_amplifier"][0] = 0


def no_certificate(tensors: dict[str, Tensor]) -> None:
    del tensors["weight_reach"]


def float_scales(tensors: dict[str, Tensor]) -> None:
    tensors["weight_scale"] = tensors["weight_scale"].float()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (another_scale, "row 3 has a reach of"),
        (another_code, "row 2 has a reach of"),
        (a_larger_certificate, "row 4 has a reach of"),
        (a_zero_scale, "weight_scale holds 0"),
        (negative_scales, "weight_scale holds -"),
        (no_amplifier, "weight_amplifier holds 0"),
        (no_certificate, "weight_reach is missing"),
        (float_scales, "instead of uint8 or int16"),
    ],
)
def test_damage_is_told(damage: Callable[[dict[str, Tensor]], None], why: str):
    tensors = OWN.write(sample(FORMAT))
    damage(tensors)
    with pytest.raises(CheckpointError, match=why):
        OWN.read(tensors, FORMAT)


def test_a_certificate_that_does_not_cover_the_inputs_is_refused_with_the_remedy():
    reach = torch.tensor([5, largest_reach(A8)], dtype=torch.int32)
    check_inputs(reach, A8)
    with pytest.raises(CheckpointError, match=r"row 1 has a reach of 16909320 \(limit 8388607.*`overflow: shrink`"):
        check_inputs(reach, ActivationFormat(bits=8, symmetric=False))


@pytest.mark.parametrize(("scale", "amplifier"), [(0.3, 1024), (40.0, 1024), (0.5 / 1024, 1024)])
def test_scales_that_are_no_multiples_are_never_rounded(scale, amplifier):
    codes = torch.ones(1, 32, dtype=torch.int8)
    grid = Grid(torch.tensor([[scale]]), None, torch.tensor([[float(amplifier)]]))
    with pytest.raises(FormatError, match=r"row 0 is not S/1024 with S in 1\.\.32767"):
        OWN.write(QuantizedWeight(codes, grid, FORMAT))
    with pytest.raises(FormatError, match="no amplifiers"):
        OWN.write(QuantizedWeight(codes, Grid(torch.ones(1, 1)), FORMAT))


def test_a_row_that_no_input_could_meet_safely_is_not_written():
    codes = torch.full((1, 2**20), -8, dtype=torch.int8)
    grid = Grid(torch.full((1, 2**15), 31.0), None, torch.full((1, 1), 1024.0))
    with pytest.raises(FormatError, match="smaller `amplifier`"):
        OWN.write(QuantizedWeight(codes, grid, FORMAT))


def test_the_configuration_says_the_kind_of_scale():
    formats = {"model.layers.0.up": FORMAT, "model.layers.0.down": NARROW, "model.layers.1.up": BYTES}
    config = json.loads(json.dumps(OWN.config(formats, ["lm_head"], dict.fromkeys(formats, A8))))
    assert config["quant_method"] == "halfbyte"
    assert layout_of(config) is OWN
    assert OWN.formats(config, [*formats, "lm_head"]) == formats
    config["config_groups"]["group_0"]["scale"]["amplifier"] = "golden"
    with pytest.raises(CheckpointError, match="scales that halfbyte does not know"):
        OWN.formats(config, list(formats))


def folder_of(folder: Path, format: WeightFormat, dtype: str = "float32", factor: float = 1.0) -> dict[str, Tensor]:
    """A tiny Llama with integer scales. Returns the weights that it stands for."""
    model = tiny("llama", hidden_size=64, intermediate_size=128)
    layers = linears(model)
    decoded, tensors = {}, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path, linear in layers.items():
        weight = of(factor * linear.weight.data, format)
        decoded[path] = weight.decode()
        del tensors[f"{path}.weight"]
        tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in OWN.write(weight).items()}
    folder.mkdir()
    save_shards(folder, tensors, 1)
    config: dict[str, Any] = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": dtype}
    config["quantization_config"] = OWN.config(dict.fromkeys(layers, format), ["lm_head"], dict.fromkeys(layers, A8))
    (folder / "config.json").write_text(json.dumps(config))
    return decoded


@pytest.mark.parametrize(("format", "dtype"), [(FORMAT, "float32"), (FORMAT, "float16"), (NARROW, "bfloat16")])
def test_other_engines_get_the_same_scales_as_floats(format, dtype, tmp_path):
    decoded = folder_of(tmp_path / "own", format, dtype)
    output = export(tmp_path / "own", "compressed-tensors", tmp_path / "plain")
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert all("scale" not in group for group in config["config_groups"].values())
    found = inspect(output)
    assert found.problems == ()
    layout = LAYOUTS["compressed-tensors"]
    shards, formats = Shards(output), layout.formats(config, list(decoded))
    for path, expected in decoded.items():
        tensors = shards.module(path, layout.names(formats[path]))
        assert tensors["weight_scale"].dtype == getattr(torch, dtype)
        assert torch.equal(layout.read(tensors, formats[path]).decode(), expected)


def test_scales_that_the_models_type_would_round_are_not_exported(tmp_path):
    folder_of(tmp_path / "own", FORMAT, "bfloat16", factor=20.0)
    with pytest.raises(FormatError, match=r"are not bfloat16 numbers.*`dtype: uint8`"):
        export(tmp_path / "own", "compressed-tensors", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_inspect_shows_the_kind_of_scale_and_how_full_the_accumulators_are(tmp_path):
    folder_of(tmp_path / "own", FORMAT)
    found = inspect(tmp_path / "own")
    assert found.problems == ()
    assert found.formats == {"int4 sym g32 S/1024, a8 per token": 14}
    assert found.accumulator is not None
    assert 0 < found.accumulator < 0.05
