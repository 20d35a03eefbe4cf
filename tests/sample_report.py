"""A finished run's report, made up: two blocks, three kinds of module, one of them with experts."""

from dataclasses import replace
from typing import Any

from halfbyte.evaluation.report import Report
from halfbyte.recipe import Recipe
from halfbyte.record import ModuleRecord

RECIPE = Recipe.load("gptq-w4a16")
PROVENANCE = {
    "source": {"config.json": "1" * 64, "model.safetensors": "2" * 64},
    "calibration": {"text": "128 samples, 262144 tokens: text.txt", "sha256": "3" * 64},
    "seed": 7,
    "device": "cpu",
    "dtype": "float32",
    "versions": {"halfbyte": "0.1.0", "torch": "2.13.0"},
}


def sample_report(**changes: Any) -> Report:
    """Output SNRs are 20, 21, 22 ... in the order of the modules."""
    names = ["self_attn.q_proj", *(f"mlp.experts.{expert}.up_proj" for expert in range(3))]
    paths = [f"model.layers.{block}.{name}" for block in range(2) for name in names]
    modules = tuple(
        ModuleRecord(path, "int4 sym g128", "gptq", (256, 128), 19.5, 20.0 + place, 4096 - place, 0.25)
        for place, path in enumerate(paths)
    )
    report = Report(
        model="some/model",
        recipe=RECIPE.model_dump(mode="json"),
        modules=modules,
        unquantized=("model.layers.0.mlp.gate",),
        bytes_before=4_000_000,
        bytes_after=1_250_000,
        seconds=83.0,
        peak_host=2_000_000_000,
        peak_device=0,
        provenance=PROVENANCE,
        bits_per_weight=4.156,
    )
    return replace(report, **changes)
