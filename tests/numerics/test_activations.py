"""Activations on their grids: what every format promises, and the laws of the outlier split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.numerics.activations import InputQuantizer, calibrated, outlier_columns, simulate
from halfbyte.scheme import ActivationFormat, OutlierSplit

TOKEN = ActivationFormat()
ASYMMETRIC = ActivationFormat(symmetric=False)
GROUPS = ActivationFormat(granularity="group", group_size=4)


def sample(tokens: int = 7, columns: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) * 2


def split(threshold: float, columns: str = "dynamic") -> ActivationFormat:
    return ActivationFormat(outliers=OutlierSplit.model_validate({"threshold": threshold, "columns": columns}))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    kind=st.sampled_from(["token", "asymmetric", "group"]),
    tokens=st.integers(1, 5),
    groups=st.integers(1, 6),
    magnitude=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_every_entry_moves_by_half_a_step_at_most(bits, kind, tokens, groups, magnitude, seed):
    x = sample(tokens, 4 * groups, seed) * magnitude
    format = {"token": TOKEN, "asymmetric": ASYMMETRIC, "group": GROUPS}[kind].model_copy(update={"bits": bits})
    parts = x.unflatten(-1, (-1, 4)) if kind == "group" else x
    if kind == "asymmetric":
        step = (parts.amax(-1).clamp(min=0) - parts.amin(-1).clamp(max=0)) / (2**bits - 1)
        slack = 1.0  # the zero point is rounded too, so that the ends of the range may clip by half a step
    else:
        step, slack = parts.abs().amax(-1) / (2 ** (bits - 1) - 1), 0.5
    moved = (simulate(x, InputQuantizer(format)).view_as(parts) - parts).abs()
    assert (moved <= slack * step[..., None] * (1 + 1e-5)).all()


@pytest.mark.parametrize("format", [TOKEN, ASYMMETRIC, GROUPS, split(6.0)])
def test_zeros_stay_zero_and_other_tokens_do_not_matter(format):
    x = sample()
    x[2] = 0
    x[3, ::2] = 0
    result = simulate(x, InputQuantizer(format))
    assert (result[x == 0] == 0).all()
    if format.outliers is None:
        assert torch.equal(simulate(x[3:4], InputQuantizer(format)), result[3:4])


def test_codes_at_the_ends_of_the_range_stand_for_the_extremes():
    x = torch.tensor([[-127.0, 64.0, 127.0], [-1.0, 0.0, 254.0]])
    assert torch.equal(simulate(x[:1], InputQuantizer(TOKEN)), x[:1])
    assert torch.equal(simulate(x[1:], InputQuantizer(ASYMMETRIC)), x[1:])


def test_a_static_scale_clips_what_calibration_did_not_see():
    static = calibrated(
        ActivationFormat(granularity="tensor", dynamic=False), torch.tensor([-127.0, 0.0]), torch.tensor([5.0, 100.0])
    )
    assert static.scale is not None
    assert static.scale.tolist() == [1.0]
    assert simulate(torch.tensor([[300.0, -300.0, 3.4]]), static).tolist() == [[127.0, -127.0, 3.0]]


@pytest.mark.parametrize("threshold", [0.0, float("inf")])
def test_no_split_at_threshold_zero_and_at_infinity(threshold):
    x = sample()
    assert torch.equal(simulate(x, InputQuantizer(split(threshold))), simulate(x, InputQuantizer(TOKEN)))
    assert not len(outlier_columns(x, OutlierSplit(threshold=threshold)))


def test_split_columns_are_exact_and_entries_below_the_threshold_count_for_the_range():
    x = torch.tensor([[5.9, 1.0, 0.3], [6.0, 1.0, 0.3]])
    result = simulate(x, InputQuantizer(split(6.0)))
    assert torch.equal(result[:, 0], x[:, 0])
    # token 0 has 5.9 in its range, token 1 does not have 6.0
    assert result[0, 2] == pytest.approx(round(0.3 / (5.9 / 127)) * 5.9 / 127)
    assert result[1, 2] == pytest.approx(round(0.3 * 127) / 127)


def test_a_static_set_is_what_calibration_found_and_leaves_the_range_alone():
    format = split(6.0, "static")
    quantizer = calibrated(format, torch.tensor([-7.0, -1.0, 0.0]), torch.tensor([0.0, 5.9, 6.0]))
    assert quantizer.outlier_columns is not None
    assert quantizer.outlier_columns.tolist() == [0, 2]
    assert quantizer.outlier_columns.dtype == torch.int32
    x = torch.tensor([[50.0, 1.27, 0.001], [0.1, 8.0, 9.0]])
    result = simulate(x, quantizer)
    assert torch.equal(result[:, [0, 2]], x[:, [0, 2]])
    assert result[:, 1].tolist() == pytest.approx([1.27, 8.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays(dtype):
    assert simulate(sample().to(dtype), InputQuantizer(split(6.0))).dtype == dtype


@pytest.mark.parametrize(
    "fields",
    [
        {"granularity": "group"},
        {"group_size": 8},
        {"dynamic": False},
        {"granularity": "group", "group_size": 8, "symmetric": False},
        {"outliers": {}, "granularity": "tensor"},
        {"outliers": {}, "bits": 4},
    ],
)
def test_formats_that_nobody_could_run_are_refused(fields):
    with pytest.raises(ValueError, match=r"granularity|group_size|symmetric"):
        ActivationFormat.model_validate(fields)
