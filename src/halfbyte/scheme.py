"""What the numbers look like: the formats of weights, activations and the cache, as frozen values.

A format says bits, grid convention, granularity and the kind of scale; it says nothing of how the codes are found.
It is written into the checkpoint as it stands here, so a reader never has to guess which "symmetric INT4" was meant.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Value(BaseModel):
    """A frozen value that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Convention(StrEnum):
    """How a group's range becomes a step and a set of codes; b is the number of bits, amax the largest magnitude.

    member      step                 codes                   used by
    GPTQ        amax / (2^(b-1)-½)   -2^(b-1) .. 2^(b-1)-1   GPTQ, Marlin, compressed-tensors; +amax clips by half a step
    AWQ         amax / (2^(b-1)-1)   -2^(b-1) .. 2^(b-1)-1   AutoAWQ, QuaRot, OmniQuant without zero points
    OMNIQUANT   amax / (2^(b-1)-1)   -(2^(b-1)-1) .. 2^(b-1) OmniQuant symmetric
    ODYSSEY     amax / (2^(b-1)-1)   ±(2^(b-1)-1)            Odyssey, QQQ per channel, SmoothQuant, LLM.int8()
    DEEPSPEED   amax / 2^(b-1)       -2^(b-1) .. 2^(b-1)-1   ZeroQuant; +amax clips by a whole step
    ASYMMETRIC  (max-min) / (2^b-1)  0 .. 2^b-1              a stored zero point; the range always contains zero
    """

    GPTQ = "gptq"
    AWQ = "awq"
    OMNIQUANT = "omniquant"
    ODYSSEY = "odyssey"
    DEEPSPEED = "deepspeed"
    ASYMMETRIC = "asymmetric"


class PerTensor(Value):
    """One scale for the whole matrix."""

    kind: Literal["tensor"] = "tensor"


class PerChannel(Value):
    """One scale per row (output channel)."""

    kind: Literal["channel"] = "channel"


class PerGroup(Value):
    """One scale per `size` neighbouring inputs of a row."""

    kind: Literal["group"] = "group"
    size: int = Field(default=128, ge=1)


class GroupCount(Value):
    """`count` groups over the matrix flattened row by row, ZeroQuant's reading of "group-wise"."""

    kind: Literal["count"] = "count"
    count: int = Field(ge=1)


Granularity = Annotated[PerTensor | PerChannel | PerGroup | GroupCount, Field(discriminator="kind")]


class FloatScale(Value):
    """Scales are floating-point numbers of the stored type; `model` means the checkpoint's own."""

    kind: Literal["float"] = "float"
    dtype: Literal["model", "float32", "float16", "bfloat16"] = "model"


class IntegerScale(Value):
    """Scales are S/amplifier with integer S >= 1 (Integer Scale, arXiv 2405.14597, section 4)."""

    kind: Literal["integer"] = "integer"
    amplifier: Annotated[int, Field(ge=1, le=2**24)] | Literal["heuristic", "layer", "row"] = 1024
    """A number, the paper's heuristic for each layer, or the largest power of two that the overflow certificate allows,
    for each layer or for each row."""
    plug_in: bool = False
    """Keep the codes that were found for float scales and round the scales afterwards, as the paper does; otherwise
    codes are found for the integer scales."""
    overflow: Literal["error", "shrink"] = "error"
    """What to do with rows that fail the certificate under a given amplifier: stop, or halve their amplifier."""
    dtype: Literal["auto", "uint8"] = "auto"
    """auto: uint8 where a weight's scales fit, else int16. uint8: they must fit, and bfloat16 then holds S/amplifier."""
    product: Literal["int32", "int8"] = "int32"
    """int8: S times a code (less its zero point) stays within ±127, so that a kernel may multiply while it unpacks, and
    groups vanish from its sums: the two levels of DGQ and QoQ. With `amplifier: row`, which is no power of two then."""

    @model_validator(mode="after")
    def _products_of_a_byte_go_by_rows(self) -> "IntegerScale":
        if self.product == "int8" and self.amplifier != "row":
            raise ValueError(f"product: int8 goes with amplifier: row, not {self.amplifier}")
        return self

    @property
    def largest(self) -> int:
        """The largest S that can be stored."""
        return 2**8 - 1 if self.dtype == "uint8" else 2**15 - 1

    def __str__(self) -> str:
        divided = f"S/{self.amplifier}" if isinstance(self.amplifier, int) else f"S/α by {self.amplifier}"
        return divided + (" in int8" if self.product == "int8" else "")


Scale = Annotated[FloatScale | IntegerScale, Field(discriminator="kind")]


class WeightFormat(Value):
    """How a weight matrix is stored."""

    bits: int = Field(default=4, ge=2, le=8)
    convention: Convention = Convention.GPTQ
    granularity: Granularity = PerGroup(size=128)
    scale: Scale = FloatScale()
    stored: Literal["words", "bytes"] = "words"
    """int32 words hold codes of any width; bytes hold one signed code each, as integer matrix products read them."""

    @model_validator(mode="after")
    def _bytes_hold_eight_bits(self) -> "WeightFormat":
        if self.stored == "bytes" and self.bits != 8:
            raise ValueError(f"stored: bytes is for 8 bits, not {self.bits}: leave it at words")
        return self

    @model_validator(mode="after")
    def _integer_scales_belong_to_rows(self) -> "WeightFormat":
        if isinstance(self.scale, IntegerScale) and not isinstance(self.granularity, PerChannel | PerGroup):
            raise ValueError(f"integer scales are per group or channel, not per {self.granularity.kind}")
        return self

    @property
    def symmetric(self) -> bool:
        return self.convention is not Convention.ASYMMETRIC

    @property
    def lowest(self) -> int:
        """The smallest code."""
        match self.convention:
            case Convention.ASYMMETRIC:
                return 0
            case Convention.ODYSSEY | Convention.OMNIQUANT:
                return 1 - 2 ** (self.bits - 1)
            case _:
                return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        match self.convention:
            case Convention.ASYMMETRIC:
                return 2**self.bits - 1
            case Convention.OMNIQUANT:
                return 2 ** (self.bits - 1)
            case _:
                return 2 ** (self.bits - 1) - 1

    @property
    def divisor(self) -> float:
        """What a group's largest magnitude (asymmetric: its whole range) is divided by to give the step."""
        match self.convention:
            case Convention.ASYMMETRIC:
                return 2**self.bits - 1
            case Convention.GPTQ:
                return 2 ** (self.bits - 1) - 0.5
            case Convention.DEEPSPEED:
                return 2 ** (self.bits - 1)
            case _:
                return 2 ** (self.bits - 1) - 1

    def __str__(self) -> str:
        match self.granularity:
            case PerGroup(size=size):
                where = f"g{size}"
            case GroupCount(count=count):
                where = f"{count} groups"
            case other:
                where = f"per {other.kind}"
        scale = f" {self.scale}" if isinstance(self.scale, IntegerScale) else ""
        return f"int{self.bits} {'sym' if self.symmetric else 'asym'} {where}{scale}"


class OutlierSplit(Value):
    """Input columns that reach `threshold` are multiplied in 16 bit (LLM.int8(), arXiv 2208.07339, section 3.2)."""

    threshold: float = Field(default=6.0, ge=0)
    """0: no column is split off."""
    columns: Literal["dynamic", "static"] = "dynamic"
    """Found anew in every call, as the paper does; or once, on the calibration text."""
    weights: Literal["dequantized", "kept"] = "dequantized"
    """The split columns' weights: decoded from their codes (bitsandbytes), or as the model had them (the paper)."""


class ActivationFormat(Value):
    """How a linear's input is quantized at run time."""

    bits: int = Field(default=8, ge=2, le=8)
    symmetric: bool = True
    granularity: Literal["token", "tensor", "group"] = "token"
    group_size: int | None = Field(default=None, ge=1)
    dynamic: bool = True
    clip: float = Field(default=1.0, gt=0, le=1)
    """The part of the range that the grid covers; what lies beyond takes its last code (QuaRot's clipping ratio)."""
    outliers: OutlierSplit | None = None

    @property
    def needs_data(self) -> bool:
        """Whether calibration must find something: a static scale, or the static set of outlier columns."""
        return not self.dynamic or (self.outliers is not None and self.outliers.columns == "static")

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return 1 - 2 ** (self.bits - 1) if self.symmetric else -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def __str__(self) -> str:
        where = {"token": "per token", "tensor": "per tensor", "group": f"g{self.group_size}"}[self.granularity]
        kind = "" if self.symmetric else " asym"
        split = f" split at {self.outliers.threshold:g}" if self.outliers else ""
        clip = f" clip {self.clip:g}" if self.clip < 1 else ""
        return f"a{self.bits}{kind} {where}{'' if self.dynamic else ' static'}{clip}{split}"

    @model_validator(mode="after")
    def _group_size_belongs_to_groups(self) -> "ActivationFormat":
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with granularity: group, and only with it")
        if self.granularity == "token" and not self.dynamic:
            raise ValueError("per-token scales are known only at run time: set dynamic: true, or granularity: tensor")
        if self.granularity == "group" and not (self.dynamic and self.symmetric):
            raise ValueError("activations in groups have dynamic symmetric scales: set dynamic and symmetric to true")
        if self.outliers is not None and (self.granularity != "token" or self.bits != 8):
            raise ValueError("outliers are split from 8-bit activations with granularity: token")
        if self.outliers is not None and self.clip < 1:
            raise ValueError("what outliers leave is not clipped: set clip: 1")
        return self


class OnlineHadamard(Value):
    """A rotation that a model needs at run time: what enters a linear, times a Hadamard matrix."""

    size: int = Field(ge=1)
    """Coordinates that are rotated together: all of a linear's inputs."""
    seed: int | None = None
    """Of random signs before it; None: no signs."""
    fallback: bool = False
    """Where no Hadamard matrix of this order is known, the odd factor's place is taken by a random orthogonal one."""

    def __str__(self) -> str:
        return f"h{self.size}{'' if self.seed is None else f' signs {self.seed}'}"


class CacheFormat(Value):
    """How past keys and values are stored (WKVQuant, arXiv 2402.12065: the current token stays exact)."""

    key_bits: int = Field(default=4, ge=2, le=8)
    value_bits: int = Field(default=4, ge=2, le=8)
    group_size: int = Field(default=128, ge=1)
    symmetric: bool = False
    past_only: bool = True
    sinks: int = Field(default=0, ge=0)  # first tokens kept exact
    window: int = Field(default=0, ge=0)  # most recent tokens kept exact
    keys: Literal["token", "channel"] = "token"
    """Keys share a grid over groups of a token's channels, or channel by channel over `block` tokens (KIVI)."""
    block: int = Field(default=32, ge=2)  # of keys per channel
    rope: Literal["after", "before"] = "after"
    """Keys are stored as rotated, or as they were before; then the whole past is rotated anew at every step."""
    rotate_keys: bool = False
    """Keys are stored times a Hadamard matrix for each head (R3 of QuaRot, arXiv 2404.00456): no channel is loud then."""
    edge_layers: int = Field(default=0, ge=0)  # so many of the first layers, and of the last, have `edge_bits`
    edge_bits: int = Field(default=8, ge=2, le=8)

    def __str__(self) -> str:
        keys = f"k{self.key_bits}{f' per channel of {self.block} tokens' if self.keys == 'channel' else ''}"
        parts = [f"{keys} v{self.value_bits} {'sym' if self.symmetric else 'asym'} g{self.group_size}"]
        parts += [f"{self.sinks} sinks"] if self.sinks else []
        parts += [f"window {self.window}"] if self.window else []
        parts += [f"k{self.edge_bits} v{self.edge_bits} in {self.edge_layers} edge layers"] if self.edge_layers else []
        parts += ["before RoPE"] if self.rope == "before" else []
        parts += ["keys rotated"] if self.rotate_keys else []
        return ", ".join(parts + ([] if self.past_only else ["current token too"]))

    @model_validator(mode="after")
    def _rotated_keys_have_no_channels(self) -> "CacheFormat":
        if self.rotate_keys and self.keys == "channel":
            raise ValueError("rotated keys have no loud channels to give grids of their own: set keys: token")
        return self


class Scheme(Value):
    """What a checkpoint's numbers look like. None: left as the model has it."""

    weights: WeightFormat | None = WeightFormat()
    activations: ActivationFormat | None = None
    cache: CacheFormat | None = None
    embeddings: WeightFormat | None = None
    """Of the tables outside the blocks: 8 bits in bytes, a symmetric scale for each row, or for groups of it."""
    head: WeightFormat | None = None
    """Of the linear that gives the logits: 8 bits rounded to nearest, a symmetric scale for each token of the vocabulary,
    or for groups of its row."""

    @property
    def head_input(self) -> ActivationFormat | None:
        """How a quantized head's input is: as the blocks' where they are 8 bits per token and whole, else as it comes."""
        inputs = self.activations
        fits = inputs is not None and (inputs.bits, inputs.granularity, inputs.outliers) == (8, "token", None)
        return inputs if fits and self.head is not None else None

    @model_validator(mode="after")
    def _tables_are_bytes(self) -> "Scheme":
        table = self.embeddings
        if table is not None and not (
            table.stored == "bytes"
            and table.symmetric
            and table.scale.kind == "float"
            and table.granularity.kind in ("channel", "group")
        ):
            raise ValueError(
                f"embeddings are {table}, and tables are int8 with symmetric scales per row or group: choose `bits: 8`, "
                "`stored: bytes`, a symmetric convention, and granularity channel or group"
            )
        return self

    @model_validator(mode="after")
    def _heads_have_eight_bits(self) -> "Scheme":
        head = self.head
        if head is not None and not (
            head.bits == 8
            and head.symmetric
            and head.scale.kind == "float"
            and head.granularity.kind in ("channel", "group")
        ):
            raise ValueError(
                f"the head is {head}, and heads are int8 with symmetric floating-point scales per channel or group: choose "
                "`bits: 8`, a symmetric convention, `scale: {kind: float}`, and granularity channel or group"
            )
        return self
