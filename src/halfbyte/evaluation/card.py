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
from halfbyte.evaluation.summary import grouped, spread
from halfbyte.layouts import LAYOUTS
from halfbyte.recipe import Recipe
from halfbyte.scheme import WeightFormat

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
            formats=[str(format) for format in formats],
            caveats=sorted({caveat for format in formats if layout and (caveat := layout.caveat(format))}),
            groups=[
                (
                    group,
                    spread(module.weight_snr for module in group.members),
                    spread(module.output_snr for module in group.members),
                )
                for group in groups
            ],
            masked=any(name.endswith("ForMaskedLM") for name in config.get("architectures") or []),
            remote_code="auto_map" in config,
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
    here = "transformers" if report.layout in LAYOUTS else "halfbyte"
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


def _formats(report: Report) -> list[WeightFormat]:
    """The formats of the quantized modules, the most frequent first."""
    recipe = Recipe.load(report.recipe)
    count: dict[WeightFormat, int] = {}
    for module in report.modules:
        format = recipe.format_of(module.path)
        if format is not None:
            count[format] = count.get(format, 0) + 1
    return sorted(count, key=lambda format: -count[format])
