"""The command line. A verb imports its command when it is called, so that help and listings need no torch."""

import json
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, cast

import typer

from sslmed import __version__, endings
from sslmed.config import DataError, UsageError

CommandLineError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])  # click's, or this typer's own copy

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
Labels = Annotated[
    Path | None, typer.Option(metavar="CSV", help="Columns file, patient, perhaps split, and label:NAME.")
]
LabelColumns = Annotated[
    str, typer.Option(metavar="A,B", help="The label columns of a CSV that does not use the prefix label:.")
]
Masks = Annotated[Path | None, typer.Option(metavar="DIR", help="Masks called like their images: PNG, NIfTI.")]
MaskClasses = Annotated[str, typer.Option(metavar="A,B", help="Names of the masks' values 0, 1, ...")]
Boxes = Annotated[Path | None, typer.Option(metavar="DIR|JSON", help="Boxes: Pascal VOC folder, or COCO JSON.")]
Tilt = Annotated[bool, typer.Option("--resample-tilt", help="Read CT with a tilted gantry, its slices sheared back.")]
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
    except CommandLineError as error:
        error.show()
        return error.exit_code
    except typer.Abort:
        return endings.interrupted()
    except (Exception, KeyboardInterrupt) as error:
        return endings.of(error)
    return endings.interrupted() if code == 130 else code  # typer itself catches a Ctrl-C, without a word


def _quiet() -> None:
    """Other libraries' warnings and update checks are no part of our output. Called before any of them is imported."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


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


def _words(text: str) -> list[str]:
    """What commas part."""
    return [word.strip() for word in text.split(",") if word.strip()]


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
    modality: Annotated[
        str, typer.Option("--modality", metavar="M", help="ct, mri, xray, histology, ultrasound or photo.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="STORE", help="The store to make.", show_default=False)
    ] = None,
    labels: Labels = None,
    label_columns: LabelColumns = "",
    masks: Masks = None,
    mask_classes: MaskClasses = "",
    boxes: Boxes = None,
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
    resample_tilt: Tilt = False,
    workers: Workers = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Read everything, write nothing, list what is wrong; 65 on errors.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn a folder of images into a checked store, split by patient."""
    named: dict[str, Any] = {
        "modality": modality,
        "labels": labels,
        "label_columns": _words(label_columns),
        "masks": masks,
        "mask_classes": _words(mask_classes),
        "boxes": boxes,
        "patient": patient,
        "split": split,
        "resample_tilt": resample_tilt,
        "workers": workers,
    }
    if check:
        _check(source, named, as_json)
    elif out is None:
        raise UsageError("ingest needs --out STORE, the store to make; with --check it writes nothing")
    else:
        from sslmed.commands.ingest import ingest as command

        _show(command(source, out, key=key, size=size, **named), as_json)


def _check(source: Path, named: dict[str, Any], as_json: bool) -> None:
    from sslmed.commands.check import check as command

    found = command(source, **named)
    _show(found, as_json)
    if found.errors:
        raise typer.Exit(DataError.exit_code)


@app.command()
def label(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store that gets them.")],
    labels: Labels = None,
    label_columns: LabelColumns = "",
    masks: Masks = None,
    mask_classes: MaskClasses = "",
    boxes: Boxes = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let them take the place of others.")] = False,
    as_json: Json = False,
) -> None:
    """Add labels, masks or boxes to a store; its pixels stay as they are."""
    from sslmed.commands.label import label as command

    result = command(
        store,
        labels=labels,
        label_columns=_words(label_columns),
        masks=masks,
        mask_classes=_words(mask_classes),
        boxes=boxes,
        replace=replace,
    )
    _show(result, as_json)


@app.command()
def preview(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store to look at.")],
    recipe: Annotated[str | None, typer.Option(metavar="RECIPE", help="Whose views to show.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="By default STORE-preview.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", help="How many images.")] = 6,
    seed: Annotated[int, typer.Option(help="Which images.")] = 0,
    as_json: Json = False,
) -> None:
    """Draw raw, normalised and augmented images, masks and boxes as PNG."""
    from sslmed.commands.preview import preview as command

    _show(command(store, recipe=recipe, out=out, count=count, seed=seed), as_json)


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
    resample_tilt: Tilt = False,
    as_json: Json = False,
) -> None:
    """Predict the classes of images with a fine-tuned model."""
    from sslmed.commands.predict import predict as command

    _show(command(model, source, out, resample_tilt=resample_tilt), as_json)


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
