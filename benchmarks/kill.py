"""Kill a run again and again at random moments, let it go on each time, and compare the bytes with an undisturbed run.

python benchmarks/kill.py --model ref-llama-22m --calibration calib.txt --kills 20 --json docs/measurements/kill.json
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMED = {"report.json", "report.html"}  # they say how long it took

RUN = """
import sys
from halfbyte.pipeline import quantize
model, recipe, output, calibration = sys.argv[1:]
quantize(model, recipe, output, calibration=calibration, samples=8, length=256, device="cpu", resume=True)
"""


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name not in TIMED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--recipe", default="gptq-w4a16")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, output = Path(folder) / "whole", Path(folder) / "out"

        def command(to: Path) -> list[str]:
            return [sys.executable, "-c", RUN, options.model, options.recipe, str(to), options.calibration]

        start = time.perf_counter()
        subprocess.run(command(whole), check=True)
        undisturbed = time.perf_counter() - start
        journal, kills, moments = output.with_name("out.unfinished") / "journal.json", 0, []
        while kills < options.kills:
            process = subprocess.Popen(command(output))
            time.sleep(draw.uniform(0.2, 1.0) * undisturbed * 0.95)
            if process.poll() is not None:  # it came to its end: begin anew
                subprocess.run(["rm", "-rf", str(output)], check=True)
                continue
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            moments.append(len(json.loads(journal.read_text())["finished"]) if journal.is_file() else 0)
        if not output.exists():
            subprocess.run(command(output), check=True)
        same = hashes(output) == hashes(whole)
    result = {
        "kills": kills, "finished_files_at_each_kill": moments, "undisturbed_seconds": round(undisturbed, 1),
        "byte_identical": same, "recipe": options.recipe,
    }  # fmt: skip
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if not same:
        raise SystemExit("the resumed output differs")


if __name__ == "__main__":
    main()
