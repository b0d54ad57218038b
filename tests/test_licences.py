"""What an installation of sslmed brings along, and under which licence."""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
COPYLEFT = re.compile(r"\bA?GPL|GNU (Affero )?General Public", re.IGNORECASE)  # LGPL passes: it is linked, not included
# Their metadata names no licence; read in the wheel itself.
READ_BY_HAND = {"faster-coco-eval": "Apache-2.0", "hdf5plugin": "MIT; its filters are BSD, MIT, zlib and bzip2"}


def closure(requirements: list[Requirement]) -> dict[str, Distribution]:
    """Every installed distribution that the requirements need, on this platform."""
    todo, found = list(requirements), dict[str, Distribution]()
    done = set[tuple[str, str]]()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in done:
                continue
            done.add((name, extra))
            found[name] = distribution(name)
            needed = [Requirement(line) for line in found[name].requires or []]
            todo += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]
    return found


def licences(installed: Distribution) -> Iterator[str]:
    """What the metadata says: an expression, classifiers, or the first line of free text."""
    about = installed.metadata
    yield from about.get_all("License-Expression") or []
    yield from (line for line in about.get_all("Classifier") or [] if line.startswith("License ::"))
    yield from (text.strip().splitlines()[0] for text in about.get_all("License") or [] if text.strip())


NEEDED = closure(CORE)


def test_the_closure_is_whole() -> None:
    assert {canonicalize_name(requirement.name) for requirement in CORE} <= NEEDED.keys()
    assert {"torch", "albucore", "pydantic-core"} <= NEEDED.keys()


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_no_copyleft_in_the_core(name: str) -> None:
    stated = list(licences(NEEDED[name]))
    assert stated or name in READ_BY_HAND, f"{name} states no licence: read it and write it down here"
    assert not [text for text in stated if COPYLEFT.search(text)]


@pytest.mark.parametrize(
    ("text", "copyleft"),
    [
        ("GPL-3.0-or-later", True),
        ("AGPL-3.0-only", True),
        ("License :: OSI Approved :: GNU Affero General Public License v3", True),
        ("License :: OSI Approved :: GNU General Public License v2 (GPLv2)", True),
        ("LGPL-2.1-or-later", False),
        ("License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)", False),
        ("Apache-2.0 AND MIT", False),
    ],
)
def test_what_counts_as_copyleft(text: str, copyleft: bool) -> None:
    assert bool(COPYLEFT.search(text)) is copyleft


def test_the_agpl_successor_of_albumentations_is_absent() -> None:
    with pytest.raises(PackageNotFoundError):
        distribution("albumentationsx")


def test_the_pins_fit_the_ranges_and_are_whole() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert NEEDED.keys() <= versions.keys()
    wanted = [*CORE, *(Requirement(line) for line in PROJECT["optional-dependencies"]["dev"])]
    for requirement in wanted:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)], prereleases=True)
