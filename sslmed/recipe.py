"""Recipes: a short YAML file that says how to run one command, and only what differs from the defaults.

Each setting is declared once, in the Config beside the code that obeys it; here stand only the sections and the reader.
A recipe is data: no import paths, no expressions, no interpolation, no environment variables.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import yaml
from pydantic import Field, SerializeAsAny, ValidationError

from sslmed.artifact import StatedConfig
from sslmed.config import Config, UsageError
from sslmed.data.loading import DataConfig
from sslmed.data.views import ViewConfig
from sslmed.evaluation.protocol import LabelsConfig
from sslmed.heads import HEADS
from sslmed.methods import METHODS
from sslmed.models.backbones import BackboneConfig
from sslmed.optim import OptimConfig
from sslmed.settings_errors import problems, unknown, unknown_choice
from sslmed.shipped import find
from sslmed.training.early_stopping import StopConfig
from sslmed.training.monitors import MonitorConfig
from sslmed.training.trainer import TrainConfig

COMMAND_LINE = "command line"
LARGEST = 64 * 1024  # characters; a recipe has about 500
DEEPEST = 8
MOST_LINES = 6
FREE_ON_RESUME = (
    *("data.workers:", "monitor.", "card."),
    *(f"train.{key}:" for key in ("save_every_steps", "keep_checkpoints", "timeout", "loggers")),
    "train.devices:",  # how many processes, and of what kind, a run records by itself
)
INSTEAD = {"train.epochs": "train.max_steps", "train.max_steps": "train.epochs"}


class PretrainRecipe(Config):
    """How to run ``sslmed pretrain``. ``views`` holds the knobs of ``ViewConfig`` that differ from the modality's."""

    verb: ClassVar[str] = "pretrain"
    task: ClassVar[str] = "method"
    backbone: BackboneConfig = BackboneConfig()
    data: DataConfig = DataConfig()
    method: SerializeAsAny[Config]
    views: dict[str, Any] = Field(default_factory=dict)
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    monitor: MonitorConfig = MonitorConfig()
    card: StatedConfig = StatedConfig()


class FinetuneRecipe(Config):
    """How to run ``sslmed finetune``. A start without a card (random, ImageNet, a weight file) needs ``backbone``."""

    verb: ClassVar[str] = "finetune"
    task: ClassVar[str] = "head"
    backbone: BackboneConfig | None = None
    data: DataConfig = DataConfig()
    head: SerializeAsAny[Config]
    views: dict[str, Any] = Field(default_factory=dict)
    labels: LabelsConfig = LabelsConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    stop: StopConfig = StopConfig()
    card: StatedConfig = StatedConfig()


Recipe = PretrainRecipe | FinetuneRecipe
R = TypeVar("R", PretrainRecipe, FinetuneRecipe)
Settings = dict[str, Any]
KINDS: dict[str, type[PretrainRecipe] | type[FinetuneRecipe]] = {"method": PretrainRecipe, "head": FinetuneRecipe}
_CHOICES: dict[str, Mapping[str, Any]] = {"method": METHODS, "head": HEADS}
_SECTIONS: dict[str, type[Config]] = {
    "backbone": BackboneConfig,
    "data": DataConfig,
    "views": ViewConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "monitor": MonitorConfig,
    "labels": LabelsConfig,
    "stop": StopConfig,
    "card": StatedConfig,
}


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file or of a shipped name, after the ``section.key=value`` overrides, checked.

    Raises:
        UsageError: unreadable YAML, or settings that are unknown, of the wrong kind or out of range; all of them are
            named, as far as six lines reach.
        MissingInputError: the file does not exist.
    """
    settings, overridden = _override(_read_file(find(source), str(source)), overrides)
    return _check(settings, str(source), overridden)


def load_pretrain(source: str | Path, overrides: Sequence[str] = ()) -> PretrainRecipe:
    """A recipe for ``sslmed pretrain``; otherwise as ``load``."""
    return _of_kind(PretrainRecipe, load(source, overrides), source)


def load_finetune(source: str | Path, overrides: Sequence[str] = ()) -> FinetuneRecipe:
    """A recipe for ``sslmed finetune``; otherwise as ``load``."""
    return _of_kind(FinetuneRecipe, load(source, overrides), source)


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, one section a line; ``load`` gives an equal recipe back."""
    sections = recipe.model_dump(mode="json")
    return "".join(f"{name}: {_write(section)}\n" for name, section in sections.items() if section is not None)


def changes(old: Recipe, new: Recipe) -> list[str]:
    """What ``diff`` says of the settings that decide the result; the others may change when a run is resumed."""
    return [line for line in diff(old, new) if not line.startswith(FREE_ON_RESUME)]


def diff(old: Recipe, new: Recipe) -> list[str]:
    """One line ``train.batch_size: 64 -> 128`` for each setting that differs."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = [*before, *(key for key in after if key not in before)]
    return [
        f"{key}: {_write(before.get(key, 'unset'))} -> {_write(after.get(key, 'unset'))}"
        for key in keys
        if key not in before or key not in after or before[key] != after[key]
    ]


# --- from settings to a recipe


def _of_kind(kind: type[R], recipe: Recipe, source: str | Path) -> R:
    if isinstance(recipe, kind):
        return recipe
    raise UsageError(
        f"{source}: a recipe with '{recipe.task}' is for sslmed {recipe.verb}; sslmed {kind.verb} needs '{kind.task}'"
    )


def _check(settings: Settings, source: str, overridden: set[str]) -> Recipe:
    kinds = [kind for task, kind in KINDS.items() if task in settings]
    if len(kinds) != 1:
        found = "has both" if kinds else "has neither"
        raise UsageError(f"{source}: a recipe has 'method' (pretraining) or 'head' (fine-tuning); this one {found}.")
    kind = kinds[0]
    elsewhere = {key: f"{name}.{key}" for name in kind.model_fields if name in _SECTIONS for key in _keys(name)}
    wrong = [(name, unknown(name, kind.model_fields, elsewhere)) for name in settings if name not in kind.model_fields]
    sections: Settings = {}
    for name in kind.model_fields:
        given = settings.get(name)
        if given is not None or name == kind.task:  # a section without content is as good as none
            sections[name], problems_here = _section(name, {} if given is None else given, elsewhere)
            wrong += problems_here
    if wrong:
        lines = [f"{_origin(key, source, overridden)}: '{key}' {text}" for key, text in wrong]
        more = [f"and {len(lines) - MOST_LINES + 1} more"] if len(lines) > MOST_LINES else []
        raise UsageError("\n".join(lines[: MOST_LINES - len(more)] + more))
    return kind(**sections)


def _keys(section: str) -> list[str]:
    return [key for key in _SECTIONS[section].model_fields if key != "name"]


def _origin(key: str, source: str, overridden: set[str]) -> str:
    near = any(f"{one}.".startswith(f"{key}.") or f"{key}.".startswith(f"{one}.") for one in overridden)
    return COMMAND_LINE if near else source


def _section(name: str, given: object, elsewhere: Mapping[str, str]) -> tuple[object, list[tuple[str, str]]]:
    """The checked section, and what is wrong with it as (dotted key, sentence)."""
    if not isinstance(given, dict):
        return None, [(name, f"is {_write(given)}; allowed: settings such as {name}: {{key: value}}")]
    kind = _SECTIONS.get(name)
    if kind is None:
        choices = _CHOICES[name]
        if "name" not in given:
            return None, [(f"{name}.name", f"is missing; allowed: {', '.join(choices)}")]
        if given["name"] not in list(choices):
            return None, [(f"{name}.name", unknown_choice(given["name"], choices))]
        kind = cast(type[Config], choices[given["name"]].Config)
    try:
        # JSON because pydantic's strict mode then takes lists for tuples and whole numbers for floats, yet neither
        # 'yes' for true nor '10' for 10
        checked = kind.model_validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        found = problems(kind, given, error, elsewhere)
        return None, [(".".join((name, *path)), text) for path, text in found]
    return (checked.model_dump(mode="json", include=set(given)) if name == "views" else checked), []


def _override(settings: Settings, overrides: Sequence[str]) -> tuple[Settings, set[str]]:
    """``settings`` with each ``a.b=value`` set, and the dotted keys that were set."""
    keys = set()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UsageError(f"{COMMAND_LINE}: '{text}' is not SECTION.KEY=VALUE, such as train.epochs=50")
        *parents, last = key.split(".")
        level = settings
        for parent in parents:
            if level.get(parent) is None:
                level[parent] = {}
            level = level[parent]
            if not isinstance(level, dict):
                raise UsageError(f"{COMMAND_LINE}: '{key}': '{parent}' is {_write(level)}, not a section")
        level[last] = _read(value, COMMAND_LINE)
        keys.add(key)
    for key in keys & INSTEAD.keys():
        section, other = INSTEAD[key].split(".")
        if INSTEAD[key] not in keys and isinstance(settings[section], dict):
            settings[section].pop(other, None)  # the file's way to say how long gives way to the one asked for now
    return settings, keys


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Settings:
    flat: Settings = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# --- YAML 1.2 as far as settings need it


def _read_file(path: Path, source: str) -> Settings:
    try:
        if path.stat().st_size > LARGEST:
            raise UsageError(f"{source} has {path.stat().st_size} bytes; a recipe has at most {LARGEST}.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source} cannot be read as text: {error}") from error
    settings = _read(text, source)
    if not isinstance(settings, dict):
        raise UsageError(f"{source}: a recipe has sections such as method: {{name: simclr}}; this file has none.")
    return settings


def _read(text: str, source: str) -> Any:
    """The value of one YAML document; None when it is empty."""
    brackets = (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)
    try:
        content = (event for event in yaml.parse(text, Loader=yaml.SafeLoader) if not isinstance(event, brackets))
        first = next(content, None)
        value = None if first is None else _node(content, first)
        if next(content, None) is not None:
            raise _RefusedError("a second document (---) is not allowed")
        return value
    except _RefusedError as error:
        raise UsageError(f"{source}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark and source != COMMAND_LINE else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", "")
        raise UsageError(f"{source}{where}: this is not YAML: {reason}") from error


class _RefusedError(Exception):
    """What YAML has and a recipe must not."""


def _node(events: Iterator[yaml.Event], event: yaml.Event, depth: int = 0) -> Any:
    """The value that begins with ``event``. From events, not by a Loader: nothing is built but the plain types.

    Tags, aliases and repeated keys are refused: they hide from the reader what a recipe says.
    """
    if isinstance(event, yaml.AliasEvent):
        raise _RefusedError(f"{_line(event)}aliases (*name) are not allowed")
    if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
        raise _RefusedError(f"{_line(event)}tags (!name) are not allowed")
    if depth > DEEPEST:
        raise _RefusedError(f"{_line(event)}more than {DEEPEST} levels of nesting")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event) if event.implicit[0] else event.value
    return (_sequence if isinstance(event, yaml.SequenceStartEvent) else _mapping)(events, depth + 1)


def _line(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}: " if event.start_mark else ""


def _sequence(events: Iterator[yaml.Event], depth: int) -> list[Any]:
    items = []
    while not isinstance(event := next(events), yaml.SequenceEndEvent):
        items.append(_node(events, event, depth))
    return items


def _mapping(events: Iterator[yaml.Event], depth: int) -> Settings:
    mapping: Settings = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _node(events, event, depth)
        if not isinstance(key, str):
            raise _RefusedError(f"{_line(event)}the key {_write(key)} is not text")
        if key in mapping:
            raise _RefusedError(f"{_line(event)}'{key}' stands twice")
        mapping[key] = _node(events, next(events), depth)
    return mapping


_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {
    spelling: value
    for word, value in (("true", True), ("false", False), ("null", None), ("~", None), ("", None))
    for spelling in (word, word.capitalize(), word.upper())
}


def _scalar(event: yaml.ScalarEvent) -> Any:
    """A plain scalar by YAML 1.2's core schema; PyYAML by itself reads 1.1, where 1e-3 is text and off is False."""
    text: str = event.value
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        if len(text) > 20:
            raise _RefusedError(f"{_line(event)}{text[:20]}... is too large a number")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _NUMBER.fullmatch(text):
        return float(re.sub(r"\.(?=[inIN])", "", text))
    return text


class _Writer(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or 1.2 would read as something else."""


_Writer.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^(?:{_INTEGER.pattern}|{_NUMBER.pattern})$"), None
)


def _write(value: object) -> str:
    """``value`` on one line."""
    text = yaml.dump(value, Dumper=_Writer, default_flow_style=True, width=10**9, sort_keys=False, allow_unicode=True)
    return text.strip().removesuffix("...").strip()
