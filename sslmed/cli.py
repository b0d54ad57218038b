"""The command line. A verb imports its command when it is called, so that help and listings need no torch."""

import errno
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, cast

import typer

from sslmed import __version__
from sslmed.config import DiskError, MissingDependencyError, SslmedError, UsageError

MOST_LINES = 6  # of an error
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
CommandLineError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])  # click's, or this typer's own copy
DISTRIBUTIONS = {"cv2": "opencv-python-headless", "sklearn": "scikit-learn", "yaml": "PyYAML"}

app = typer.Typer(
    name="sslmed",
    help="Self-supervised pretraining for medical images: unlabelled scans in, a reusable backbone out.",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
)
recipes_app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped name (sslmed recipes ls) or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings on top of the recipe, such as train.epochs=50.", show_default=False
    ),
]
Model = Annotated[Path, typer.Argument(metavar="RUN|ARTIFACT", help="A finished run or an artifact.")]
Data = Annotated[Path, typer.Option("--data", metavar="STORE", help="The store that sslmed ingest made.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that read images; 0 reads in this one.")]


class Result(Protocol):
    """What every command returns."""

    @property
    def next(self) -> str:
        """The exact command to go on with."""

    def lines(self) -> list[str]:
        """The result for people."""

    def as_dict(self) -> dict[str, Any]:
        """The result for programs."""


def main() -> None:
    """Run the command line of this process and end it with the command's exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line; the exit code. Errors go to standard error, in at most six lines."""
    _quiet()
    try:
        code = int(typer.main.get_command(app).main(list(arguments), prog_name="sslmed", standalone_mode=False) or 0)
        return _fail("interrupted", 130) if code == 130 else code  # typer itself catches a Ctrl-C, without a word
    except CommandLineError as error:
        error.show()
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except SslmedError as error:
        return _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "sslmed"):
            return _bug()
        missing = DISTRIBUTIONS.get(package, package)
        return _fail(
            f"this needs {missing}, which is not installed: python -m pip install {missing}",
            MissingDependencyError.exit_code,
        )
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(f"cannot write: {error}", DiskError.exit_code) if error.errno in DISK_ERRORS else _bug()
    except Exception:
        return _bug()


def _quiet() -> None:
    """Other libraries' warnings and update checks are no part of our output. Called before any of them is imported."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _fail(message: str, code: int) -> int:
    print("\n".join(f"error: {message}".splitlines()[:MOST_LINES]), file=sys.stderr)
    return code


def _bug() -> int:
    traceback.print_exc()
    print(f"error: this is a bug in sslmed {__version__}; please report it with the lines above", file=sys.stderr)
    return SslmedError.exit_code


def _show(result: Result, as_json: bool) -> None:
    if as_json:
        text = json.dumps(_plain(result.as_dict()), allow_nan=False)
    else:
        text = "\n".join([*result.lines(), f"next: {result.next}"])
    print(text, flush=True)  # now, so that a reader that has gone is noticed where it is handled


def _plain(value: object) -> object:
    """JSON has neither NaN nor paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _size(text: str) -> int | tuple[int, int]:
    """``96``, or ``96x128``: height, then width."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--size is '{text}'; allowed: 96 for a square, or height x width such as 96x128, in pixels")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sslmed {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")] = False,
) -> None:
    """Options before the verb."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that does not exist yet.")] = Path(
        "sslmed-demo"
    ),
    as_json: Json = False,
) -> None:
    """The whole way on generated images: CPU, offline, 2 minutes."""
    from sslmed.commands.demo import demo as command

    _show(command(out), as_json)


@app.command()
def ingest(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A folder of images, or one image.")],
    out: Annotated[Path, typer.Option("--out", metavar="STORE", help="The store to make.")],
    modality: Annotated[
        str, typer.Option("--modality", metavar="M", help="What kind of image: xray, histology or photo.")
    ],
    labels: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Columns file, patient, perhaps split, and label:NAME.")
    ] = None,
    label_columns: Annotated[
        str, typer.Option(metavar="A,B", help="The label columns of a CSV that does not use the prefix label:.")
    ] = "",
    patient: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Finds the patient in a file's path: first group, or whole match."),
    ] = None,
    split: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CSV of split and file or patient; else 70/10/20 by patient.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The site's key; by default site.key beside the store, made if absent."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(metavar="N", help="Shrink images whose shorter side is longer, pixels.")
    ] = None,
    workers: Workers = 0,
    as_json: Json = False,
) -> None:
    """Turn a folder of images into a checked store, split by patient."""
    from sslmed.commands.ingest import ingest as command

    columns = [name.strip() for name in label_columns.split(",") if name.strip()]
    result = command(
        source,
        out,
        modality=modality,
        labels=labels,
        label_columns=columns,
        patient=patient,
        split=split,
        key=key,
        size=size,
        workers=workers,
    )
    _show(result, as_json)


@app.command()
def pretrain(
    recipe: Recipe,
    data: Data,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="RUN", help="The run to make.", show_default=False)
    ] = None,
    resume: Resume = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what it would take: parameters, steps, disk.")] = False,
    as_json: Json = False,
) -> None:
    """Pretrain a backbone on a store's train and unlabelled patients."""
    from sslmed.commands import pretrain as commands

    if plan:
        _show(commands.plan(recipe, data, overrides=overrides or ()), as_json)
    elif out is None:
        raise UsageError("pretrain needs --out RUN, the folder to write; with --plan it writes nothing")
    else:
        _show(commands.pretrain(recipe, data, out, overrides=overrides or (), resume=resume), as_json)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    target: Annotated[str | None, typer.Option(help="The label column; by default the store's first.")] = None,
    budgets: Annotated[
        str, typer.Option(help="Shares of the labelled patients, or k=N patients a class.")
    ] = "1%,10%,100%",
    seeds: Annotated[int, typer.Option(help="Label draws a budget.")] = 5,
    replicates: Annotated[int, typer.Option(help="Patient bootstrap replicates.")] = 1000,
    size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="Size of the network input, pixels; by default the card's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="By default RUN/evaluation, or beside the artifact.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse when pretraining has seen a test patient.")] = False,
    workers: Workers = 0,
    as_json: Json = False,
) -> None:
    """Score frozen features with few labels, beside random weights."""
    from sslmed.commands.evaluate import evaluate as command

    result = command(
        model,
        data,
        target=target,
        budgets=budgets,
        seeds=seeds,
        replicates=replicates,
        size=None if size is None else _size(size),
        out=out,
        strict=strict,
        workers=workers,
    )
    _show(result, as_json)


@app.command()
def finetune(
    recipe: Recipe,
    data: Data,
    start: Annotated[str, typer.Option("--from", metavar="RUN|ARTIFACT|random", help="The weights to start from.")],
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="The run to make.")],
    overrides: Overrides = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a classifier, from a pretrained backbone or from scratch."""
    from sslmed.commands.finetune import finetune as command

    _show(command(recipe, data, out, start=start, overrides=overrides or (), resume=resume), as_json)


@app.command()
def predict(
    model: Model,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A folder of images, or one image.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    as_json: Json = False,
) -> None:
    """Predict the classes of images with a fine-tuned model."""
    from sslmed.commands.predict import predict as command

    _show(command(model, source, out), as_json)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A store, a run or an artifact.")], as_json: Json = False
) -> None:
    """Check every digest and the self-test."""
    from sslmed.commands.verify import verify as command

    _show(command(path), as_json)


@recipes_app.command("ls")
def recipes_ls(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from sslmed.commands import recipes

    _show(recipes.ls(), as_json)


@recipes_app.command("show")
def recipes_show(recipe: Recipe, as_json: Json = False) -> None:
    """Print a recipe."""
    from sslmed.commands import recipes

    _show(recipes.show(recipe), as_json)


@recipes_app.command("copy")
def recipes_copy(
    recipe: Recipe,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that does not exist yet.")],
    as_json: Json = False,
) -> None:
    """Copy a recipe to change it."""
    from sslmed.commands import recipes

    _show(recipes.copy(recipe, file), as_json)


@recipes_app.command("check")
def recipes_check(recipe: Recipe, overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what is wrong with a recipe, or print it with every default."""
    from sslmed.commands import recipes

    _show(recipes.check(recipe, overrides or ()), as_json)
