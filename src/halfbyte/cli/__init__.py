"""The command line: words to functions of the same names, and what those return as tables or JSON. No logic here.

Commands import what they run when they run, because `halfbyte --help` must not wait for PyTorch.
"""

from importlib.metadata import version
from typing import Annotated

import typer

from halfbyte.cli.bench import bench
from halfbyte.cli.demo import demo
from halfbyte.cli.evaluate import evaluate
from halfbyte.cli.folders import export, inspect
from halfbyte.cli.generate import generate
from halfbyte.cli.quantize import quantize
from halfbyte.cli.recipes import recipes
from halfbyte.cli.terminal import plainly

app = typer.Typer(
    name="halfbyte",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a traceback is a bug report: whole, plain, without the values of variables
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (quantize, evaluate, generate, bench, inspect, export, recipes, demo):
    app.command(command.__name__)(plainly(command))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"halfbyte {version('halfbyte')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Quantize large language models after training, prove what it cost, run them fast.

    \b
    halfbyte demo                                     see it work, offline
    halfbyte recipes                                  what there is to choose
    halfbyte quantize org/model -r gptq-w4a16 --calibration c4 -o model-w4
    halfbyte evaluate model-w4 --against org/model --text held-out.txt
    halfbyte generate model-w4 --prompt "The capital of France is"

    Each command explains itself: halfbyte quantize --help
    """
