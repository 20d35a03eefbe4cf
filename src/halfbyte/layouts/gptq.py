"""The GPTQ layout (packing/gptq_words.py), which AutoGPTQ began: qweight, qzeros, scales and g_idx.

Scales are float16. Version 1 (`gptq`) stores zero points minus one and is what everybody reads; version 2 (`gptq_v2`)
stores them as they are. Groups are runs of neighbouring inputs (`desc_act` false), so g_idx says nothing new.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.layouts.layout import (
    NONE_QUANTIZED,
    check_stored,
    common_refusal,
    exact_scales,
    expect,
    offset,
    own_codes,
    present,
    require,
    require_some,
    resolved,
    unsigned_codes,
    weights_only,
    whole_zero_points,
)
from halfbyte.layouts.targets import family, patterns
from halfbyte.numerics.grid import SCALE_DTYPES, Grid, scales_shape
from halfbyte.numerics.quantized import QuantizedWeight
from halfbyte.packing import gptq_words
from halfbyte.packing.gptq_words import Version
from halfbyte.scheme import ActivationFormat, Convention, PerChannel, PerGroup, PerTensor, WeightFormat

# vLLM runs these as one layer and looks for rules under its name
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True, slots=True)
class Gptq:
    """The layout in one of its versions."""

    version: Version = 1
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    @property
    def name(self) -> str:
        """`gptq` or `gptq_v2`; the quant_method of both is `gptq`."""
        return "gptq" if self.version == 1 else "gptq_v2"

    def names(self, format: WeightFormat) -> tuple[str, ...]:  # noqa: ARG002
        """See Layout."""
        return self.suffixes

    def refusal(self, format: WeightFormat, out: int, columns: int) -> str | None:
        """See Layout."""
        if format.bits not in gptq_words.BITS:
            return f"it has no {format.bits} bits, only {gptq_words.BITS}: write compressed-tensors"
        if out % gptq_words.MULTIPLE or columns % gptq_words.MULTIPLE:
            return f"{gptq_words.MULTIPLE} must divide both sides of {out}x{columns}: write compressed-tensors"
        if format.granularity == PerTensor():
            return "it has one scale per channel or group: choose `granularity: {kind: channel}`"
        return common_refusal(format, out, columns)

    def caveat(self, format: WeightFormat) -> str | None:
        """See Layout."""
        if not format.symmetric:
            return "vLLM reads symmetric GPTQ weights only, and GPTQModel asymmetric ones of version 1 only from itself"
        return None if format.bits in (4, 8) else "vLLM reads GPTQ weights of 4 and 8 bits only"

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See Layout."""
        out, columns = weight.codes.shape
        format = weight.format
        require(self.refusal(format, out, columns), self.name)
        return {
            "qweight": gptq_words.pack_weight(unsigned_codes(weight), format.bits).cpu(),
            "g_idx": gptq_words.group_index(columns, columns // weight.grid.scales.shape[1]),
            **self.write_grid(weight.grid, format),
        }

    def write_grid(self, grid: Grid, format: WeightFormat) -> dict[str, Tensor]:
        """See Layout. FormatError also for a zero point of 0 in version 1."""
        points = whole_zero_points(grid, format)
        return {
            "scales": exact_scales(grid.scales, torch.float16).T.cpu().contiguous(),
            "qzeros": gptq_words.pack_zero_points(points, format.bits, self.version).cpu().contiguous(),
        }

    def read(self, tensors: Mapping[str, Tensor], format: WeightFormat) -> QuantizedWeight:
        """See Layout. CheckpointError for groups of scattered inputs."""
        grid, format = self.read_grid(tensors, format)
        return QuantizedWeight(
            own_codes(gptq_words.unpack_weight(tensors["qweight"], format.bits), format), grid, format
        )

    def read_grid(self, tensors: Mapping[str, Tensor], format: WeightFormat) -> tuple[Grid, WeightFormat]:
        """See Layout. A symmetric format demands that every stored zero point is the middle code."""
        _, columns = self.shape(tensors, format)
        format = resolved(format, tensors["scales"].dtype)
        scales = tensors["scales"].T.to(torch.float32).contiguous()
        if "g_idx" in tensors and gptq_words.group_size_of(tensors["g_idx"]) != columns // scales.shape[1]:
            raise CheckpointError(
                f"g_idx has groups of {gptq_words.group_size_of(tensors['g_idx'])} inputs and the scales of "
                f"{columns // scales.shape[1]}: download the checkpoint again"
            )
        points = gptq_words.unpack_zero_points(tensors["qzeros"], format.bits, self.version)
        if not format.symmetric:
            return Grid(scales, points.to(torch.float32)), format
        if (points != offset(format)).any():
            raise CheckpointError(
                f"qzeros hold zero points other than {offset(format)}, so the weight is not symmetric (sym: true) or "
                f"not of version {self.version} (checkpoint_format): mend config.json, or quantize again"
            )
        return Grid(scales), format

    def shape(self, tensors: Mapping[str, Tensor], format: WeightFormat) -> tuple[int, int]:
        """See Layout."""
        qweight = present(tensors, "qweight")
        if qweight.dim() != 2:
            raise CheckpointError(f"qweight has {qweight.dim()} axes instead of 2: download the checkpoint again")
        out, columns = qweight.shape[1], qweight.shape[0] * 32 // format.bits
        expect(self.refusal(format, out, columns), self.name, out, columns)
        groups = scales_shape(out, columns, format.granularity)[1]
        expected = {
            "qweight": ((columns * format.bits // 32, out), (torch.int32,)),
            "qzeros": ((groups, out * format.bits // 32), (torch.int32,)),
            "scales": ((groups, out), tuple(SCALE_DTYPES.values())),
            "g_idx": ((columns,), (torch.int32, torch.int64)),
        }
        if "g_idx" not in tensors:
            del expected["g_idx"]
        check_stored(tensors, expected)
        return out, columns

    def config(
        self,
        formats: Mapping[str, WeightFormat],
        ignored: Sequence[str],
        activations: Mapping[str, ActivationFormat] = NONE_QUANTIZED,
    ) -> dict[str, Any]:
        """See Layout. The commonest format is the base; modules of others and skipped ones have rules in `dynamic`."""
        require_some(formats, self.name)
        weights_only(activations, self.name)
        settings = {path: _settings(format) for path, format in formats.items()}
        base = dict(Counter(tuple(entry.items()) for entry in settings.values()).most_common(1)[0][0])
        in_blocks = sorted({_within_block(path) for path in formats if family(path)})
        outside = any(not family(path) for path in formats)
        # the list of names within blocks has no place for lm_head: without it, everything that is not skipped counts
        skipped = [path for path in ignored if outside or (family(path) and _listed(path, in_blocks))]
        dynamic: dict[str, dict[str, Any]] = {f"-:{rule}": {} for rule in _rules(skipped, formats)}
        for entry in {str(entry): entry for entry in settings.values() if entry != base}.values():
            mine = [path for path, other in settings.items() if other == entry]
            others = [*(path for path, other in settings.items() if other != entry), *ignored]
            dynamic |= {f"+:{rule}": entry for rule in _rules(mine, others)}
        config: dict[str, Any] = {
            "quant_method": "gptq",
            **base,
            "desc_act": False,
            "lm_head": outside,
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"halfbyte:{version('halfbyte')}"]},
        }
        if not outside:
            config["modules_in_block_to_quantize"] = [[name] for name in in_blocks]
        return config | ({"dynamic": dynamic} if dynamic else {})

    def formats(self, config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, WeightFormat]:
        """See Layout. Without `modules_in_block_to_quantize` every one of the `modules` inside blocks is quantized."""
        stored_as = config.get("checkpoint_format") or config.get("format") or "gptq"
        if stored_as != self.name:
            raise CheckpointError(
                f"checkpoint_format {stored_as!r} is not {self.name!r}: layout_of(config) finds the right layout for "
                "gptq and gptq_v2; convert others with the program that wrote them"
            )
        listed = config.get("modules_in_block_to_quantize")
        names = None if not listed else [n for entry in listed for n in ([entry] if isinstance(entry, str) else entry)]
        found = {}
        for path in modules:
            if not family(path):
                selected = bool(config.get("lm_head"))
            else:
                selected = names is None or _listed(path, names)
            rule = _rule(config.get("dynamic") or {}, path)
            if selected and rule is not None:
                found[path] = _format({**config, **rule})
        return found

    def activations(self, config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, ActivationFormat]:  # noqa: ARG002
        """See Layout."""
        return {}

    def beyond_weights(self, config: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ARG002
        """See Layout."""
        return ()


def _settings(format: WeightFormat) -> dict[str, Any]:
    granularity = format.granularity
    size = granularity.size if isinstance(granularity, PerGroup) else -1
    return {"bits": format.bits, "group_size": size, "sym": format.symmetric}


def _format(settings: Mapping[str, Any]) -> WeightFormat:
    bits, size = settings.get("bits"), settings.get("group_size", -1)
    if bits not in gptq_words.BITS or not isinstance(size, int) or size < -1 or size == 0:
        raise CheckpointError(
            f"quantization_config asks for bits: {bits}, group_size: {size}, which GPTQ does not have"
        )
    convention = Convention.GPTQ if settings.get("sym", True) else Convention.ASYMMETRIC
    granularity = PerChannel() if size == -1 else PerGroup(size=size)
    return WeightFormat(bits=bits, convention=convention, granularity=granularity)


def _within_block(path: str) -> str:
    """`self_attn.q_proj` of `model.layers.0.self_attn.q_proj`."""
    parts = path.split(".")
    return ".".join(parts[next(index for index, part in enumerate(parts) if part.isdigit()) + 1 :])


def _listed(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _rules(paths: Sequence[str], others: Iterable[str]) -> list[str]:
    """Regular expressions that match the paths, and their fused names where all members are among them."""
    mine, rest = set(paths), list(others)
    fused = [name for name, members in _fused(paths).items() if members <= mine]
    expressions, single = patterns([*paths, *fused], [*rest, *_fused(rest)])
    return expressions + [re.escape(path) + "$" for path in single]


def _fused(paths: Iterable[str]) -> dict[str, set[str]]:
    """The fused layers that the paths have a part in, each with all its members."""
    found = {}
    for path in paths:
        parent, _, own = path.rpartition(".")
        for name, members in FUSED.items():
            if own in members:
                found[f"{parent}.{name}"] = {f"{parent}.{member}" for member in members}
    return found


def _rule(dynamic: Mapping[str, Any], path: str) -> Mapping[str, Any] | None:
    """The settings that `dynamic` overrides for a module, {} where there are none; None where it is to be skipped."""
    for pattern, settings in dynamic.items():
        try:
            matches = re.match(pattern.removeprefix("+:").removeprefix("-:"), path)
        except re.error as cause:
            raise CheckpointError(f"rule {pattern!r} of config.json is no regular expression: {cause}") from cause
        if matches:
            return None if pattern.startswith("-:") else settings
    return {}
