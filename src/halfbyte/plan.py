"""What a run would do, before it does it: every module's format, the bytes on disk, memory and time."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import nn

from halfbyte.calibration.walk import linears
from halfbyte.errors import FormatError, RecipeError, WeightError
from halfbyte.layouts.compressed_tensors import OWN
from halfbyte.models.linearize import TransposedLinear, is_router
from halfbyte.models.load import Skeleton, WeightFiles, outer_modules
from halfbyte.numerics.cache import layer_coders
from halfbyte.numerics.grid import scales_shape
from halfbyte.numerics.quantized import stored_format
from halfbyte.recipe import Recipe
from halfbyte.scheme import ActivationFormat, CacheFormat, FloatScale, IntegerScale, OnlineHadamard, WeightFormat

LAYOUT = OWN


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One linear of the model."""

    path: str
    shape: tuple[int, int]
    format: WeightFormat | None  # None: stays as it is
    activations: ActivationFormat | None  # of its input, as the recipe has it; None: 16 bit
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class PlannedRotations:
    """What a recipe's rotation leaves to run time, and what it costs on disk."""

    inputs: Mapping[str, OnlineHadamard] = field(default_factory=dict)  # by path of the linear that reads them
    untied: int = 0  # bytes of an unquantized head that no longer shares the embedding's weight


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole run."""

    modules: tuple[ModulePlan, ...]
    layout: str  # the quant_method that the checkpoint will carry
    bytes_before: int
    bytes_after: int
    peak_host: int  # bytes
    peak_device: int  # bytes; 0 where the device is the host
    seconds: float | None  # None until a throughput was measured
    rotations: PlannedRotations = PlannedRotations()
    tables: Mapping[str, WeightFormat] = field(default_factory=dict)  # of embeddings, by path
    head: ModulePlan | None = None  # where it is quantized

    def formats(self, prefix: str) -> dict[str, WeightFormat]:
        """Name relative to `prefix` -> format, of the modules below it that will be quantized."""
        return {
            module.path.removeprefix(prefix): module.format
            for module in self.modules
            if module.format is not None and module.path.startswith(prefix)
        }

    def activations(self, prefix: str) -> dict[str, ActivationFormat]:
        """Likewise the formats of their inputs, of those that will be quantized."""
        return {
            module.path.removeprefix(prefix): module.activations
            for module in self.modules
            if module.activations is not None and module.path.startswith(prefix)
        }

    def __iter__(self) -> Iterator[ModulePlan]:
        return iter(self.modules if self.head is None else (*self.modules, self.head))


def plan_modules(skeleton: Skeleton, files: WeightFiles, recipe: Recipe) -> tuple[ModulePlan, ...]:
    """Every linear of every block, checked against its format.

    RecipeError where the recipe selects nothing or asks for what cannot be done yet; WeightError, FormatError with the
    module's path where a format does not fit it.
    """
    if recipe.scheme.cache is not None:
        check_cache(skeleton, recipe.scheme.cache)
    modules = []
    for index, block in enumerate(skeleton.blocks):
        for name, linear in linears(block).items():
            path = f"{skeleton.blocks_name}.{index}.{name}"
            stored = skeleton.stored_name(f"{path}.weight", files)
            if stored not in files:
                files.read(stored)  # raises, saying which tensor is missing
            size = files.nbytes(stored)
            format, activations = recipe.format_of(path), recipe.activations_of(path)
            out, columns = linear.out_features, linear.in_features
            if format is not None:
                format = resolved(format, files.dtype(stored), activations)
                check_formats(path, (out, columns), format, activations)
            elif activations is not None:
                raise RecipeError(
                    f"{path}: recipe {recipe.name!r} quantizes its input and not its weight: give `scheme.weights`, or "
                    "put the module on the `ignore` list"
                )
            after = size if format is None else packed_bytes(out, columns, format)
            modules.append(ModulePlan(path, (out, columns), format, activations, size, after))
    if not any(module.format for module in modules) and (recipe.scheme.weights or not recipe.scheme.cache):
        raise RecipeError(
            f"recipe {recipe.name!r} selects none of the {len(modules)} linears of this model: look at its `ignore` list"
        )
    return tuple(modules)


def check_cache(skeleton: Skeleton, format: CacheFormat) -> None:
    """FormatError where the format's groups do not divide this model's heads."""
    coders = layer_coders(format, 0, 1)
    for coder in (coders.keys, coders.values):
        coder.groups(skeleton.heads[2])


def plan_rotations(skeleton: Skeleton, files: WeightFiles, recipe: Recipe) -> PlannedRotations:
    """What the recipe's rotation leaves to run time. ModelError, WeightError where this model cannot be rotated so."""
    rotation, table = recipe.rotation, skeleton.architecture
    if rotation is None:
        return PlannedRotations()
    rotation.check(skeleton)
    size, unties = 0, rotation.unties and recipe.scheme.head is None
    if unties and table is not None and skeleton.stored_name(f"{table.head}.weight", files) not in files:
        size = files.nbytes(skeleton.stored_name(f"{table.embeddings[0]}.weight", files))
    return PlannedRotations(rotation.online_inputs(skeleton), size)


def plan_tables(skeleton: Skeleton, recipe: Recipe) -> dict[str, WeightFormat]:
    """Path of every table of embeddings that is quantized -> its format, scales in float32.

    RecipeError where the model has none that can be; WeightError where groups do not divide its rows.
    """
    format = recipe.scheme.embeddings
    if format is None:
        return {}
    tables = {path: module for path, module in outer_modules(skeleton) if type(module) is nn.Embedding}
    if not tables:
        raise RecipeError(
            f"{skeleton.config.model_type} has no plain tables of embeddings outside its blocks: take `embeddings` out of "
            "the recipe's scheme"
        )
    format = format.model_copy(update={"scale": FloatScale(dtype="float32")})
    for path, module in tables.items():
        try:
            scales_shape(module.num_embeddings, module.embedding_dim, format.granularity)
        except WeightError as cause:
            raise WeightError(f"{path}: {cause}") from cause
    return dict.fromkeys(tables, format)


def plan_head(skeleton: Skeleton, files: WeightFiles, recipe: Recipe) -> ModulePlan | None:
    """The language model's head, where it is quantized; one that shares the embedding's tensor gets its own.

    RecipeError where the model has none; WeightError, FormatError where the format does not fit it.
    """
    format, activations = recipe.scheme.head, recipe.scheme.head_input
    if format is None:
        return None
    path = skeleton.output_head
    if path is None:
        raise RecipeError(
            f"{skeleton.config.model_type} has no head that continues text: take `head` out of the recipe's scheme"
        )
    own = skeleton.stored_name(f"{path}.weight", files)
    read = skeleton.shared_name(f"{path}.weight", files)
    out, columns = files.shape(read)
    format = resolved(format, files.dtype(read), activations)
    check_formats(path, (out, columns), format, activations)
    before = files.nbytes(own) if own in files else 0
    return ModulePlan(path, (out, columns), format, activations, before, packed_bytes(out, columns, format))


def saved_bytes(skeleton: Skeleton, files: WeightFiles, path: str, format: WeightFormat) -> int:
    """How much smaller a table of embeddings is on disk in this format."""
    name = skeleton.stored_name(f"{path}.weight", files)
    rows, dim = files.shape(name)
    scale_rows, groups = scales_shape(rows, dim, format.granularity)
    return files.nbytes(name) - rows * dim - 4 * scale_rows * groups


def check_formats(
    path: str, shape: tuple[int, int], format: WeightFormat, activations: ActivationFormat | None
) -> None:
    """WeightError or FormatError, with the path, where the formats do not fit an [out, in] weight or cannot be stored."""
    try:
        scales_shape(*shape, format.granularity)
    except WeightError as cause:
        raise WeightError(f"{path}: {cause}") from cause
    if reason := LAYOUT.refusal(stored_format(format, *shape), *shape):
        raise FormatError(f"{path}: {reason}")
    if isinstance(format.scale, IntegerScale) and activations is None:
        raise FormatError(
            f"{path}: integer scales are for integer products, and its input stays in 16 bit: choose `scale: {{kind: "
            "float}`, or quantize the input (`activations: {bits: 8}`)"
        )
    if activations is not None and activations.group_size is not None and shape[1] % activations.group_size:
        raise WeightError(
            f"{path}: activation groups of {activations.group_size} do not divide its {shape[1]} inputs: choose a divisor"
        )


def resolved(format: WeightFormat, dtype: torch.dtype, activations: ActivationFormat | None = None) -> WeightFormat:
    """The format with the scale's dtype named (`model` becomes the weight's own), in bytes where integers multiply."""
    if activations is not None and format.bits == 8:
        format = format.model_copy(update={"stored": "bytes"})
    if isinstance(format.scale, FloatScale) and format.scale.dtype == "model":
        name = str(dtype).removeprefix("torch.")
        return format.model_copy(update={"scale": FloatScale.model_validate({"dtype": name})})
    return format


def packed_bytes(out: int, columns: int, format: WeightFormat) -> int:
    """Bytes of the stored codes, scales and zero points."""
    rows, groups = scales_shape(out, columns, stored_format(format, out, columns).granularity)
    scale = 4 if isinstance(format.scale, FloatScale) and format.scale.dtype == "float32" else 2
    certificate = 8 * rows if isinstance(format.scale, IntegerScale) else 0
    zeros = 0 if format.symmetric else 4 * ceil(rows * format.bits / 32) * groups
    return 4 * out * ceil(columns * format.bits / 32) + scale * rows * groups + zeros + certificate + 16


def layout_name(
    skeleton: Skeleton,
    modules: Iterable[ModulePlan],
    rotations: PlannedRotations = PlannedRotations(),
    cache: CacheFormat | None = None,
    tables: Mapping[str, WeightFormat] | None = None,
) -> str:
    """compressed-tensors wherever its readers find the modules (no Conv1D) and run all that they need.

    They know no outlier split, no clipped range, no integer scales, no rotation at run time, no past-only cache and no
    quantized tables of embeddings.
    """
    modules = tuple(modules)
    transposed = any(isinstance(module, TransposedLinear) for module in skeleton.model.modules())
    inputs = [module.activations for module in modules if module.activations is not None]
    beyond = any(each.outliers is not None or each.clip < 1 for each in inputs)
    integers = any(module.format is not None and isinstance(module.format.scale, IntegerScale) for module in modules)
    online = bool(rotations.inputs or tables) or cache is not None
    return LAYOUT.name if transposed or beyond or integers or online else "compressed-tensors"


@dataclass(frozen=True, slots=True)
class Workload:
    """The sizes that memory and time depend on."""

    samples: int
    length: int
    batch: int  # samples per forward pass
    hidden: int
    itemsize: int  # bytes of an activation
    streams: int  # 0 without data, 1, or 2 where the float model runs beside
    on_host: bool
    base: int  # bytes that the process holds once the model's skeleton is built
    outer: int  # bytes of the tensors outside the blocks, which are written last
    rotated: bool = False  # every block is float64 while it is rotated


def peak_memory(skeleton: Skeleton, plan: tuple[ModulePlan, ...], work: Workload) -> tuple[int, int]:
    """Peak bytes of host and device. The largest block, its statistics, the stream, and the solver's matrices."""
    blocks: dict[str, list[ModulePlan]] = {}
    depth = skeleton.blocks_name.count(".") + 2
    for module in plan:
        blocks.setdefault(".".join(module.path.split(".")[:depth]), []).append(module)
    elements = max(sum(m.shape[0] * m.shape[1] for m in block) for block in blocks.values())
    widest = max(m.shape[1] for m in plan)
    largest = max(m.shape[0] * m.shape[1] for m in plan)
    weights = elements * (work.itemsize + 8 * work.rotated)
    streams = work.streams * work.samples * work.length * work.hidden * work.itemsize
    inputs = {(module.path.rpartition(".")[0], module.shape[1]) for module in next(iter(blocks.values()))}
    grams = sum(4 * width * width for _, width in inputs) * work.streams
    # one pass: the widest tensors of the feed-forward part (on a CPU also as float32, for the Gram matrix), norms
    inner = max(max(module.shape) for module in plan)
    per_token = inner * (5 * work.itemsize + 8 * work.on_host) + work.hidden * (4 * work.itemsize + 8)
    activations = work.batch * work.length * per_token if work.streams else 0
    solver = 4 * (8 * largest + (5 * widest * widest if work.streams else 0))
    written = 2 * max(sum(module.bytes_after for module in block) for block in blocks.values())
    if work.on_host:  # the allocator keeps what a phase frees, so the phases add up
        compute = weights * max(work.streams, 1) + streams + grams + activations + solver
        return work.base + compute + written + work.outer, 0
    compute = weights * max(work.streams, 1) + streams + grams + max(activations, solver)
    return work.base + written + weights + work.outer, compute


def estimate_seconds(plan: tuple[ModulePlan, ...], work: Workload, flops: float, recipe: Recipe) -> float:
    """Forward passes, Gram matrices and the solver's products at a measured rate of float32 products."""
    tokens = work.samples * work.length if work.streams else 0
    total = 0.0
    for module in plan:
        out, columns = module.shape
        total += 2 * tokens * out * columns * (1 + work.streams)
        total += 2 * tokens * columns * columns * work.streams
        if module.format is not None and recipe.rounding.needs_data:
            total += out * columns * columns * 2 + columns**3
        total += 20 * len(recipe.transforms) * 2 * out * columns * columns
    return total / flops


def ignored_paths(skeleton: Skeleton, plan: Iterable[ModulePlan]) -> list[str]:
    """Every linear and router that stays as it is, by the names that checkpoints use, a head also by the model's own."""
    quantized = {module.path for module in plan if module.format is not None}
    stays = [
        path
        for path, module in skeleton.model.named_modules()
        if (isinstance(module, nn.Linear) and path not in quantized) or is_router(module)
    ]
    return sorted({name for path in stays for name in skeleton.known_names(path)})
