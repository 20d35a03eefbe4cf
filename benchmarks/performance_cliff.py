"""Draw how the W4A8 kernels' lead over bf16 falls when arithmetic takes over from bytes, of what benchmarks/w4a8.py measured.

    python benchmarks/performance_cliff.py docs/measurements/w4a8_h200.json docs/w4a8.svg

The numbers are there already: no GPU is needed.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from line_plot import Line, Plot, svg

OUTS, INS = 22016, 4096  # the shape of the paper's figure
COLUMNS = {
    "W4A8, integer scales": "integer_scales",
    "W4A8, scales on codes": "weight_scales",
    "W4A8, float scales": "float_scales",
    "W4A16": "w4a16",
    "fp8, by rows": "fp8",
}


def drawn(rows: Sequence[dict[str, Any]]) -> str:
    """Times as fast as bf16 cuBLAS over the number of tokens, for one shape; dashed, what bytes and operations allow."""
    of_shape = [row for row in rows if (row["outs"], row["ins"]) == (OUTS, INS)]
    lines = [
        Line(name, tuple((str(row["tokens"]), row["cublas"] / row[column]) for row in of_shape), column == "bound")
        for name, column in (COLUMNS | {"bound of W4A8": "bound"}).items()
    ]
    return svg(Plot(f"{OUTS} x {INS}, groups of 128", "tokens", "times as fast as bf16", tuple(lines)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="JSON of benchmarks/w4a8.py")
    parser.add_argument("plot", type=Path, help="SVG to write")
    options = parser.parse_args()
    options.plot.write_text(drawn(json.loads(options.measured.read_text())["rows"]))


if __name__ == "__main__":
    main()
