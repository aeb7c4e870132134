"""Batches: augmentation against a loop over images, and starting in the middle of an epoch."""

import pytest
import torch

from ssp_fused import data
from ssp_fused.data import augment
from ssp_fused.data.splits import ImageSet


def random_set(count: int, channels: int = 3, height: int = 9, width: int = 12) -> ImageSet:
    images = torch.randint(256, (count, channels, height, width), dtype=torch.uint8)
    return ImageSet(images, torch.arange(count), scale=255.0)


def by_hand(image: torch.Tensor, top: int, left: int, flip: int) -> torch.Tensor:
    """One image, pixel by pixel."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            source = width - 1 - column if flip else column
            y, x = row + top - augment.PADDING, source + left - augment.PADDING
            if 0 <= y < height and 0 <= x < width:
                out[:, row, column] = image[:, y, x]
    assert channels == out.shape[0]
    return out


@pytest.mark.parametrize("kind", ["crop", "crop-flip"])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_against_a_loop_over_images(kind: str, channels: int) -> None:
    images = random_set(40, channels).images
    draws = augment.draw(kind, 40, seed=5)
    augmented = augment.apply(images, draws)
    assert augmented.dtype == torch.uint8 and augmented.is_contiguous()
    for image, out, numbers in zip(images, augmented, draws.T.tolist(), strict=True):
        assert torch.equal(out, by_hand(image, *numbers))


def test_windows_vary_over_their_whole_range_and_half_are_flipped() -> None:
    top, left, flip = augment.draw("crop-flip", 20_000, seed=0)
    for offsets in (top, left):
        shares = offsets.bincount(minlength=9) / 20_000
        assert len(shares) == 9
        torch.testing.assert_close(shares, torch.full((9,), 1 / 9), atol=0.01, rtol=0)
    assert abs(flip.float().mean() - 0.5) < 0.02
    # One independent of the others: windows do not run along a diagonal, nor flips with them.
    correlations = torch.corrcoef(torch.stack([top, left, flip]).double())
    assert correlations.fill_diagonal_(0).abs().max() < 0.03


def test_crop_alone_does_not_flip_and_crops_alike() -> None:
    crop, both = (augment.draw(kind, 100, seed=3) for kind in ("crop", "crop-flip"))
    assert torch.equal(crop[:2], both[:2]) and not crop[2].any() and both[2].any()
    assert not torch.equal(both, augment.draw("crop-flip", 100, seed=4))


def test_batches_are_augmented_in_the_order_they_are_drawn() -> None:
    part = random_set(23)
    plain = list(part.batches(5, shuffle_seed=1))
    augmented = list(part.batches(5, shuffle_seed=1, augment="crop-flip", augment_seed=2))
    draws = augment.draw("crop-flip", 23, 2).split(5, dim=1)
    for (x, y), (ax, ay), numbers in zip(plain, augmented, draws, strict=True):
        assert torch.equal(y, ay) and ax.dtype == torch.float32
        assert torch.equal(ax, augment.apply(x, numbers))
    assert not torch.equal(plain[0][0], augmented[0][0])
    assert part.images.dtype == torch.uint8


@pytest.mark.parametrize("kind", data.AUGMENTATIONS)
@pytest.mark.parametrize("shuffle_seed", [None, 7])
@pytest.mark.parametrize("drop_last", [False, True])
def test_start_gives_the_tail(kind: str, shuffle_seed: int | None, drop_last: bool) -> None:
    part = random_set(22)
    options = {"shuffle_seed": shuffle_seed, "drop_last": drop_last}
    options |= {"augment": kind, "augment_seed": 9}
    whole = list(part.batches(5, **options))
    assert len(whole) == 4 + (not drop_last)
    for start in range(len(whole) + 1):
        tail = list(part.batches(5, start=start, **options))
        assert len(tail) == len(whole) - start
        for (x, y), (tail_x, tail_y) in zip(whole[start:], tail, strict=True):
            assert torch.equal(x, tail_x) and torch.equal(y, tail_y)


def test_an_empty_set_and_the_global_random_state() -> None:
    part = random_set(6)
    before = torch.get_rng_state()
    assert len(list(part.batches(2, shuffle_seed=1, augment="crop", augment_seed=1))) == 3
    assert list(part.take(0).batches(2, shuffle_seed=1, augment="crop", augment_seed=1)) == []
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "start must be 0 to 3, the number of batches, got -1"),
        ({"start": 4}, "start must be 0 to 3, the number of batches, got 4"),
        ({"augment": "flip"}, "unknown augment 'flip'; known: none, crop, crop-flip"),
        ({"augment": "crop"}, "augment_seed must be given with augment 'crop', got None"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    # At the call, not at the first batch.
    with pytest.raises(ValueError, match=message):
        random_set(10).batches(4, **options)


@pytest.mark.gpu
def test_same_batches_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    part = random_set(50)
    options = {"shuffle_seed": 1, "augment": "crop-flip", "augment_seed": 2}
    pairs = zip(part.batches(8, **options), part.to("cuda").batches(8, **options), strict=True)
    for (x, y), (device_x, device_y) in pairs:
        assert torch.equal(x, device_x.cpu()) and torch.equal(y, device_y.cpu())
