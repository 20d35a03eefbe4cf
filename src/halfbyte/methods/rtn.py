"""RTN: round each weight to the nearest point of its grid. The baseline of every table.

No data are needed, unless the ranges are searched for the least output error (`ranges: output`).
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from halfbyte.calibration.statistics import InputStatistics
from halfbyte.numerics.quantized import QuantizedWeight, round_to_grid
from halfbyte.numerics.ranges import Ranges, find_grid
from halfbyte.scheme import Value, WeightFormat


class RTN(Value):
    """Round to nearest."""

    method: Literal["rtn"] = "rtn"
    ranges: Ranges = "minmax"

    @property
    def needs_data(self) -> bool:
        return self.ranges == "output"

    @property
    def needs_drift(self) -> bool:
        return False

    def quantize(
        self, weight: Float[Tensor, "out in"], format: WeightFormat, seen: InputStatistics | None
    ) -> QuantizedWeight:
        """The nearest codes. `weight` is left as it was."""
        gram = None if seen is None else seen.gram
        return round_to_grid(weight, find_grid(weight, format, self.ranges, gram), format)
