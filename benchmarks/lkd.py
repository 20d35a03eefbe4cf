"""What layer-by-layer distillation recovers of what rounding loses, and what it costs: the tables of docs/zeroquant.md.

    python benchmarks/lkd.py --models ref-llama-22m ref-neox-7m --calibration calib.txt --text test.txt --json lkd.json
    python benchmarks/lkd.py --bert-base --json lkd_bert_base.json

W4/8A8: feed-forward weights in 4 bits and groups of 128, attention weights in 8 bits per channel, inputs in 8 bits per
token. Calibration on 128 x 512 tokens, perplexity over the first 16 windows of 1024 tokens of the test text, float32.
`recovered` is the share of the gap between rounding to nearest and the float model.
`--bert-base` times the paper's case instead: 12 layers of BERT-base's shape, 100 steps of 32 x 128 tokens each.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from halfbyte.evaluation.perplexity import evaluate
from halfbyte.pipeline import quantize
from halfbyte.runtime.load import load

RTN: dict[str, Any] = {"method": "rtn"}
GPTQ: dict[str, Any] = {"method": "gptq", "ranges": "mse"}
GPTAQ = GPTQ | {"drift": 0.5}
PAPER: dict[str, Any] = {
    "method": "lkd",
    "learn": "weights", "unit": "weight", "learning_rate": 5e-6, "inputs": "teacher", "norms": False, "decay": False,
}  # fmt: skip
LKD: dict[str, Any] = {"method": "lkd"}
SCALES = LKD | {"learn": "scales"}
WEIGHTS = LKD | {"learn": "weights", "norms": False}

VARIANTS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "rtn": ([RTN], "text"),
    "rtn → lkd, the paper's settings": ([RTN, PAPER], "text"),
    "rtn → lkd, teacher's inputs": ([RTN, LKD | {"inputs": "teacher"}], "text"),
    "rtn → lkd": ([RTN, LKD], "text"),
    "rtn → lkd, scales and norms": ([RTN, SCALES], "text"),
    "rtn → lkd, weights": ([RTN, WEIGHTS], "text"),
    "rtn → lkd, 400 steps": ([RTN, LKD | {"steps": 400}], "text"),
    "gptq": ([GPTQ], "text"),
    "gptq → lkd, scales and norms": ([GPTQ, SCALES], "text"),
    "gptq → lkd": ([GPTQ, LKD], "text"),
    "gptq → lkd, weights": ([GPTQ, WEIGHTS], "text"),
    "gptq, drift 0.5": ([GPTAQ], "text"),
    "gptq, drift 0.5 → lkd": ([GPTAQ, LKD], "text"),
    "gptq → lkd, other domain": ([GPTQ, LKD], "other"),
    "gptq → lkd, self-written": ([GPTQ, LKD], "self"),
    "gptq, random tokens": ([GPTQ], "random"),
    "gptq → lkd, random tokens": ([GPTQ, LKD], "random"),
    "rtn → lkd, random tokens": ([RTN, LKD], "random"),
}


def recipe(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """W4/8A8 with these steps."""
    four = {"bits": 4, "convention": "gptq", "granularity": {"kind": "group", "size": 128}}
    globs = ("*.mlp.*", "*.intermediate.dense", "*[0-9].output.dense")
    return {
        "scheme": {
            "weights": {"bits": 8, "convention": "deepspeed", "granularity": {"kind": "channel"}},
            "activations": {"bits": 8},
        },
        "overrides": dict.fromkeys(globs, four),
        "steps": steps,
    }


def measure(model: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: quantize, load again, evaluate."""
    steps, data = VARIANTS[name]
    source = {"text": options.calibration, "other": options.other}.get(data, data)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        report = quantize(
            model, recipe(steps), output, calibration=source, samples=128, length=512, device=options.device,
            dtype="float32",
        )  # fmt: skip
        quantized = load(output, device=options.evaluate_on, dtype=torch.float32)
        found = evaluate(quantized, text=options.text, window=1024, limit_windows=16)
    return {
        "model": model.name, "variant": name, "data": data, "perplexity": found.perplexity,
        "seconds": round(report.seconds, 1), "peak_device_gb": round(report.peak_device / 1e9, 2),
    }  # fmt: skip


def with_shares(rows: list[dict[str, Any]], exact: dict[str, float]) -> list[dict[str, Any]]:
    """The rows with the share of rounding's gap that each recovers."""
    nearest = {row["model"]: row["perplexity"] for row in rows if row["variant"] == "rtn"}
    for row in rows:
        if row["model"] not in nearest:
            continue
        gap = nearest[row["model"]] - exact[row["model"]]
        row["recovered"] = round((nearest[row["model"]] - row["perplexity"]) / gap, 3)
    return rows


def time_bert_base(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to distil twelve random layers of BERT-base's shape."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "bert"
        config = transformers.BertConfig(vocab_size=8192)
        transformers.BertForMaskedLM(config).to(torch.bfloat16).save_pretrained(source)
        transformers.AutoTokenizer.from_pretrained(options.tokenizer).save_pretrained(source)
        seconds = {}
        for name, steps in {"rtn": [RTN], "rtn → lkd": [RTN, LKD | {"tokens_per_step": 4096}]}.items():
            start = time.perf_counter()
            report = quantize(
                source, recipe(steps), Path(folder) / f"out-{len(seconds)}", calibration="random", samples=128,
                length=128, device=options.device,
            )  # fmt: skip
            seconds[name] = {"seconds": time.perf_counter() - start, "peak_device_gb": report.peak_device / 1e9}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"shape": "BERT-base, 12 layers", "steps": 100, "tokens_per_step": 4096, "device": device, "runs": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", type=Path, default=[])
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--other", type=Path, help="text of another domain")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--evaluate-on", default="cpu")
    parser.add_argument("--bert-base", action="store_true")
    parser.add_argument("--tokenizer", help="any tokenizer, for --bert-base; its random tokens are all that is used")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.bert_base:
        options.json.write_text(json.dumps(time_bert_base(options), indent=1, ensure_ascii=False) + "\n")
        return
    rows, exact = [], {}
    for model in options.models:
        pair = load(model, device=options.evaluate_on, dtype=torch.float32)
        exact[model.name] = evaluate(pair, text=options.text, window=1024, limit_windows=16).perplexity
        print(f"{model.name}: float {exact[model.name]:.3f}", flush=True)
        for name in options.variants:
            if VARIANTS[name][1] == "other" and options.other is None:
                continue
            rows.append(measure(model, name, options))
            options.json.write_text(
                json.dumps({"float": exact, "rows": with_shares(rows, exact)}, indent=1, ensure_ascii=False)
            )
            print(f"  {name:40s} {rows[-1]['perplexity']:.3f}  {rows[-1]['seconds']} s", flush=True)
    result = {"float": exact, "rows": with_shares(rows, exact)}
    options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
