"""What quantization costs an encoder: masked words found by a BERT that was really trained, variant by variant.

    python benchmarks/bert.py --corpus wiki-books.txt.xz --texts out/bert-texts
    python benchmarks/bert.py --model ref-bert --texts out/bert-texts --json docs/measurements/bert.json --device cuda

The first writes the two texts: the beginning of what benchmarks/train_bert.py trains on, and what it holds out. Every
variant is calibrated on the same 128 x 128 tokens of the first (or on random tokens), saved, loaded again, and measured
on the second in float32, beside the float model on the same hidden tokens.

W4/8A8 is ZeroQuant's mix: feed-forward weights in 4 bits, attention weights in 8, inputs in 8 bits per token.
"""

import argparse
import json
import lzma
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import halfbyte
from halfbyte.evaluation.perplexity import Evaluation, evaluate
from halfbyte.pipeline import quantize
from halfbyte.runtime.load import load
from train_bert import HELD_OUT_EVERY

CALIBRATION, HELD_OUT = "calibration.txt", "held-out.txt"
CALIBRATION_CHARACTERS = 400_000
SEPARATOR = "[SEP]"  # after each document, as the model was trained
SAMPLES, LENGTH = 128, 128
FEED_FORWARD = ("*.intermediate.dense", "*[0-9].output.dense")

RTN: dict[str, Any] = {"method": "rtn"}
GPTQ: dict[str, Any] = {"method": "gptq"}
LKD: dict[str, Any] = {"method": "lkd"}
PAPER: dict[str, Any] = LKD | {
    "learn": "weights", "unit": "weight", "learning_rate": 5e-6, "inputs": "teacher", "norms": False, "decay": False,
}  # fmt: skip

CHANNEL: dict[str, Any] = {"kind": "channel"}
PER_TENSOR: dict[str, Any] = {"bits": 8, "convention": "odyssey", "granularity": {"kind": "tensor"}}
EIGHT: dict[str, Any] = {"bits": 8, "convention": "odyssey", "granularity": CHANNEL}
EIGHT_COUNT: dict[str, Any] = {"bits": 8, "convention": "deepspeed", "granularity": {"kind": "count", "count": 48}}
FOUR: dict[str, Any] = {"bits": 4, "convention": "gptq", "granularity": {"kind": "group", "size": 128}}
FOUR_COUNT: dict[str, Any] = {"bits": 4, "convention": "deepspeed", "granularity": {"kind": "count", "count": 48}}
STATIC: dict[str, Any] = {"granularity": "tensor", "dynamic": False}


def variant(
    *steps: dict[str, Any],
    data: str | None = "text",
    weights: dict[str, Any] = EIGHT,
    feed_forward: dict[str, Any] | None = None,
    activations: dict[str, Any] | None = None,
    tables: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], str | None]:
    """A recipe, and what it is calibrated on (None: nothing)."""
    overrides = {} if feed_forward is None else dict.fromkeys(FEED_FORWARD, feed_forward)
    scheme = {"weights": weights, "activations": {"bits": 8} | (activations or {}), "embeddings": tables}
    return {"scheme": scheme, "overrides": overrides, "steps": list(steps)}, data


VARIANTS = {
    "W8A8, one scale per tensor, static": variant(RTN, weights=PER_TENSOR, activations=STATIC),
    "W8A8, per channel": variant(RTN, data=None),
    "W8A8, per channel, embeddings too": variant(RTN, data=None, tables=EIGHT | {"stored": "bytes"}),
    "W8A8, 48 groups": variant(RTN, data=None, weights=EIGHT_COUNT),
    "W4/8A8, rtn": variant(RTN, data=None, feed_forward=FOUR),
    "W4/8A8, gptq": variant(GPTQ, feed_forward=FOUR),
    "W4/8A8, rtn → lkd": variant(RTN, LKD, feed_forward=FOUR),
    "W4/8A8, gptq → lkd": variant(GPTQ, LKD, feed_forward=FOUR),
    "W4/8A8, gptq, random tokens": variant(GPTQ, feed_forward=FOUR, data="random"),
    "W4/8A8, rtn → lkd, random tokens": variant(RTN, LKD, feed_forward=FOUR, data="random"),
    "W4/8A8, gptq → lkd, random tokens": variant(GPTQ, LKD, feed_forward=FOUR, data="random"),
    "W4/8A8, 48 groups, rtn": variant(RTN, data=None, weights=EIGHT_COUNT, feed_forward=FOUR_COUNT),
    "W4/8A8, 48 groups, rtn → lkd, the paper's settings": variant(
        RTN, PAPER, weights=EIGHT_COUNT, feed_forward=FOUR_COUNT
    ),
    "W4/8A8, 48 groups, rtn → lkd": variant(RTN, LKD, weights=EIGHT_COUNT, feed_forward=FOUR_COUNT),
    "W4/8A8, 48 groups, rtn → lkd, random tokens": variant(
        RTN, LKD, weights=EIGHT_COUNT, feed_forward=FOUR_COUNT, data="random"
    ),
}


def main() -> None:
    """Write the texts, or measure the variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="xz file of documents separated by NUL: only write --texts from it")
    parser.add_argument("--texts", type=Path, required=True, help="folder of the two texts")
    parser.add_argument("--model", type=Path, help="the folder that train_bert.py wrote")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--windows", type=int, help="only the first so many held-out windows")
    parser.add_argument("--tokens-per-step", type=int, default=4096, help="that one step of distillation sees")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="where the figures go; rows that are there are kept")
    options = parser.parse_args()
    if options.corpus:
        write_texts(options.corpus, options.texts)
    elif options.model and options.json:
        measure(options)
    else:
        parser.error("give --corpus, or --model with --json")


def write_texts(corpus: Path, folder: Path) -> None:
    """The split of train_bert.py, as text with `[SEP]` after each document."""
    documents = lzma.decompress(corpus.read_bytes()).decode("utf-8").split("\0")
    held_out = documents[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    del documents[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    few, length = [], 0
    while length < CALIBRATION_CHARACTERS:
        few.append(documents[len(few)])
        length += len(few[-1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in ((CALIBRATION, few), (HELD_OUT, held_out)):
        (folder / name).write_text("".join(text + SEPARATOR for text in texts), encoding="utf-8")


def measure(options: argparse.Namespace) -> None:
    """Every variant beside the float model; the file is written after each, so that a stopped run keeps its rows."""
    original = load(options.model, device=options.device, dtype=torch.float32)
    exact = evaluated(original, None, options)
    print(f"{'float':52s} {100 * exact.accuracy:.2f} %, perplexity {exact.perplexity:.3f}", flush=True)
    rows = {}
    if options.json.is_file():
        earlier = json.loads(options.json.read_text())
        if earlier["predicted"] == exact.predicted:
            rows = {row["variant"]: row for row in earlier["rows"]}
    for name in options.variants:
        rows[name] = row = figures(name, original, exact, options)
        print(
            f"{name:52s} {100 * row['accuracy']:.2f} % ({row['points_lost']:+.2f} lost), perplexity "
            f"{row['perplexity']:.3f}, KL {row['kl_mean']:.5f}, {row['seconds']} s",
            flush=True,
        )
        write(options.json, exact, [rows[known] for known in VARIANTS if known in rows], options)


def figures(name: str, original: Any, exact: Evaluation, options: argparse.Namespace) -> dict[str, Any]:
    """One row: quantize, load again, evaluate against the float model."""
    recipe, data = VARIANTS[name]
    for step in recipe["steps"]:
        if step["method"] == "lkd":
            step["tokens_per_step"] = options.tokens_per_step
    source = options.texts / CALIBRATION if data == "text" else data
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        report = quantize(
            options.model, recipe, output, calibration=source, samples=SAMPLES, length=LENGTH, device=options.device,
            dtype="float32",
        )  # fmt: skip
        found = evaluated(load(output, device=options.device, dtype=torch.float32), original, options)
    return {
        "variant": name,
        "data": data,
        "accuracy": round(found.accuracy, 5),
        "points_lost": round(100 * (exact.accuracy - found.accuracy), 3),
        "perplexity": round(found.perplexity, 4),
        "kl_mean": found.kl_mean,
        "top1_agreement": found.top1_agreement,
        "bits_per_weight": report.bits_per_weight,
        "seconds": round(report.seconds, 1),
    }


def evaluated(model: Any, original: Any, options: argparse.Namespace) -> Evaluation:
    """On the held-out text, all of it or its first windows."""
    return evaluate(
        model, against=original, text=options.texts / HELD_OUT, window=LENGTH, limit_windows=options.windows
    )


def write(path: Path, exact: Evaluation, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The figures, and what it takes to measure them again."""
    result = {
        "model": options.model.name,
        "device": torch.cuda.get_device_name() if options.device != "cpu" and torch.cuda.is_available() else "CPU",
        "versions": {"halfbyte": halfbyte.__version__, "torch": torch.__version__, "python": platform.python_version()}
        | {"transformers": transformers.__version__},
        "calibration": f"{SAMPLES} x {LENGTH} tokens",
        "tokens_per_step": options.tokens_per_step,
        "predicted": exact.predicted,
        "float": {"accuracy": round(exact.accuracy, 5), "perplexity": round(exact.perplexity, 4)},
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
