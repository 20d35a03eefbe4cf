"""What a method promises. A recipe's steps run in order within each block: transforms, one rounding, refinements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from halfbyte.calibration.statistics import InputStatistics
from halfbyte.calibration.walk import Stream
from halfbyte.models.fold import ResolvedLink
from halfbyte.numerics.activations import InputQuantizer
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.scheme import ActivationFormat, WeightFormat


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
        activations: Mapping[str, ActivationFormat],
    ) -> None:
        """Edit the links' modules, and the statistics of what the readers see, in place. Names are the block's."""
        ...


@runtime_checkable
class InputChoice(Protocol):
    """A transform that also decides, layer by layer, how inputs are quantized."""

    def choose(
        self, seen: Mapping[str, InputStatistics], activations: Mapping[str, ActivationFormat]
    ) -> Mapping[str, ActivationFormat]:
        """The formats of the inputs, after `transform`, in place of the recipe's."""
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


@dataclass(frozen=True, slots=True)
class RoundedBlock:
    """A block after rounding, for a refinement."""

    index: int
    block: nn.Module  # its linears hold the decoded weights
    original: nn.Module  # the float block that it came from
    weights: Mapping[str, Float[Tensor, "out in"]]  # what was rounded: after the transforms, before the rounding
    inputs: Mapping[str, InputQuantizer]
    stream: Stream  # the quantized model's hidden states at the door of the block
    float_stream: Stream  # the float model's


@runtime_checkable
class Refinement(Protocol):
    """Improves a rounded block by looking at what the whole block computes."""

    @property
    def method(self) -> str: ...

    @property
    def tokens_per_step(self) -> int:
        """How much of the calibration text it wants to see at a time: the streams come in batches of at most so many."""
        ...

    def refine(self, rounded: RoundedBlock, quantized: Mapping[str, QuantizedWeight]) -> Mapping[str, QuantizedWeight]:
        """Better weights of the same formats. Norms and biases of `rounded.block` may be edited in place."""
        ...
