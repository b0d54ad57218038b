"""Every family of files: its exact names, from its own modules where they are installed, give its own features."""

import argparse
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightly.models.modules import MaskedVisionTransformerTorchvision, heads
from torch import nn
from torchvision.models import ConvNeXt, DenseNet, ResNet, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock

from sslmed.config import UsageError
from sslmed.methods import METHODS
from sslmed.models import key_layouts
from sslmed.models.backbones import Backbone, BackboneConfig, build
from sslmed.models.key_layouts import KEY_LAYOUTS, KeyLayout, State
from sslmed.models.weights import LoadReport, fill, read

SIZE = 64


def stirred(module: nn.Module) -> nn.Module:
    """With values in every tensor that would be noticed if it went elsewhere."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=draw)
    return module.eval()


def own(name: str, **knobs: Any) -> nn.Module:
    return stirred(build(BackboneConfig(name=name, in_chans=3, **knobs), SIZE, 1).network)


def imported(content: Any, target: nn.Module, folder: Path, family: KeyLayout | None = None) -> LoadReport:
    """Through a file, as it comes from its training."""
    torch.save(content, folder / "weights.pth.tar")
    return fill(target, read(folder / "weights.pth.tar", family), "FILE", family=family)


def under(prefix: str, module: nn.Module) -> State:
    return {prefix + name: value.clone() for name, value in module.state_dict().items()}


def noise() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def same(target: nn.Module, expected: torch.Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(target.eval()(noise()), expected, rtol=1e-4, atol=1e-5)


def whole(report: LoadReport, target: nn.Module, layout: str) -> None:
    assert report.layout == layout
    assert report.matched == len(target.state_dict())
    assert (report.adapted, report.surplus, report.missing) == ((), (), ())


# torchvision, by its own modules.


def resnet() -> ResNet:
    return stirred(ResNet(BasicBlock, [1, 1, 1, 1]))  # type: ignore[return-value]


def small_resnet() -> nn.Module:
    return timm.create_model("resnet18", layers=[1, 1, 1, 1], num_classes=0)


def tv_vit() -> VisionTransformer:
    return stirred(  # type: ignore[return-value]
        VisionTransformer(image_size=SIZE, patch_size=16, num_layers=6, num_heads=2, hidden_dim=64, mlp_dim=192)
    )


def tv_densenet() -> DenseNet:
    return stirred(DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16))  # type: ignore[return-value]


def small_densenet() -> nn.Module:
    return timm.create_model("densenet121", growth_rate=8, block_config=(2, 2), num_classes=0)


def tv_convnext() -> ConvNeXt:
    widths = (8, 16, 24, 32)
    blocks = [CNBlockConfig(a, b, n) for a, b, n in zip(widths, (*widths[1:], None), (1, 1, 2, 1), strict=True)]
    return stirred(ConvNeXt(blocks))  # type: ignore[return-value]


def small_convnext(conv_mlp: bool) -> nn.Module:
    shape = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    return timm.create_model("convnext_tiny", conv_mlp=conv_mlp, num_classes=0, **shape)


def tv_swin() -> SwinTransformer:
    return stirred(SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4]))  # type: ignore[return-value]


def small_swin() -> nn.Module:
    shape = {"img_size": SIZE, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **shape)


def without(module: Any, *classifier: str) -> nn.Module:
    for name in classifier:
        setattr(module, name, nn.Identity())
    return module


TORCHVISION: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str, str]] = {
    "resnet": (resnet, small_resnet, "timm", "fc"),
    "densenet": (tv_densenet, small_densenet, "timm", "classifier"),
    "vit": (tv_vit, lambda: own("test_vit"), "torchvision", "heads"),
    "convnext": (tv_convnext, partial(small_convnext, False), "torchvision", ""),
    "convnext of convolutions": (tv_convnext, partial(small_convnext, True), "torchvision", ""),
    "swin": (tv_swin, small_swin, "torchvision", "head"),
}


@pytest.mark.parametrize("kind", TORCHVISION)
def test_torchvision(kind: str, tmp_path: Path) -> None:
    source, target, layout, classifier = TORCHVISION[kind]
    theirs, network = source(), target()
    report = imported(theirs.state_dict(), network, tmp_path)
    whole(report, network, layout)
    assert report.dropped
    if classifier:
        without(theirs, classifier)
    else:
        theirs.classifier[2] = nn.Identity()  # type: ignore[operator, index]
    with torch.inference_mode():
        expected = theirs(noise()).flatten(1)
    same(network, expected)


def test_torchvisions_densenet_files_have_older_names(tmp_path: Path) -> None:
    source, target = stirred(small_densenet()), small_densenet()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value
        for name, value in source.state_dict().items()
    }
    assert "features.denseblock1.denselayer2.norm.1.running_var" in old
    whole(imported(old, target, tmp_path), target, "torchvision")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


# lightly, by its own modules.


def test_lightly_sequential(tmp_path: Path) -> None:
    theirs = resnet()
    model = nn.Module()
    model.backbone = nn.Sequential(*list(theirs.children())[:-1])
    model.projection_head = heads.SimCLRProjectionHead(512, 32, 16)
    network = small_resnet()
    report = imported({"state_dict": model.state_dict(), "epoch": 3}, network, tmp_path)
    whole(report, network, "lightly")
    assert all(name.startswith("projection_head.") for name in report.dropped)
    with torch.inference_mode():
        same(network, model.backbone(noise()).flatten(1))


def test_lightly_prefers_teachers_and_online_networks(tmp_path: Path) -> None:
    chosen, other = own("test_resnet"), own("test_resnet")
    for preferred, second in (
        ("teacher_backbone.", "student_backbone."),
        ("backbone.", "backbone_momentum."),
    ):
        target = build(BackboneConfig(name="test_resnet", in_chans=3), SIZE, 2).network
        state = {name: value + 1 for name, value in under(second, other).items()} | under(preferred, chosen)
        state |= {
            "student_head.layers.0.weight": torch.ones(2),
            "projection_head_momentum.layers.0.bias": torch.ones(2),
        }
        whole(imported(state, target, tmp_path), target, "lightly")
        with torch.inference_mode():
            same(target, chosen(noise()))


@pytest.mark.parametrize("kind", ["torchvision", "timm"])
def test_lightly_masked_vits(kind: str, tmp_path: Path) -> None:
    vit: Any = tv_vit() if kind == "torchvision" else own("test_vit")
    model = nn.Module()
    if kind == "torchvision":
        model.backbone = MaskedVisionTransformerTorchvision(vit=vit)
    else:
        masked = pytest.importorskip("lightly.models.modules.masked_vision_transformer_timm")
        model.backbone = masked.MaskedVisionTransformerTIMM(vit=vit)
    model.decoder = nn.Linear(3, 3)
    target = build(BackboneConfig(name="test_vit", in_chans=3), SIZE, 2).network
    report = imported({"state_dict": model.state_dict()}, target, tmp_path)
    whole(report, target, "lightly")
    with torch.inference_mode():
        expected = without(vit, "heads")(noise())
    same(target, expected)


# Others, by the names of their published files, in networks of timm.

VIT, RES = "test_vit", "test_resnet"


def moco() -> Any:
    network = own(RES)
    state = under("module.encoder_q.", network) | {
        name: value + 1 for name, value in under("module.encoder_k.", network).items()
    }
    for encoder in ("encoder_q", "encoder_k"):
        state |= {f"module.{encoder}.fc.{layer}.weight": torch.ones(2, 2) for layer in (0, 2)}
    state |= {"module.queue": torch.ones(2, 4), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": OrderedDict(state), "optimizer": {"state": {}}}, network


def moco_v3() -> Any:
    network = own(VIT)
    state = {name: value + 1 for name, value in under("module.momentum_encoder.", network).items()}
    state |= under("module.base_encoder.", network)
    state |= {"module.base_encoder.head.0.weight": torch.ones(2, 2), "module.predictor.0.weight": torch.ones(2, 2)}
    state |= {"module.momentum_encoder.head.0.weight": torch.ones(2, 2)}
    return {"epoch": 300, "arch": "vit_small", "state_dict": state}, network


def solo(backbone: str, projector: str = "projector") -> Any:
    network = own(RES)
    state = under(f"{backbone}.", network)
    state |= {name: value + 1 for name, value in under(f"momentum_{backbone}.", network).items()}
    state |= {"classifier.weight": torch.ones(3, 2), f"{projector}.0.weight": torch.ones(2, 2)}
    state |= {"momentum_projector.0.weight": torch.ones(2, 2), "queue": torch.ones(2, 2)}
    return {"epoch": 9, "state_dict": state}, network


def dino() -> Any:
    network = own(VIT)
    head = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
    return {
        "student": {f"module.{name}": value + 1 for name, value in (under("backbone.", network) | head).items()},
        "teacher": under("backbone.", network) | head,
        "optimizer": {"state": {}},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, lr=5e-4),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }, network


def plain(name: str, **knobs: Any) -> Any:
    network = own(name, **knobs)
    return under("", network) | {"head.weight": torch.ones(2, 2)} if name == VIT else under("", network), network


def mae() -> Any:
    network = own(VIT)
    state = under("", network) | {
        "mask_token": torch.ones(1, 1, 32),
        "decoder_pos_embed": torch.ones(1, 17, 32),
        "decoder_embed.weight": torch.ones(32, 64),
        "decoder_blocks.0.norm1.weight": torch.ones(32),
        "decoder_norm.weight": torch.ones(32),
        "decoder_pred.weight": torch.ones(768, 32),
    }
    return {"model": state, "epoch": 800, "args": argparse.Namespace(model="mae_vit_base_patch16")}, network


def medical_densenet() -> Any:
    network = stirred(small_densenet())
    state = {
        **under("model.encoder.", network),
        "model.decoder.blocks.0.conv1.0.weight": torch.ones(2, 2, 3, 3),
        "model.segmentation_head.0.weight": torch.ones(3, 2, 3, 3),
    }
    return {"model": state}, network


def xrv_densenet() -> Any:
    network = stirred(small_densenet())
    rest = {"classifier.weight": torch.ones(18, 8), "classifier.bias": torch.ones(18), "op_threshs": torch.ones(18)}
    return under("", network) | rest, network


def xrv_resnet() -> Any:
    network = stirred(small_resnet())
    rest = {"model.fc.weight": torch.ones(18, 512), "model.fc.bias": torch.ones(18), "op_threshs": torch.ones(18)}
    return under("model.", network) | rest, network


def ours() -> Any:
    backbone = Backbone(own(RES))
    method = METHODS["byol"](METHODS["byol"].Config(hidden=8, out=4), backbone)
    return {"state_dict": method.state_dict(), "epoch": 1}, backbone.network


FAMILIES: dict[str, tuple[Callable[[], Any], str, Callable[[], nn.Module]]] = {
    "moco": (moco, "moco", partial(own, RES)),
    "moco-v3": (moco_v3, "moco-v3", partial(own, VIT)),
    "solo-learn": (partial(solo, "backbone"), "solo-learn", partial(own, RES)),
    "solo-learn, older": (partial(solo, "encoder"), "solo-learn", partial(own, RES)),
    "dino": (dino, "dino", partial(own, VIT)),
    "dino, the backbone": (partial(plain, VIT), "timm", partial(own, VIT)),
    "mae": (mae, "mae", partial(own, VIT)),
    "medical-mae, densenet": (medical_densenet, "medical-mae", small_densenet),
    "torchxrayvision, densenet": (xrv_densenet, "torchxrayvision", small_densenet),
    "torchxrayvision, resnet": (xrv_resnet, "torchxrayvision", small_resnet),
    "sslmed": (ours, "sslmed", partial(own, RES)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_published_names(family: str, tmp_path: Path) -> None:
    make, layout, empty = FAMILIES[family]
    content, source = make()
    target = empty()
    with torch.no_grad():
        for value in target.state_dict().values():
            value.zero_()
    report = imported(content, target, tmp_path)
    whole(report, target, layout)
    assert report.dropped
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


# DINOv2: registers, positions of patches alone, chunks of blocks.


def dinov2(registers: bool, chunked: bool) -> tuple[nn.Module, State]:
    """A network of timm, and the names and values that DINOv2 has for it."""
    shape = {"img_size": SIZE, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    network = stirred(timm.create_model(name, **shape))
    state = dict(network.state_dict())
    if registers:
        first = torch.randn(1, 1, 32)
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([first, state["pos_embed"]], 1)
        state["cls_token"] = state["cls_token"] - first
    state["mask_token"] = torch.ones(1, 32)
    if chunked:
        renamed = {}
        for key, value in state.items():
            block = key.split(".")[1] if key.startswith("blocks.") else ""
            chunk = key.replace(f"blocks.{block}.", f"blocks.{int(block) // 2}.{block}.") if block else key
            renamed[f"backbone.{chunk}"] = value
        state = renamed | {"dino_head.mlp.0.weight": torch.ones(2), "ibot_head.last_layer.weight_g": torch.ones(2)}
    return network, state


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2(registers: bool, chunked: bool, tmp_path: Path) -> None:
    source, state = dinov2(registers, chunked)
    target = stirred(dinov2(registers, False)[0])
    report = imported({"teacher": state} if chunked else state, target, tmp_path)
    assert report.layout == "dinov2"
    assert report.surplus == ()
    assert report.missing == ()
    assert [name for name, _, _ in report.adapted] == (["cls_token"] if registers else [])
    with torch.inference_mode():
        same(target, source.eval()(noise()))


def test_registers_as_timm_reads_them(tmp_path: Path) -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    source, state = dinov2(True, False)
    target = dinov2(True, False)[0]
    theirs = checkpoint_filter_fn(dict(state), source)  # type: ignore[arg-type]
    imported(state, target, tmp_path)
    for name, value in target.state_dict().items():
        assert torch.equal(value, theirs[name].reshape(value.shape)), name


# Choosing.


def test_mae_averages_tokens_where_the_network_does(tmp_path: Path) -> None:
    content, source = mae()
    target = own(VIT, pool="avg")
    report = imported(content, target, tmp_path)
    whole(report, target, "mae")
    assert torch.equal(target.state_dict()["fc_norm.weight"], source.state_dict()["norm.weight"])
    encoder = {"model": source.state_dict()}
    report = imported(encoder, own(VIT, pool="avg"), tmp_path, KEY_LAYOUTS["mae"])
    assert report.layout == "mae"


def test_a_second_choice_is_taken_where_the_first_is_absent(tmp_path: Path) -> None:
    content, source = moco()
    content["state_dict"] = {name: value for name, value in content["state_dict"].items() if "encoder_q" not in name}
    target = own(RES)
    whole(imported(content, target, tmp_path), target, "moco")
    assert torch.equal(target.state_dict()["conv1.0.weight"], source.state_dict()["conv1.0.weight"] + 1)


def test_a_family_says_where_to_look_first(tmp_path: Path) -> None:
    network = own(VIT)
    both = {"model": under("", own(RES)), "teacher": under("backbone.", network)}
    target = own(VIT)
    assert imported(both, target, tmp_path, KEY_LAYOUTS["dino"]).layout == "dino"


def test_every_family_is_in_the_table_by_its_name() -> None:
    assert list(KEY_LAYOUTS)[-1] == "timm", "plain names are the last guess"
    for name, layout in KEY_LAYOUTS.items():
        assert key_layouts.named(name) is layout
        assert layout.source or layout.note
        assert bool(layout.usual_licence) == bool(layout.licence)
    with pytest.raises(UsageError, match="did you mean moco"):
        key_layouts.named("mooco")


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"]
)
def test_nothing_of_a_backbone_is_called_dropped_by_design(name: str) -> None:
    with torch.device("meta"):
        names = timm.create_model(name, num_classes=0).state_dict()
    assert not [each for each in names if KEY_LAYOUTS["timm"].drops(each)]
