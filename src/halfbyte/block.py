"""One block of the model: observe what its linears read, transform, round, and say what it cost."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfbyte.calibration.statistics import InputStatistics
from halfbyte.calibration.walk import SharedInput, Stream, linears, observe, shared_inputs
from halfbyte.errors import CalibrationError, HalfbyteError, ModelError
from halfbyte.methods.contract import Rounding
from halfbyte.methods.rtn import RTN
from halfbyte.models.fold import ResolvedLink, find_links
from halfbyte.models.load import Skeleton
from halfbyte.numerics.error import output_snr, weight_snr
from halfbyte.numerics.grid import Grid
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.recipe import Recipe
from halfbyte.scheme import PerChannel, PerGroup, WeightFormat


@dataclass(frozen=True, slots=True)
class ModuleRecord:
    """One line of the closing table."""

    path: str
    format: str
    method: str
    shape: tuple[int, int]
    weight_snr: float  # dB
    output_snr: float | None  # dB over the calibration tokens; None where nothing was observed
    tokens: int
    seconds: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModuleRecord":
        """The record that a journal holds."""
        return cls(**{**values, "shape": tuple(values["shape"])})


@dataclass(slots=True)
class BlockQuantizer:
    """Quantizes the blocks of one model in turn. The streams are at the door of the block that comes next."""

    skeleton: Skeleton
    recipe: Recipe
    dtype: torch.dtype  # of the tensors that stay unquantized, as they are stored
    stream: Stream | None
    float_stream: Stream | None
    structures: dict[tuple[type[nn.Module], tuple[str, ...]], list[SharedInput]] = field(default_factory=dict)

    def quantize(
        self, index: int, block: nn.Module, formats: Mapping[str, WeightFormat]
    ) -> tuple[dict[str, QuantizedWeight], list[ModuleRecord]]:
        """Quantize block `index` and step both streams over it. Edits the block: afterwards it computes what is stored.

        `formats`: name in the block -> the format its weight must come out in; every one of them does.
        """
        original = copy.deepcopy(block) if self.float_stream else None
        quantized: dict[str, QuantizedWeight] = {}
        records: list[ModuleRecord] = []
        if self.stream is None:
            for name in formats:
                self._round(index, block, (name,), formats, None, quantized, records)
        else:
            for shared, seen in self._observed(index, block, original, formats):
                names = tuple(name for name in shared if name in formats)
                for alike in _alike(names, formats):
                    self._round(index, block, alike, formats, seen[shared[0]], quantized, records)
        if missing := sorted(formats.keys() - quantized.keys()):
            raise ModelError(f"block {index}: {', '.join(missing)} were to be quantized and were not")
        self.step_over(index, block, original)
        return quantized, records

    def step_over(self, index: int, block: nn.Module, original: nn.Module | None) -> None:
        """Move the stream past a block that computes what is stored, and the float stream past the block it came from."""
        if self.stream is not None:
            self.stream.advance(block, index)
        if self.float_stream is not None and original is not None:
            self.float_stream.advance(original, index)

    def _observed(
        self, index: int, block: nn.Module, original: nn.Module | None, formats: Mapping[str, WeightFormat]
    ) -> Iterator[tuple[SharedInput, Mapping[str, InputStatistics]]]:
        """Each shared input with its statistics: all gathered at once, or (`sequential`) when its turn comes."""
        assert self.stream is not None
        reference = (original, self.float_stream) if original and self.float_stream else None
        inputs = self._shared_inputs(index, block)
        seen = observe(block, self.stream, index, inputs, reference, magnitudes=bool(self.recipe.transforms))
        check_finite(index, seen)
        for step in self.recipe.transforms:
            step.transform(self._links(block), seen, formats)
        if self.recipe.transforms:
            if reference and self.recipe.sequential:  # what is observed from now on is scaled in both models alike
                reference = (copy.deepcopy(block), reference[1])
            round_parameters(block, formats, self.dtype)
        for place, shared in enumerate(inputs):
            if self.recipe.sequential and place > 0:
                seen = observe(block, self.stream, index, [shared], reference, magnitudes=False)
            yield shared, seen
            for name in shared:
                seen.pop(name)

    def _shared_inputs(self, index: int, block: nn.Module) -> list[SharedInput]:
        """Found by running one batch, once for all blocks of the same class with the same linears."""
        assert self.stream is not None
        structure = type(block), tuple(linears(block))
        if structure not in self.structures:
            self.structures[structure] = shared_inputs(block, self.stream, index)
        return self.structures[structure]

    def _links(self, block: nn.Module) -> list[ResolvedLink]:
        if self.skeleton.architecture is None:
            raise ModelError(
                f"{self.skeleton.config.model_type} has no table of links, and {self.recipe.transforms[0].method} must "
                "know where scales can move: use a recipe without transforms (rtn, gptq), or add a table to "
                "models/tables.py"
            )
        return find_links(block, self.skeleton.architecture, *self.skeleton.heads)

    def _round(
        self,
        index: int,
        block: nn.Module,
        names: Sequence[str],
        formats: Mapping[str, WeightFormat],
        seen: InputStatistics | None,
        quantized: dict[str, QuantizedWeight],
        records: list[ModuleRecord],
    ) -> None:
        """Round linears that share input and format as one matrix, rows on rows. Adds to `quantized` and `records`."""
        if not names:
            return
        start = time.perf_counter()
        modules = linears(block)
        weights = {name: modules[name].weight.float() for name in names}
        whole = torch.cat(list(weights.values()))
        paths = [f"{self.skeleton.blocks_name}.{index}.{name}" for name in names]
        step = self._rounding(paths[0], seen)
        try:
            result = step.quantize(whole, formats[names[0]], seen)
        except HalfbyteError as cause:
            raise type(cause)(f"{', '.join(paths)}: {cause}") from cause
        for name, path, part in zip(names, paths, split_rows(result, [len(w) for w in weights.values()]), strict=True):
            rounded = part.decode()
            quantized[name] = part
            records.append(
                ModuleRecord(
                    path=path,
                    format=str(part.format),
                    method=" → ".join([step.method for step in self.recipe.transforms] + [step.method]),
                    shape=(rounded.shape[0], rounded.shape[1]),
                    weight_snr=weight_snr(weights[name], rounded),
                    output_snr=output_snr(weights[name], rounded, seen.gram)
                    if seen is not None and seen.tokens
                    else None,
                    tokens=seen.tokens if seen is not None else 0,
                    seconds=(time.perf_counter() - start) / len(names),
                )
            )
            modules[name].weight.data.copy_(rounded)

    def _rounding(self, path: str, seen: InputStatistics | None) -> Rounding:
        """The recipe's rounding, or what the recipe says about layers that saw too few tokens."""
        step = self.recipe.rounding
        if not step.needs_data or seen is None or seen.tokens >= self.recipe.minimum_tokens:
            return step
        if self.recipe.starved == "round":
            return RTN()
        raise CalibrationError(
            f"{path} saw {seen.tokens} calibration tokens, fewer than minimum_tokens={self.recipe.minimum_tokens}: "
            "calibrate on more or more varied text, or set `starved: round` in the recipe to round such experts to nearest"
        )


def split_rows(whole: QuantizedWeight, rows: Sequence[int]) -> list[QuantizedWeight]:
    """The parts of a matrix that was quantized rows on rows."""
    if len(rows) == 1:
        return [whole]
    codes, scales = whole.codes.split(list(rows)), whole.grid.scales.split(list(rows))
    zeros = [None] * len(rows) if whole.grid.zero_points is None else whole.grid.zero_points.split(list(rows))
    return [
        QuantizedWeight(c.contiguous(), Grid(s.contiguous(), None if z is None else z.contiguous()), whole.format)
        for c, s, z in zip(codes, scales, zeros, strict=True)
    ]


def _alike(names: Sequence[str], formats: Mapping[str, WeightFormat]) -> list[tuple[str, ...]]:
    """Names that can be rounded as one matrix: the same format, with grids that do not span rows."""
    together: dict[WeightFormat, list[str]] = {}
    alone = []
    for name in names:
        if isinstance(formats[name].granularity, PerChannel | PerGroup):
            together.setdefault(formats[name], []).append(name)
        else:
            alone.append((name,))
    return [tuple(group) for group in together.values()] + alone


def round_parameters(block: nn.Module, formats: Mapping[str, WeightFormat], dtype: torch.dtype) -> None:
    """What a transform left unquantized takes the values that will be stored. Edits in place."""
    for path, parameter in block.named_parameters():
        if path.removesuffix(".weight") not in formats:
            parameter.data.copy_(parameter.data.to(dtype))


def check_finite(index: int, seen: Mapping[str, InputStatistics]) -> None:
    for name, statistics in seen.items():
        if not bool(torch.isfinite(statistics.gram.diagonal()).all()):
            raise CalibrationError(
                f"the inputs of {name} in block {index} hold NaN or Inf: the model overflows in this dtype, or its "
                "weights are damaged; load it in bfloat16 or float32, or download it again"
            )
