"""The command `fxquant`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

# Everything that needs torch is imported by the commands that need it: `fxquant --help` must not wait for it.
_HELP = """Quantize PyTorch models by rewriting their graph.

\b
[bold]To start[/bold]
  fxquant demo                            the main job on a small model
  fxquant recipes                         what a recipe can be
  fxquant plan MODEL -r int4-g64          what becomes of each weight, and why
  fxquant quantize MODEL OUT -r nf4-dq    quantize a checkpoint and write it
  fxquant convert MODEL OUT --to gptq     write it in another format
  fxquant inspect OUT                     what is in a checkpoint

\b
In Python: model = fxquant.quantize(model, "int4"), then torch.compile(model)
"""


class _Commands(TyperGroup):
    """Ends in one plain paragraph, not in a traceback, where the cause is the caller's or a file's."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _error("interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            from fxquant.errors import FxquantError

            if not isinstance(error, FxquantError):
                raise
            _error(f"{type(error).__name__}: {error}")
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    name="fxquant",
    help=_HELP,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a transformers checkpoint, or hub id.")]
RecipeText = Annotated[
    str,
    typer.Option(
        "--recipe", "-r", help="A preset (int4), a scheme (nf4-dq, int4-g64-asym) or a YAML file; see: fxquant recipes"
    ),
]
Excluded = Annotated[
    list[str] | None,
    typer.Option("--exclude", "-x", metavar="PATTERN", help="Modules to leave as they are; may be repeated."),
]
Full = Annotated[bool, typer.Option("--full", help="One row per weight; without it layers of a kind share one.")]


def main() -> None:
    """The entry point of the command."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"fxquant {version('fxquant')}")
        except PackageNotFoundError:
            typer.echo("fxquant, a checkout that is not installed")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("plan")
def show_plan(model: Model, recipe: RecipeText = "int4", exclude: Excluded = None, full: Full = False) -> None:
    """Show what would become of each weight, and why. Reads the config alone, no weights.

    [bold]Example:[/bold]  fxquant plan ./my-model -r int4-g64 -x '*.mlp.down_proj'
    """
    from fxquant.api import plan
    from fxquant.pretrained import load_config, model_class, refuse_quantized, skeleton
    from fxquant.recipe import Recipe

    chosen = Recipe.resolve(recipe)
    config = load_config(model)
    refuse_quantized(model, config)
    empty = skeleton(model_class(config), config, buffers=False)
    plan(empty, chosen, exclude=exclude or ()).table(full=full).show(Console())


Out = Annotated[
    str, typer.Argument(metavar="OUT", help="What to write: a directory that is not there, or is empty; a .gguf file.")
]
Format = Annotated[
    str,
    typer.Option("--to", metavar="FORMAT", help="fxquant, gptq, awq, compressed-tensors, bitsandbytes, gpt-oss, gguf"),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace OUT where fxquant wrote it in its own format, or a file.")
]


@app.command("quantize")
def quantize_checkpoint(
    model: Model,
    out: Out,
    recipe: RecipeText = "int4",
    exclude: Excluded = None,
    to: Format = "fxquant",
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Decode a checkpoint that is quantized already, and quantize it again.")
    ] = False,
    full: Full = False,
    force: Force = False,
) -> None:
    """Quantize a checkpoint and write it, tensor by tensor: the model is never built, and needs no room in memory.

    When it is interrupted, the same command goes on where it was. What it writes, [bold]fxquant.load[/bold] reads.

    [bold]Example:[/bold]  fxquant quantize ./my-model ./my-model-nf4 -r nf4-dq
    """
    _convert(model, out, to, full, recipe=recipe, exclude=exclude or (), requantize=requantize, force=force)


@app.command("convert")
def convert_checkpoint(
    model: Model, out: Out, to: Format = "fxquant", full: Full = False, force: Force = False
) -> None:
    """Write a quantized checkpoint in another format: exactly, where that can hold it, else quantized again.

    [bold]Example:[/bold]  fxquant convert ./my-model-awq ./my-model-gptq --to gptq
    """
    _convert(model, out, to, full, force=force)


def _convert(model: str, out: str, to: str, full: bool, **options: Any) -> None:
    from fxquant.conversion import convert
    from fxquant.install import record_of
    from fxquant.model_report import report
    from fxquant.pretrained import local_checkpoint

    done = convert(local_checkpoint(model), out, to, **options)
    record = None if done.model is None else record_of(done.model)
    if done.model is None or record is None:
        done.table(full=full).show(Console())
    else:
        typer.echo(f"plan: {record.plan.table().notes[0]}")
        report(done.model).table(full=full).show(Console())
        for note in done.notes:
            typer.echo(note, err=True)
    typer.echo(f"written to {out}")


@app.command("inspect")
def inspect_checkpoint(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Directory of a checkpoint in any format, GGUF file, or hub id.")
    ],
    full: Full = False,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Read headers, and one matrix of each kind; numbers are not looked at."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what is in a checkpoint, quantized by whatever producer or not at all, and all that is wrong with it.

    Reads every tensor. The exit code is 1 where there are problems, 2 where there is no checkpoint, else 0.

    [bold]Example:[/bold]  fxquant inspect ./my-model-int4
    """
    import json

    from fxquant.checkpoint_tables import checkpoint_tables
    from fxquant.inspection import inspect
    from fxquant.pretrained import local_checkpoint

    found = inspect(local_checkpoint(path), fast=fast)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        for table in checkpoint_tables(found, full=full):
            table.show(Console())
    if found.problems:
        raise typer.Exit(1)


@app.command("recipes")
def show_recipes() -> None:
    """Show the presets and the schemes, with bits per weight."""
    from fxquant.recipe_tables import recipe_tables

    for table in recipe_tables():
        table.show(Console())


@app.command("demo")
def demo(
    recipe: RecipeText = "int4",
    model: Annotated[str | None, typer.Option(help="Another causal language model: directory or hub id.")] = None,
    text: Annotated[str | None, typer.Option(help="A file of text to measure perplexity on.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 256 tokens to measure perplexity on.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Generate with the compiled model.")] = True,
) -> None:
    """Do the main job on a small trained model that comes along, and measure it: sizes, perplexity, text.

    [bold]Example:[/bold]  fxquant demo -r nf4
    """
    from fxquant.demo import run_demo
    from fxquant.recipe import Recipe

    run_demo(
        Console(),
        Recipe.resolve(recipe),
        model_path=model,
        text_path=text,
        windows=windows,
        tokens=tokens,
        compiled=compiled,
    )


def _error(message: str) -> None:
    typer.echo(message, err=True)
