"""What the choices inside a method are worth: exponents and links of SmoothQuant, limits of FPTQ, the split of LLM.int8().

    python benchmarks/choices.py --models ref-llama-22m ref-llama-22m-outliers --calibration calib.txt --text test.txt \
        --json docs/measurements/choices.json --docs docs

The protocol is that of quality.py. Each table goes between the markers of its page; KL is in thousandths of a nat.
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
from halfbyte.runtime.load import load

ROUND, GPTQ = {"method": "rtn"}, {"method": "gptq", "ranges": "mse"}
WEIGHTS_8 = {"bits": 8, "convention": "odyssey", "granularity": {"kind": "channel"}}
WEIGHTS_4 = {"bits": 4, "granularity": {"kind": "group", "size": 128}}


def recipe(*steps: dict[str, Any], weights: Any = WEIGHTS_8, split: Any = None, down: Any = None) -> dict[str, Any]:
    """8-bit inputs; `split`: outlier columns of all inputs; `down`: what differs for the inputs of down_proj."""
    overrides = {} if down is None else {"*.down_proj": {"activations": down}}
    scheme = {"weights": weights, "activations": {"bits": 8, "outliers": split}}
    return {"scheme": scheme, "steps": list(steps), "overrides": overrides}


def smooth(**options: Any) -> dict[str, Any]:
    return {"method": "smoothquant", **options}


def fptq(**options: Any) -> dict[str, Any]:
    return {"method": "fptq", **options}


def split(threshold: float, columns: str, weights: str) -> dict[str, Any]:
    return {"threshold": threshold, "columns": columns, "weights": weights}


STATIC, DYNAMIC = split(6.0, "static", "kept"), split(6.0, "dynamic", "dequantized")
PAPER = {"dynamic_from": 150.0, "noise": None}
BALANCE = {"method": "awq", "duo": True}

CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "smoothquant": {
        "no smoothing": recipe(ROUND),
        "no smoothing, `ranges: mse`": recipe({"method": "rtn", "ranges": "mse"}),
        "`links: norms`, α = 0.8": recipe(smooth(alpha=0.8, links="norms"), ROUND),
        "`links: norms`, searched": recipe(smooth(links="norms"), ROUND),
        "all links, α = 0.5": recipe(smooth(alpha=0.5), ROUND),
        "all links, α = 0.8": recipe(smooth(alpha=0.8), ROUND),
        "**all links, searched**": recipe(smooth(), ROUND),
        "all links, searched, `ranges: mse`": recipe(smooth(), {"method": "rtn", "ranges": "mse"}),
        "all links, searched, then GPTQ": recipe(smooth(), {"method": "gptq"}),
    },
    "fptq": {
        "every input per token": recipe(GPTQ, weights=WEIGHTS_4),
        "the paper's limits": recipe(fptq(**PAPER), GPTQ, weights=WEIGHTS_4),
        "the paper's limits, `links: all`": recipe(fptq(**PAPER, links="all"), GPTQ, weights=WEIGHTS_4),
        "no upper limit": recipe(fptq(noise=None), GPTQ, weights=WEIGHTS_4),
        "no upper limit, `links: all`": recipe(fptq(noise=None, links="all"), GPTQ, weights=WEIGHTS_4),
        "**no upper limit, noise up to 6**": recipe(fptq(), GPTQ, weights=WEIGHTS_4),
        "the same, `links: all`": recipe(fptq(links="all"), GPTQ, weights=WEIGHTS_4),
        "the same, plain rounding": recipe(fptq(), {"method": "rtn", "ranges": "mse"}, weights=WEIGHTS_4),
        "SmoothQuant before, `noise: null`": recipe(smooth(), fptq(noise=None), GPTQ, weights=WEIGHTS_4),
        "SmoothQuant before": recipe(smooth(), fptq(), GPTQ, weights=WEIGHTS_4),
        "AWQ (duo) before": recipe(BALANCE, fptq(), GPTQ, weights=WEIGHTS_4),
        "AWQ (duo), every input per token": recipe(BALANCE, GPTQ, weights=WEIGHTS_4),
    },
    "llm-int8": {
        "no split": recipe(ROUND),
        "dynamic, dequantized": recipe(ROUND, split=DYNAMIC),
        "dynamic, kept": recipe(ROUND, split=split(6.0, "dynamic", "kept")),
        "dynamic, dequantized, not `down_proj`": recipe(ROUND, split=DYNAMIC, down={"outliers": None}),
        "static, dequantized": recipe(ROUND, split=split(6.0, "static", "dequantized")),
        "static, kept": recipe(ROUND, split=STATIC),
        "static, kept, not `down_proj`": recipe(ROUND, split=STATIC, down={"outliers": None}),
        "static, kept, `down_proj` at 20": recipe(
            ROUND, split=STATIC, down={"outliers": split(20.0, "static", "kept")}
        ),
    },
}  # fmt: skip


def measure(model: Path, what: dict[str, Any], options: argparse.Namespace, original: Any) -> dict[str, float]:
    """Quantize, load again, evaluate against the float model."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        quantize(
            model, what, output, calibration=options.calibration, samples=options.samples, length=512,
            device=options.device, dtype="float32",
        )  # fmt: skip
        quantized = load(output, device=options.evaluate_on, dtype=torch.float32)
        result = evaluate(quantized, against=original, text=options.text, window=1024, limit_windows=options.windows)
    return {"perplexity": result.perplexity, "kl_mean": result.kl_mean or 0.0}


def table(rows: list[dict[str, Any]], page: str) -> str:
    """Markdown: a line per variant, perplexity and KL per model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(row["model"], row["variant"]): row for row in rows if row["page"] == page}
    head = ["variant"] + [f"{kind}{what}" for kind in ("", "outliers: ")[: len(models)] for what in ("ppl", "KL·10³")]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for variant in dict.fromkeys(row["variant"] for row in rows if row["page"] == page):
        values = [cells[model, variant] for model in models]
        shown = [cell for row in values for cell in (f"{row['perplexity']:.2f}", f"{1e3 * row['kl_mean']:.1f}")]
        lines.append("| " + " | ".join([variant, *shown]) + " |")
    return "\n".join(lines)


def write(rendered: str, page: Path, name: str) -> None:
    """Put a table between the markers of its page."""
    begin, end = f"<!-- choices: begin {name} -->", "<!-- choices: end -->"
    before, rest = page.read_text().split(begin)
    page.write_text(before + begin + "\n" + rendered + "\n" + end + rest.split(end, 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, default=[])
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--pages", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--samples", type=int, default=128, help="of 512 tokens")
    parser.add_argument("--windows", type=int, default=16, help="of 1024 tokens")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--evaluate-on", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--render", type=Path, help="measure nothing, take the rows of this earlier --json")
    parser.add_argument("--docs", type=Path, help="the folder of the pages that take the tables")
    options = parser.parse_args()
    rows = json.loads(options.render.read_text())["rows"] if options.render else []
    for model in options.models:
        original = load(model, device=options.evaluate_on, dtype=torch.float32)
        for page in options.pages:
            for variant, what in CHOICES[page].items():
                found = measure(model, what, options, original)
                rows.append({"model": model.name, "page": page, "variant": variant, **found})
                print(json.dumps(rows[-1]), flush=True)
    if options.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        versions = {
            "halfbyte": halfbyte.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
        head = {"device": device, "versions": versions, "samples": options.samples, "windows": options.windows}
        options.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    for page in dict.fromkeys(row["page"] for row in rows):
        print(table(rows, page))
        if options.docs:
            write(table(rows, page), options.docs / f"{page}.md", page)


if __name__ == "__main__":
    main()
