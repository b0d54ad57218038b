"""The verbs by which weights come, go and are checked: import, export, publish, pull, verify."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from sslmed.cli.options import Json, Model, image_size
from sslmed.cli.showing import show
from sslmed.config import DataError


def import_weights(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Foreign weights: .safetensors, .pth, .ckpt, ...")],
    out: Annotated[Path, typer.Option("--out", metavar="ARTIFACT", help="The artifact to make.")],
    backbone: Annotated[str, typer.Option("--backbone", metavar="NAME", help="Their network, as timm calls it.")],
    modality: Annotated[
        str, typer.Option("--modality", metavar="M", help="ct, mri, xray, histology, ultrasound or photo.")
    ],
    in_chans: Annotated[
        int | None,
        typer.Option(
            "--in-chans", metavar="N", help="Input channels; by default 3 for colour, else 1.", show_default=False
        ),
    ] = None,
    size: Annotated[str, typer.Option(metavar="N|HxW", help="Input to adapt them to, pixels.")] = "224",
    patch: Annotated[
        int | None, typer.Option(metavar="N", help="Side of a transformer's patches, pixels.", show_default=False)
    ] = None,
    pool: Annotated[
        str | None, typer.Option(metavar="token|avg", help="How a transformer's tokens are pooled.", show_default=False)
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The family whose names the file has; by default found.", show_default=False),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(metavar="P", help="What the network's names have before them there.", show_default=False),
    ] = None,
    licence: Annotated[str, typer.Option(metavar="SPDX", help="Theirs, such as CC-BY-NC-4.0.")] = "",
    source: Annotated[str, typer.Option(metavar="TEXT", help="Where they come from: a page, a paper.")] = "",
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Let tensors that the file lacks stay random.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn published weights into an artifact, with a report of every tensor."""
    from sslmed.commands.import_weights import import_weights as command

    result = command(
        file,
        out,
        backbone=backbone,
        modality=modality,
        in_chans=in_chans,
        size=image_size(size),
        patch=patch,
        pool=pool,
        layout=layout,
        prefix=prefix,
        licence=licence,
        source=source,
        allow_partial=allow_partial,
    )
    show(result, as_json)


def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to make.")],
    form: Annotated[Literal["timm", "onnx", "torch-export"], typer.Option("--format", help="For which reader.")],
    as_json: Json = False,
) -> None:
    """Write a model for timm, ONNX Runtime or torch.export, and check that it gives the same numbers."""
    from sslmed.commands.export import export as command

    show(command(model, out, form=form), as_json)


def publish(
    model: Model,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to make.")],
    stated: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="What only you can say: licence, data_licence, intended_use, limits.",
            show_default=False,
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What sslmed evaluate wrote; by default the run's own.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a folder ready for a hub or a mirror; refused while the card has gaps."""
    from sslmed.commands.publish import publish as command

    show(command(model, to, stated=stated or (), evaluation=evaluation), as_json)


def pull(
    source: Annotated[str, typer.Argument(metavar="DIR|URL", help="What sslmed publish made, or where it lies now.")],
    sha256: Annotated[str, typer.Option("--sha256", metavar="DIGEST", help="As sslmed publish printed it.")],
    out: Annotated[Path, typer.Option("--out", metavar="ARTIFACT", help="The artifact to make.")],
    as_json: Json = False,
) -> None:
    """Fetch a published artifact and check every byte; a URL is the only reason for network."""
    from sslmed.commands.pull import pull as command

    show(command(source, out, sha256=sha256), as_json)


def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A store, a run, an artifact or an export.")],
    as_json: Json = False,
) -> None:
    """Check every digest and the self-test."""
    from sslmed.commands.verify import Damaged
    from sslmed.commands.verify import verify as command

    try:
        show(command(path), as_json)
    except Damaged as damaged:
        if not as_json:
            raise
        show(damaged.result, as_json)
        raise typer.Exit(DataError.exit_code) from None


VERBS: dict[str, Callable[..., None]] = {
    "import": import_weights,
    "export": export,
    "publish": publish,
    "pull": pull,
    "verify": verify,
}
