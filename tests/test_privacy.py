"""Names of people and places must not leave the site: canaries in ids and paths are looked for in every byte."""

import csv
from pathlib import Path

import pytest

from sslmed.cli import run
from sslmed.data.phantoms import write_phantoms

CANARIES = ("CANARYNAME", "CANARYMRN", "CANARYFILE", "CANARYFOLDER")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source whose folder, file names and patient ids hold canaries, and the way taken from it through every verb."""
    home = tmp_path_factory.mktemp("site")
    source = home / "CANARYFOLDER"
    phantoms = write_phantoms(home / "plain", patients=40)
    with phantoms.labels.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    source.mkdir()
    for row in rows:
        new = source / f"CANARYFILE_{Path(row[0]).name}"
        (home / "plain" / row[0]).rename(new)
        row[0], row[1] = new.name, f"CANARYNAME CANARYMRN{row[1]}"
    with (source / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    store, pretrained, model = (str(home / name) for name in ("store", "pretrained", "model"))
    small = ["data.workers=0", "train.max_steps=2", "train.batch_size=8"]
    network = ["backbone.name=test_resnet", "data.size=32"]
    labels = str(source / "labels.csv")
    commands = (
        ["ingest", str(source), "--out", store, "--modality", "xray", "--labels", labels],
        ["pretrain", "xray/simclr_resnet18", "--data", store, "--out", pretrained, *small, *network],
        ["evaluate", pretrained, "--data", store, "--seeds", "1", "--replicates", "100"],
        ["finetune", "xray/classification", "--data", store, "--from", pretrained, "--out", model, *small],
    )
    for command in commands:
        assert run(command) == 0, command
    return home


@pytest.mark.parametrize("folder", ["store", "pretrained", "model"])
def test_no_byte_of_what_may_be_shared_names_anyone(site: Path, folder: str) -> None:
    files = [path for path in (site / folder).rglob("*") if path.is_file()]
    assert len(files) > 2
    for path in files:
        content = path.read_bytes()
        found = [canary for canary in CANARIES if canary.encode() in content or canary in path.name]
        assert not found, f"{path.relative_to(site)} holds {found}"


def test_what_may_not_be_shared_is_for_its_owner_alone(site: Path) -> None:
    private = site / "store.private"
    assert private.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in private.iterdir()} == {"data_report.json", "key_table.csv"}
    for path in (*private.iterdir(), site / "site.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert "CANARYMRN" in (private / "key_table.csv").read_text(encoding="utf-8")
