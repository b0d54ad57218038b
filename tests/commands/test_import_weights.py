"""Foreign weights become an artifact, with a report; what is not theirs, not whole or not safe becomes nothing."""

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import nn

from sslmed import artifact
from sslmed.artifact import MIXED_KEYS, DataCard
from sslmed.commands.evaluate import evaluate
from sslmed.commands.import_weights import ImportResult, import_weights
from sslmed.commands.pretrain import PretrainResult
from sslmed.commands.verify import verify
from sslmed.config import DataError, MissingInputError, OutputExistsError, UsageError
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.models.weights import State

RES, VIT = "test_resnet", "test_vit"


def network(name: str = RES, **knobs: Any) -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model(name, num_classes=4, **knobs).eval()


def saved(content: Any, path: Path) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def brought(content: Any, folder: Path, **options: Any) -> ImportResult:
    told: dict[str, Any] = {"backbone": RES, "modality": "xray", "size": 64}
    return import_weights(saved(content, folder / "weights.pth"), folder / "artifact", **(told | options))


def tensors(result: ImportResult) -> State:
    return load_file(Path(result.artifact) / "model.safetensors")


def moco(**changes: torch.Tensor) -> dict[str, Any]:
    state = {f"module.encoder_q.{name}": value for name, value in network(in_chans=3).state_dict().items()}
    state |= {"module.queue": torch.ones(4), "module.other": torch.ones(4)}
    return {"state_dict": state | changes}


# What is made.


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ImportResult]:
    """Read it, never change it."""
    folder = tmp_path_factory.mktemp("imported")
    return folder, brought(moco(), folder, source="arXiv 1911.05722")


def test_the_card_says_where_it_came_from(imported: tuple[Path, ImportResult]) -> None:
    folder, result = imported
    card = artifact.read_card(result.artifact)
    digest = sha256(folder / "weights.pth")
    assert (card.modality, card.size, card.steps, card.method) == ("xray", 64, 0, {"name": "imported"})
    assert card.normalisation == artifact.policy(card).words
    assert (card.parent, card.stated.licence, card.backbone.init) == (digest, "", "file")
    assert card.data == DataCard(fingerprint="", key_id=MIXED_KEYS, split_digest="", images=0, patients=0)
    came = card.imported
    assert came is not None
    assert (came.layout, came.source, came.digest) == ("moco", "arXiv 1911.05722", digest)
    assert came.adapted == ("conv1.0.weight 3 -> 1 channels",)
    assert came.matched + 1 == len(tensors(result))
    assert set(came.dropped) == {
        "module.queue",
        "module.other",
        *(f"module.encoder_q.fc.{x}" for x in ("weight", "bias")),
    }
    text = "".join(path.read_text() for path in Path(result.artifact).iterdir() if path.suffix in (".json", ".md"))
    assert str(folder) not in text


def test_it_is_whole(imported: tuple[Path, ImportResult]) -> None:
    _, result = imported
    assert verify(result.artifact).kind == f"backbone {RES}"
    loaded = artifact.load_backbone(result.artifact)
    grey = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    source = network(in_chans=3)
    source.reset_classifier(0)  # type: ignore[operator]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(grey), source(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_what_is_printed(imported: tuple[Path, ImportResult]) -> None:
    folder, result = imported
    lines = result.lines()
    assert lines[0].startswith(
        f"weights from {folder}/weights.pth, as moco names them: {result.matched} tensors matched"
    )
    assert "3 dropped by design (" in lines[0]
    assert "1 dropped that no layout knows (module.other)" in lines[0]
    assert lines[-1] == f"artifact: {folder}/artifact"
    assert any("licence is not stated, give --licence; moco: CC-BY-NC-4.0 is usual" in line for line in lines)
    assert result.next == f"sslmed evaluate {folder}/artifact --data STORE"
    told = json.loads(json.dumps(result.as_dict()))
    assert (told["layout"], told["surplus"], told["missing"]) == ("moco", ["module.other"], [])


def test_whom_it_has_seen_cannot_be_told(
    imported: tuple[Path, ImportResult], phantom_store: Store, tmp_path: Path
) -> None:
    _, result = imported
    assert artifact.patients_seen(result.artifact, phantom_store, phantom_store.rows("test")) is None
    told = {"budgets": "100%", "seeds": 1, "replicates": 100}
    assert evaluate(result.artifact, phantom_store.path, out=tmp_path / "a", **told).seen is None
    with pytest.raises(DataError, match="cannot tell whether test patients were seen"):
        evaluate(result.artifact, phantom_store.path, out=tmp_path / "b", strict=True, **told)
    own = DataCard(fingerprint="f", key_id="12345678", split_digest="d", images=1, patients=1)
    data, _ = artifact.inherit(own, np.ones((1, 8), np.uint8), result.artifact)
    assert data.key_id == MIXED_KEYS


# Fitting.


@pytest.mark.parametrize("chans", [1, 3, 4])
def test_channels(chans: int, tmp_path: Path) -> None:
    state = network(in_chans=3).state_dict()
    weight = state["conv1.0.weight"]
    found = tensors(brought(state, tmp_path, in_chans=chans))["conv1.0.weight"]
    # a grey image repeated over channels acts as before: 4 are red, green, blue, red, and red is shared by two
    expected = {
        1: weight.sum(1, keepdim=True),
        3: weight,
        4: torch.stack([weight[:, 0] / 2, weight[:, 1], weight[:, 2], weight[:, 0] / 2], 1),
    }[chans]
    torch.testing.assert_close(found, expected)


def test_channels_there_and_back(tmp_path: Path) -> None:
    state = network(in_chans=3).state_dict()
    (tmp_path / "back").mkdir()
    grey = tensors(brought(state, tmp_path, in_chans=1))
    colour = tensors(brought(grey, tmp_path / "back", in_chans=3))
    mean = state["conv1.0.weight"].mean(1, keepdim=True)
    torch.testing.assert_close(colour["conv1.0.weight"], mean.expand(-1, 3, -1, -1))


def test_positions_and_patches_as_timm_resizes_them(tmp_path: Path) -> None:
    state = network(VIT, img_size=96).state_dict()
    found = tensors(brought(state, tmp_path, backbone=VIT, in_chans=3, size=224, patch=14))
    expected = resample_abs_pos_embed(state["pos_embed"], [16, 16], [6, 6], num_prefix_tokens=1)
    assert torch.equal(found["pos_embed"], expected)
    name = "patch_embed.proj.weight"
    assert torch.equal(found[name], resample_patch_embed(state[name], [14, 14]))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timms_weights_come_back_to_the_bit(suffix: str, tmp_path: Path) -> None:
    state = timm.create_model(VIT, num_classes=0, img_size=64).state_dict()
    path = saved(state, tmp_path / f"a{suffix}")
    result = import_weights(path, tmp_path / "out", backbone=VIT, modality="photo", in_chans=3, size=64)
    back = tensors(result)
    assert back.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in back.items())
    assert (result.adapted, result.missing) == ((), ())


def test_a_checkpoint_of_ours_holds_what_its_artifact_holds(pretrained: PretrainResult, tmp_path: Path) -> None:
    path = Path(pretrained.run) / "checkpoints" / "last.ckpt"
    result = import_weights(path, tmp_path / "out", backbone=RES, modality="xray", size=32)
    assert (result.layout, result.adapted, result.surplus, result.missing) == ("sslmed", (), (), ())
    whole = load_file(Path(pretrained.artifact) / "model.safetensors")
    assert all(torch.equal(value, whole[name]) for name, value in tensors(result).items())


def test_another_pooling(tmp_path: Path) -> None:
    state = network(VIT, img_size=64).state_dict()
    with pytest.raises(DataError, match=r"'norm\.' would fit 'fc_norm\.'"):
        brought(state, tmp_path, backbone=VIT, in_chans=3, pool="avg")
    result = brought(state, tmp_path, backbone=VIT, in_chans=3, pool="avg", layout="mae")
    assert torch.equal(tensors(result)["fc_norm.weight"], state["norm.weight"])
    assert artifact.read_card(result.artifact).backbone.pool == "avg"


def test_names_of_nobody_belong_to_no_family(tmp_path: Path) -> None:
    state = network(in_chans=3).state_dict()
    foreign = {f"_part{n}.{name.rpartition('.')[2]}": value for n, (name, value) in enumerate(state.items())}
    foreign = {
        name.replace(f"_part{len(state) - 2}", "_fc").replace(f"_part{len(state) - 1}", "_fc"): value
        for name, value in foreign.items()
    }
    result = brought(foreign, tmp_path)
    assert (result.layout, result.usual_licence) == ("by order", "")
    assert "note: the licence is not stated, give --licence" in result.lines()
    assert any("matched by their order" in line for line in result.lines())


def test_a_prefix(tmp_path: Path) -> None:
    state = {f"net.{name}": value for name, value in network(in_chans=3).state_dict().items()}
    with pytest.raises(DataError, match=r"--prefix net\."):
        brought(state, tmp_path)
    assert not (tmp_path / "artifact").exists()
    assert brought(state, tmp_path, prefix="net.").layout == "timm"


def test_allow_partial(tmp_path: Path) -> None:
    state = network(in_chans=3).state_dict()
    state.pop("layer2.0.bn1.bias")
    with pytest.raises(DataError, match=r"1 are missing: layer2\.0\.bn1\.bias"):
        brought(state, tmp_path)
    result = brought(state, tmp_path, allow_partial=True)
    assert result.missing == ("layer2.0.bn1.bias",)
    assert f"warning: 1 of the network's {len(tensors(result))} tensors stay random" in result.lines()
    card = artifact.read_card(result.artifact)
    assert card.imported is not None
    assert card.imported.missing == ("layer2.0.bn1.bias",)


# Licences.


@pytest.mark.parametrize(
    ("content", "licence", "warned"),
    [
        (moco, "", "CC-BY-NC-4.0 (usual for the files of moco; not stated)"),
        (moco, "MIT", ""),
        (lambda: network(in_chans=3).state_dict(), "", ""),
        (lambda: network(in_chans=3).state_dict(), "CC-BY-NC-SA-4.0", "CC-BY-NC-SA-4.0"),
        (lambda: network(in_chans=3).state_dict(), "non-commercial research only", "non-commercial research only"),
    ],
)
def test_licences(content: Callable[[], Any], licence: str, warned: str, tmp_path: Path) -> None:
    result = brought(content(), tmp_path, licence=licence)
    lines = [line for line in result.lines() if line.startswith("warning:")]
    assert lines == ([f"warning: these weights are for non-commercial use: {warned}"] if warned else [])
    card = artifact.read_card(result.artifact)
    assert card.stated.licence == result.licence == licence, "what is usual is no statement"


# What is refused.


def test_an_output_that_exists(tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    with pytest.raises(OutputExistsError) as caught:
        brought(network(in_chans=3).state_dict(), tmp_path)
    assert caught.value.exit_code == 73
    assert list((tmp_path / "artifact").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": "resnet_18"}, "timm has no model named 'resnet_18'"),
        ({"backbone": "../resnet18"}, "timm has no model"),
        ({"modality": "xrays"}, "not a known modality"),
        ({"in_chans": 0}, "--in-chans is 0; allowed: a whole number at least 1"),
        ({"patch": 0}, "--patch is 0; allowed"),
        ({"pool": "max"}, "--pool is 'max'; allowed: token or avg"),
        ({"layout": "dinov3"}, "did you mean dinov2"),
        ({"prefix": "net."}, r"no name begins with the prefix net\."),
    ],
)
def test_options(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        brought(network(in_chans=3).state_dict(), tmp_path, **options)
    assert not (tmp_path / "artifact").exists()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        import_weights(tmp_path / "a.pth", tmp_path / "out", backbone=RES, modality="xray")


class Runs:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def in_zip(marker: Path, path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "hyper_parameters": Runs(marker)}, path)


def legacy(marker: Path, path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Runs(marker)}, path, _use_new_zipfile_serialization=False)


def bare(marker: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps(Runs(marker), protocol=2))


def as_name(marker: Path, path: Path) -> None:
    torch.save({"state_dict": {Hashed(marker): torch.ones(2)}}, path)


class Hashed(Runs):
    def __hash__(self) -> int:
        return 1


def tarred(marker: Path, path: Path) -> None:
    content = pickle.dumps(Runs(marker), protocol=2)
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def polyglot(marker: Path, path: Path) -> None:
    """A pickle at its beginning, a zip at its end."""
    torch.save(network().state_dict(), path)
    path.write_bytes(pickle.dumps(Runs(marker), protocol=2) + path.read_bytes())


def swapped(marker: Path, path: Path) -> None:
    """A sound archive whose pickle is another's."""
    torch.save(network().state_dict(), path)
    other = path.with_name("other.zip")
    with zipfile.ZipFile(path) as sound, zipfile.ZipFile(other, "w") as evil:
        for name in sound.namelist():
            evil.writestr(
                name, pickle.dumps(Runs(marker), protocol=2) if name.endswith("data.pkl") else sound.read(name)
            )
    other.replace(path)


def outside(marker: Path, path: Path) -> None:
    """Members that would lie elsewhere."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"../{marker.name}", b"")
        archive.writestr(str(marker), b"")
        archive.writestr("a/data.pkl", pickle.dumps({"a": 1}, protocol=2))


@pytest.mark.parametrize("make", [in_zip, legacy, bare, as_name, tarred, polyglot, swapped, outside])
@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".pth.tar", ".safetensors"])
def test_nothing_in_a_file_is_run(make: Callable[[Path, Path], None], suffix: str, tmp_path: Path) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "in"
    folder.mkdir()
    make(marker, folder / "made.pth")
    path = shutil.move(folder / "made.pth", folder / f"evil{suffix}")
    with pytest.raises(DataError) as caught:
        import_weights(path, folder / "out", backbone=RES, modality="xray", in_chans=3)
    assert caught.value.exit_code == 65
    assert [each.name for each in tmp_path.rglob("*")] == ["in", f"evil{suffix}"]
    assert pickle.loads(pickle.dumps(Runs(marker))) == 0  # noqa: S301
    assert marker.exists(), "it would have been seen"
