"""What a 4-bit cache costs in quality, choice by choice: the ablation table of docs/kv-cache.md and docs/wkvquant.md.

    python benchmarks/kv_cache.py --models ref-llama-22m ref-llama-22m-outliers --calibration calib.txt --text test.txt \
        --json docs/measurements/kv_cache.json

Calibration on the first --samples x 512 tokens of the calibration text, perplexity through the cache over the first 16 windows
of 1024 tokens of the test text, the second copy of a passage of 64 tokens at distances of 64 to 960,
float32.
A row that is in --json already is not measured again.
"""

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import halfbyte
from halfbyte.calibration.cache import CacheStatistics, observe_cache
from halfbyte.calibration.data import calibration_tokens
from halfbyte.calibration.walk import enter
from halfbyte.evaluation.long_context import long_context
from halfbyte.evaluation.perplexity import evaluate
from halfbyte.methods.wkv import WKV
from halfbyte.numerics.cache import Smoothing
from halfbyte.runtime.cache_plan import attach_cache, cache_plan, named_format
from halfbyte.runtime.load import load
from halfbyte.scheme import CacheFormat


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    format: CacheFormat | None
    step: WKV | None = None


DISTANCES = (64, 128, 256, 512, 960)  # the reference model was trained on 1024 tokens
PLAIN, PRESENT = named_format("int4"), named_format("int4-present")
BEFORE = named_format("int4-prerope")
ROWS = [
    Row("float", None),
    Row("2D before RoPE", BEFORE, WKV()),
    Row("2D before RoPE, 4 sinks, window of 64", named_format("int4-prerope-s4-w64"), WKV()),
    Row("plain", PLAIN),
    Row("2D after RoPE", PLAIN, WKV()),
    Row("KIVI 4 bits", named_format("kivi")),
    Row("2D before RoPE, current token too", named_format("int4-present-prerope"), WKV()),
    Row("plain, current token too", PRESENT),
    Row("2D pairs tied", PLAIN, WKV(tied=True)),
    Row("plain before RoPE", BEFORE),
    Row("2D before RoPE, extremes", BEFORE, WKV(search=False)),
    Row("2D after RoPE, extremes", PLAIN, WKV(search=False)),
    Row("2D after RoPE, current token too", PRESENT, WKV()),
    Row("KIVI 4 bits without a window", named_format("kivi-w0")),
    Row("plain with 4 sinks and a window of 64", named_format("int4-s4-w64")),
    Row("2D before RoPE, 3 bits", named_format("int3-prerope"), WKV()),
    Row("KIVI 2 bits", named_format("kivi2")),
    Row("8 bits", named_format("int8")),
]


def observed(pair: Any, text: Path, samples: int, device: torch.device) -> list[CacheStatistics]:
    """What every layer of the float model writes into its cache on the calibration text."""
    model, tokenizer = pair
    tokens = calibration_tokens(text, tokenizer, samples=samples, length=512, seed=0, model=model)
    blocks = list(model.model.layers)
    stream = enter(model, blocks, tokens.batches(8), device, device)
    found = []
    for index, block in enumerate(blocks):
        found.append(observe_cache(block, stream, index))
        stream.advance(block, index)
    return found


def measure(pair: Any, row: Row, seen: list[CacheStatistics], options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    start = time.perf_counter()
    smoothing: dict[int, Smoothing] = {}
    if row.step is not None and row.format is not None:
        smoothing = {i: row.step.smooth(each, row.format, i, len(seen)) for i, each in enumerate(seen)}
    searched = time.perf_counter() - start
    attach_cache(pair[0], None if row.format is None else cache_plan(pair[0], row.format, smoothing))
    result = evaluate(pair, text=options.text, window=1024, limit_windows=options.windows)
    far = long_context(pair, text=options.text, distances=DISTANCES, sequences=2)
    return {
        "row": row.name, "format": None if row.format is None else str(row.format), "perplexity": result.perplexity,
        "second_copy": far.mean, "distances": far.losses, "first_copy": far.first_copy, "worst_head": far.worst_head,
        "calibration_seconds": round(searched, 1), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per row, perplexity, second copy and worst head per model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    head = ["cache"] + [f"{model}: perplexity | second copy | worst head" for model in models]
    lines = ["| " + " | ".join(head) + " |", "|---" * (1 + 3 * len(models)) + "|"]
    for name in dict.fromkeys(row["row"] for row in rows):
        cells = [name]
        for model in models:
            found = [row for row in rows if row["model"] == model and row["row"] == name]
            if not found:
                cells += ["–"] * 3
                continue
            worst = found[0]["worst_head"]
            cells += [f"{found[0]['perplexity']:.2f}", f"{found[0]['second_copy']:.3f}"]
            cells += ["–" if worst is None else f"{100 * worst:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", help="only those whose name is given")
    options = parser.parse_args()
    known = json.loads(options.json.read_text())["rows"] if options.json.is_file() else []
    versions = {"halfbyte": halfbyte.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    cuda = options.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else platform.processor() or "cpu"
    for model in options.models:
        pair = load(model, device=options.device, dtype=torch.float32)
        seen = observed(pair, options.calibration, options.samples, torch.device(options.device))
        for row in ROWS:
            there = any(old["model"] == model.name and old["row"] == row.name for old in known)
            if there or (options.rows and row.name not in options.rows):
                continue
            known.append({"model": model.name, **measure(pair, row, seen, options)})
            print(json.dumps(known[-1]), flush=True)
            options.json.write_text(
                json.dumps(
                    {"device": device, "versions": versions, "samples": options.samples, "rows": known}, indent=1
                )
            )
    print(table(known))


if __name__ == "__main__":
    main()
