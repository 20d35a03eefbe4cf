"""8-bit weights and activations: ours beside bitsandbytes and llm-compressor, on one model, in one run.

    python benchmarks/peers/eight_bits.py --model ref-llama-22m-outliers --calibration calib.txt --text test.txt \
        --json eight_bits.json

Needs a GPU, bitsandbytes and llm-compressor beside halfbyte. Calibration on the first 128 x 512 tokens, perplexity over
the first 16 windows of 1024 tokens. bitsandbytes computes in float16, its own choice; the others in float32. What
llm-compressor writes is loaded and run by halfbyte's integer kernels, as ours is.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import halfbyte
from halfbyte.evaluation.perplexity import evaluate
from halfbyte.pipeline import quantize

OURS = ("rtn-w8a8", "llm-int8", "llm-int8-static", "smoothquant-w8a8", "zeroquant-w8a8")
LLM_COMPRESSOR = ("smoothquant-w8a8", "smoothquant-gptq-w8a8")


def perplexity(pair: Any, text: Path) -> float:
    return evaluate(pair, text=text, window=1024, limit_windows=16).perplexity


def bitsandbytes(model: Path, text: Path) -> float:
    """LLM.int8() as transformers loads it."""
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, dtype=torch.float16, device_map="cuda"
    )
    return perplexity((network, transformers.AutoTokenizer.from_pretrained(model)), text)


def llm_compressor(kind: str, model: Path, options: argparse.Namespace, output: Path) -> float:
    script = Path(__file__).with_name("llm_compressor.py")
    command = [sys.executable, script, kind, "--model", model, "--output", output, "--calibration", options.calibration]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return perplexity(halfbyte.load(output, dtype=torch.float32), options.text)


def ours(recipe: str, model: Path, options: argparse.Namespace, output: Path) -> float:
    quantize(model, recipe, output, calibration=options.calibration, samples=128, length=512, dtype="float32")
    return perplexity(halfbyte.load(output, dtype=torch.float32), options.text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    model = options.model
    rows = {"float": perplexity(halfbyte.load(model, dtype=torch.float32), options.text)}
    with tempfile.TemporaryDirectory() as folder:
        for name in OURS:
            rows[f"halfbyte {name}"] = ours(name, model, options, Path(folder) / f"ours-{name}")
        rows["bitsandbytes LLM.int8()"] = bitsandbytes(model, options.text)
        for kind in LLM_COMPRESSOR:
            rows[f"llm-compressor {kind}"] = llm_compressor(kind, model, options, Path(folder) / f"peer-{kind}")
    for name, value in rows.items():
        print(f"{name:40s} {value:.3f}")
    result = {"model": model.name, "device": torch.cuda.get_device_name(), "perplexity": rows}
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
