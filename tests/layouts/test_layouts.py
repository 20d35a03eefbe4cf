"""What every layout owes: reading undoes writing, and what cannot be exact is refused with a remedy."""

import pytest
import torch
from export_samples import ASYMMETRIC, INT4, same, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError, FormatError
from halfbyte.layouts import LAYOUTS, layout_of
from halfbyte.layouts.layout import Layout
from halfbyte.numerics.grid import Grid
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.scheme import (
    Convention,
    FloatScale,
    GroupCount,
    IntegerScale,
    PerChannel,
    PerGroup,
    PerTensor,
    WeightFormat,
)

EVERY = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
FORMATS = st.builds(
    WeightFormat,
    bits=st.integers(2, 8),
    convention=st.sampled_from(Convention),
    granularity=st.sampled_from([PerTensor(), PerChannel(), PerGroup(size=1), PerGroup(size=3), PerGroup(size=16)]),
    scale=st.sampled_from([FloatScale(dtype="float32"), FloatScale(dtype="float16"), FloatScale(dtype="bfloat16")]),
)


@EVERY
@settings(max_examples=60, deadline=None)
@given(
    format=FORMATS,
    out=st.one_of(st.integers(1, 40), st.sampled_from([32, 64])),
    columns=st.one_of(st.integers(1, 70), st.sampled_from([32, 96])),
    seed=st.integers(0, 2**16),
)
def test_reading_returns_what_was_written(layout, format, out, columns, seed):
    if layout.refusal(format, out, columns) is not None:
        return
    weight = sample(format, out, columns, seed)
    tensors = layout.write(weight)
    assert set(tensors) <= set(layout.suffixes)
    assert layout.suffixes[0] in tensors
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert layout.shape(tensors, format) == (out, columns)
    assert same(layout.read(tensors, format), weight)
    grid, _ = layout.read_grid(tensors, format)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in layout.write_grid(grid, format).items())


@EVERY
@pytest.mark.parametrize("convention", [c for c in Convention if c is not Convention.OMNIQUANT])
def test_every_layout_says_int4_of_every_convention_that_fits_it(layout, convention):
    format = INT4.model_copy(update={"convention": convention})
    assert layout.refusal(format, 64, 96) is None
    assert same(layout.read(layout.write(sample(format, 64, 96)), format), sample(format, 64, 96))


@EVERY
def test_the_scale_dtype_model_becomes_the_stored_one(layout):
    format = INT4.model_copy(update={"scale": FloatScale(dtype="float16")})
    tensors = layout.write(sample(format, 64, 96))
    assert layout.read(tensors, format.model_copy(update={"scale": FloatScale()})).format == format


@EVERY
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"scale": IntegerScale(amplifier=512)}, "S/512"),
        ({"granularity": GroupCount(count=4)}, "flattened"),
        ({"granularity": PerGroup(size=40)}, "40 does not divide"),
        ({"convention": Convention.OMNIQUANT}, "beyond 4 bits"),
    ],
    ids=["integer-scales", "group-count", "ragged-groups", "omniquant"],
)
def test_what_cannot_be_said_is_refused_with_a_remedy(layout, change, word):
    format = INT4.model_copy(update=change)
    refusal = layout.refusal(format, 64, 96)
    assert refusal is not None
    assert word in refusal
    assert "write" in refusal or "choose" in refusal
    codes = torch.zeros(64, 96, dtype=torch.int8)
    with pytest.raises(FormatError, match=layout.name):
        layout.write(QuantizedWeight(codes, Grid(torch.ones(64, 3)), format))


@pytest.mark.parametrize(
    ("layout", "format", "shape", "word"),
    [
        ("gptq", {"bits": 5}, (64, 96), "no 5 bits"),
        ("gptq", {}, (40, 96), "32 must divide"),
        ("gptq", {"granularity": PerTensor()}, (64, 96), "kind: channel"),
        ("awq", {"bits": 8}, (64, 96), "not 8"),
        ("awq", {}, (36, 96), "does not divide 36"),
        (
            "compressed-tensors",
            {"granularity": PerTensor(), "convention": Convention.ASYMMETRIC},
            (64, 96),
            "kind: channel",
        ),
    ],
)
def test_each_layout_refuses_what_its_readers_lack(layout, format, shape, word):
    refusal = LAYOUTS[layout].refusal(INT4.model_copy(update=format), *shape)
    assert refusal is not None
    assert word in refusal


@EVERY
@pytest.mark.parametrize("scale", [2.0**-30, 1e6, 1 + 2.0**-20, float("inf"), float("nan")])
def test_a_scale_that_would_be_rounded_is_refused(layout, scale):
    format = INT4.model_copy(update={"scale": FloatScale(dtype="float16")})
    weight = sample(format, 64, 96)
    scales = weight.grid.scales.clone()
    scales[5, 1] = scale
    with pytest.raises(FormatError, match="1 of 192 scales"):
        layout.write(QuantizedWeight(weight.codes, Grid(scales), format))


@EVERY
@pytest.mark.parametrize("point", [-1.0, 16.0, 7.5])
def test_a_zero_point_that_is_no_code_is_refused(layout, point):
    weight = sample(ASYMMETRIC, 64, 96)
    assert weight.grid.zero_points is not None
    points = weight.grid.zero_points.clone()
    points[5, 1] = point
    with pytest.raises(FormatError, match="not one of the codes"):
        layout.write(QuantizedWeight(weight.codes, Grid(weight.grid.scales, points), ASYMMETRIC))


@EVERY
def test_codes_of_another_format_are_refused(layout):
    weight = sample(INT4, 64, 96)
    with pytest.raises(FormatError, match=r"-8\.\.7 are outside -7\.\.7"):
        layout.write(
            QuantizedWeight(weight.codes, weight.grid, INT4.model_copy(update={"convention": Convention.ODYSSEY}))
        )


def cut(tensors, layout):
    tensors[layout.suffixes[0]] = tensors[layout.suffixes[0]][:-1].contiguous()


def dropped_scales(tensors, layout):
    tensors.pop(layout.suffixes[1] if layout.name == "compressed-tensors" else "scales")


def scales_of_another_group_size(tensors, layout):
    name = layout.suffixes[1] if layout.name == "compressed-tensors" else "scales"
    tensors[name] = tensors[name].repeat(2, 2)


def wide_codes(tensors, layout):
    tensors[layout.suffixes[0]] = tensors[layout.suffixes[0]].to(torch.int64)


@EVERY
@pytest.mark.parametrize("damage", [cut, dropped_scales, scales_of_another_group_size, wide_codes])
def test_tensors_that_do_not_fit_the_format_are_told(layout, damage):
    tensors = layout.write(sample(INT4, 64, 96))
    damage(tensors, layout)
    with pytest.raises(CheckpointError):
        layout.read(tensors, INT4)


PATHS = [
    f"model.layers.{block}.{name}"
    for block in range(11)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.experts.0.up",
        "mlp.experts.1.up",
    )
]


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "gptq_v2"])
@settings(max_examples=40, deadline=None)
@given(
    formats=st.dictionaries(
        st.sampled_from([*PATHS, "lm_head"]),
        st.sampled_from([INT4, ASYMMETRIC, INT4.model_copy(update={"bits": 8, "granularity": PerChannel()})]),
        min_size=1,
    )
)
def test_any_mixture_of_formats_is_read_back_from_its_configuration(name, formats):
    ignored = [path for path in [*PATHS, "lm_head", "score"] if path not in formats]
    config = LAYOUTS[name].config(formats, ignored)
    expected = {path: format.model_copy(update={"scale": FloatScale()}) for path, format in formats.items()}
    assert LAYOUTS[name].formats(config, [*ignored, *formats]) == expected


@EVERY
def test_a_configuration_of_nothing_is_refused(layout):
    with pytest.raises(FormatError, match="no module is quantized"):
        layout.config({}, ["lm_head"])


def test_a_configuration_names_its_layout():
    for name, layout in LAYOUTS.items():
        assert isinstance(layout, Layout)
        assert layout.name == name
        assert layout_of(layout.config({"model.layers.0.q": INT4}, ["lm_head"])) is layout
    with pytest.raises(CheckpointError, match="'bitsandbytes' is none of"):
        layout_of({"quant_method": "bitsandbytes"})
