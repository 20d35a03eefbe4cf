"""What a method promises. A recipe's steps run in order: a rotation of the whole model before all else, and within each
block transforms, one rounding, refinements.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from halfbyte.calibration.cache import CacheStatistics
from halfbyte.calibration.past_only import BlockCache
from halfbyte.calibration.statistics import InputStatistics
from halfbyte.calibration.walk import Stream
from halfbyte.models.fold import ResolvedLink
from halfbyte.models.load import Skeleton
from halfbyte.numerics.activations import InputQuantizer
from halfbyte.numerics.cache import Smoothing
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.scheme import ActivationFormat, CacheFormat, OnlineHadamard, WeightFormat


@runtime_checkable
class Rotation(Protocol):
    """Changes the coordinates in which a whole model computes, and not its function.

    What it does depends on its options and the model's sizes alone, so that a run can go on at any block; all that comes
    after it takes the rotated model for the model.
    """

    @property
    def method(self) -> str: ...

    @property
    def unties(self) -> bool:
        """Whether the head gets a weight of its own."""
        ...

    def check(self, skeleton: Skeleton) -> None:
        """ModelError, WeightError where this model cannot be rotated so; nothing is read or edited."""
        ...

    def rotate_outside(self, skeleton: Skeleton, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Parameters outside the blocks that change: path -> new value, in the dtype of what `read` gives for a path."""
        ...

    def rotate_block(self, skeleton: Skeleton, block: nn.Module) -> None:
        """Edit a block, whose parameters are float64, in place."""
        ...

    def online_inputs(self, skeleton: Skeleton) -> dict[str, OnlineHadamard]:
        """Path of a linear -> what is done to its input at run time, and was undone in its weight."""
        ...


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


@runtime_checkable
class CacheSmoothing(Protocol):
    """Finds what a quantized cache does to keys and values before it rounds them."""

    @property
    def method(self) -> str: ...

    def smooth(self, seen: CacheStatistics, format: CacheFormat, layer: int, layers: int) -> Smoothing:
        """Shifts and scales for layer `layer` of `layers`, from what the quantized block writes."""
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
    seen: dict[str, InputStatistics] = field(
        default_factory=dict
    )  # of the quantized model's inputs, for each of `weights`
    links: Callable[[], Sequence[ResolvedLink]] = tuple  # of `block`; ModelError where none are known
    following: Callable[[int], Sequence[nn.Module]] = (
        lambda _count: ()
    )  # so many float blocks after it, or what is left
    cache: BlockCache | None = None  # through which the quantized model's block attends


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
        """Better weights of the same formats. Norms and biases of `rounded.block` may be edited in place.

        A refinement that moves scales or shifts between modules also edits `rounded.weights`, tensor by tensor, and
        puts new statistics into `rounded.seen`.
        """
        ...
