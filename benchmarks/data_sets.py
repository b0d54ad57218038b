"""What ingest says of seven sets of real images: the reports in docs/ingest.md, written anew.

    python benchmarks/data_sets.py --data ../shared/data [--previews DIR]

Each set is checked, ingested by one command and previewed; what the commands print goes into the page, without the
places of files on this machine. The previews show patients' images: they stay where ``--previews`` says.
"""

import argparse
import contextlib
import io
import shlex
import tempfile
from pathlib import Path

from sslmed.cli import run

PAGE = Path(__file__).parents[1] / "docs" / "ingest.md"
START, END = "<!-- made by benchmarks/data_sets.py -->\n", "<!-- end -->\n"
WIDTH = 150  # of a line in the page
XRAYS = "xray_pneumonia/labels.csv"
# (what it is, source, options)
SETS = [
    ("Chest X-rays, JPEG with a CSV", "xray_pneumonia", "xray", f"--labels {XRAYS} --label-columns label,subtype"),
    ("Blood smears, JPEG with Pascal VOC boxes", "blood_cells/images", "photo", "--boxes blood_cells/annotations"),
    ("Ultrasound, PNG with palette masks", "ultrasound_nerve/images", "ultrasound", "--masks ultrasound_nerve/masks"),
    ("Hippocampus MRI, NIfTI with label volumes", "mri_hippocampus/images", "mri", "--masks mri_hippocampus/labels"),
    ("Stained tissue, JPEG in class folders", "histology_lung", "histology", ""),
    ("CT, DICOM; one series has a tilted gantry", "ct_dicom", "ct", ""),
    ("The same, the tilted series resampled", "ct_dicom", "ct", "--resample-tilt"),
    ("MRI, DICOM", "mri_dicom", "mri", ""),
]


def main() -> None:
    """Run everything and rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds the seven sets")
    parser.add_argument("--previews", type=Path, help="where the previews go; by default they are thrown away")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        previews = given.previews or Path(home) / "previews"
        (Path(home) / "site.key").write_text("00" * 32)  # the split depends on the site's key: always the same here
        parts = [_part(each, given.data, Path(home), previews) for each in SETS]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{before}{START}\n" + "\n".join(parts) + f"\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def _part(each: tuple[str, str, str, str], data: Path, home: Path, previews: Path) -> str:
    what, source, modality, options = each
    store = f"{source.split('/')[0]}{'_resampled' if 'resample' in options else ''}"
    asked = ["ingest", source, "--modality", modality, *options.split()]
    text = [f"## {what}", ""]
    for words in ([*asked, "--check"], [*asked, "--out", store], ["preview", store, "--out", f"{store}-preview"]):
        text += ["```", f"$ sslmed {shlex.join(words)}", *_said(words, data, home, previews), "```", ""]
    return "\n".join(text)


def _said(words: list[str], data: Path, home: Path, previews: Path) -> list[str]:
    """What a command prints, its paths as they are in the page."""
    real = []
    for before, word in zip(["", *words], words, strict=False):
        if before == "--out":
            real.append(str((previews if words[0] == "preview" else home) / word))
        elif before in ("--labels", "--masks", "--boxes") or (before == "ingest"):
            real.append(str(data / word))
        elif before == "preview":
            real.append(str(home / word))
        else:
            real.append(word)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(real)
    lines = [line for line in out.getvalue().splitlines() if not line.startswith("next: ")]
    lines += [f"(exit {code})"] if code else []
    for place in (data, home, previews):
        lines = [line.replace(f"{place}/", "") for line in lines]
    return [line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in lines]


if __name__ == "__main__":
    main()
