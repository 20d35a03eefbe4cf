import torch

from halfbyte.methods.rtn import RTN
from halfbyte.numerics.grid import decode, encode, fit
from halfbyte.scheme import Convention, FloatScale, PerGroup, WeightFormat


def test_it_takes_the_nearest_point_of_the_min_max_grid():
    weight = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    format = WeightFormat(
        convention=Convention.ASYMMETRIC, granularity=PerGroup(size=8), scale=FloatScale(dtype="float32")
    )
    found, grid = RTN().quantize(weight, format, None), fit(weight, format)
    assert torch.equal(found.codes, encode(weight, grid, format))
    assert torch.equal(found.decode(), decode(found.codes, grid))


def test_it_needs_data_only_to_search_ranges_by_output_error():
    assert not RTN().needs_data
    assert not RTN(ranges="mse").needs_data
    assert RTN(ranges="output").needs_data
