"""A number of groups over the flattened matrix, said per channel or per group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.numerics.activations import InputQuantizer
from halfbyte.numerics.grid import fit, scales_shape
from halfbyte.numerics.quantized import QuantizedModule, QuantizedWeight, along_rows, round_to_grid, stored_format
from halfbyte.scheme import (
    ActivationFormat,
    Convention,
    FloatScale,
    GroupCount,
    OutlierSplit,
    PerChannel,
    PerGroup,
    WeightFormat,
)


def counted(out: int, columns: int, count: int, convention: Convention = Convention.DEEPSPEED) -> QuantizedWeight:
    format = WeightFormat(
        bits=8, convention=convention, granularity=GroupCount(count=count), scale=FloatScale(dtype="float32")
    )
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(out))
    return round_to_grid(weight, fit(weight, format), format)


@given(
    out=st.integers(1, 12), columns=st.integers(1, 12), data=st.data(), asymmetric=st.booleans()
)  # fmt: skip
def test_the_weight_stays_what_it_is(out, columns, data, asymmetric):
    count = data.draw(st.sampled_from([n for n in range(1, out * columns + 1) if out * columns % n == 0]))
    weight = counted(out, columns, count, Convention.ASYMMETRIC if asymmetric else Convention.DEEPSPEED)
    rows = along_rows(weight)
    assert torch.equal(rows.decode(), weight.decode())
    assert rows.grid.scales.shape == scales_shape(out, columns, rows.format.granularity)
    assert rows.format == stored_format(weight.format, out, columns)


@pytest.mark.parametrize(
    ("count", "granularity"),
    [(4, PerChannel()), (8, PerChannel()), (16, PerGroup(size=6)), (32, PerGroup(size=3)), (6, PerGroup(size=4))],
)
def test_groups_that_end_within_a_row_become_the_longest_equal_runs(count, granularity):
    assert stored_format(counted(8, 12, count).format, 8, 12).granularity == granularity


def test_other_granularities_pass_as_they_are():
    weight = QuantizedWeight(*[getattr(counted(4, 4, 2), key) for key in ("codes", "grid")], WeightFormat(bits=8))
    assert along_rows(weight) is weight


def test_a_module_computes_with_the_kept_columns_of_a_static_set():
    weight = along_rows(counted(4, 6, 4))
    split = ActivationFormat(outliers=OutlierSplit(columns="static", weights="kept"))
    kept = torch.full((4, 2), 9.0)
    module = QuantizedModule(
        weight, InputQuantizer(split, outlier_columns=torch.tensor([1, 4], dtype=torch.int32)), kept
    )
    assert torch.equal(module.decode()[:, [1, 4]], kept)
    assert torch.equal(module.decode()[:, [0, 2, 3, 5]], weight.decode()[:, [0, 2, 3, 5]])
