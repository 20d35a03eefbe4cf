"""halfbyte demo."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.terminal import hush_transformers, out, progress, write_json


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the models and the report go.")
    ] = Path("halfbyte-demo"),
    json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Quantize the small model that comes with halfbyte by recipe after recipe, and compare them.

    Needs no network, no GPU, and a few minutes at most.

    \b
    halfbyte demo
    """
    # PyTorch and transformers take seconds to import, which the help must not wait for.
    from halfbyte.cli import tables
    from halfbyte.demonstration import demo as run

    hush_transformers()
    with progress() as step:
        shown = run(output, progress=step)
    if json:
        write_json(shown.to_json(), Path("-"))
    else:
        out.print(tables.demo(shown))
        out.print(f"the same with charts: {shown.folder / 'report.html'}", soft_wrap=True)
