import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed import recipe as recipes
from sslmed.config import MissingInputError, UsageError
from sslmed.methods import METHODS
from sslmed.recipe import FinetuneRecipe, PretrainRecipe, diff, dump, load, load_finetune, load_pretrain

# The example of the design, word for word.
EXAMPLE = """\
# sslmed pretrain xray/simclr_resnet18 --data STORE --out RUN      (then: licence of the data, time, score)
backbone: {name: resnet18, in_chans: 1, init: random}   # or imagenet, or a path
data:     {size: 96, workers: auto}
method:   {name: simclr, temperature: 0.2}
views:    {crop: [0.5, 1.0]}
optim:    {name: adamw, lr: 1e-3, weight_decay: 1e-4, warmup: 0.05}
train:    {epochs: 100, batch_size: 256, accumulate: 1, precision: auto, devices: auto, save_every_steps: 500, seed: 0}   # or max_steps instead of epochs
monitor:  {knn_every: 5, collapse: stop}
"""  # noqa: E501


@pytest.fixture
def my(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(EXAMPLE, encoding="utf-8")
    return Path("my.yaml")


def write(text: str) -> Path:
    Path("my.yaml").write_text(text, encoding="utf-8")
    return Path("my.yaml")


def complaint(*overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load("my.yaml", overrides)
    return str(caught.value)


def test_the_example(my: Path) -> None:
    recipe = load_pretrain(my)
    assert recipe.method.model_dump()["temperature"] == 0.2
    assert recipe.views == {"crop": [0.5, 1.0]}
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.train.epochs) == (1e-3, 1e-4, 100)
    assert (recipe.backbone.in_chans, recipe.data.size, recipe.monitor.collapse) == (1, 96, "stop")


def test_dump_loads_equal(my: Path) -> None:
    recipe = load(my, ["optim.lr=3e-5", "train.seed=12345678901", "data.target=off", "views.rotate=15"])
    assert load(write(dump(recipe))) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301
    tuned = load(write("head: {name: classification}\nbackbone:\ndata: {target: '1e-3'}\n"))
    assert isinstance(tuned, FinetuneRecipe)
    assert (tuned.backbone, tuned.data.target) == (None, "1e-3")
    assert load(write(dump(tuned))) == tuned


def test_a_size_of_height_and_width(my: Path) -> None:
    for recipe in (load(write("method: {name: simclr}\ndata: {size: [96, 128]}\n")), load(my, ["data.size=[96, 128]"])):
        assert recipe.data.size == (96, 128)
        assert "size: [96, 128]" in dump(recipe)
        assert load(write(dump(recipe))) == recipe
    assert diff(load(my, ["data.size=96"]), recipe)[-1] == "data.size: 96 -> [96, 128]"


def test_overrides_win_and_go_through_the_same_reader(my: Path) -> None:
    recipe = load_pretrain(my, ["train.epochs=7", "train.epochs=8", "views.crop=[0.1, 0.9]", "optim.betas=[0.8, 0.95]"])
    assert (recipe.train.epochs, recipe.views["crop"], recipe.optim.betas) == (8, [0.1, 0.9], (0.8, 0.95))
    assert load_pretrain(my, ["method={name: simclr, temperature: 1}"]).method.model_dump()["temperature"] == 1.0


def test_max_steps_takes_the_place_of_epochs(my: Path) -> None:
    train = load_pretrain(my, ["train.max_steps=5"]).train
    assert (train.epochs, train.max_steps) == (None, 5)
    assert "give one of them" in complaint("train.max_steps=5", "train.epochs=5")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=ten", "'train.epochs' is 'ten'; allowed: a whole number at least 1"),
        ("train.epochs='10'", "'train.epochs' is '10'; allowed: a whole number at least 1"),
        ("train.epoch=3", "'train.epoch' is not a known key; did you mean 'epochs'?"),
        ("epochs=3", "'epochs' is not a known key; did you mean 'train.epochs'?"),
        ("method.batch_size=3", "'method.batch_size' is not a known key; did you mean 'train.batch_size'?"),
        ("method.name=simclrr", "'method.name' is 'simclrr'; did you mean 'simclr'?"),
        ("optim.name=lamb", "'optim.name' is 'lamb'; allowed: adamw, sgd or lars"),
        ("optim.lr=-1", "'optim.lr' is -1; allowed: a number above 0"),
        ("optim.lr=.nan", "'optim.lr' is NaN; allowed: a number above 0"),
        (
            "optim.betas=[0.9, 2]",
            "'optim.betas' is [0.9, 2]; allowed: a list of 2, each a number at least 0 and below 1",
        ),
        ("views.crop=0.5", "'views.crop' is 0.5; allowed: a list of 2, each a number"),
        ("views.crops=[0.5, 1]", "'views.crops' is not a known key; did you mean 'crop'?"),
        ("data.workers=-1", "'data.workers' is -1; allowed: auto or a whole number at least 0 and at most 256"),
        *(
            (
                f"data.size={size}",
                f"'data.size' is {shown}; allowed: a whole number at least 16 and at most 4096 or a list of 2, each a "
                "whole number at least 16 and at most 4096",
            )
            for size, shown in (("abc", "'abc'"), ("[96]", "[96]"), ("7", "7"), ("[96, 7]", "[96, 7]"), ("1.5", "1.5"))
        ),
        ("data.positives=twin", "'data.positives' is 'twin'; allowed: image, patient, study or neighbour"),
        ("data.neighbour_mm=0", "'data.neighbour_mm' is 0; allowed: a number above 0"),
        ("train=3", "'train' is 3; allowed: settings such as train: {key: value}"),
        ("train.seed.deep=3", "'train.seed.deep': 'seed' is 0, not a section"),
        ("train.epochs", "'train.epochs' is not SECTION.KEY=VALUE, such as train.epochs=50"),
        ("a b=1", "'a b=1' is not SECTION.KEY=VALUE, such as train.epochs=50"),
    ],
)
def test_wrong_settings_on_the_command_line(my: Path, override: str, message: str) -> None:
    assert complaint(override) == f"command line: {message}"


def test_wrong_settings_in_a_file_name_the_file(my: Path) -> None:
    write("method: {name: simclr, temprature: 0.2}\ntrian: {epochs: 3}\n")
    assert complaint() == (
        "my.yaml: 'trian' is not a known key; did you mean 'train'?\n"
        "my.yaml: 'method.temprature' is not a known key; did you mean 'temperature'?"
    )
    write("method: {temperature: 0.2}")
    assert complaint() == f"my.yaml: 'method.name' is missing; allowed: {', '.join(METHODS)}"


def test_at_most_six_lines(my: Path) -> None:
    wrong = [f"{key}=nothing" for key in ("train.epochs", "train.seed", "data.size", "optim.lr", "optim.warmup")]
    assert len(complaint(*wrong, "optim.name=x").splitlines()) == 6
    lines = complaint(*wrong, "optim.name=x", "monitor.collapse=x", "train.accumulate=x").splitlines()
    assert (len(lines), lines[-1]) == (6, "and 3 more")


def test_the_wrong_kind(my: Path) -> None:
    with pytest.raises(UsageError, match="'method' is for sslmed pretrain; sslmed finetune needs 'head'"):
        load_finetune(my)
    write("head: {name: classification}")
    with pytest.raises(UsageError, match="'head' is for sslmed finetune; sslmed pretrain needs 'method'"):
        load_pretrain(my)
    write("head: {name: classification}\nmethod: {name: simclr}")
    assert "this one has both" in complaint()
    write("train: {epochs: 3}")
    assert "this one has neither" in complaint()


def test_where_recipes_come_from(my: Path) -> None:
    assert isinstance(load("xray/simclr_resnet18"), PretrainRecipe)
    with pytest.raises(UsageError, match="did you mean 'xray/simclr_resnet18'"):
        load("xray/simclr_resnet")
    with pytest.raises(MissingInputError, match="no recipe file"):
        load("absent.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this file has none"),
        ("- 1", "this file has none"),
        ("method: [", "this is not YAML"),
        ("method: {name: simclr, name: byol}", "line 1: 'name' stands twice"),
        ("a: &x {b: 1}\nmethod: *x", "line 2: aliases"),
        ("method: !!python/object/apply:os.system [id]", "line 1: tags"),
        ("method: !!int '3'", "line 1: tags"),
        ("method: {1: 2}", "line 1: the key 1 is not text"),
        ("---\na: 1\n---\nb: 1", "second document"),
        ("method: " + "[" * 50 + "]" * 50, "levels of nesting"),
        ("method: {name: " + "9" * 5000 + "}", "too large a number"),
        ("method: \x00", "this is not YAML"),
        ("#" * 70_000, "at most 65536"),
    ],
)
def test_text_that_is_no_recipe(my: Path, text: str, message: str) -> None:
    write(text)
    assert message in complaint()
    assert len(complaint()) < 300


def test_bytes_that_are_no_text(my: Path) -> None:
    my.write_bytes(b"method: \xff\xfe")
    assert "cannot be read as text" in complaint()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("012", 12),
        ("0x1F", 31),
        ("0o17", 15),
        ("+3", 3),
        ("true", True),
        ("FALSE", False),
        ("off", "off"),
        ("Yes", "Yes"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("<<", "<<"),
        ("~", None),
        ("", None),
        ("'12'", "12"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = recipes._read(text, "text")
    assert read == value
    assert type(read) is type(value)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
    | st.sampled_from(["1e-3", "0o7", "012", "off", "null", "~", "1_0", "0x1g", ".5", "1:30", "a: b", "#", "- x"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text("abc_", min_size=1), values, max_size=3),
    max_leaves=6,
)


@given(PLAIN)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_is_written_reads_equal(value: object) -> None:
    text = recipes._write(value)
    assert "\n" not in text
    assert repr(recipes._read(text, "text")) == repr(value)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    try:
        recipes._read(text, "text")
    except UsageError as error:
        assert str(error).startswith("text")  # noqa: PT017


def test_a_dump_is_also_yaml_for_others(my: Path) -> None:
    assert yaml.safe_load(dump(load(my)))["optim"]["weight_decay"] == 1e-4


def test_diff(my: Path) -> None:
    old, new = load(my), load(my, ["train.batch_size=128", "views.rotate=5", "data.target=finding"])
    assert diff(old, new) == [
        "data.target: null -> finding",
        "train.batch_size: 256 -> 128",
        "views.rotate: unset -> 5.0",
    ]
    assert diff(old, old) == []
