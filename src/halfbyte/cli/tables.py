"""What the functions return, as tables for the terminal and as plain values for JSON."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from halfbyte.demonstration import DemoResult
from halfbyte.evaluation.long_context import LongContext
from halfbyte.evaluation.passkey import Passkey
from halfbyte.evaluation.perplexity import Evaluation
from halfbyte.evaluation.report import Report
from halfbyte.evaluation.summary import grouped, spread
from halfbyte.evaluation.units import decibels, duration, size
from halfbyte.layouts.inspect import Inspection
from halfbyte.plan import Plan
from halfbyte.recipe import Recipe
from halfbyte.runtime.bench import Speed

MOST_ROWS = 60  # a longer table is one line for each kind of module


def table(*columns: str, numbers: int = 0, title: str | None = None) -> Table:
    """An empty table, the last `numbers` columns of it aligned for numbers."""
    made = Table(
        title=title, title_justify="left", title_style="bold", box=None, header_style="dim", padding=(0, 1, 0, 0)
    )
    for place, column in enumerate(columns):
        number = place >= len(columns) - numbers
        made.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return made


def plan(planned: Plan) -> Group:
    """Each kind of module with its format, and what the run takes."""
    rows = table("modules", "format", "count", "shape", "before", "after", numbers=4)
    for group in grouped(planned, lambda module: (str(module.format), module.shape)):
        first = group.members[0]
        rows.add_row(
            group.name,
            str(first.format or "as it is"),
            str(len(group.members)),
            f"{first.shape[0]} × {first.shape[1]}",
            size(sum(module.bytes_before for module in group.members)),
            size(sum(module.bytes_after for module in group.members)),
        )
    device = f", {size(planned.peak_device)} of device" if planned.peak_device else ""
    facts = [
        f"on disk   {size(planned.bytes_after)} ({planned.layout}), now {size(planned.bytes_before)}",
        f"memory    {size(planned.peak_host)} of host{device} at the peak, estimated",
        f"time      {duration(planned.seconds)}, estimated" if planned.seconds is not None else "",
        "nothing was written: this is a dry run",
    ]
    return Group(rows, "", *filter(None, facts))


def plan_json(planned: Plan) -> dict[str, Any]:
    """Every module on its own."""
    modules = [
        {
            "path": module.path,
            "shape": list(module.shape),
            "format": None if module.format is None else str(module.format),
            "format_fields": None if module.format is None else module.format.model_dump(mode="json"),
            "bytes_before": module.bytes_before,
            "bytes_after": module.bytes_after,
        }
        for module in planned
    ]
    whole = ("layout", "bytes_before", "bytes_after", "peak_host", "peak_device", "seconds")
    return {**{key: getattr(planned, key) for key in whole}, "modules": modules}


def report(done: Report) -> Group:
    """What every module came out as; one line for each kind where there are many."""
    if len(done.modules) <= MOST_ROWS:
        rows = table("module", "format", "weight\nSNR", "output\nSNR", "tokens\nseen", "seconds", numbers=4)
        for module in done.modules:
            rows.add_row(
                module.path,
                module.format,
                decibels(module.weight_snr),
                decibels(module.output_snr),
                str(module.tokens),
                f"{module.seconds:.2f}",
            )
    else:
        rows = table("modules", "format", "weight\nSNR ≥", "output\nSNR ≥", "tokens\nseen ≥", "seconds", numbers=4)
        for group in grouped(done.modules, lambda module: module.format):
            weights = spread(module.weight_snr for module in group.members)
            outputs = spread(module.output_snr for module in group.members)
            rows.add_row(
                group.name,
                group.members[0].format,
                decibels(weights and weights.worst),
                decibels(outputs and outputs.worst),
                str(min(module.tokens for module in group.members)),
                f"{sum(module.seconds for module in group.members):.2f}",
            )
    kept = f"; {len(done.unquantized)} left as they were" if done.unquantized else ""
    bits = f", {done.bits_per_weight:.3f} bits per quantized weight" if done.bits_per_weight is not None else ""
    device = f", {size(done.peak_device)} of device" if done.peak_device else ""
    return Group(
        rows,
        "",
        f"{len(done.modules)} linears quantized{kept}; SNR in dB, higher is better (20 dB: an error of 10 %)",
        f"{size(done.bytes_before)} → {size(done.bytes_after)}{bits}",
        f"{duration(done.seconds)}, {size(done.peak_host)} of host{device} at the peak",
    )


def evaluation(measured: Evaluation) -> Group:
    """Perplexity, of an encoder first its accuracy, drift, and how they were measured."""
    masked = measured.task == "masked"
    rows = table("", "", numbers=1)
    if masked:
        rows.add_row("hidden tokens found", f"{100 * measured.accuracy:.2f} %")
    rows.add_row("perplexity of the hidden tokens" if masked else "perplexity", f"{measured.perplexity:.4f}")
    if measured.kl_mean is not None and measured.kl_p99 is not None and measured.top1_agreement is not None:
        rows.add_row("KL divergence from the original, mean", f"{measured.kl_mean:.5f} nats")
        rows.add_row("KL divergence, 99 % quantile", f"{measured.kl_p99:.5f} nats")
        rows.add_row("same most likely token", f"{100 * measured.top1_agreement:.2f} %")
    start = "with BOS" if measured.bos else "without BOS"
    how = f"{measured.predicted} hidden, seed {measured.seed}" if masked else start
    return Group(
        rows,
        Text(
            f"{measured.tokens} tokens in windows of {measured.window}, {how}, {measured.dtype}, "
            f"{f'cache {measured.kv_cache}, ' if measured.kv_cache else ''}{duration(measured.seconds)}",
            style="dim",
        ),
    )


def second_copies(far: LongContext) -> Group:
    """The loss on a repeated passage by distance, and the worst head."""
    rows = table("tokens between the copies", "nats per token", numbers=2)
    for distance, loss in far.losses.items():
        rows.add_row(str(distance), f"{loss:.4f}")
    worst = (
        "" if far.worst_head is None else f"; worst head {100 * far.worst_head:.1f} % off, in layer {far.worst_layer}"
    )
    return Group(
        rows,
        Text(
            f"{far.sequences} passages of {far.passage} tokens; first copy {far.first_copy:.4f} nats per token{worst}",
            style="dim",
        ),
    )


def inspection(found: Inspection) -> Group:
    """What the folder holds, and what is wrong with it."""
    rows = table("format", "modules", numbers=1)
    for format, count in found.formats.items():
        rows.add_row(format, str(count))
    quantized = f", {found.bits_per_weight:.3f} in the quantized layers" if found.bits_per_weight is not None else ""
    facts = [
        f"layout       {found.layout or 'not quantized'}",
        f"size         {size(found.bytes_on_disk)}",
        f"bits/weight  {found.model_bits_per_weight:.3f}{quantized}",
        f"unquantized  {100 * found.unquantized_share:.1f} % of the parameters",
    ]
    if found.accumulator is not None:
        facts.append(f"accumulators certified: no input fills more than {100 * found.accumulator:.2g} % of int32")
    if found.rotations:
        facts.append(f"rotated      inputs at run time: {counted(found.rotations)}")
    if found.cache:
        facts.append(f"cache        {found.cache}")
    if found.kernels:
        facts.append(f"kernels      {counted(found.kernels)}")
    problems = [Text(f"problem: {problem}", style="red") for problem in found.problems]
    return Group(*([rows, ""] if found.formats else []), *facts, *(problems or [Text("intact", style="green")]))


def counted(modules: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count} modules)" for name, count in modules.items())


def recipes(known: dict[str, Recipe]) -> Group:
    """Names and what they stand for."""
    rows = table("recipe", "weights", "steps", "data", "what it is")
    for name, recipe in known.items():
        steps = " → ".join(step.method for step in recipe.steps)
        rows.add_row(name, str(recipe.scheme.weights), steps, "yes" if recipe.needs_data else "no", recipe.summary)
    return Group(rows, "", Text("halfbyte recipes NAME shows one as YAML, to save and change", style="dim"))


def demo(shown: DemoResult) -> Group:
    """The recipes side by side."""
    rows = table(
        "recipe", "size", "bits/weight", "perplexity", "KL, nats", "top-1", "seconds", numbers=6, title="halfbyte demo"
    )
    for row in shown.rows:
        rows.add_row(
            row.recipe,
            size(row.bytes),
            f"{row.bits_per_weight:.2f}",
            f"{row.perplexity:.3f}",
            "–" if row.kl_mean is None else f"{row.kl_mean:.4f}",
            "–" if row.top1_agreement is None else f"{100 * row.top1_agreement:.1f} %",
            "–" if row.seconds is None else f"{row.seconds:.1f}",
        )
    return Group(rows, "", Text(shown.caption, style="dim"))


def speed(measured: Speed) -> Group:
    """Prefill and decoding, and what they are bound by."""
    rows = table("", "tokens/s", "", numbers=2)
    rows.add_row("prefill", f"{measured.prefill_rate:,.0f}", f"{1e3 * measured.prefill_seconds:.2f} ms")
    rows.add_row("decode", f"{measured.decode_rate:,.1f}", f"{1e3 * measured.step_seconds:.3f} ms a step")
    bound = measured.bound_seconds
    rows.add_row("bound of decoding", f"{measured.batch / bound:,.1f}", f"{1e3 * bound:.3f} ms a step")
    peak = f", {size(measured.peak_bytes)} at the peak" if measured.peak_bytes else ""
    facts = [
        f"{measured.model}, {measured.recipe or 'not quantized here'}, {measured.dtype}, on {measured.device}",
        f"{measured.batch} × {measured.context} tokens, {measured.new_tokens} new ones",
        f"memory   weights {size(measured.weight_bytes)}, cache {size(measured.cache_bytes)}{peak}",
        f"copies   {size(measured.copy_rate)}/s, read and written",
        *(f"kernel   {name} ({count} linears)" for name, count in measured.kernels.items()),
    ]
    return Group(rows, "", *facts)


def pass_keys(asked: Passkey) -> Group:
    """The share of pass keys that were found again, by the length of the text and how deep in it they were."""
    depths = list(next(iter(asked.shares.values())))
    rows = table("tokens", *(f"depth {100 * depth:.0f} %" for depth in depths), numbers=1 + len(depths))
    for length, shares in asked.shares.items():
        rows.add_row(str(length), *(f"{100 * share:.0f} %" for share in shares.values()))
    return Group(rows, Text(f"pass keys found again, of {asked.keys} at each place", style="dim"))
