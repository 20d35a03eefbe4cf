"""The demo: a small model that comes with the package, quantized by every quick recipe and judged on text it never saw."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.demo_text import documentation_split
from halfbyte.errors import OutputError
from halfbyte.evaluation.perplexity import Evaluation, evaluate
from halfbyte.evaluation.report import Report, templates
from halfbyte.models.load import WeightFiles
from halfbyte.pipeline import Progress, quantize, silent
from halfbyte.recipe import Recipe, shipped
from halfbyte.runtime.load import load

MODEL = Path(__file__).parent / "demo_model"
RESULT = "demo.json"
SAMPLES = 32  # of WINDOW tokens each, for calibration
WINDOWS = 8  # of WINDOW tokens each, for evaluation
WINDOW = 512


@dataclass(frozen=True, slots=True)
class DemoRow:
    """The model as it is, or what one recipe made of it."""

    recipe: str
    summary: str
    bytes: int  # of the weight files
    bits_per_weight: float  # of the linears in the blocks, scales and zero points included
    perplexity: float
    kl_mean: float | None  # nats per token; None for the original itself
    top1_agreement: float | None
    seconds: float | None  # to quantize


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The recipes side by side, the original first."""

    folder: Path
    rows: tuple[DemoRow, ...]
    caption: str  # what was measured, on what
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, as demo.json holds them."""
        return asdict(self) | {"folder": str(self.folder)}


def demo(
    output: str | Path = "halfbyte-demo",
    *,
    recipes: Sequence[str | Recipe] | None = None,
    model: str | Path = MODEL,
    samples: int = SAMPLES,
    windows: int = WINDOWS,
    window: int = WINDOW,
    device: str = "auto",
    progress: Progress = silent,
) -> DemoResult:
    """Quantize `model` by each of `recipes`, measure each result, and write it all to `output`.

    `recipes`: None takes every shipped one that is quick.

    Calibration and evaluation text are two halves of this Python's own documentation, split by topic; nothing is
    downloaded. An earlier demo in `output` is replaced; OutputError where something else is there.
    """
    start = time.perf_counter()
    folder = _own_folder(Path(output).expanduser())
    chosen = [Recipe.load(recipe) for recipe in (shipped() if recipes is None else recipes)]
    if recipes is None:
        chosen = [recipe for recipe in chosen if _is_quick(recipe)]
    training, held_out = documentation_split()
    training, held_out = _written(folder / "calibration.txt", training), _written(folder / "held-out.txt", held_out)
    total = 2 * len(chosen) + 1
    progress(0, total, "measuring the original")
    original = load(model, device=device)

    def measured(judged: Any, against: Any) -> Evaluation:
        return evaluate(judged, against=against, text=held_out, window=window, limit_windows=windows, device=device)

    rows = [_original_row(Path(model), measured(original, None))]
    for place, recipe in enumerate(chosen):
        progress(2 * place + 1, total, f"quantizing by {recipe.name}")
        calibration = training if recipe.needs_data else None
        report = quantize(
            model, recipe, folder / recipe.name, calibration=calibration, samples=samples, length=window,
            device=device, overwrite=True,
        )  # fmt: skip
        progress(2 * place + 2, total, f"measuring {recipe.name}")
        rows.append(_row(recipe, report, measured(folder / recipe.name, original)))
    progress(total, total, "done")
    caption = (
        f"A model of {original[0].num_parameters() / 1e6:.1f} M parameters. Perplexity, KL divergence from the "
        f"original and agreement on the likeliest token: {windows} windows of {window} tokens of this "
        f"Python's documentation, topics held out. Calibration: {samples} x {window} tokens of other topics. "
        "Seconds: to quantize."
    )
    result = DemoResult(folder, tuple(rows), caption, time.perf_counter() - start)
    _written(folder / RESULT, json.dumps(result.to_json(), indent=2) + "\n")
    _written(folder / "report.html", html(result))
    return result


def html(result: DemoResult) -> str:
    """The comparison as one page; each recipe's own report is a link away."""
    worst = max((row.kl_mean or 0.0 for row in result.rows), default=0.0)
    return templates().get_template("demo.html").render(result=result, worst=worst)


def _is_quick(recipe: Recipe) -> bool:
    """Not so what learns, searches a cache, or observes a block again after each of its layers: half a minute or more."""
    return not recipe.refinements and recipe.scheme.cache is None and not recipe.sequential


def _own_folder(folder: Path) -> Path:
    """The folder, made if need be. OutputError where it holds something that no demo wrote."""
    marker = folder / RESULT
    if folder.exists() and not marker.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and holds no earlier demo: choose another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as cause:
        raise OutputError(f"{folder} cannot be written ({cause.strerror}): choose another --output") from cause
    return folder


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _original_row(folder: Path, measured: Evaluation) -> DemoRow:
    files = WeightFiles(folder)
    size = sum(files.nbytes(name) for name in files)
    bits = 8 * max(files.dtype(name).itemsize for name in files)
    return DemoRow("original", "the model as it is", size, bits, measured.perplexity, None, None, None)


def _row(recipe: Recipe, report: Report, measured: Evaluation) -> DemoRow:
    assert report.bits_per_weight is not None
    return DemoRow(
        recipe=recipe.name,
        summary=recipe.summary,
        bytes=report.bytes_after,
        bits_per_weight=report.bits_per_weight,
        perplexity=measured.perplexity,
        kl_mean=measured.kl_mean,
        top1_agreement=measured.top1_agreement,
        seconds=report.seconds,
    )
