"""Masks keep an exact number of patches, each alike; patches lie in MAE's order and go back to the same image."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from sslmed.config import UsageError
from sslmed.models.masking import (
    FLAT,
    enlarged,
    foreground_mask,
    foreground_patches,
    keyed_noise,
    patchify,
    random_mask,
    take_tokens,
    unpatchify,
)

DRAWS = 4000


def noise_of(draws: int, length: int) -> torch.Tensor:
    return keyed_noise(0, 0, torch.arange(draws), length, "mask")


def chi_square(counts: np.ndarray, draws: int, share: float) -> float:
    """Of how often each of L patches was drawn, when a draw takes ``share * L`` of them without putting back."""
    length = len(counts)
    deviation = ((counts - draws * share) ** 2).sum() / (draws * share * (1 - share))
    return float(deviation * (length - 1) / length)


def test_noise_depends_on_what_it_is_for_and_on_nothing_else() -> None:
    ids = torch.tensor([3, 8, 5])
    noise = keyed_noise(1, 2, ids, 7, "mask")
    assert noise.shape == (3, 7)
    assert noise.dtype == torch.float64
    assert torch.equal(keyed_noise(1, 2, ids[[2]], 7, "mask"), noise[[2]]), "the batch does not matter"
    torch.rand(3)
    assert torch.equal(keyed_noise(1, 2, ids, 7, "mask"), noise)
    for other in (keyed_noise(2, 2, ids, 7, "mask"), keyed_noise(1, 3, ids, 7, "mask"), keyed_noise(1, 2, ids, 7, "x")):
        assert not (other == noise).any()


@pytest.mark.parametrize(("length", "keep"), [(16, 4), (196, 49), (10, 0), (10, 10), (9, 1)])
def test_a_random_mask_keeps_exactly_so_many(length: int, keep: int) -> None:
    keep_ids, hidden = random_mask(noise_of(50, length), keep)
    assert keep_ids.shape == (50, keep)
    assert (hidden.sum(dim=1) == length - keep).all()
    assert not hidden.gather(1, keep_ids).any()
    assert (keep_ids.sort(dim=1).values.diff(dim=1) > 0).all(), "no patch twice"


def test_the_least_noise_stays_and_ties_go_to_the_first() -> None:
    keep_ids, hidden = random_mask(torch.tensor([[0.5, 0.1, 0.9, 0.1], [0.3] * 4]), 2)
    assert keep_ids.tolist() == [[1, 3], [0, 1]]
    assert hidden.tolist() == [[True, False, True, False], [False, False, True, True]]


@pytest.mark.parametrize(("length", "keep"), [(16, 4), (36, 3), (36, 9)])
def test_every_patch_is_kept_alike(length: int, keep: int) -> None:
    _, hidden = random_mask(noise_of(DRAWS, length), keep)
    stays = (~hidden).double()
    assert chi_square(stays.sum(dim=0).numpy(), DRAWS, keep / length) < chi2.ppf(0.999, length - 1)
    pairs = (stays.T @ stays)[~torch.eye(length, dtype=torch.bool)]
    expected = DRAWS * keep * (keep - 1) / (length * (length - 1))
    assert (pairs - expected).abs().max() < 6 * expected**0.5, "nor does one patch draw another along"


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.75, 0.9])
def test_the_foreground_is_hidden_by_the_ratio_whatever_its_size(ratio: float) -> None:
    length = 36
    keep = int(length * (1 - ratio))
    sizes = torch.arange(length + 1)
    foreground = keyed_noise(0, 0, sizes, length, "place").argsort(dim=1) < sizes[:, None]
    keep_ids, hidden = foreground_mask(noise_of(length + 1, length), foreground, keep, ratio)
    assert (hidden.sum(dim=1) == length - keep).all()
    assert not hidden.gather(1, keep_ids).any()
    for size, count in zip(sizes.tolist(), (hidden & foreground).sum(dim=1).tolist(), strict=True):
        # the background cannot take more places than it has, nor the foreground more than there are
        possible = range(max(min(size, 1), size - keep), min(size, length - keep) + 1)
        nearest = min(abs(each - ratio * size) for each in possible)
        assert abs(count - ratio * size) == pytest.approx(nearest), size


def test_foreground_and_background_patches_are_each_kept_alike() -> None:
    length, keep, ratio = 24, 6, 0.75
    foreground = torch.arange(length) < 16
    _, hidden = foreground_mask(noise_of(DRAWS, length), foreground.expand(DRAWS, -1), keep, ratio)
    counts = (~hidden).sum(dim=0).numpy()
    for part in (foreground.numpy(), ~foreground.numpy()):
        assert chi_square(counts[part], DRAWS, 0.25) < chi2.ppf(0.999, part.sum() - 1)


def test_an_image_full_of_foreground_is_masked_like_any_other() -> None:
    noise = noise_of(20, 36)
    _, hidden = foreground_mask(noise, torch.ones(20, 36, dtype=torch.bool), 9, 0.75)
    assert torch.equal(hidden, random_mask(noise, 9)[1])


def test_a_flat_patch_is_background_whatever_its_value() -> None:
    images = torch.full((1, 2, 4, 16), -2.0)
    images[:, 1] = 1.5  # flat, though not grey
    images[:, :, :, 4:8] += 0.9 * FLAT * torch.tensor([1.0, -1.0]).repeat(4, 2)
    images[:, 1, :, 8:12] += 1.1 * FLAT * torch.tensor([1.0, -1.0]).repeat(4, 2)  # in one channel alone
    images[:, :, :, 12:] += torch.linspace(-1, 1, 4)
    assert foreground_patches(patchify(images, (4, 4)), channels=2).tolist() == [[False, False, True, True]]


def test_patches_lie_row_by_row_and_their_values_by_row_column_channel() -> None:
    n, channels, rows, columns, p, q = 2, 3, 2, 3, 4, 5
    images = torch.randn(n, channels, rows * p, columns * q)
    patches = patchify(images, (p, q))
    assert patches.shape == (n, rows * columns, p * q * channels)
    for row, column, y, x, channel in [(0, 0, 0, 0, 0), (1, 2, 3, 4, 2), (0, 1, 2, 0, 1), (1, 0, 0, 3, 2)]:
        ours = patches[:, row * columns + column, (y * q + x) * channels + channel]
        assert torch.equal(ours, images[:, channel, row * p + y, column * q + x])


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize(("size", "patch"), [((32, 32), (8, 8)), ((48, 32), (16, 16)), ((16, 24), (4, 8))])
def test_patches_go_back_to_the_same_image(channels: int, size: tuple[int, int], patch: tuple[int, int]) -> None:
    images = torch.randn(2, channels, *size)
    grid = size[0] // patch[0], size[1] // patch[1]
    assert torch.equal(unpatchify(patchify(images, patch), grid, patch), images)


def test_part_of_a_patch_is_refused() -> None:
    with pytest.raises(UsageError, match=r"32 x 30 pixels .* 8 x 8"):
        patchify(torch.zeros(1, 1, 32, 30), (8, 8))


def test_each_sample_gives_its_own_tokens() -> None:
    tokens = torch.arange(2 * 4 * 3).view(2, 4, 3)
    taken = take_tokens(tokens, torch.tensor([[3, 0], [1, 1]]))
    assert torch.equal(taken, torch.stack([tokens[0, [3, 0]], tokens[1, [1, 1]]]))


def test_a_mask_of_squares_covers_all_their_patches() -> None:
    squares = torch.tensor([[True, False, False, False, True, False]])  # 2 rows of 3
    patches = enlarged(squares, (2, 3), (2, 1)).view(1, 4, 3)
    assert patches.int().tolist() == [[[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]]
    assert torch.equal(enlarged(squares, (2, 3), (1, 1)), squares)
