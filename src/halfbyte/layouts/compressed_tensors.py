"""compressed-tensors, formats `pack-quantized` and `int-quantized`: what transformers, vLLM and SGLang read as it is.

Tensors of a linear layer [out, in]; per channel there is one group, and one scale per tensor is [1]:

    pack-quantized (`stored: words`), codes unsigned and packed as in packing/int32_words.py
        weight_packed      int32  [out, words]     runs along `in`
        weight_scale       float  [out, groups]
        weight_shape       int64  [2]              out, in
        weight_zero_point  int32  [words, groups]  packed along `out`; asymmetric formats only
    int-quantized (`stored: bytes`), codes signed: an asymmetric code c is stored as c - 128
        weight             int8   [out, in]
        weight_scale       float  [out, groups]
        weight_zero_point  int8   [out, groups]    the zero point - 128; asymmetric formats only

What a module's input needs lies beside them: layouts/inputs.py. `OWN` is the same under our own quant_method, which
also says what no other reader knows, integer scales among it: layouts/integer_scales.py.

The configuration names formats by config groups, each with its targets: a class name, a path, or `re:` and a regular
expression. Only the keys that every reader knows are written: an unknown one makes compressed-tensors refuse the file.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.layouts import inputs, integer_scales
from halfbyte.layouts.layout import (
    NONE_QUANTIZED,
    Stored,
    check_stored,
    common_refusal,
    exact_scales,
    expect,
    own_codes,
    present,
    require,
    require_some,
    resolved,
    scale_dtype,
    scale_dtypes,
    unsigned_codes,
    whole_zero_points,
)
from halfbyte.layouts.targets import family, patterns
from halfbyte.numerics.certificate import middle
from halfbyte.numerics.grid import Grid, scales_shape
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.packing import int32_words
from halfbyte.scheme import (
    ActivationFormat,
    Convention,
    FloatScale,
    IntegerScale,
    PerChannel,
    PerGroup,
    PerTensor,
    WeightFormat,
)

PACKED, BYTES = "pack-quantized", "int-quantized"
WORDS = ("weight_packed", "weight_scale", "weight_shape")
FOLLOWS = "0.20.0"  # the version of compressed-tensors whose format this is


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """The layout, under the name that everybody knows, or our own (`OWN`)."""

    name: Literal["compressed-tensors", "halfbyte"] = "compressed-tensors"
    suffixes: tuple[str, ...] = ("weight_scale", "weight_packed", "weight_shape", "weight_zero_point", *inputs.SUFFIXES)

    def names(self, format: WeightFormat) -> tuple[str, ...]:
        """See Layout."""
        codes = ("weight", "weight_scale") if format.stored == "bytes" else WORDS
        zeros = () if format.symmetric else ("weight_zero_point",)
        return (*codes, *zeros, *(integer_scales.SUFFIXES if isinstance(format.scale, IntegerScale) else ()))

    def refusal(self, format: WeightFormat, out: int, columns: int) -> str | None:
        """See Layout."""
        if format.granularity == PerTensor() and not format.symmetric:
            return "it packs zero points per channel and per group only: choose `granularity: {kind: channel}`"
        return common_refusal(format, out, columns, integer_scales=self.name == "halfbyte")

    def caveat(self, format: WeightFormat) -> str | None:
        """See Layout."""
        if format.granularity == PerTensor() and format.stored == "words":
            return "vLLM reads one scale per channel or group, not one per tensor"
        if format.stored == "bytes" and (not format.symmetric or isinstance(format.granularity, PerGroup)):
            return "vLLM multiplies int8 weights with one symmetric scale per channel or tensor"
        if format.bits not in (2, 4, 8):
            return f"transformers reads {format.bits} bits with compressed-tensors 0.19 or later: 0.17 packed otherwise"
        if not format.symmetric:
            return "transformers 5.23 loads zero points only with CompressedTensorsConfig(dequantize=True)"
        return None

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See Layout."""
        out, columns = weight.codes.shape
        require(self.refusal(weight.format, out, columns), self.name)
        grid = self.write_grid(weight.grid, weight.format)
        if isinstance(weight.format.scale, IntegerScale):
            grid |= integer_scales.write_reach(weight.grid, weight.codes, weight.format)
        if weight.format.stored == "bytes":
            return {"weight": signed(unsigned_codes(weight)).cpu().contiguous(), **grid}
        return {
            "weight_packed": int32_words.pack(unsigned_codes(weight), weight.format.bits).cpu(),
            "weight_shape": torch.tensor([out, columns], dtype=torch.int64),
            **grid,
        }

    def write_grid(self, grid: Grid, format: WeightFormat) -> dict[str, Tensor]:
        """See Layout."""
        if isinstance(format.scale, IntegerScale):
            tensors = integer_scales.write_scales(grid, format.scale)
        else:
            scales = exact_scales(grid.scales, scale_dtype(format)).cpu()
            tensors = {"weight_scale": (scales.flatten() if format.granularity == PerTensor() else scales).contiguous()}
        if not format.symmetric:
            points = whole_zero_points(grid, format)
            packed = signed(points) if format.stored == "bytes" else int32_words.pack_zero_points(points, format.bits)
            tensors["weight_zero_point"] = packed.cpu().contiguous()
        return tensors

    def read(self, tensors: Mapping[str, Tensor], format: WeightFormat) -> QuantizedWeight:
        """See Layout."""
        _, columns = self.shape(tensors, format)
        if format.stored == "bytes":
            stored = unsigned(tensors["weight"])
        else:
            stored = int32_words.unpack(tensors["weight_packed"], format.bits, columns)
        grid, format = self.read_grid(tensors, format)
        codes = own_codes(stored, format)
        if isinstance(format.scale, IntegerScale):
            reached, whole = tensors["weight_reach"], tensors["weight_scale"]
            integer_scales.check_reach(reached, codes, whole, grid.zero_points, middle(format))
        return QuantizedWeight(codes, grid, format)

    def read_grid(self, tensors: Mapping[str, Tensor], format: WeightFormat) -> tuple[Grid, WeightFormat]:
        """See Layout."""
        out, columns = self.shape(tensors, format)
        stored, amplifiers = tensors["weight_scale"], None
        if isinstance(format.scale, IntegerScale):
            scales, amplifiers = integer_scales.read_scales(tensors)
        else:
            format = resolved(format, stored.dtype)
            scales = stored.to(torch.float32).reshape(scales_shape(out, columns, format.granularity))
        if format.symmetric:
            return Grid(scales, None, amplifiers), format
        points = tensors["weight_zero_point"]
        points = (
            unsigned(points) if format.stored == "bytes" else int32_words.unpack_zero_points(points, format.bits, out)
        )
        return Grid(scales, points.to(torch.float32), amplifiers), format

    def shape(self, tensors: Mapping[str, Tensor], format: WeightFormat) -> tuple[int, int]:
        """See Layout."""
        if format.stored == "bytes":
            return self._shape_of_bytes(tensors, format)
        stated = present(tensors, "weight_shape")
        if stated.is_floating_point() or stated.shape != (2,) or int(stated.min()) < 1:
            raise CheckpointError(f"weight_shape is {stated.tolist()}, not two sizes: download the checkpoint again")
        out, columns = (int(length) for length in stated)
        expect(self.refusal(format, out, columns), self.name, out, columns)
        grid = scales_shape(out, columns, format.granularity)
        expected: dict[str, Stored] = {
            "weight_packed": ((out, int32_words.words_for(columns, format.bits)), (torch.int32,)),
            **self._stored_scales(format, grid),
        }
        if not format.symmetric:
            expected["weight_zero_point"] = ((int32_words.words_for(out, format.bits), grid[1]), (torch.int32,))
        check_stored(tensors, expected)
        return out, columns

    def _stored_scales(self, format: WeightFormat, grid: tuple[int, int]) -> dict[str, Stored]:
        if isinstance(format.scale, IntegerScale):
            return integer_scales.expected(*grid)
        return {"weight_scale": ((1,) if format.granularity == PerTensor() else grid, scale_dtypes(format))}

    def _shape_of_bytes(self, tensors: Mapping[str, Tensor], format: WeightFormat) -> tuple[int, int]:
        stated = present(tensors, "weight").shape
        if len(stated) != 2:
            raise CheckpointError(f"weight is {list(stated)}, not [out, in]: download the checkpoint again")
        out, columns = stated
        expect(self.refusal(format, out, columns), self.name, out, columns)
        grid = scales_shape(out, columns, format.granularity)
        expected: dict[str, Stored] = {"weight": ((out, columns), (torch.int8,)), **self._stored_scales(format, grid)}
        if not format.symmetric:
            expected["weight_zero_point"] = (grid, (torch.int8,))
        check_stored(tensors, expected)
        return out, columns

    def config(
        self,
        formats: Mapping[str, WeightFormat],
        ignored: Sequence[str],
        activations: Mapping[str, ActivationFormat] = NONE_QUANTIZED,
    ) -> dict[str, Any]:
        """See Layout. Formats that differ in convention or scale dtype alone share a group: readers see no difference.

        Several groups never use the target `Linear`: vLLM would take it for every fused layer (q, k and v in one). A
        head has its name among the targets in any case: vLLM does not count it among the linears.
        """
        require_some(formats, self.name)
        members: dict[str, list[str]] = defaultdict(list)
        entries: dict[str, dict[str, Any]] = {}
        for path, format in formats.items():
            entry = _entry(format, activations.get(path))
            members[str(entry)].append(path)
            entries[str(entry)] = entry
        groups = {}
        for index, key in enumerate(sorted(members, key=lambda key: -len(members[key]))):
            targets = ["Linear", *(path for path in members[key] if family(path) is None)]
            if len(members) > 1:
                mine = set(members[key])
                expressions, single = patterns(
                    members[key], [*(path for path in formats if path not in mine), *ignored]
                )
                targets = [f"re:{expression}" for expression in expressions] + single
            groups[f"group_{index}"] = {"targets": targets, **entries[key]}
        forms = {group["format"] for group in groups.values()}
        return {
            "quant_method": self.name,
            "format": forms.pop() if len(forms) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "version": FOLLOWS,
            "config_groups": groups,
            "ignore": list(ignored),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
        }

    def formats(self, config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, WeightFormat]:
        """See Layout. Paths go before expressions before class names, as the library itself decides."""
        return self._chosen(config, modules, lambda name, group: _format(name, group, config.get("format")))

    def activations(self, config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, ActivationFormat]:
        """See Layout."""
        return self._chosen(config, modules, lambda _name, group: inputs.activation_format(group))

    def _chosen(
        self, config: Mapping[str, Any], modules: Sequence[str], read: Callable[[str, Mapping[str, Any]], Any]
    ) -> dict[str, Any]:
        """What `read` makes of the config group of each module; modules of which it is None are left out."""
        ignored = Targets(dict.fromkeys(config.get("ignore") or (), True))
        groups = config.get("config_groups") or {}
        targets = Targets({target: name for name, group in groups.items() for target in _targets(name, group)})
        chosen = {path: targets.of(path) for path in modules if not ignored.of(path)}
        found = {
            name: read(name, groups[name]) for name in sorted({name for name in chosen.values() if name is not None})
        }
        return {path: found[name] for path, name in chosen.items() if name is not None and found[name] is not None}

    def beyond_weights(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """See Layout."""
        groups = [group for group in (config.get("config_groups") or {}).values() if isinstance(group, Mapping)]
        asked = {
            "quantized outputs": any(group.get("output_activations") for group in groups),
            "a quantized cache": bool(config.get("kv_cache_scheme")),
            "a past-only cache": bool(config.get("kv_cache")),
            "online rotations": bool((config.get("transform_config") or {}).get("config_groups")),
            "Hadamard products at run time": bool(config.get("online_hadamards")),
            "inputs with outliers split off": any(group.get("outliers") for group in groups),
            "tables of embeddings in 8 bits": bool(config.get("embeddings")),
            "inputs that are clipped": any(group.get("input_clip") for group in groups),
            "sparsity": bool(config.get("sparsity_config") or config.get("moe_sparsity_config")),
        }
        return tuple(name for name, present in asked.items() if present)


OWN = CompressedTensors("halfbyte", (*CompressedTensors().suffixes, *integer_scales.SUFFIXES))
"""What our own runtime reads and writes."""


class Targets:
    """Which value a path's target has. CheckpointError for a target that is no regular expression."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.expressions = []
        for target in sorted(target for target in values if target.startswith("re:")):
            try:
                self.expressions.append((re.compile(target.removeprefix("re:")), values[target]))
            except re.error as cause:
                raise CheckpointError(f"target {target!r} of config.json is no regular expression: {cause}") from cause

    def of(self, path: str) -> Any:
        """The value of the first target that matches, or None."""
        if path in self.values:
            return self.values[path]
        matching = (value for expression, value in self.expressions if expression.match(path))
        return next(matching, self.values.get("Linear"))


def _targets(name: str, group: Any) -> Sequence[str]:
    if not isinstance(group, Mapping):
        raise CheckpointError(
            f"config group {name!r} names a preset only: load the checkpoint with compressed-tensors and save it "
            "again, which writes the preset out"
        )
    return group.get("targets") or ()


def signed(codes: UInt8[Tensor, "*shape"]) -> Int8[Tensor, "*shape"]:
    """Unsigned codes, less 128."""
    return (codes.to(torch.int16) - 128).to(torch.int8)


def unsigned(codes: Int8[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The inverse of `signed`."""
    return (codes.to(torch.int16) + 128).to(torch.uint8)


def _entry(format: WeightFormat, activations: ActivationFormat | None) -> dict[str, Any]:
    """A config group without its targets."""
    entry: dict[str, Any] = {
        "format": BYTES if format.stored == "bytes" else PACKED,
        "weights": _arguments(format),
        "input_activations": None if activations is None else inputs.input_arguments(activations),
        "output_activations": None,
    }
    if isinstance(format.scale, IntegerScale):
        entry["scale"] = format.scale.model_dump()
    if activations is not None and activations.outliers is not None:
        entry["outliers"] = activations.outliers.model_dump()
    if activations is not None and activations.clip < 1:
        entry["input_clip"] = activations.clip
    return entry


def _arguments(format: WeightFormat) -> dict[str, Any]:
    """The `weights` entry of a config group: compressed-tensors' QuantizationArgs."""
    granularity = format.granularity
    return {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": format.symmetric,
        "strategy": granularity.kind,
        "group_size": granularity.size if isinstance(granularity, PerGroup) else None,
        "dynamic": False,
    }


def _format(name: str, group: Mapping[str, Any], default: str | None) -> WeightFormat | None:
    """The format of a config group; None where it leaves weights as they are."""
    weights, form = group.get("weights"), group.get("format") or default
    if weights is None:
        return None
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    size = weights.get("group_size")
    strategy = strategy or {None: "tensor", -1: "channel"}.get(size, "group")
    granularity = {"tensor": PerTensor(), "channel": PerChannel()}.get(strategy)
    if strategy == "group" and isinstance(size, int) and size > 0:
        granularity = PerGroup(size=size)
    readable = form == PACKED or (form == BYTES and bits == 8)
    if not readable or kind != "int" or granularity is None or bits not in range(2, 9):
        raise CheckpointError(
            f"config group {name!r} holds {form} weights of type {kind}, {bits} bits, one scale per {strategy}: "
            f"halfbyte reads {PACKED} integers of 2 to 8 bits and {BYTES} ones of 8, per group, channel or tensor; use "
            "the program that wrote them"
        )
    if weights.get("actorder") in ("group", "dynamic", True):
        raise CheckpointError(
            f"config group {name!r} orders columns by activation (actorder: {weights['actorder']}), so that groups are "
            "scattered, which current readers refuse: quantize again with actorder static, or none"
        )
    convention = Convention.GPTQ if weights.get("symmetric", True) else Convention.ASYMMETRIC
    return WeightFormat(
        bits=bits,
        convention=convention,
        granularity=granularity,
        scale=_scale(name, group),
        stored="bytes" if form == BYTES else "words",
    )


def _scale(name: str, group: Mapping[str, Any]) -> FloatScale | IntegerScale:
    """The kind of scale of a config group: floats, where it does not say otherwise."""
    if group.get("scale") is None:
        return FloatScale()
    try:
        return IntegerScale.model_validate(group["scale"])
    except ValueError as cause:
        raise CheckpointError(
            f"config group {name!r} has scales that halfbyte does not know ({group['scale']}): use the version that wrote it"
        ) from cause
