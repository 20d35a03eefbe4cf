"""One block of the model: observe what its linears read, transform, round, and say what it cost."""

import copy
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from halfbyte.calibration.cache import observe_cache
from halfbyte.calibration.past_only import BlockCache
from halfbyte.calibration.statistics import InputStatistics
from halfbyte.calibration.walk import SharedInput, Stream, linears, observe, quantizing_inputs, shared_inputs
from halfbyte.errors import CalibrationError, HalfbyteError, ModelError
from halfbyte.methods.contract import InputChoice, Rotation, RoundedBlock, Rounding, Transform
from halfbyte.methods.rtn import RTN
from halfbyte.models.fold import ResolvedLink, find_links
from halfbyte.models.load import Skeleton
from halfbyte.numerics.activations import InputQuantizer, calibrated
from halfbyte.numerics.cache import Smoothing
from halfbyte.numerics.certificate import TOKEN_INPUTS, strictest
from halfbyte.numerics.error import output_snr, weight_snr
from halfbyte.numerics.integer_scales import on_integer_grid, require_safe
from halfbyte.numerics.quantized import QuantizedModule, QuantizedWeight, alike, along_rows, split_rows
from halfbyte.recipe import Recipe
from halfbyte.record import ModuleRecord
from halfbyte.scheme import ActivationFormat, WeightFormat


@dataclass(slots=True)
class Rounded:
    """A linear that was rounded, with what is still needed of what it was."""

    weight: QuantizedWeight
    method: str
    weight_snr: float
    output_snr: float | None
    tokens: int
    seconds: float
    original: Float[Tensor, "out in"] | None  # after the transforms; where a refinement or a split asks for it
    seen: InputStatistics | None  # likewise


@dataclass(slots=True)
class BlockQuantizer:
    """Quantizes the blocks of one model in turn. The streams are at the door of the block that comes next."""

    skeleton: Skeleton
    recipe: Recipe
    dtype: torch.dtype  # of the tensors that stay unquantized, as they are stored
    stream: Stream | None
    float_stream: Stream | None
    structures: dict[tuple[type[nn.Module], tuple[str, ...]], list[SharedInput]] = field(default_factory=dict)
    smoothing: dict[int, Smoothing] = field(default_factory=dict)  # what each block's cache does, if a step says
    read: Callable[[int], nn.Module] | None = None
    """A float block with its weights, for refinements that look at the blocks that follow."""
    rotated_inputs: set[str] = field(init=False)  # names in a block

    def __post_init__(self) -> None:
        rotation = self.recipe.rotation
        online = () if rotation is None else rotation.online_inputs(self.skeleton)
        prefix = self.skeleton.blocks_name + "."
        self.rotated_inputs = {path.removeprefix(prefix).partition(".")[2] for path in online}

    def quantize(
        self,
        index: int,
        block: nn.Module,
        formats: Mapping[str, WeightFormat],
        activations: Mapping[str, ActivationFormat],
    ) -> tuple[dict[str, QuantizedModule], list[ModuleRecord]]:
        """Quantize block `index` and step both streams over it. Edits the block: afterwards it computes what is stored.

        `formats`: name in the block -> the format its weight must come out in; every one of them does. `activations`:
        likewise for the inputs that are quantized; a method may choose others (`InputChoice`).
        """
        original = copy.deepcopy(block) if self.float_stream else None
        done: dict[str, Rounded] = {}
        cached = self.recipe.scheme.cache
        cache = None if cached is None else BlockCache(cached, index, len(self.skeleton.blocks))
        if self.stream is None or self.recipe.scheme.weights is None:
            inputs = {name: InputQuantizer(format) for name, format in activations.items()}
            for name in formats:
                done |= self._round(index, block, (name,), formats, activations, None)
        else:
            seen = self._observed(index, block, original, self._shared_inputs(index, block), first=True)
            activations = self._transform(block, seen, formats, activations)
            inputs = {name: calibrated(f, seen[name].minimum, seen[name].maximum) for name, f in activations.items()}
            for shared, statistics in self._in_turn(index, block, original, seen):
                for group in alike([name for name in shared if name in formats], formats):
                    done |= self._round(index, block, group, formats, activations, statistics)
        self._refine(index, block, original, inputs, done, cache)
        if missing := sorted(formats.keys() - done.keys()):
            raise ModelError(f"block {index}: {', '.join(missing)} were to be quantized and were not")
        modules = {name: self._module(rounded, inputs.get(name)) for name, rounded in done.items()}
        for name, module in modules.items():
            linears(block)[name].weight.data.copy_(module.decode())
        if cache is not None:
            self._smooth(cache, index, block, inputs)
        self.step_over(index, block, original, inputs)
        return modules, [self._record(index, name, done[name], inputs.get(name)) for name in modules]

    def _smooth(self, cache: BlockCache, index: int, block: nn.Module, inputs: Mapping[str, InputQuantizer]) -> None:
        """Let the recipe's step look at what the block, as it now is, writes into its cache; learned smoothing stays."""
        step = self.recipe.smoothing
        if step is None or self.stream is None:
            return
        if not cache.learned:
            with quantizing_inputs(block, inputs):
                seen = observe_cache(block, self.stream, index)
            cache.smoothing = step.smooth(seen, cache.format, cache.layer, cache.layers)
        self.smoothing[index] = cache.smoothing

    def step_over(
        self, index: int, block: nn.Module, original: nn.Module | None, inputs: Mapping[str, InputQuantizer]
    ) -> None:
        """Move the stream past a block that computes what is stored, and the float stream past the block it came from."""
        if self.stream is not None:
            with quantizing_inputs(block, inputs):
                self.stream.advance(block, index)
        if self.float_stream is not None and original is not None:
            self.float_stream.advance(original, index)

    def _observed(
        self,
        index: int,
        block: nn.Module,
        original: nn.Module | None,
        inputs: Sequence[SharedInput],
        *,
        first: bool,
    ) -> dict[str, InputStatistics]:
        """What these linears see; magnitudes only the first time, when transforms and formats may ask for them."""
        assert self.stream is not None
        reference = None
        if self.recipe.rounding.needs_drift and original is not None and self.float_stream is not None:
            reference = original, self.float_stream
        magnitudes = first and bool(self.recipe.transforms or self.recipe.needs_ranges)
        seen = observe(block, self.stream, index, inputs, reference, magnitudes=magnitudes)
        check_finite(index, seen)
        return seen

    def _transform(
        self,
        block: nn.Module,
        seen: Mapping[str, InputStatistics],
        formats: Mapping[str, WeightFormat],
        activations: Mapping[str, ActivationFormat],
    ) -> Mapping[str, ActivationFormat]:
        """Let the recipe's transforms edit block and statistics in place; the input formats after them."""
        for step in self.recipe.transforms:
            step.transform(self._links(block), seen, formats, activations)
            if isinstance(step, InputChoice):
                activations = step.choose(seen, activations)
        if self.recipe.transforms or self.recipe.rotation is not None:
            round_parameters(block, formats, self.dtype)
        return activations

    def _in_turn(
        self, index: int, block: nn.Module, original: nn.Module | None, seen: dict[str, InputStatistics]
    ) -> Iterator[tuple[SharedInput, InputStatistics]]:
        """Each shared input with its statistics; `sequential`: gathered anew after what came before was rounded."""
        transformed = original
        if original is not None and self.recipe.sequential and self.recipe.transforms:
            transformed = copy.deepcopy(block)
        for place, names in enumerate(self._shared_inputs(index, block)):
            if self.recipe.sequential and place > 0:
                # the scales that transforms moved are in both models, or the two inputs would differ by them
                seen = self._observed(index, block, transformed, [names], first=False)
            yield names, seen[names[0]]
            if not self.recipe.refinements:
                for name in names:
                    seen.pop(name)

    def _shared_inputs(self, index: int, block: nn.Module) -> list[SharedInput]:
        """Found by running one batch, once for all blocks of the same class with the same linears."""
        assert self.stream is not None
        structure = type(block), tuple(linears(block))
        if structure not in self.structures:
            self.structures[structure] = shared_inputs(block, self.stream, index)
        return self.structures[structure]

    @property
    def _before_rounding(self) -> tuple[Rotation | Transform, ...]:
        rotation = self.recipe.rotation
        return (*(() if rotation is None else (rotation,)), *self.recipe.transforms)

    def _links(self, block: nn.Module) -> list[ResolvedLink]:
        if self.skeleton.architecture is None:
            raise ModelError(
                f"{self.skeleton.config.model_type} has no table of links, and "
                f"{(*self.recipe.transforms, *self.recipe.refinements)[0].method} must "
                "know where scales can move: use a recipe without transforms (rtn, gptq), or add a table to "
                "models/tables.py"
            )
        links = find_links(block, self.skeleton.architecture, *self.skeleton.heads)
        # a scale does not pass the rotation that an input gets at run time
        return [link for link in links if not self.rotated_inputs & link.readers.keys()]

    def _round(
        self,
        index: int,
        block: nn.Module,
        names: Sequence[str],
        formats: Mapping[str, WeightFormat],
        activations: Mapping[str, ActivationFormat],
        seen: InputStatistics | None,
    ) -> dict[str, Rounded]:
        """Round linears that share input and format as one matrix, rows on rows. The block computes with the result."""
        start = time.perf_counter()
        modules = linears(block)
        weights = {name: modules[name].weight.to(torch.float32, copy=True) for name in names}
        whole = torch.cat(list(weights.values()))
        step = self._rounding(self._path(index, names[0]), seen)
        try:
            result = on_integer_grid(
                lambda weight, format: step.quantize(weight, format, seen),
                whole,
                formats[names[0]],
                strictest([activations.get(name, TOKEN_INPUTS) for name in names]),
            )
        except HalfbyteError as cause:
            raise type(cause)(f"{', '.join(self._path(index, name) for name in names)}: {cause}") from cause
        done = {}
        for name, part in zip(names, split_rows(result, [len(w) for w in weights.values()]), strict=True):
            modules[name].weight.data.copy_(part.decode())
            done[name] = Rounded(
                weight=along_rows(part),
                method=" → ".join(each.method for each in (*self._before_rounding, step)),
                weight_snr=weight_snr(weights[name], part.decode()),
                output_snr=_output_snr(weights[name], part, seen),
                tokens=seen.tokens if seen is not None else 0,
                seconds=(time.perf_counter() - start) / len(names),
                original=weights[name] if self.recipe.refinements or self.recipe.keeps_columns else None,
                seen=seen if self.recipe.refinements else None,
            )
        return done

    def _refine(
        self,
        index: int,
        block: nn.Module,
        original: nn.Module | None,
        inputs: Mapping[str, InputQuantizer],
        done: Mapping[str, Rounded],
        cache: BlockCache | None,
    ) -> None:
        """Let the recipe's refinements improve what was rounded. Edits the block's norms and biases, `done` and the cache."""
        if not self.recipe.refinements or original is None or self.stream is None or self.float_stream is None:
            return
        start = time.perf_counter()
        if cache is not None:
            self._smooth(cache, index, block, inputs)
        weights = {name: rounded.original for name, rounded in done.items() if rounded.original is not None}
        rounded_block = RoundedBlock(
            index, block, original, weights, inputs, self.stream, self.float_stream,
            seen={name: rounded.seen for name, rounded in done.items() if rounded.seen is not None},
            links=lambda: self._links(block),
            following=lambda count: self._following(index, count),
            cache=cache,
        )  # fmt: skip
        for step in self.recipe.refinements:
            better = step.refine(rounded_block, {name: rounded.weight for name, rounded in done.items()})
            for name, weight in better.items():
                done[name].weight = weight
                done[name].method += f" → {step.method}"
        round_parameters(block, done.keys(), self.dtype)
        for name, rounded in done.items():
            found = inputs.get(name)
            try:
                require_safe(rounded.weight, TOKEN_INPUTS if found is None else found.format)
            except HalfbyteError as cause:
                raise type(cause)(f"{self._path(index, name)}: {cause}") from cause
            rounded.weight_snr = weight_snr(weights[name], rounded.weight.decode())
            rounded.output_snr = _output_snr(weights[name], rounded.weight, rounded_block.seen.get(name))
            rounded.seconds += (time.perf_counter() - start) / len(done)

    def _following(self, index: int, count: int) -> list[nn.Module]:
        """The next `count` blocks of the float model, fewer at its end."""
        if self.read is None:
            raise ModelError("looking at the blocks that follow needs a way to read them: BlockQuantizer(read=...)")
        return [self.read(place) for place in range(index + 1, min(index + 1 + count, len(self.skeleton.blocks)))]

    def _module(self, rounded: Rounded, inputs: InputQuantizer | None) -> QuantizedModule:
        """What is stored of a linear, with the columns that an outlier split keeps."""
        split = None if inputs is None else inputs.format.outliers
        if split is None or inputs is None or split.weights != "kept" or rounded.original is None:
            return QuantizedModule(rounded.weight, inputs)
        columns = inputs.outlier_columns
        kept = rounded.original if columns is None else rounded.original[:, columns.long()]
        return QuantizedModule(rounded.weight, inputs, kept.to(self.dtype))

    def _record(self, index: int, name: str, rounded: Rounded, inputs: InputQuantizer | None) -> ModuleRecord:
        return ModuleRecord(
            path=self._path(index, name),
            format=str(rounded.weight.format) + (f", {inputs.format}" if inputs else ""),
            method=rounded.method,
            activations=inputs.format.model_dump(mode="json") if inputs else None,
            shape=(rounded.weight.codes.shape[0], rounded.weight.codes.shape[1]),
            weight_snr=rounded.weight_snr,
            output_snr=rounded.output_snr,
            tokens=rounded.tokens,
            seconds=rounded.seconds,
        )

    def _path(self, index: int, name: str) -> str:
        return f"{self.skeleton.blocks_name}.{index}.{name}"

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


def _output_snr(weight: Tensor, rounded: QuantizedWeight, seen: InputStatistics | None) -> float | None:
    return output_snr(weight, rounded.decode(), seen.gram) if seen is not None and seen.tokens else None


def round_parameters(block: nn.Module, quantized: Container[str], dtype: torch.dtype) -> None:
    """What is not quantized takes the values that will be stored. Edits in place."""
    for path, parameter in block.named_parameters():
        if path.removesuffix(".weight") not in quantized:
            parameter.data.copy_(parameter.data.to(dtype))


def check_finite(index: int, seen: Mapping[str, InputStatistics]) -> None:
    for name, statistics in seen.items():
        if not bool(torch.isfinite(statistics.gram.diagonal()).all()):
            raise CalibrationError(
                f"the inputs of {name} in block {index} hold NaN or Inf: the model overflows in this dtype, or its "
                "weights are damaged; load it in bfloat16 or float32, or download it again"
            )
