"""What every recipe costs in quality, on models that were really trained: the tables of README.md and docs/.

    python benchmarks/quality.py --models ref-llama-22m ref-llama-22m-outliers --calibration calib.txt --text test.txt \
        --json docs/measurements/quality.json --readme README.md

One protocol for every row: calibration on the first 128 x 512 tokens of the calibration text without BOS, perplexity
over the first 16 windows of 1024 tokens of the test text, drift against the float model on the same tokens, float32.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import halfbyte
from halfbyte.evaluation.perplexity import evaluate
from halfbyte.pipeline import quantize
from halfbyte.recipe import shipped
from halfbyte.runtime.load import load
from page import tell


def measure(model: Path, recipe: str, options: argparse.Namespace, original: Any) -> dict[str, Any]:
    """One row: quantize, load again, evaluate against the float model."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        report = quantize(
            model, recipe, output, calibration=options.calibration, samples=128, length=512, device=options.device,
            dtype=options.dtype,
        )  # fmt: skip
        quantized = load(output, device=options.evaluate_on, dtype=torch.float32)
        result = evaluate(quantized, against=original, text=options.text, window=1024, limit_windows=16)
    return {
        "model": model.name, "recipe": Path(recipe).stem, "perplexity": result.perplexity, "kl_mean": result.kl_mean,
        "kl_p99": result.kl_p99, "top1_agreement": result.top1_agreement, "bits_per_weight": report.bits_per_weight or 16.0,
        "seconds": round(report.seconds, 1),
    }  # fmt: skip


def merged(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier rows and new ones, model by model; what was measured again is new."""
    rows = {(row["model"], row["recipe"]): row for row in [*before, *now]}
    return [rows[key] for model in dict.fromkeys(key[0] for key in rows) for key in rows if key[0] == model]


def table(rows: list[dict[str, Any]], models: list[str]) -> str:
    """Markdown: a line per recipe, perplexity and mean KL per model."""
    head = ["recipe", "bits/weight"] + [f"{model}: perplexity | KL" for model in models]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * (2 + 2 * len(models))]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        cells = {row["model"]: row for row in rows if row["recipe"] == recipe}
        bits = next(iter(cells.values()))["bits_per_weight"]
        values = [
            f"{cells[m]['perplexity']:.2f} | {cells[m]['kl_mean']:.4f}" if m in cells else "– | –" for m in models
        ]
        lines.append(f"| `{recipe}` | {bits:.2f} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=[])
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--render", type=Path, help="measure nothing, take the rows of this earlier --json")
    parser.add_argument("--recipes", nargs="+", default=shipped())
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--evaluate-on", default="cpu", help="the device of the evaluation, apart from the quantization's"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--add", action="store_true", help="keep the rows of --json that are not measured again")
    parser.add_argument("--dtype", default="float32", help="of calibration passes")
    parser.add_argument("--readme", type=Path, help="replace the table between the markers of this file")
    options = parser.parse_args()
    if options.render:
        rows = json.loads(options.render.read_text())["rows"]
        tell(table(rows, list(dict.fromkeys(row["model"] for row in rows))), options.readme, "measured")
        return
    rows: list[dict[str, Any]] = []
    for model in options.models:
        original = load(model, device=options.evaluate_on, dtype=torch.float32)
        own = evaluate(original, text=options.text, window=1024, limit_windows=16)
        rows.append({"model": model.name, "recipe": "float", "perplexity": own.perplexity, "kl_mean": 0.0,
                     "kl_p99": 0.0, "top1_agreement": 1.0, "bits_per_weight": 16.0, "seconds": 0.0})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        for recipe in options.recipes:
            rows.append(measure(model, recipe, options, original))
            print(json.dumps(rows[-1]), flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    if options.add:
        rows = merged(json.loads(options.json.read_text())["rows"], [row | {"device": device} for row in rows])
    versions = {"halfbyte": halfbyte.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    if options.json:
        options.json.write_text(json.dumps({"device": device, "versions": versions, "rows": rows}, indent=1))
    rendered = table(rows, list(dict.fromkeys(row["model"] for row in rows)))
    tell(rendered, options.readme, "measured")


if __name__ == "__main__":
    main()
