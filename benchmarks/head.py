"""What a head in 8 bits costs in quality: the table of docs/head.md.

    python benchmarks/head.py --models ref-llama-22m ref-llama-22m-outliers --calibration calib.txt --text test.txt \
        --json docs/measurements/head.json --page docs/head.md

The protocol of quality.py. What the blocks become does not depend on the head, so they are quantized once for each model,
and the head is replaced in memory by what a checkpoint of `scheme.head` holds: the nearest codes to the source's weight.
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
from halfbyte.models.load import WeightFiles, skeleton
from halfbyte.numerics.activations import InputQuantizer
from halfbyte.numerics.quantized import QuantizedModule
from halfbyte.numerics.rows import round_rows, rows_snr
from halfbyte.pipeline import quantize
from halfbyte.plan import resolved
from halfbyte.runtime.load import load
from halfbyte.runtime.replacement import from_module
from halfbyte.scheme import ActivationFormat, PerChannel, PerGroup, WeightFormat
from page import tell

PER_CHANNEL = WeightFormat(bits=8, granularity=PerChannel())
IN_GROUPS = WeightFormat(bits=8, granularity=PerGroup(size=128))
HEADS: dict[str, tuple[WeightFormat, ActivationFormat | None] | None] = {
    "16 bit": None,
    "W8A16 g128": (IN_GROUPS, None),
    "W8A16 per channel": (PER_CHANNEL, None),
    "W8A8 per channel": (PER_CHANNEL, ActivationFormat()),
}


def replace_head(model: Any, weight: torch.Tensor, formats: tuple[WeightFormat, ActivationFormat | None]) -> float:
    """Put a quantized head in a loaded model; the SNR of its weight. Edits in place."""
    format, activations = formats
    rounded = round_rows(weight, resolved(format, weight.dtype, activations))
    inputs = None if activations is None else InputQuantizer(activations)
    model.lm_head = from_module(QuantizedModule(rounded, inputs), None).prepare(torch.float32)
    return rows_snr(weight, rounded)


def head_of(model: Path) -> torch.Tensor:
    """The head's weight as it is stored, its own or the embedding's."""
    bones, files = skeleton(model), WeightFiles(model)
    return files.read(bones.shared_name(f"{bones.output_head}.weight", files))


def measure(
    folder: Path, blocks: str, weight: torch.Tensor, original: Any, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each head on the blocks of `folder`."""
    rows = []
    pair = load(folder, device="cpu", dtype=torch.float32)
    for name, formats in HEADS.items():
        snr = None if formats is None else replace_head(pair[0], weight, formats)
        found = evaluate(pair, against=original, text=options.text, window=1024, limit_windows=16)
        rows.append(
            {"blocks": blocks, "head": name, "perplexity": found.perplexity, "kl_mean": found.kl_mean,
             "kl_p99": found.kl_p99, "top1_agreement": found.top1_agreement, "weight_snr": snr}
        )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each head on the same blocks, perplexity and mean KL for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(row["blocks"], row["head"], row["model"]): row for row in rows}
    lines = ["| blocks | head | " + " | ".join(f"{model}: perplexity | KL" for model in models) + " |"]
    lines.append("|" + "---|" * (2 + 2 * len(models)))
    for blocks, head in dict.fromkeys((row["blocks"], row["head"]) for row in rows):
        found = [cells[blocks, head, model] for model in models]
        values = [f"{row['perplexity']:.3f} | {row['kl_mean']:.5f}" for row in found]
        lines.append(f"| {blocks} | {head} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True, help="models whose head is called lm_head")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--recipe", default="integer-scale-w4a8")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="replace the table between the markers of this file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in options.models:
        original, weight = load(model, device="cpu", dtype=torch.float32), head_of(model)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "out"
            quantize(
                model, options.recipe, made, calibration=options.calibration, samples=128, length=512, device="cpu",
                dtype="float32",
            )  # fmt: skip
            for blocks, place in (("float", model), (options.recipe, made)):
                found = measure(place, blocks, weight, original, options)
                rows += [{"model": model.name, **row} for row in found]
                print(*(json.dumps(row) for row in rows[-len(found) :]), sep="\n", flush=True)
    versions = {"halfbyte": halfbyte.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    if options.json:
        device = platform.processor() or "cpu"
        options.json.write_text(json.dumps({"device": device, "versions": versions, "rows": rows}, indent=1) + "\n")
    tell(table(rows), options.page, "head")


if __name__ == "__main__":
    main()
