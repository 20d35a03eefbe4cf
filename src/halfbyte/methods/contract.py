"""What a method promises. A recipe's steps run in order within each block: transforms first, then one rounding.

Two more verbs belong to the family and will join when their first method does: `tune(block, inputs, targets)`, which
learns parameters by gradients through the block (the walk gives it the stream and the float block), and
`rescale(quantized)`, which keeps the codes and changes the scales.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from halfbyte.calibration.statistics import InputStatistics
from halfbyte.models.fold import ResolvedLink
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.scheme import WeightFormat


@runtime_checkable
class Transform(Protocol):
    """Changes the weights of a block and not its function."""

    @property
    def method(self) -> str: ...

    def transform(
        self,
        links: Sequence[ResolvedLink],
        seen: Mapping[str, InputStatistics],
        formats: Mapping[str, WeightFormat],
    ) -> None:
        """Edit the links' modules, and the statistics of what the readers see, in place. Names are the block's."""
        ...


@runtime_checkable
class Rounding(Protocol):
    """Puts a weight on its grid."""

    @property
    def method(self) -> str: ...

    @property
    def needs_data(self) -> bool:
        """Whether it must know the layer's inputs."""
        ...

    @property
    def needs_drift(self) -> bool:
        """Whether it must know how these inputs differ from the float model's."""
        ...

    def quantize(
        self, weight: Float[Tensor, "out in"], format: WeightFormat, seen: InputStatistics | None
    ) -> QuantizedWeight:
        """Codes on a grid of this format. `weight` is left as it was; rows do not influence each other."""
        ...
