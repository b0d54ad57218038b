"""A segmentation starts from the neck and decoder of a restorative run, and from the backbone alone when told to."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stores
import torch
from safetensors.torch import load_file

from sslmed import artifact
from sslmed.commands.finetune import finetune
from sslmed.commands.pretrain import PretrainResult, pretrain
from sslmed.commands.publish import publish
from sslmed.commands.pull import pull
from sslmed.commands.verify import verify
from sslmed.config import DataError, UsageError
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.recipe import load_finetune
from sslmed.supervised.tuning import Job, prepare

RECIPE = "xray/segmentation"
PRETRAIN = (
    "data.size=32",
    "data.workers=0",
    "train.max_steps=3",
    "train.batch_size=8",
    "train.precision=32",
    "monitor.knn_every=0",
)
FINETUNE = ("data.workers=0", "train.max_steps=3", "train.batch_size=8", "train.precision=32", "stop.check_every=3")
LAST = ("decoder.classifier.weight", "decoder.classifier.bias")
SAID = "neck and decoder start from"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return stores.write_shapes(tmp_path_factory.mktemp("shapes") / "store")


def pretrained(shapes: Store, out: Path, recipe: str, *settings: str) -> PretrainResult:
    return pretrain(f"xray/{recipe}", shapes.path, out, overrides=(*PRETRAIN, *settings))


@pytest.fixture(scope="module")
def genesis(shapes: Store) -> PretrainResult:
    """Read it, never change it."""
    out = shapes.path.parent / "genesis"
    return pretrained(shapes, out, "models_genesis_resnet18", "backbone.name=test_resnet")


def begun(shapes: Store, start: str | Path, *settings: str) -> Job:
    return prepare(load_finetune(RECIPE, (*FINETUNE, *settings)), shapes, start)


def tensors(job: Job) -> dict[str, torch.Tensor]:
    return job.head.head.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], names: Any) -> bool:
    return all(torch.equal(one[name], other[name]) for name in names)


def test_the_run_holds_what_the_decoder_had_learnt(genesis: PretrainResult) -> None:
    kept = artifact.read_decoder(genesis.artifact)
    assert artifact.read_card(genesis.artifact).decoder == "unet"
    checkpoint = torch.load(Path(genesis.run) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    prefix = "restorer."
    trained = {name.removeprefix(prefix): each for name, each in checkpoint.items() if name.startswith(prefix)}
    assert kept.keys() == trained.keys() - set(LAST)
    assert same(kept, trained, kept)


def test_before_step_1_the_head_has_these_weights(genesis: PretrainResult, shapes: Store) -> None:
    kept, job, alone = (
        artifact.read_decoder(genesis.artifact),
        begun(shapes, genesis.run),
        begun(shapes, genesis.run, "head.decoder=random"),
    )
    assert tensors(job).keys() == kept.keys() | set(LAST)
    assert same(tensors(job), kept, kept)
    assert job.lines == (f"{SAID} the pretraining's: {len(kept)} tensors, all but the last layer",)
    assert alone.lines == (f"{SAID} random weights (head.decoder=random)",)
    assert same(tensors(job), tensors(alone), LAST), "classes start alike"
    convolutions = [name for name in kept if kept[name].ndim == 4]
    assert not any(torch.equal(tensors(alone)[name], kept[name]) for name in convolutions)
    network = job.head.backbone.network.state_dict()
    assert same(network, load_file(Path(genesis.artifact) / "model.safetensors"), network)


def test_a_vits_neck_is_taken_too(shapes: Store, tmp_path: Path) -> None:
    vit = ("backbone.name=test_vit", "backbone.patch=8")
    run = pretrained(shapes, tmp_path / "vit", "denoising_resnet18", *vit)
    kept, job = artifact.read_decoder(run.artifact), begun(shapes, run.run)
    assert any(name.startswith("neck.") for name in kept)
    assert same(tensors(job), kept, kept)


def test_other_starts_are_as_before(genesis: PretrainResult, shapes: Store, tmp_path: Path) -> None:
    rotation = pretrained(shapes, tmp_path / "rotation", "rotation_resnet18", "backbone.name=test_resnet")
    assert not (Path(rotation.artifact) / artifact.DECODER).exists()
    random = begun(shapes, "random", "backbone.name=test_resnet", "data.size=32")
    for start in (rotation.run, Path(genesis.artifact) / "model.safetensors"):
        settings = () if start == rotation.run else ("backbone.name=test_resnet", "data.size=32")
        job = begun(shapes, start, *settings)
        assert not job.lines
        assert same(tensors(job), tensors(random), tensors(random))


def test_it_trains_and_says_so_and_resumes(genesis: PretrainResult, shapes: Store, tmp_path: Path) -> None:
    whole = finetune(RECIPE, shapes.path, tmp_path / "whole", start=genesis.run, overrides=FINETUNE)
    log = (tmp_path / "whole" / "train.log").read_text()
    assert log.count(SAID) == 1
    assert artifact.read_card(whole.artifact).decoder is None, "its own head is all it has"
    assert not (Path(whole.artifact) / artifact.DECODER).exists()
    again = finetune(RECIPE, shapes.path, tmp_path / "whole", start=genesis.run, overrides=FINETUNE, resume=True)
    assert again == whole
    settings = (*FINETUNE, "head.decoder=random")
    with pytest.raises(UsageError, match=r"head\.decoder"):
        finetune(RECIPE, shapes.path, tmp_path / "whole", start=genesis.run, overrides=settings, resume=True)


def test_published_and_pulled_it_is_still_there(genesis: PretrainResult, shapes: Store, tmp_path: Path) -> None:
    assert verify(genesis.run).verdict == "whole"
    stated = ("licence=CC-BY-4.0", "data_licence=CC0-1.0", "intended_use=tests", "limits=all")
    publish(genesis.run, tmp_path / "published", stated=stated)
    digest = sha256(tmp_path / "published" / artifact.MANIFEST)
    pull(tmp_path / "published", tmp_path / "pulled", sha256=digest)
    assert "`decoder.safetensors` holds" in (tmp_path / "pulled" / "README.md").read_text()
    assert sha256(tmp_path / "pulled" / artifact.DECODER) == sha256(Path(genesis.artifact) / artifact.DECODER)
    assert begun(shapes, tmp_path / "pulled").lines


@pytest.mark.parametrize("change", ["shape", "missing", "unknown"])
def test_a_decoder_that_does_not_fit_is_refused(
    change: str, genesis: PretrainResult, shapes: Store, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(genesis.artifact, tmp_path / "artifact"))
    known, kept = artifact.read_card(folder), artifact.read_decoder(folder)
    name = next(name for name in kept if kept[name].ndim == 4)
    if change == "shape":
        kept[name] = kept[name][:, :3].contiguous()
    elif change == "missing":
        del kept[name]
    else:
        kept["decoder.other"] = torch.zeros(2)
    network = begun(shapes, genesis.run).head.backbone.network
    artifact.write(folder, network, known, np.zeros((1, 8), np.uint8), decoder=kept)
    expected = "decoder.other is" if change == "unknown" else f"{name} is"
    with pytest.raises(DataError, match=f"the decoder of the start does not fit this head: {expected}") as raised:
        begun(shapes, folder)
    assert "head.decoder=random" in str(raised.value)
    assert begun(shapes, folder, "head.decoder=random").lines


def test_a_head_without_a_decoder_leaves_it(genesis: PretrainResult, phantom_store: Store) -> None:
    settings = ("data.workers=0", "train.max_steps=3", "train.batch_size=8")
    assert not prepare(load_finetune("xray/classification", settings), phantom_store, genesis.run).lines
