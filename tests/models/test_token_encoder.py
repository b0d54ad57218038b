"""A transformer opened for masking computes what timm computes, on fewer tokens; what cannot be opened is refused."""

from typing import Any

import pytest
import torch

from sslmed.config import UsageError
from sslmed.image_size import ImageSize
from sslmed.models.backbones import Backbone, BackboneConfig, build
from sslmed.models.token_encoder import TokenEncoder

NETWORKS: dict[str, dict[str, Any]] = {
    "class token, dynamic size": {"name": "test_vit", "patch": 8},
    "register without class token, RMSNorm": {"name": "test_vit4", "patch": 8},
    "fixed size, mean": {"name": "vit_tiny_patch16_224", "patch": 8, "pool": "avg"},
    "two class tokens": {"name": "deit_tiny_distilled_patch16_224", "patch": 8},
    "absolute and rotary positions": {"name": "eva02_tiny_patch14_224", "patch": 8},
    "registers, rotary positions alone": {"name": "vit_tiny_patch16_dinov3_qkvb", "patch": 8},
    "rotary positions of each block": {"name": "vit_small_patch16_rope_mixed_ape_224", "patch": 8},
}
SIZE = (32, 48)
every_network = pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)


def opened(settings: dict[str, Any], size: ImageSize = SIZE) -> tuple[Backbone, TokenEncoder]:
    backbone = build(BackboneConfig.model_validate(settings), size, 0).eval()
    return backbone, TokenEncoder(backbone, "mae")


@every_network
@pytest.mark.parametrize("channels", [1, 3])
def test_all_patches_in_order_give_what_timm_gives(settings: dict[str, Any], channels: int) -> None:
    backbone, encoder = opened(settings | {"in_chans": channels})
    images = torch.randn(2, channels, *SIZE)
    network: Any = backbone.network
    with torch.no_grad():
        expected = network.fc_norm(network.forward_features(images))
        patches = encoder.embed(images)
        torch.testing.assert_close(encoder.encode(patches), expected)
        order = torch.arange(24).expand(2, -1)
        torch.testing.assert_close(encoder.encode(patches, order), expected, atol=1e-5, rtol=1e-4)


@every_network
def test_some_patches_give_what_timm_gives_when_no_token_attends_to_the_others(settings: dict[str, Any]) -> None:
    backbone, encoder = opened(settings)
    network: Any = backbone.network
    images, keep_ids = torch.randn(2, 1, *SIZE), torch.tensor([[5, 0, 17, 23], [9, 2, 1, 20]])
    for sample in range(2):
        places = torch.cat([torch.arange(encoder.prefix), keep_ids[sample] + encoder.prefix])
        seen = torch.zeros(24 + encoder.prefix, dtype=torch.bool)
        seen[places] = True
        with torch.no_grad():
            every = network.forward_features(images[[sample]], attn_mask=seen.expand(1, 1, len(seen), -1))
            expected = network.fc_norm(every)[:, places]
            found = encoder.encode(encoder.embed(images), keep_ids)[[sample]]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@every_network
def test_hidden_pixels_change_nothing_and_hidden_tokens_enter_no_block(settings: dict[str, Any]) -> None:
    backbone, encoder = opened(settings)
    network: Any = backbone.network
    lengths = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    images, keep_ids = torch.randn(2, 1, *SIZE), torch.tensor([[5, 0, 17], [9, 2, 1]])
    visible = torch.zeros(2, 24, dtype=torch.bool).scatter_(1, keep_ids, True).view(2, 1, 4, 6)
    visible = visible.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    others = torch.where(visible, images, 100 * torch.randn_like(images))
    with torch.no_grad():
        tokens = [encoder.encode(encoder.embed(each), keep_ids) for each in (images, others)]
        seen = encoder.encode(encoder.embed(torch.where(visible, images + 1, images)), keep_ids)
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.allclose(seen, tokens[0])
    assert set(lengths) == {encoder.prefix + 3}


@every_network
def test_what_it_says_of_the_network(settings: dict[str, Any]) -> None:
    backbone, encoder = opened(settings)
    assert (encoder.grid, encoder.patch) == ((4, 6), (8, 8))
    assert encoder.encode(encoder.embed(torch.zeros(1, 1, *SIZE))).shape == (1, encoder.prefix + 24, encoder.width)
    assert encoder.width == backbone.num_features


@every_network
def test_fixed_positions_are_those_of_the_patches(settings: dict[str, Any]) -> None:
    backbone, encoder = opened(settings)
    network: Any = backbone.network
    encoder.fix_positions(torch.full((24, encoder.width), 2.0))
    if network.pos_embed is None:
        assert "rotary positions alone" in next(name for name, each in NETWORKS.items() if each is settings)
        return
    assert not network.pos_embed.requires_grad
    assert (network.pos_embed[0, -24:] == 2).all()
    assert not network.pos_embed[0, :-24].any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "test_resnet"}, r"mae needs a vision transformer.*; test_resnet is none \(ResNet\)"),
        ({"name": "vit_tiny_r_s16_p8_224"}, "HybridEmbed.*would leak"),
        ({"name": "vit_base_patch16_siglip_224", "patch": 32}, "set backbone.pool=avg"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_words(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        opened(settings, 64)


@every_network
def test_covered_patches_keep_their_positions_and_lose_their_pixels(settings: dict[str, Any]) -> None:
    _, encoder = opened(settings)
    images, hidden = torch.randn(2, 1, *SIZE), torch.rand(2, 24, generator=torch.Generator().manual_seed(0)) < 0.4
    token = torch.randn(encoder.width)
    patches = encoder.embed(images)
    covered = encoder.cover(patches, hidden, token)
    assert covered.shape == patches.shape
    flat, before = (each.flatten(1, -2) for each in (covered, patches))
    assert torch.equal(flat[hidden], token.expand(int(hidden.sum()), -1))
    assert torch.equal(flat[~hidden], before[~hidden])
    with torch.no_grad():
        found = encoder.encode(covered)
        other = encoder.encode(encoder.cover(patches + 5 * hidden.view(*patches.shape[:-1], 1), hidden, token))
        torch.testing.assert_close(found, other)
        assert found.shape == (2, encoder.prefix + 24, encoder.width)
