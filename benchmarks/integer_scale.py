"""Integer scales against float scales: perplexity and weight error of RTN and GPTQ, found on the integer grid or plugged in.

    python benchmarks/integer_scale.py --models ref-llama-22m ref-llama-22m-outliers --calibration calib.txt --text test.txt \
        --json docs/measurements/integer_scale.json --plot docs/integer-scale.svg --page docs/integer-scale.md

W4A8, groups of 128, inputs per token; `--smooth` puts SmoothQuant before. A seed other than 0 shuffles the paragraphs of the
calibration text; with several the table has means and their standard errors. Weight error: mean squared over all
quantized weights, relative to float scales with the same method. The plug-in form is the paper's: the codes of float
scales, their scales rounded to S/α.
"""

import argparse
import json
import platform
import random
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import transformers

import halfbyte
from halfbyte.evaluation.perplexity import evaluate
from halfbyte.pipeline import quantize
from halfbyte.recipe import Recipe
from halfbyte.runtime.load import load
from line_plot import Line, Plot, svg
from page import tell

METHODS: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"method": "rtn"}],
    "rtn-mse": [{"method": "rtn", "ranges": "mse"}],
    "gptq": [{"method": "gptq", "ranges": "mse"}],
}
AMPLIFIERS = ("heuristic", 256, 512, 1024, 2048, 4096, "layer", "row")
NEARBY = (896, 928, 960, 992, 1056, 1088, 1120, 1152)  # round the scales otherwise: draws of what 1024 costs
FORMS = {"fresh": False, "plug-in": True}


def scales(amplifiers: list[str | int]) -> Iterator[tuple[str, str | int, dict[str, Any]]]:
    """Form, amplifier and the `scale` of a recipe: float scales first."""
    yield "float", "", {"kind": "float", "dtype": "float32"}
    for amplifier in amplifiers:
        for form, plug_in in FORMS.items():
            yield (
                form,
                amplifier,
                {"kind": "integer", "amplifier": amplifier, "plug_in": plug_in, "overflow": "shrink"},
            )


def recipe(method: str, scale: dict[str, Any], smooth: bool) -> Recipe:
    steps = [*([{"method": "smoothquant"}] if smooth else []), *METHODS[method]]
    weights = {"bits": 4, "granularity": {"kind": "group", "size": 128}, "scale": scale}
    return Recipe.load(
        {"name": method, "scheme": {"weights": weights, "activations": {"bits": 8}}, "steps": steps}
        | {"starved": "round"}
    )


def measure(model: Path, method: str, scale: dict[str, Any], seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize and evaluate; the weight error as mean noise-to-signal of the modules, weighted by their size."""
    chosen = recipe(method, scale, options.smooth)
    with tempfile.TemporaryDirectory() as folder:
        output, text = Path(folder) / "quantized", Path(folder) / "calibration.txt"
        paragraphs = options.calibration.read_text().split("\n\n")
        if seed:
            random.Random(seed).shuffle(paragraphs)
        text.write_text("\n\n".join(paragraphs))
        report = quantize(
            model, chosen, output, calibration=text if chosen.needs_data else None,
            samples=options.samples, length=512, device=options.device, dtype="float32",
        )  # fmt: skip
        found = halfbyte.inspect(output)
        quantized = load(output, device=options.evaluate_on, dtype=torch.float32)
        result = evaluate(quantized, text=options.text, window=1024, limit_windows=options.windows)
    sizes = [module.shape[0] * module.shape[1] for module in report.modules]
    noise = [10 ** (-module.weight_snr / 10) for module in report.modules]
    return {
        "perplexity": result.perplexity,
        "weight_error": sum(n * s for n, s in zip(noise, sizes, strict=True)) / sum(sizes),
        "accumulator": found.accumulator,
        "bits_per_weight": found.bits_per_weight,
        "problems": list(found.problems),
    }


def told(figures: list[float], sign: str = "") -> str:
    """The mean over the draws, with its standard error where there are several."""
    error = f" ± {stdev(figures) / len(figures) ** 0.5:.3f}" if len(figures) > 1 else ""
    return f"{fmean(figures):{sign}.3f}{error}"


Found = dict[tuple[str, str, str, str | int], list[dict[str, Any]]]


def table(rows: list[dict[str, Any]]) -> str:
    """Float scales, and the difference to them on the grid and plugged in; a column for each model and method."""
    found: Found = {}
    for row in rows:
        found.setdefault((row["model"], row["method"], row["form"], row["amplifier"]), []).append(row)
    columns = list(dict.fromkeys(key[:2] for key in found))
    amplifiers = [amplifier for amplifier in AMPLIFIERS if any(key[3] == amplifier for key in found)]
    head = ["α", *(f"{model}: {method}" for model, method in columns)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    exact = [told([row["perplexity"] for row in found[model, method, "float", ""]]) for model, method in columns]
    lines.append(f"| float | {' | '.join(exact)} |")
    for label, alike in [(str(amplifier), (amplifier,)) for amplifier in amplifiers] + [
        (f"{NEARBY[0]} to {NEARBY[-1]}", NEARBY)
    ]:
        cells = [" / ".join(difference(found, *column, form, alike) for form in FORMS) for column in columns]
        if any(cell != "– / –" for cell in cells):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(found: Found, model: str, method: str, form: str, amplifiers: Sequence[str | int]) -> str:
    """To float scales with the same calibration text, on the same device: the mean over seeds and amplifiers."""
    draw = lambda row: (row["seed"], row.get("device"))  # noqa: E731
    exact = {draw(row): row["perplexity"] for row in found[model, method, "float", ""]}
    mine = [row for amplifier in amplifiers for row in found.get((model, method, form, amplifier), [])]
    differences = [row["perplexity"] - exact[draw(row)] for row in mine if draw(row) in exact]
    return told(differences, "+") if differences else "–"


def plot(rows: list[dict[str, Any]], model: str) -> str:
    """Perplexity over the amplifier, as SVG: a line for each method and form, float scales dashed."""
    lines = []
    for method in METHODS:
        mine = [row for row in rows if (row["model"], row["method"]) == (model, method)]
        numbers = sorted({row["amplifier"] for row in mine if isinstance(row["amplifier"], int)})
        for form in FORMS:
            points = [
                (str(number), fmean(found))
                for number in numbers
                if (found := [row["perplexity"] for row in mine if (row["form"], row["amplifier"]) == (form, number)])
            ]
            lines.append(Line(f"{method}, {'on the grid' if form == 'fresh' else form}", tuple(points)))
        exact = [row["perplexity"] for row in mine if row["form"] == "float"]
        if exact:
            level = tuple((str(number), fmean(exact)) for number in numbers)
            lines.append(Line(f"{method}, float scales", level, dashed=True))
    return svg(Plot(f"{model}, W4A8 g128", "amplifier α", "perplexity", tuple(lines)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=[])
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--amplifiers", nargs="+", default=[str(amplifier) for amplifier in AMPLIFIERS])
    parser.add_argument("--smooth", action="store_true", help="SmoothQuant before")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--evaluate-on", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--render", type=Path, help="measure nothing, take the rows of this earlier --json")
    parser.add_argument("--plot", type=Path, help="SVG of the first model")
    parser.add_argument("--page", type=Path, help="replace the table between the markers of this file")
    options = parser.parse_args()
    if options.render:
        rows = json.loads(options.render.read_text())["rows"]
    else:
        rows = run(options)
    tell(table(rows), options.page, "integer-scale")
    if options.plot:
        options.plot.write_text(plot(rows, rows[0]["model"]))


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row, written to --json as it comes."""
    amplifiers = [int(word) if word.isdigit() else word for word in options.amplifiers]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    versions = {"halfbyte": halfbyte.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    protocol = {"samples": options.samples, "length": 512, "windows": options.windows, "window": 1024}
    rows: list[dict[str, Any]] = []
    for model in options.models:
        for method in options.methods:
            for one, seed in product(list(scales(amplifiers)), list[int](options.seeds)):
                form, amplifier, scale = one
                measured = measure(model, method, scale, seed, options)
                name = model.name + (" smoothed" if options.smooth else "")
                which = {"model": name, "method": method, "form": form, "amplifier": amplifier, "seed": seed}
                rows.append(which | measured | {"device": device})
                print(json.dumps(rows[-1]), flush=True)
                if options.json:
                    options.json.write_text(
                        json.dumps({"versions": versions, "protocol": protocol, "rows": rows}, indent=1)
                    )
    return rows


if __name__ == "__main__":
    main()
