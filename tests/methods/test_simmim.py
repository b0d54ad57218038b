"""SimMIM: squares that are hidden, what the encoder sees of them, where the loss is, refusals, pictures."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from courses import course

from sslmed.config import UsageError
from sslmed.data.geometry_view import GEOMETRY
from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES, with_views
from sslmed.image_size import ImageSize
from sslmed.methods.simmim import SimMIM, SimMIMConfig
from sslmed.models.backbones import BackboneConfig, build
from sslmed.models.decoders import sine_cosine_positions
from sslmed.models.masking import patchify

VIT = BackboneConfig(name="test_vit", patch=8)


def simmim(backbone: BackboneConfig = VIT, size: ImageSize = 64, pretrained: bool = False, **settings: Any) -> SimMIM:
    torch.manual_seed(0)
    network = build(backbone, size, 0)
    network.pretrained = pretrained
    return SimMIM(SimMIMConfig(**{"mask_patch": 16} | settings), network)


def batch(images: torch.Tensor, epoch: int = 0) -> Batch:
    rows = torch.arange(len(images))
    return Batch(views=[images], target=rows, ids=rows, groups=rows, seed=3, epoch=epoch)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_whole_squares_are_hidden_as_many_in_every_image() -> None:
    method = simmim(size=(64, 96), mask_patch=16)
    hidden = method._hidden(batch(torch.zeros(50, 1, 64, 96))).view(50, 4, 2, 6, 2)
    squares = hidden.permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(squares.all(dim=3), squares.any(dim=3))
    assert (squares.all(dim=3).sum(dim=(1, 2)) == 15).all(), "0.6 of 24, rounded up"
    assert squares.all(dim=3).float().mean(dim=0).std() < 0.15, "each alike"


def test_an_images_mask_depends_on_seed_epoch_and_the_image_alone() -> None:
    method, data = simmim(), batch(noise(6, 1, 64, 64))
    whole = method._hidden(data)
    assert torch.equal(method._hidden(replace(data, ids=data.ids[3:])), whole[3:])
    assert not torch.equal(method._hidden(replace(data, epoch=1)), whole)


@pytest.mark.parametrize("name", ["test_vit", "test_vit4", "vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_the_gradient_by_the_prediction_is_zero_on_visible_patches_and_hidden_pixels_are_not_seen(name: str) -> None:
    method = simmim(BackboneConfig(name=name, patch=8)).eval()
    data = batch(noise(3, 1, 64, 64))
    hidden = method._hidden(data)
    prediction = method._predict(data.views[0], hidden)[1]
    tampered = torch.where(
        hidden.view(3, 1, 8, 8).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3), 1000.0, data.views[0]
    )
    with torch.no_grad():
        assert torch.equal(method._predict(tampered, hidden)[1], prediction)
    kept: list[torch.Tensor] = []
    method.head.register_forward_hook(lambda _, __, output: (output.retain_grad(), kept.append(output))[0])
    method.loss(data)["loss"].backward()
    assert kept[0].grad is not None
    assert torch.equal(kept[0].grad.abs().amax(dim=2) > 0, hidden)


def test_the_loss_is_the_mean_absolute_error_of_hidden_pixels() -> None:
    method, data = (
        simmim(BackboneConfig(name="test_vit", patch=8, in_chans=2)).double(),
        batch(noise(4, 2, 64, 64).double()),
    )
    with torch.no_grad():
        prediction = method._predict(data.views[0], method._hidden(data))[1]
    hidden = method._hidden(data).view(4, 8, 8)
    total = count = 0.0
    for n, row, column in hidden.nonzero().tolist():
        true = data.views[0][n, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(1, 2, 0).flatten()
        total += (prediction[n, 8 * row + column] - true).abs().sum().item()
        count += 128
    assert method.loss(data)["loss"].item() == pytest.approx(total / count, abs=1e-9)


def test_hidden_patches_are_the_token_before_positions() -> None:
    method, data = simmim(), batch(noise(2, 1, 64, 64))
    seen: list[torch.Tensor] = []
    method.encoder.encode = lambda patches: seen.append(patches) or torch.zeros(2, 1 + 64, 64)  # type: ignore[method-assign, func-returns-value]
    hidden = method._hidden(data)
    method._predict(data.views[0], hidden)
    entered, embedded = seen[0].reshape(2, 64, -1), method.encoder.embed(data.views[0]).reshape(2, 64, -1)
    assert torch.equal(entered[hidden], method.mask_token[0].expand(int(hidden.sum()), -1))
    assert torch.equal(entered[~hidden], embedded[~hidden])


def test_positions_are_fixed_sines_and_given_ones_stay() -> None:
    table = simmim().backbone.network.pos_embed
    assert torch.equal(table[0, 1:], sine_cosine_positions(64, (8, 8)).float())  # type: ignore[index]
    assert not table.requires_grad  # type: ignore[union-attr]
    before = build(VIT, 64, 0).network.state_dict()
    given = simmim(pretrained=True).backbone.network
    assert all(torch.equal(before[name], tensor) for name, tensor in given.state_dict().items())
    assert given.pos_embed.requires_grad  # type: ignore[union-attr]


def test_the_class_token_alone_of_large_weights_does_not_decay() -> None:
    method = simmim()
    decayed, free = ({id(each) for each in group["params"]} for group in method.parameter_groups(0.05))
    assert id(method.backbone.network.cls_token) in free
    assert {id(method.mask_token), id(method.head.weight)} <= decayed
    trained = {id(each) for each in method.parameters() if each.requires_grad}
    assert decayed | free == trained
    assert not decayed & free


def test_first_weights_do_not_let_the_sum_over_blocks_grow() -> None:
    method = simmim()
    deviations = [block.mlp.fc2.weight.std().item() for block in method.backbone.network.blocks]  # type: ignore[union-attr]
    for number, deviation in enumerate(deviations, 1):
        assert deviation == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.05)
    assert 0.008 < method.mask_token.std().item() < 0.014
    assert method.mask_token.abs().max().item() <= 0.02


def test_the_embedding_is_the_mean_of_the_visible_tokens() -> None:
    method, data = simmim().eval(), batch(noise(3, 1, 64, 64))
    hidden = method._hidden(data)
    tokens, _ = method._predict(data.views[0], hidden)
    expected = torch.stack([tokens[row, ~hidden[row]].mean(dim=0) for row in range(3)])
    torch.testing.assert_close(method.loss(data)["embeddings"], expected)


def test_what_is_hidden_is_predicted_from_what_is_seen_of_the_same_image() -> None:
    levels = torch.linspace(-2, 2, 16)[:, None, None, None]
    images = levels + 0.1 * noise(16, 1, 32, 32)
    method = simmim(size=32, mask_patch=8)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    for epoch in range(60):
        loss = method.loss(batch(images, epoch))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3, "the mean of all images is 1.07 away"


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_show_original_masked_and_restored(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method = simmim(BackboneConfig(name="test_vit", patch=8, in_chans=channels))
    data = batch(3 + 0.5 * noise(10, channels, 64, 64))
    originals = data.views[0][:8]
    monkeypatch.setattr(method, "_predict", lambda images, _: (None, patchify(images, (8, 8)) + 1))
    pictures = method.pictures(data)
    hidden = method._hidden(data)[:8].view(8, 1, 8, 8).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    middle = (originals.amin((1, 2, 3), True) + originals.amax((1, 2, 3), True)) / 2
    assert pictures.shape == (8, 3, channels, 64, 64)
    assert torch.equal(pictures[:, 0], originals)
    assert torch.equal(pictures[:, 1], torch.where(hidden, middle, originals))
    torch.testing.assert_close(pictures[:, 2], originals + hidden)


def test_the_view_keeps_the_modalitys_geometry_and_the_true_intensities() -> None:
    for modality in MODALITIES.values():
        (view,) = simmim().views(modality)
        for knob, field in type(view).model_fields.items():
            assert getattr(view, knob) == (getattr(modality.view, knob) if knob in GEOMETRY else field.default)
    (note,) = simmim().notes(with_views(MODALITIES["xray"], {"blur": 0.5}), course(64))
    assert "views.blur" in note
    assert simmim().notes(MODALITIES["xray"], course(64)) == []


@pytest.mark.parametrize(
    ("backbone", "settings", "said"),
    [
        ({"name": "test_resnet"}, {}, "simmim needs a vision transformer.*test_resnet is none"),
        ({"name": "swin_tiny_patch4_window7_224"}, {}, "swin_tiny_patch4_window7_224 is none"),
        (
            {"name": "test_vit", "patch": 8},
            {"mask_patch": 12},
            "'method.mask_patch' is 12; allowed with patches of 8 x 8",
        ),
        ({"name": "test_vit", "patch": 8}, {"mask_patch": 24}, "multiples of the patch that divide the image's sides"),
        ({"name": "test_vit", "patch": 8}, {"mask_patch": 64}, "hides all of 1 x 1 squares"),
        ({"name": "test_vit", "patch": 8}, {"mask_ratio": 0.95}, "hides all of 4 x 4 squares"),
    ],
)
def test_what_it_cannot_take_is_refused_in_words(backbone: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        simmim(BackboneConfig.model_validate(backbone), 64, **settings)
    assert len(str(caught.value).splitlines()) <= 6


def test_the_defaults_are_the_papers() -> None:
    assert SimMIMConfig().model_dump() == {"name": "simmim", "mask_ratio": 0.6, "mask_patch": 32}
