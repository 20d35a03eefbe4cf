"""Does a quantized checkpoint load, answer and name its kernels on a GPU, and does it answer as the CPU does?

    python benchmarks/cuda_smoke.py --json smoke.json

quantizes the demo model by a few recipes and compares logits and greedy text between the GPU (bfloat16, float16,
float32; plain, and compiled) and the CPU in float32.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

import halfbyte
from halfbyte.demo_text import documentation_split
from halfbyte.pipeline import quantize
from halfbyte.runtime.generate import generate
from halfbyte.runtime.linear import QuantizedLinear
from halfbyte.runtime.load import load

MODEL = Path(halfbyte.__file__).parent / "demo_model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(documentation_split()[0])
        for recipe in ("gptq-w4a16", "awq-w4a16-asym", "rtn-w8a16", "gptq-w3a16"):
            output = Path(folder) / recipe
            quantize(MODEL, recipe, output, calibration=text, samples=16, length=256)
            reference, tokenizer = load(output, device="cpu")
            ids = torch.tensor(tokenizer(documentation_split()[1])["input_ids"][:512]).view(2, 256)
            with torch.no_grad():
                expected = reference(input_ids=ids).logits.double()
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                model, _ = load(output, device="cuda", dtype=dtype)
                with torch.no_grad():
                    found = model(input_ids=ids.cuda()).logits.cpu().double()
                    one = model(input_ids=ids[:1, :1].cuda()).logits.cpu().double()
                kernels = sorted({m.kernel for m in model.modules() if isinstance(m, QuantizedLinear)})
                rows.append({
                    "recipe": recipe, "dtype": str(dtype), "kernels": kernels,
                    "logits": float((found - expected).norm() / expected.norm()),
                    "one token": float((one - expected[:1, :1]).norm() / expected[:1, :1].norm()),
                    "same text": generate((model, tokenizer), "The import statement", max_new_tokens=16)
                    == generate((reference, tokenizer), "The import statement", max_new_tokens=16),
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
            compiled = torch.compile(model, dynamic=False)
            with torch.no_grad():
                found = compiled(input_ids=ids.cuda()).logits.cpu().double()
            print(
                json.dumps({"recipe": recipe, "compiled bfloat16": float((found - expected).norm() / expected.norm())})
            )
    if options.json:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
