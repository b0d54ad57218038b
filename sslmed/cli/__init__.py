"""The command line. A verb imports its command when it is called, so that help and listings need no torch."""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from sslmed import __version__, endings
from sslmed.cli.options import (
    Boxes,
    Data,
    Json,
    LabelColumns,
    Labels,
    MaskClasses,
    Masks,
    Model,
    Overrides,
    Recipe,
    Resume,
    Tilt,
    Workers,
    image_size,
    words,
)
from sslmed.cli.recipes import recipes_app
from sslmed.cli.sharing import VERBS
from sslmed.cli.showing import show
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
app.add_typer(recipes_app, name="recipes")


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

    show(command(out), as_json)


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
        "label_columns": words(label_columns),
        "masks": masks,
        "mask_classes": words(mask_classes),
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

        show(command(source, out, key=key, size=size, **named), as_json)


def _check(source: Path, named: dict[str, Any], as_json: bool) -> None:
    from sslmed.commands.check import check as command

    found = command(source, **named)
    show(found, as_json)
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
        label_columns=words(label_columns),
        masks=masks,
        mask_classes=words(mask_classes),
        boxes=boxes,
        replace=replace,
    )
    show(result, as_json)


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

    show(command(store, recipe=recipe, out=out, count=count, seed=seed), as_json)


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
        show(commands.plan(recipe, data, overrides=overrides or ()), as_json)
    elif out is None:
        raise UsageError("pretrain needs --out RUN, the folder to write; with --plan it writes nothing")
    else:
        result = commands.pretrain(recipe, data, out, overrides=overrides or (), resume=resume)
        show(result, as_json, shared=True)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    overrides: Overrides = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(metavar="START", help="One more start, repeatable: imagenet, a weight file, a run or artifact."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Fine-tune every start by it instead of probing features.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The label that probes learn; by default as finetune.")] = None,
    budgets: Annotated[
        str | None,
        typer.Option(metavar="B,B", help="Shares of labelled patients, or k=N of each class.", show_default=False),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Label draws a budget; by default 5, of fine-tunings 3.", show_default=False)
    ] = None,
    replicates: Annotated[int, typer.Option(help="Patient bootstrap replicates.")] = 1000,
    size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="Size of the network input, pixels; by default the card's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="By default RUN/evaluation, or beside the artifact.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse when pretraining has seen a test patient.")] = False,
    workers: Workers = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with interrupted fine-tunings.")] = False,
    as_json: Json = False,
) -> None:
    """Compare a backbone with random weights and other starts, on few labels."""
    from sslmed.commands.evaluate import evaluate as command

    result = command(
        model,
        data,
        beside=beside or (),
        recipe=recipe,
        overrides=overrides or (),
        target=target,
        budgets=budgets,
        seeds=seeds,
        replicates=replicates,
        size=None if size is None else image_size(size),
        out=out,
        strict=strict,
        workers=workers,
        resume=resume,
    )
    show(result, as_json)


@app.command()
def finetune(
    recipe: Recipe,
    data: Data,
    start: Annotated[
        str, typer.Option("--from", metavar="RUN|ARTIFACT|FILE|imagenet|random", help="The weights to start from.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="The run to make.")],
    overrides: Overrides = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a classifier, a detector or a segmenter, from a pretrained backbone or not."""
    from sslmed.commands.finetune import finetune as command

    result = command(recipe, data, out, start=start, overrides=overrides or (), resume=resume)
    show(result, as_json, shared=True)


@app.command()
def predict(
    model: Model,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A folder of images, or one image.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    resample_tilt: Tilt = False,
    tta: Annotated[bool, typer.Option("--tta", help="Average over turned, mirrored or smaller images.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also draw heat maps, masks or boxes on the images.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Predict classes, findings, masks or boxes of images with a fine-tuned model."""
    from sslmed.commands.predict import predict as command

    show(command(model, source, out, resample_tilt=resample_tilt, tta=tta, explain=explain), as_json)


for _name, _verb in VERBS.items():
    app.command(_name)(_verb)
