"""halfbyte: quantize large language models after training, prove what it cost, run them fast.

The journey, and where each stage lives:

    model ──► calibration ──► transform ──► quantize ──► pack ──► checkpoint ──► run ──► evaluate
    models/   calibration/    methods/      methods/     packing/ layouts/       runtime/ evaluation/

`pipeline.py` walks it once; read that first. Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.demonstration import demo
    from halfbyte.evaluation.perplexity import evaluate
    from halfbyte.layouts.convert import export
    from halfbyte.layouts.inspect import inspect
    from halfbyte.pipeline import dry_run, quantize
    from halfbyte.recipe import Recipe, recipes
    from halfbyte.runtime.generate import generate
    from halfbyte.runtime.load import load

__version__ = "0.1.0"
__all__ = ["Recipe", "demo", "dry_run", "evaluate", "export", "generate", "inspect", "load", "quantize", "recipes"]

_HOMES = {
    "Recipe": "halfbyte.recipe",
    "demo": "halfbyte.demonstration",
    "dry_run": "halfbyte.pipeline",
    "evaluate": "halfbyte.evaluation.perplexity",
    "export": "halfbyte.layouts.convert",
    "generate": "halfbyte.runtime.generate",
    "inspect": "halfbyte.layouts.inspect",
    "load": "halfbyte.runtime.load",
    "quantize": "halfbyte.pipeline",
    "recipes": "halfbyte.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
