"""The model card: the README.md that a checkpoint carries to the hub. It holds no times and no paths.

So two runs that give the same tensors give the same card, to the byte.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from halfbyte.evaluation.report import HUB_NAME, Report, model_name, templates
from halfbyte.evaluation.summary import grouped, in_block, spread
from halfbyte.layouts import LAYOUTS
from halfbyte.recipe import Recipe
from halfbyte.scheme import WeightFormat

EXPERT = re.compile(r"(.*\.experts)\.\d+\.")  # up to the experts of one block
LEFT_OUT = "left out"
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def card(report: Report, config: Mapping[str, Any], original: str = "") -> str:
    """README.md with the hub's metadata in front.

    `config` is the checkpoint's config.json, `original` the text of the source model's own card: its licence, language
    and task hold for the quantized model too.
    """
    formats = _formats(report)
    layout = LAYOUTS.get(report.layout)
    groups = grouped(report.modules, lambda module: (module.format, module.method))
    fields = (
        templates()
        .get_template("card.md")
        .render(
            report=report,
            name=model_name(report.model),
            formats=[str(format) for format in formats] + _cache(report),
            caveats=sorted({caveat for format in formats if layout and (caveat := layout.caveat(format))}),
            groups=[
                (
                    group,
                    spread(module.weight_snr for module in group.members),
                    spread(module.output_snr for module in group.members),
                )
                for group in groups
            ],
            head=Recipe.load(report.recipe).scheme.head is not None,
            masked=any(name.endswith("ForMaskedLM") for name in config.get("architectures") or []),
            remote_code="auto_map" in config,
            readers=_readers(report),
            recipe=yaml.safe_dump(report.recipe, sort_keys=False),
        )
    )
    return f"---\n{_metadata(report, formats, original).to_yaml()}\n---\n{fields}"


def own_card(folder: Path) -> str:
    """The text of a model folder's own card, empty where it has none."""
    path = folder / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _metadata(report: Report, formats: list[WeightFormat], original: str) -> ModelCardData:
    name = model_name(report.model)
    bits = sorted({format.bits for format in formats})
    here = "transformers" if "transformers" in _readers(report) else "halfbyte"
    base: dict[str, Any] = {"base_model": name, "base_model_relation": "quantized"} if HUB_NAME.fullmatch(name) else {}
    return ModelCardData(
        **_inherited(original),
        **base,
        library_name=here,
        tags=["halfbyte", "quantized", report.layout, *(f"{count}-bit" for count in bits), report.recipe["name"]],
        quantized_bits=bits[0] if len(bits) == 1 else bits,
    )


def _inherited(original: str) -> dict[str, Any]:
    found = re.match(r"\s*---\s*\n(.*?)\n---", original, re.DOTALL)
    if found is None:
        return {}
    try:
        data = yaml.load(found[1], Loader=yaml.BaseLoader)  # strings alone: `language: no` is Norwegian
    except yaml.YAMLError:  # hours of work must not end at somebody else's misprint; nothing is claimed then
        return {}
    return {key: data[key] for key in INHERITED if data.get(key)} if isinstance(data, dict) else {}


def _readers(report: Report) -> list[str]:
    """The programs beside ours that compute what they should.

    Those that know the layout fuse the experts of a block and give them all one format, most often without a check:
    vLLM that of the block's first, transformers one for the whole model, whose experts it wants all quantized and
    without zero points.
    """
    if report.layout not in LAYOUTS:
        return []
    recipe = Recipe.load(report.recipe)
    experts: dict[str, set[str]] = {}
    for path in [*(module.path for module in report.modules), *report.unquantized]:
        if found := EXPERT.match(path):
            format = None if path in report.unquantized else recipe.format_of(path)
            experts.setdefault(found[1], set()).add(LEFT_OUT if format is None else str(format))
    if any(len(formats) > 1 for formats in experts.values()):
        return []
    everywhere = set().union(*experts.values())
    alike = len(everywhere) <= 1 and not any(name == LEFT_OUT or " asym " in name for name in everywhere)
    return ["vllm", "transformers"] if alike else ["vllm"]


def _cache(report: Report) -> list[str]:
    """What the recipe says of the cache, where it does."""
    format = Recipe.load(report.recipe).scheme.cache
    return [] if format is None else [f"cache {format}"]


def _formats(report: Report) -> list[WeightFormat]:
    """The formats of the quantized modules, the most frequent first."""
    recipe = Recipe.load(report.recipe)
    count: dict[WeightFormat, int] = {}
    for module in report.modules:
        format = recipe.format_of(module.path) if in_block(module.path) else recipe.scheme.head
        if format is not None:
            count[format] = count.get(format, 0) + 1
    return sorted(count, key=lambda format: -count[format])
