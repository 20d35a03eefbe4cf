"""What learned ranges and scales recover of what rounding loses, and what each way of learning them costs.

    python benchmarks/reconstruction.py --models ref-llama-22m --calibration calib.txt --text test.txt \
        --variants w3-rtn w3-mse w3-crr --json docs/measurements/reconstruction.json
    python benchmarks/reconstruction.py --time-block --variants paper cheaper --json docs/measurements/reconstruction.json

Rows are added to the JSON file one by one and replace those of the same model, variant and calibration text, so that a run
can be cut into pieces. Calibration on 128 x 512 tokens, perplexity over the first 16 windows of 1024 tokens of the test text
and of the calibration text, through the cache where there is one; then the second copy of a passage too.
`--time-block` times one block of Llama-2-7B's shape and random weights in bfloat16 on --samples x 2048 tokens, attending
through a 4-bit cache, with four float blocks behind it, and says what 32 such blocks would take with 128 samples.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from halfbyte.calibration.past_only import BlockCache
from halfbyte.calibration.walk import enter, linears
from halfbyte.evaluation.long_context import long_context
from halfbyte.evaluation.perplexity import evaluate
from halfbyte.methods.contract import RoundedBlock
from halfbyte.methods.omniquant import OmniQuant
from halfbyte.methods.wkvquant import WKVQuant
from halfbyte.models.fold import find_links
from halfbyte.models.tables import architecture_of
from halfbyte.numerics.cache import Smoothing
from halfbyte.numerics.quantized import round_to_grid
from halfbyte.numerics.ranges import find_grid
from halfbyte.pipeline import quantize
from halfbyte.runtime.load import load
from halfbyte.scheme import CacheFormat, Convention, FloatScale, PerGroup, WeightFormat

RTN: dict[str, Any] = {"method": "rtn"}
GPTQ: dict[str, Any] = {"method": "gptq", "ranges": "mse"}
GPTAQ = GPTQ | {"drift": 0.5}
PAPER_CLIP: dict[str, Any] = {
    "method": "omniquant",
    "links": "none",
    "start": "paper",
    "decay": False,
    "clip_rate": 1e-2,
}
OMNI: dict[str, Any] = {"method": "omniquant", "links": "none"}
MOVES = OMNI | {"links": "all"}
FAST = MOVES | {"clip_rate": 5e-2, "link_rate": 2e-2}
LONG = MOVES | {"epochs": 10, "tokens_per_step": 512}  # 1280 steps instead of 160
ASYMMETRIC = {"convention": "asymmetric"}
SMOOTH: dict[str, Any] = {"method": "smoothquant", "alpha": 0.5}
A4: dict[str, Any] = {"bits": 4}
NEAREST: dict[str, Any] = {"method": "rtn", "ranges": "mse"}
CRR: dict[str, Any] = {"method": "wkvquant", "clip_rate": 2e-2}
CHEAP = CRR | {"samples": 0.5, "epochs": 3, "stride": 2}
AWQ: dict[str, Any] = {"method": "awq", "duo": True}
LKD: dict[str, Any] = {"method": "lkd"}
BOTH = CRR | {"learn": "both", "cache_rate": 2e-3}
BLOCK_WISE = {"loss": "mse", "depth": 1}
SEARCH = CRR | {"ratios": [0.7, 0.8, 0.9, 1.1], "samples": 0.125}
CACHE = {"key_bits": 4, "value_bits": 4, "group_size": 128, "rope": "before"}
SINKS_AND_WINDOW = {"sinks": 4, "window": 64}
PRESENT = {"past_only": False}
WKV: dict[str, Any] = {"method": "wkv"}
DISTANCES = (64, 128, 256, 512, 960)
SEQUENTIAL = "-sequential"  # behind a variant's name: with `sequential: true`

# name: bits, fields of the weight format, of the inputs' format, steps
VARIANTS: dict[str, tuple[int, dict[str, Any], dict[str, Any] | None, list[dict[str, Any]]]] = {
    # 3 bits: what each part brings
    "w3-rtn": (3, {}, None, [RTN]),
    "w3-gptq": (3, {}, None, [GPTQ]),
    "w3-gptaq": (3, {}, None, [GPTAQ]),
    "w3-clip-paper": (3, {}, None, [RTN, PAPER_CLIP]),
    "w3-clip-paper-asym": (3, ASYMMETRIC, None, [RTN, PAPER_CLIP]),
    "w3-clip": (3, {}, None, [NEAREST, OMNI]),
    "w3-clip-norms": (3, {}, None, [NEAREST, OMNI | {"links": "norms"}]),
    "w3-clip-moves": (3, {}, None, [NEAREST, MOVES]),
    "w3-clip-gptq": (3, {}, None, [GPTQ, OMNI | {"finish": GPTQ}]),
    "w3-clip-moves-gptq": (3, {}, None, [GPTQ, MOVES | {"finish": GPTQ}]),
    "w3-clip-moves-gptaq": (3, {}, None, [GPTAQ, MOVES | {"finish": GPTAQ}]),
    "w3-clip-moves-asym": (3, ASYMMETRIC, None, [NEAREST, MOVES]),
    "w3-moves-gptaq-fast": (3, {}, None, [GPTAQ, FAST | {"finish": GPTAQ}]),
    "w3-moves-gptaq-long": (3, {}, None, [GPTAQ, LONG | {"finish": GPTAQ}]),
    "w3-awq-gptaq": (3, {}, None, [AWQ, GPTAQ]),
    "w3-awq-clip-moves-gptaq": (3, {}, None, [AWQ, GPTAQ, MOVES | {"finish": GPTAQ}]),
    "w3-gptaq-lkd": (3, {}, None, [GPTAQ, LKD]),
    "w3-clip-moves-gptaq-lkd": (3, {}, None, [GPTAQ, MOVES | {"finish": GPTAQ}, LKD]),
    # 3 bits, rounding to nearest: which loss, where, at the same budget
    "w3-nearest": (3, {}, None, [NEAREST]),
    "w3-mse": (3, {}, None, [NEAREST, CRR | {"loss": "mse", "depth": 1}]),
    "w3-mae": (3, {}, None, [NEAREST, CRR | {"depth": 1}]),
    "w3-crr": (3, {}, None, [NEAREST, CRR]),
    "w3-crr-mse": (3, {}, None, [NEAREST, CRR | {"loss": "mse"}]),
    "w3-crr-k3": (3, {}, None, [NEAREST, CRR | {"depth": 3}]),
    # 3 bits, rounding to nearest: cheaper
    "w3-crr-cold": (3, {}, None, [RTN, CRR | {"start": "paper"}]),
    "w3-crr-quarter": (3, {}, None, [NEAREST, CRR | {"samples": 0.25}]),
    "w3-crr-stride4": (3, {}, None, [NEAREST, CRR | {"stride": 4}]),
    "w3-crr-cheap": (3, {}, None, [NEAREST, CHEAP]),
    "w3-crr-cheapest": (3, {}, None, [NEAREST, CRR | {"samples": 0.25, "epochs": 4, "stride": 4}]),
    "w3-search": (3, {}, None, [NEAREST, SEARCH]),
    "w3-search-whole": (3, {}, None, [RTN, SEARCH | {"ratios": [0.5, 0.6, 0.7, 0.8, 0.9]}]),
    "w3-search-mse": (3, {}, None, [NEAREST, SEARCH | BLOCK_WISE]),
    "w3-crr-cheap-mae": (3, {}, None, [NEAREST, CHEAP | {"depth": 1, "stride": 1}]),
    # 3 bits, rounding to nearest: more steps
    "w3-mse-double": (3, {}, None, [NEAREST, CRR | BLOCK_WISE | {"epochs": 10}]),
    "w3-crr-double": (3, {}, None, [NEAREST, CRR | {"epochs": 10}]),
    # 3 bits, the first block alone; the others stay float
    "w3-nearest-block0": (3, {}, None, [NEAREST]),
    "w3-mse-block0": (3, {}, None, [NEAREST, CRR | BLOCK_WISE]),
    "w3-mae-block0": (3, {}, None, [NEAREST, CRR | {"depth": 1}]),
    "w3-crr-block0": (3, {}, None, [NEAREST, CRR]),
    # 3 bits, GPTQ on the learned grids
    "w3-mse-gptq": (3, {}, None, [GPTQ, CRR | {"loss": "mse", "depth": 1, "finish": GPTQ}]),
    "w3-crr-gptq": (3, {}, None, [GPTQ, CRR | {"finish": GPTQ}]),
    "w3-crr-cheap-gptq": (3, {}, None, [GPTQ, CHEAP | {"finish": GPTQ}]),
    # 4 bits
    "w4-rtn": (4, {}, None, [RTN]),
    "w4-gptq": (4, {}, None, [GPTQ]),
    "w4-gptaq": (4, {}, None, [GPTAQ]),
    "w4-clip-paper": (4, {}, None, [RTN, PAPER_CLIP]),
    "w4-clip-moves": (4, {}, None, [NEAREST, MOVES]),
    "w4-clip-moves-gptq": (4, {}, None, [GPTQ, MOVES | {"finish": GPTQ}]),
    "w4-clip-moves-gptaq": (4, {}, None, [GPTAQ, MOVES | {"finish": GPTAQ}]),
    "w4-awq-clip-moves-gptaq": (4, {}, None, [AWQ, GPTAQ, MOVES | {"finish": GPTAQ}]),
    "w4-clip-moves-gptaq-lkd": (4, {}, None, [GPTAQ, MOVES | {"finish": GPTAQ}, LKD]),
    # 4 bits, and a 4-bit cache that is there while ranges learn; perplexity through the cache
    "w4kv4-gptq": (4, {}, None, [GPTQ]),
    "w4kv4-mse": (4, {}, None, [GPTQ, CRR | {"loss": "mse", "depth": 1, "finish": GPTQ}]),
    "w4kv4-crr": (4, {}, None, [GPTQ, CRR | {"finish": GPTQ}]),
    "w4kv4-crr-cheap": (4, {}, None, [GPTQ, CHEAP | {"finish": GPTQ}]),
    "w4kv4-paper": (4, ASYMMETRIC, None, [RTN, CRR | {"start": "paper", "clip_rate": 1e-2, "decay": False}]),
    "w4kv4-mse-paper": (
        4, ASYMMETRIC, None,
        [RTN, CRR | {"start": "paper", "clip_rate": 1e-2, "decay": False, "loss": "mse", "depth": 1}],
    ),
    "w4kv4-both": (4, {}, None, [GPTQ, BOTH | {"finish": GPTQ}]),
    "w4kv4-both-paper-rate": (4, {}, None, [GPTQ, BOTH | {"cache_rate": 5e-4, "finish": GPTQ}]),
    "w4kv4-both-mse": (4, {}, None, [GPTQ, BOTH | BLOCK_WISE | {"finish": GPTQ}]),
    "w4kv4-both-paper": (
        4, ASYMMETRIC, None,
        [RTN, CRR | {"learn": "both", "start": "paper", "clip_rate": 1e-2, "decay": False}],
    ),
    "w4kv4-both-cheap": (4, {}, None, [GPTQ, CHEAP | {"learn": "both", "cache_rate": 2e-3, "finish": GPTQ}]),
    "w4kv4-search": (4, {}, None, [GPTQ, SEARCH | {"finish": GPTQ}]),
    "w4kv4-gptaq": (4, {}, None, [GPTAQ]),
    "w4kv4-both-gptaq": (4, {}, None, [GPTAQ, BOTH | {"finish": GPTAQ}]),
    "w4kv4-awq-gptaq": (4, {}, None, [AWQ, GPTAQ]),
    "w4kv4-awq-both-gptaq": (4, {}, None, [AWQ, GPTAQ, BOTH | {"finish": GPTAQ}]),
    "w4kv4-awq-cache-gptaq": (4, {}, None, [AWQ, GPTAQ, BOTH | {"learn": "cache"}]),
    "w4kv4-moves-cache-gptaq": (4, {}, None, [GPTAQ, MOVES | {"finish": GPTAQ}, BOTH | {"learn": "cache"}]),
    # likewise with sinks and a window, as the recipes have it
    "w4kv4-window-gptq": (4, {}, None, [GPTQ]),
    "w4kv4-window-both": (4, {}, None, [GPTQ, BOTH | {"finish": GPTQ}]),
    "w4kv4-window-awq-gptaq": (4, {}, None, [AWQ, GPTAQ]),
    "w4kv4-window-awq-both-gptaq": (4, {}, None, [AWQ, GPTAQ, BOTH | {"finish": GPTAQ}]),
    # a 4-bit cache and float weights
    "kv4": (0, {}, None, []),
    "kv4-learned": (0, {}, None, [BOTH | {"learn": "cache"}]),
    "kv4-learned-paper-rate": (0, {}, None, [BOTH | {"learn": "cache", "cache_rate": 5e-4}]),
    "kv4-learned-fast": (0, {}, None, [BOTH | {"learn": "cache", "cache_rate": 1e-2}]),
    "kv4-learned-mse": (0, {}, None, [BOTH | BLOCK_WISE | {"learn": "cache"}]),
    "kv4-window-learned": (0, {}, None, [BOTH | {"learn": "cache"}]),
    # what each of three ideas brings: the past alone is quantized, two dimensions, cross-block reconstruction
    "w4kv4-past-2d-crr": (4, {}, None, [GPTQ, BOTH | {"finish": GPTQ}]),
    "w4kv4-past-2d-none": (4, {}, None, [GPTQ]),
    "w4kv4-past-plain-crr": (4, {}, None, [GPTQ, CRR | {"finish": GPTQ}]),
    "w4kv4-past-plain-none": (4, {}, None, [GPTQ]),
    "w4kv4-present-2d-crr": (4, {}, None, [GPTQ, BOTH | {"finish": GPTQ}]),
    "w4kv4-present-2d-none": (4, {}, None, [GPTQ]),
    "w4kv4-present-plain-crr": (4, {}, None, [GPTQ, CRR | {"finish": GPTQ}]),
    "w4kv4-present-plain-none": (4, {}, None, [GPTQ]),
    # 4-bit inputs
    "w4a4-rtn": (4, {}, A4, [RTN]),
    "w4a4-smoothquant": (4, {}, A4, [SMOOTH, RTN]),
    "w4a4-smoothquant-search": (4, {}, A4, [SMOOTH | {"alpha": "search"}, RTN]),
    "w4a4-smoothquant-gptq": (4, {}, A4, [SMOOTH | {"alpha": "search"}, GPTQ]),
    "w4a4-paper": (4, {}, A4, [SMOOTH, RTN, PAPER_CLIP | {"links": "norms"}]),
    "w4a4-moves": (4, {}, A4, [SMOOTH | {"alpha": "search"}, GPTQ, MOVES]),
    "w4a4-moves-gptq-fast": (4, {}, A4, [SMOOTH | {"alpha": "search"}, GPTQ, FAST | {"finish": GPTQ}]),
    "w4a4-moves-gptq-long": (4, {}, A4, [SMOOTH | {"alpha": "search"}, GPTQ, LONG | {"finish": GPTQ}]),
    "w4a4-moves-gptq-lkd": (4, {}, A4, [SMOOTH | {"alpha": "search"}, GPTQ, MOVES | {"finish": GPTQ}, LKD]),
    "w4a4-moves-gptq": (4, {}, A4, [SMOOTH | {"alpha": "search"}, GPTQ, MOVES | {"finish": GPTQ}]),
}  # fmt: skip

PAPER = WKVQuant(learn="both", start="paper", decay=False)
BLOCKS: dict[str, OmniQuant | WKVQuant] = {
    "paper": PAPER,
    "cheaper": WKVQuant(learn="both", samples=0.5, epochs=3, stride=2),
    "cheapest": WKVQuant(learn="both", samples=0.25, epochs=4, stride=4),
    "block-wise": WKVQuant(learn="both", depth=1),
    "search": WKVQuant(ratios=(0.7, 0.8, 0.9, 1.1), samples=0.125),
    "omniquant-5-epochs": OmniQuant(links="all"),
}


def recipe(variant: str, epochs: float | None) -> dict[str, Any]:
    """The variant as a recipe; `epochs` in place of its own where it learns."""
    bits, weights, activations, steps = VARIANTS[variant.removesuffix(SEQUENTIAL)]
    group = {"kind": "group", "size": 128}
    if epochs is not None:
        steps = [step | ({"epochs": epochs} if step["method"] in ("omniquant", "wkvquant") else {}) for step in steps]
    format = {"bits": bits, "granularity": group} | weights if bits else None
    scheme: dict[str, Any] = {"weights": format, "activations": activations}
    if "kv4" in variant:
        scheme["cache"] = CACHE | (SINKS_AND_WINDOW if "window" in variant else {})
        scheme["cache"] |= PRESENT if "present" in variant else {}
        steps = steps if "plain" in variant else [*steps, WKV]
    ignored = ["lm_head", "*.layers.[1-9]*"] if "block0" in variant else ["lm_head"]
    return {"scheme": scheme, "steps": steps, "ignore": ignored, "sequential": variant.endswith(SEQUENTIAL)}


def measure(model: Path, variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: quantize, load again, evaluate."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        report = quantize(
            model, recipe(variant, options.epochs), output, calibration=options.calibration, samples=options.samples,
            length=512, device=options.device, dtype=options.dtype,
        )  # fmt: skip
        quantized = load(output, device=options.evaluate_on, dtype=torch.float32)
        original = load(model, device=options.evaluate_on, dtype=torch.float32)
        texts = [options.text] if options.test_only else [options.text, options.calibration]
        found, *seen = [
            evaluate(quantized, against=original, text=text, window=1024, limit_windows=options.windows)
            for text in texts
        ]
        far = None
        if "kv4" in variant and not options.test_only:
            far = long_context(quantized, text=options.text, distances=DISTANCES, sequences=2)
    return {
        "model": model.name, "variant": variant, "calibration": options.calibration.stem,
        "perplexity": found.perplexity, "kl_mean": found.kl_mean,
        "perplexity_on_calibration": seen[0].perplexity if seen else None,
        "kl_mean_on_calibration": seen[0].kl_mean if seen else None,
        "second_copy": far and far.mean, "worst_head": far and far.worst_head,
        "seconds": round(report.seconds, 1), "samples": options.samples, "windows": options.windows, "epochs": options.epochs,
        "peak_device_gb": round(report.peak_device / 1e9, 2),
    }  # fmt: skip


def seven_billion(options: argparse.Namespace) -> tuple[RoundedBlock, dict[str, Any]]:
    """Block 0 of five of Llama-2-7B's shape, rounded to nearest, with its stream; and the rounded weights."""
    config = transformers.LlamaConfig(num_hidden_layers=5, vocab_size=4096, hidden_size=options.hidden,
                                      intermediate_size=max(128, options.hidden * 43 // 16 // 128 * 128),
                                      num_attention_heads=options.hidden // 128)  # fmt: skip
    torch.manual_seed(0)
    device = torch.device(options.device if options.device != "auto" else "cuda")
    with torch.device(device):
        model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).eval().requires_grad_(requires_grad=False)
    blocks: list[torch.nn.Module] = list(model.model.layers)
    tokens = torch.randint(0, 4096, (options.samples, options.length), generator=torch.Generator().manual_seed(0))
    stream = enter(model, blocks, list(tokens.split(1)), device, device)
    format = WeightFormat(
        bits=4, convention=Convention.ASYMMETRIC, granularity=PerGroup(size=128), scale=FloatScale(dtype="bfloat16")
    )
    block, quantized, weights = copy.deepcopy(blocks[0]), {}, {}
    for name, linear in linears(block).items():
        weights[name] = linear.weight.detach().float()
        quantized[name] = round_to_grid(weights[name], find_grid(weights[name], format, "mse"), format)
        linear.weight.data.copy_(quantized[name].decode())
    table = architecture_of("llama")
    assert table is not None
    heads = config.num_attention_heads, config.num_attention_heads, 128
    zeros = torch.zeros(config.num_attention_heads, 128, device=device)
    smoothing = Smoothing(zeros, zeros + 1, zeros, zeros + 1)
    rounded = RoundedBlock(
        0, block, blocks[0], weights, {}, stream, stream.copy(),
        links=lambda: find_links(block, table, *heads), following=lambda count: blocks[1 : 1 + count],
        cache=BlockCache(CacheFormat.model_validate(CACHE), 0, 32, smoothing),
    )  # fmt: skip
    return rounded, quantized


def time_block(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the seconds of one block, its peak memory, and 32 times that."""
    rounded, quantized = seven_billion(options)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with torch.no_grad():  # as the pipeline has it
        BLOCKS[variant].refine(rounded, quantized)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {
        "model": "one Llama-2-7B block", "variant": variant, "block_seconds": round(seconds, 1),
        "minutes_for_32_blocks": round(32 * seconds * 128 / options.samples / 60, 1),
        "samples": options.samples, "length": options.length,
        "hidden": options.hidden, "settings": BLOCKS[variant].model_dump(mode="json"),
        "peak_device_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if cuda else None,
    }  # fmt: skip


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Write the row into the file, in place of one of the same model, variant and calibration text."""
    row["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [old for old in rows if any(old.get(key) != row.get(key) for key in ("model", "variant", "calibration"))]
    path.write_text(json.dumps({"rows": [*kept, row]}, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", type=Path, default=[])
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    names = f"of {', '.join(VARIANTS)}, each also with {SEQUENTIAL}; with --time-block: {', '.join(BLOCKS)}"
    parser.add_argument("--variants", nargs="*", help=names)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--epochs", type=float, help="in place of the variants' own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="of calibration passes")
    parser.add_argument("--evaluate-on", default="cpu")
    parser.add_argument("--test-only", action="store_true", help="nothing but perplexity and KL on the test text")
    parser.add_argument("--time-block", action="store_true")
    parser.add_argument("--length", type=int, default=2048, help="of the samples of --time-block")
    parser.add_argument("--hidden", type=int, default=4096, help="width of --time-block")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.time_block:
        for variant in options.variants or BLOCKS:
            add_row(options.json, time_block(variant, options))
        return
    for model in options.models:
        for variant in options.variants or VARIANTS:
            add_row(options.json, measure(model, variant, options))


if __name__ == "__main__":
    main()
