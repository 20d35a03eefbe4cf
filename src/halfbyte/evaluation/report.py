"""The report of a run: what was quantized, how well, from what, and how long it took."""

import math
import re
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml

from halfbyte.evaluation import chart, units
from halfbyte.evaluation.summary import grouped, in_block, spread
from halfbyte.plan import Plan
from halfbyte.record import ModuleRecord

WEAKEST = 10
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the closing table, report.json, report.html and the model card say."""

    model: str
    recipe: dict[str, Any]
    modules: tuple[ModuleRecord, ...]
    unquantized: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_host: int  # bytes
    peak_device: int  # bytes
    provenance: dict[str, Any] = field(default_factory=dict)
    layout: str = "compressed-tensors"  # the checkpoint's quant_method
    bits_per_weight: float | None = None  # of the quantized modules, scales and zero points included

    def to_json(self) -> dict[str, Any]:
        """Plain values, for report.json. JSON has no infinity: an SNR where nothing at all was lost is null."""
        fields = asdict(self)
        for module in fields["modules"]:
            for key in ("weight_snr", "output_snr"):
                if module[key] is not None and not math.isfinite(module[key]):
                    module[key] = None
        return fields


def completed(report: Report, plan: Plan) -> Report:
    """The report with what the plan knows of the checkpoint."""
    quantized = [module for module in plan if module.format is not None]
    bits = 8 * sum(module.bytes_after for module in quantized)
    weights = sum(module.shape[0] * module.shape[1] for module in quantized)
    return replace(report, layout=plan.layout, bits_per_weight=bits / weights if weights else None)


def html(report: Report) -> str:
    """report.html: one file that needs nothing else, for screens of any width, light or dark."""
    observed = any(module.output_snr is not None for module in report.modules)
    groups = grouped(report.modules, lambda module: (module.format, module.method, module.shape))
    return (
        templates()
        .get_template("report.html")
        .render(
            report=report,
            observed=observed,
            groups=[
                (
                    group,
                    spread(module.weight_snr for module in group.members),
                    spread(module.output_snr for module in group.members),
                    min(module.tokens for module in group.members),
                )
                for group in groups
            ],
            weakest=weakest(report)[:WEAKEST],
            chart=chart.chart(report.modules),
            box=chart,
            recipe=yaml.safe_dump(report.recipe, sort_keys=False),
        )
    )


def weakest(report: Report) -> list[ModuleRecord]:
    """The modules by what was lost, most first: in outputs where those were observed, else in weights."""
    observed = any(module.output_snr is not None for module in report.modules)

    def measured(module: ModuleRecord) -> float:
        # what the head gives is not observed
        value = module.output_snr if observed and in_block(module.path) else module.weight_snr
        return -math.inf if value is None else value

    return sorted(report.modules, key=measured)


def model_name(model: str) -> str:
    """The hub's name of a model, or the name of its folder without the way there."""
    cached = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots", model)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return model if HUB_NAME.fullmatch(model) and not Path(model).is_dir() else Path(model).expanduser().resolve().name


@cache
def templates() -> jinja2.Environment:
    """The templates of this package; what a template asks for and does not get is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("halfbyte.evaluation"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        size=units.size,
        duration=units.duration,
        decibels=units.decibels,
        percent=units.percent,
        model_name=model_name,
    )
    return environment
