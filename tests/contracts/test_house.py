"""Floors, doors, names and forbidden calls of the house (CONTRIBUTING.md), read from the source."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up: a room may import the rooms below its floor, and itself.
FLOORS = [
    {"config", "console", "keyed_rng", "image_size"},
    {"distributed", "torchvision_ops", "durable", "settings_errors", "shipped", "endings"},
    {"data", "models", "optim"},
    {"evaluation", "artifact", "run"},
    {"methods", "heads", "training"},
    {"recipe"},
    {"supervised"},
    {"exporting"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# training/fit.py fits a Method or a Head: it knows the two contracts, none of their members.
ON_ONE_FLOOR = {("training", "methods.method"), ("training", "heads.head")}
# Rooms whose members do not know each other, and what in them everyone there may know.
STRANGERS = {"methods": {"methods.method", "methods.restorative"}, "heads": {"heads.head"}, "commands": set[str]()}
PUBLIC_DOOR = "commands.demo"  # the only one that uses the package as its users do

DOORS = {
    "timm": ["models/backbones.py"],
    "albumentations": ["data/views.py"],
    "cv2": ["data/views.py", "data/readers/", "data/writers.py"],
    "h5py": ["data/shards/hdf5.py"],
    "hdf5plugin": ["data/shards/hdf5.py"],
    "pydicom": ["data/readers/", "data/writers.py"],
    "gdcm": ["data/readers/"],
    "nibabel": ["data/readers/", "data/writers.py"],
    "tifffile": ["data/readers/", "data/writers.py"],
    "safetensors": ["models/weights.py", "artifact/"],
    "torchmetrics": ["evaluation/metrics.py"],
    "lightly": ["methods/"],
    "yaml": ["recipe.py"],
    "pytorch_lightning": ["methods/method.py", "heads/head.py", "data/loading.py", "training/"],
    "typer": ["cli/"],
    "wandb": ["training/sinks.py"],
    "mlflow": ["training/sinks.py"],
    "tensorboard": ["training/sinks.py"],
    "matplotlib": ["data/previews/panels.py", "evaluation/curves.py"],
    "faster_coco_eval": ["evaluation/detections.py"],
    "onnxruntime": ["exporting/graphs.py"],
    "onnxscript": ["exporting/graphs.py"],
}
FORBIDDEN_NAMES = {"utils", "core", "common", "helpers", "registry", "constants", "types"}
UNSAFE_MODULES = {"pickle", "_pickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_YAML = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}
UNSAFE_YAML |= {"Loader", "FullLoader", "UnsafeLoader"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60  # lines past which they want splitting by meaning


@dataclass(frozen=True)
class Source:
    """One file. ``name`` is dotted and without ``sslmed``: ``data.store``, or ``data`` for data/__init__.py."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def name(self) -> str:
        return self.path.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]


def read_package() -> list[Source]:
    package = ROOT / "sslmed"
    return [
        Source(path.relative_to(package).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    ]


HOUSE = read_package()
MODULES = {source.name for source in HOUSE}


def imports(source: Source) -> Iterator[str]:
    """Every module imported anywhere in the file, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.path}:{node.lineno}: relative import"
            base = node.module or ""
            yield from (f"{base}.{alias.name}" if _is_module(base, alias.name) else base for alias in node.names)


def _is_module(base: str, name: str) -> bool:
    return f"{base}.{name}".removeprefix("sslmed.") in MODULES if base.split(".")[0] == "sslmed" else False


def own_imports(source: Source) -> list[str]:
    """The modules of this package that the file imports, named as in ``Source.name``; the package itself is ''."""
    return [name.removeprefix("sslmed").lstrip(".") for name in imports(source) if name.split(".")[0] == "sslmed"]


def breaches(source: Source) -> list[str]:
    """What breaks the rules of floors and doors."""
    if not source.name:
        return []  # the public door: lazy names of every floor
    outside = {name.split(".")[0] for name in imports(source)} & DOORS.keys()
    return [
        *(
            f"{source.path} imports {other}"
            for other in own_imports(source)
            if other and not _may_import(source, other)
        ),
        *(f"{source.path} imports {name}, whose door is {DOORS[name]}" for name in outside if not _door(source, name)),
    ]


def _door(source: Source, library: str) -> bool:
    return any(source.path.startswith(door) if door.endswith("/") else source.path == door for door in DOORS[library])


def _may_import(source: Source, other: str) -> bool:
    room = other.partition(".")[0]
    if room == source.room:
        known = STRANGERS.get(room)
        return known is None or source.name == room or other in known
    return FLOOR[room] < FLOOR[source.room] or (source.room, other) in ON_ONE_FLOOR


def unsafe(source: Source) -> list[str]:
    """Calls and imports that would run what a file says, or could."""
    found = [f"import {name}" for name in imports(source) if name.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml" and node.attr in UNSAFE_YAML:
            found.append(f"yaml.{node.attr}")
        if isinstance(node, ast.Call):
            found += _unsafe_call(node)
    return found


def _unsafe_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    bad = (
        name in ("eval", "exec", "__import__", "os.system", "os.popen")
        or (name == "torch.load" and given.get("weights_only") != "True")
        or name.endswith("load_from_checkpoint")
        or (given.get("allow_pickle", "False") != "False")
        or (given.get("shell", "False") != "False")
    )
    return [name] if bad else []


def test_every_room_has_a_floor() -> None:
    assert {source.room for source in HOUSE if source.name} <= FLOOR.keys()


def test_floors_and_doors() -> None:
    assert [breach for source in HOUSE for breach in breaches(source)] == []


def test_no_circles() -> None:
    graph = {source.name: {other for other in own_imports(source) if other} for source in HOUSE if source.name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {error.args[1]}")


def test_only_demo_uses_the_public_names() -> None:
    public = {f"sslmed.{name}" for name in _public_names()}
    for source in HOUSE:
        users = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(source.tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        } | {ast.unparse(node) for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)}
        if source.name not in ("", PUBLIC_DOOR):
            assert not users & public, f"{source.path} uses {users & public}"


def _public_names() -> list[str]:
    (top,) = (source for source in HOUSE if not source.name)
    for node in top.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError("sslmed/__init__.py has no __all__")


@pytest.mark.parametrize("source", HOUSE, ids=lambda source: source.path)
def test_a_file(source: Source) -> None:
    assert not set(Path(source.path).with_suffix("").parts) & FORBIDDEN_NAMES
    assert unsafe(source) == []
    assert ast.get_docstring(source.tree), "a file says at its top what it is for"
    assert len(source.text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert _length(node) <= LONGEST_FUNCTION, f"{node.name} has {_length(node)} lines"


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body without its docstring."""
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    return (function.end_lineno or 0) - first.lineno + 1


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("data/new.py", "from sslmed.models import backbones", "data/new.py imports models.backbones"),
        ("models/new.py", "def f():\n    from sslmed.data.store import Store", "models/new.py imports data.store"),
        ("methods/new.py", "from sslmed.methods.simclr import SimCLR", "methods/new.py imports methods.simclr"),
        ("commands/new.py", "from sslmed.commands.ingest import ingest", "commands/new.py imports commands.ingest"),
        ("evaluation/new.py", "if TYPE_CHECKING:\n    from sslmed.run import Run", "evaluation/new.py imports run"),
        ("training/new.py", "import sslmed.methods.simclr", "training/new.py imports methods.simclr"),
        ("heads/new.py", "import timm.models", "heads/new.py imports timm, whose door is ['models/backbones.py']"),
        ("run.py", "import yaml", "run.py imports yaml, whose door is ['recipe.py']"),
    ],
)
def test_a_breach_is_seen(path: str, text: str, message: str) -> None:
    assert breaches(Source(path, text)) == [message]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "yaml.parse(text, Loader=yaml.FullLoader)",
        "eval('1')",
        "exec('1')",
        "np.load(path, allow_pickle=True)",
        "Method.load_from_checkpoint(path)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_an_unsafe_call_is_seen(text: str) -> None:
    assert unsafe(Source("new.py", text)) != []


def test_what_is_safe_passes() -> None:
    text = "torch.load(path, weights_only=True)\nmodel.eval()\nyaml.parse(text, Loader=yaml.SafeLoader)\nnp.load(path)"
    assert unsafe(Source("new.py", text)) == []
