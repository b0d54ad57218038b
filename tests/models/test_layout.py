"""What timm says of its networks is found under the names of their tensors."""

import pytest
import timm

from sslmed.models.layout import layout


@pytest.mark.parametrize(
    ("name", "inputs", "patches", "positions", "classifiers"),
    [
        ("test_resnet", ["conv1.0"], None, None, ("fc",)),
        ("test_convnext", ["stem.0"], None, None, ("head.fc",)),
        ("test_vit", ["patch_embed.proj"], "patch_embed.proj.weight", "pos_embed", ("head",)),
        ("repvgg_a0", ["stem.conv_kxk.conv", "stem.conv_1x1.conv"], None, None, ("head.fc",)),
        ("pvt_v2_b0", ["patch_embed.proj"], None, None, ("head",)),  # its patches overlap
        ("tresnet_m", [], None, None, ("head.fc",)),  # it moves pixels into channels first
    ],
)
def test_names(
    name: str, inputs: list[str], patches: str | None, positions: str | None, classifiers: tuple[str, ...]
) -> None:
    network = timm.create_model(name)
    found = layout(network)
    assert found.inputs == tuple(f"{each}.weight" for each in inputs)
    assert (found.patches, found.positions, found.classifiers) == (patches, positions, classifiers)
    named = network.state_dict().keys()
    assert {*found.inputs, *(each for each in (found.patches, found.positions) if each)} <= named
    assert all(f"{each}.weight" in named for each in found.classifiers)


def test_the_grid_is_rows_and_columns() -> None:
    network = timm.create_model("test_vit", img_size=(32, 48), patch_size=8)
    assert layout(network).grid == (4, 6)
    positions = network.state_dict()["pos_embed"]
    assert positions.shape[1] == 1 + 4 * 6
