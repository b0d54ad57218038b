"""Every file that pydicom and nibabel bring along: what becomes of it, as the table in docs/readers.md.

python tests/data/readers/outcomes.py     writes the table anew
"""

from pathlib import Path

import nibabel
import pydicom

from sslmed.config import SslmedError
from sslmed.data.readers import scans

PAGE = Path(__file__).parents[3] / "docs" / "readers.md"
START, END = "<!-- made by tests/data/readers/outcomes.py -->\n", "<!-- end -->\n"


def samples() -> list[tuple[str, Path]]:
    """(name, path): the DICOM files of pydicom's wheel, the NIfTI files of nibabel's tests."""
    ours = Path(pydicom.__file__).parent / "data"
    theirs = Path(nibabel.__file__).parent / "tests" / "data"
    skipped = (".py", ".pyc", ".json", ".txt", ".md", ".rst", ".dump", ".icc")  # scripts and texts
    folders = ("test_files", "charset_files", "palettes")
    found = [path for folder in folders for path in (ours / folder).rglob("*") if path.is_file()]
    found = [path for path in found if path.suffix not in skipped and path.name != "README"]
    rows = [(f"pydicom/{path.relative_to(ours).as_posix()}", path) for path in found]
    rows += [
        (f"nibabel/{path.name}", path)
        for path in theirs.iterdir()
        if path.is_file() and path.suffix not in skipped and path.name[0] != "."
    ]
    return sorted(rows)


def outcome(path: Path) -> str:
    """The scan, or the first of several, in a few words, or why there is none."""
    try:
        found = list(scans(path))
    except SslmedError as error:
        return f"refused: {str(error).removeprefix(f'{path}: ')}"
    first = found[0]
    shape = " x ".join(str(side) for side in first.pixels.shape)
    ends = min(scan.pixels.min() for scan in found), max(scan.pixels.max() for scan in found)
    values = f"{ends[0]:g} to {ends[1]:g}{f' {first.unit}' if first.unit else ''}"
    kinds = first.kind if len(found) == 1 else f"{len(found)} {first.kind}s"
    return f"{kinds} {shape} {first.pixels.dtype}, {values}"


def family(path: Path) -> str:
    """DICOM with its transfer syntax, else what the suffix says."""
    try:
        meta = pydicom.filereader.read_file_meta_info(path)
        return f"DICOM {meta.TransferSyntaxUID.name}"
    except Exception:
        return "DICOM" if path.suffix == ".dcm" else path.suffix.lstrip(".") or "none"


def table() -> str:
    """Markdown. Files of one folder with the same outcome share a line."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for name, path in samples():
        folder, _, last = name.rpartition("/")
        lines.setdefault((folder, family(path), outcome(path)), []).append(last)
    rows = ["| Files | Format | Outcome |", "|---|---|---|"]
    for (folder, kind, result), names in lines.items():
        shown = ", ".join(names) if len(names) <= 40 else f"{names[0]} to {names[-1]} ({len(names)} files)"
        rows.append(f"| {folder}: {shown} | {kind} | {result.replace('|', '/')} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + START + "\n" + table() + "\n" + END + rest.partition(END)[2], encoding="utf-8")
