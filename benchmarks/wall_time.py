"""GPTQ W4 of a small model on a CPU: halfbyte beside llm-compressor, one after the other, same threads, same data.

    OMP_NUM_THREADS=1 python benchmarks/wall_time.py --model ref-llama-22m --calibration calib.txt \
        --peer-python llmc/bin/python

Ours is timed from reading the model to the finished folder; the peer's figure is its oneshot call alone, on a model
that is loaded already. Imports count for neither. `--peer-python` is the interpreter of an environment made by
benchmarks/peers/make_environment.sh llmc.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from halfbyte.pipeline import quantize
from halfbyte.run import Run

SETTINGS = ["--samples", "128", "--length", "512"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--recipe", default="gptq-w4a16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Run(
            options.model, options.recipe, calibration=options.calibration
        )  # imports, which the peer's figure leaves out too
        start = time.perf_counter()
        report = quantize(
            options.model, options.recipe, Path(folder) / "ours", calibration=options.calibration, samples=128, length=512,
            device="cpu",
        )  # fmt: skip
        ours = time.perf_counter() - start
        script = Path(__file__).parent / "peers" / "llm_compressor.py"
        command = [options.peer_python, script, "gptq-w4a16", "--model", options.model, "--output", Path(folder) / "peer",
                   "--calibration", options.calibration, *SETTINGS]  # fmt: skip
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peer = json.loads(next(line for line in reversed(printed.splitlines()) if line.startswith("{")))
    result = {
        "threads": torch.get_num_threads(), "recipe": options.recipe, "halfbyte": round(ours, 1),
        "halfbyte_report": round(report.seconds, 1), "llm-compressor oneshot": peer["seconds"],
        "ratio": round(peer["seconds"] / ours, 2),
    }  # fmt: skip
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
