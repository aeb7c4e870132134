"""Sets of images in memory, their batches, and fixed stratified splits."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .augment import AUGMENTATIONS, apply, draw


@dataclass(frozen=True)
class ImageSet:
    """Images and labels in memory.

    Attributes:
        images: `[N, C, H, W]`, uint8 with values 0 to `scale`.
        labels: `[N]`, int64.
        scale: the byte that stands for 1.0.
    """

    images: Tensor
    labels: Tensor
    scale: float

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on `device`; batches are then cut there, with no copies in between."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, count: int) -> ImageSet:
        """The first `count` images (all, if there are fewer)."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def select(self, indices: Sequence[int]) -> ImageSet:
        """The images with these indices, in their order."""
        index = torch.tensor(indices, dtype=torch.int64)
        return replace(self, images=self.images[index], labels=self.labels[index])

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        drop_last: bool = False,
        start: int = 0,
        augment: str = "none",
        augment_seed: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of float32 images in [0, 1] and labels, on the device of the set.

        Args:
            batch_size: images per batch.
            shuffle_seed: seed of the order, the same on every device; None keeps the stored order.
            drop_last: leave out a last batch that is smaller (unless it is the only one).
            start: index of the first batch to yield; it and those after it are the ones that
                start=0 yields at their places.
            augment: one of `AUGMENTATIONS`: "crop" pads by 4 zeros and takes a random window of the
                image's own size, "crop-flip" also flips half of the images left-right.
            augment_seed: seed of the crops and flips, the same on every device; needed unless
                `augment` is "none".
            part: (index, count): of each batch only the index-th of count parts that follow each
                other and differ in size by one image at most; parts of small batches can be empty.

        Returns:
            Iterator over x `[B, C, H, W]` float32 in [0, 1], y `[B]` int64.

        Raises:
            ValueError: batch_size below 1, start outside 0 to `batch_count`, an unknown
                augmentation, or one without its seed; an index outside 0 to count - 1.
        """
        count = self.batch_count(batch_size, drop_last)
        if not 0 <= start <= count:
            raise ValueError(f"start must be 0 to {count}, the number of batches, got {start}")
        if not 0 <= part[0] < part[1]:
            raise ValueError(f"part must be (index, count) with 0 <= index < count, got {part}")
        if augment not in AUGMENTATIONS:
            raise ValueError(f"unknown augment {augment!r}; known: {', '.join(AUGMENTATIONS)}")
        order = draws = None
        if augment != "none":
            if augment_seed is None:
                raise ValueError(f"augment_seed must be given with augment {augment!r}, got None")
            draws = draw(augment, len(self), augment_seed).to(self.labels.device)
        if shuffle_seed is not None:
            generator = torch.Generator().manual_seed(shuffle_seed)
            order = torch.randperm(len(self), generator=generator).to(self.labels.device)
        starts = range(start * batch_size, count * batch_size, batch_size)
        return self._cut(starts, part, order, draws)

    def _cut(
        self, starts: range, part: tuple[int, int], order: Tensor | None, draws: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        index, count = part
        for start in starts:
            size = min(starts.step, len(self) - start)
            place = slice(start + size * index // count, start + size * (index + 1) // count)
            chosen = place if order is None else order[place]
            images = self.images[chosen]
            if draws is not None:
                images = apply(images, draws[:, place])
            yield images.float().div_(self.scale), self.labels[chosen]

    def batch_count(self, batch_size: int, drop_last: bool = False) -> int:
        """How many batches `batches` yields."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        full, rest = divmod(len(self), batch_size)
        return full + (rest > 0 and not (drop_last and full > 0))


@dataclass(frozen=True)
class ImageSplits:
    """A data set: training, validation and test sets and what a network must know about them.

    Attributes:
        name: the name in the registry.
        train, val, test: disjoint sets.
        num_classes: labels are 0 to num_classes - 1.
        mean, std: per channel, of the training images in [0, 1].
    """

    name: str
    train: ImageSet
    val: ImageSet
    test: ImageSet
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.train.images.shape[1:])


def stratified_split(
    labels: Sequence[int],
    fractions: Sequence[float],
    key: str,
    ids: Sequence[str] | None = None,
) -> list[list[int]]:
    """Split sample indices into parts that hold every class in the same proportion.

    Samples are ordered by a hash of their id, not by a random generator: the split then stays
    the same with every version of every library, and results on it stay comparable.

    Args:
        labels: class of each sample.
        fractions: share of each part but the first, which takes the rest.
        key: names the split; another key gives another one.
        ids: a name for each sample, such as its file, so that samples added later leave (nearly)
            all others in their parts; None takes the indices.

    Returns:
        One list of indices per part, in hashed (so mixed) order.
    """
    names = range(len(labels)) if ids is None else ids
    digests = [hashlib.sha256(f"{key}:{name}".encode()).digest() for name in names]
    by_class: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(labels)), key=digests.__getitem__):
        by_class[labels[index]].append(index)
    part_of = {}
    for members in by_class.values():
        start = 0
        for part, fraction in enumerate(fractions, start=1):
            stop = start + round(fraction * len(members))
            part_of.update(dict.fromkeys(members[start:stop], part))
            start = stop
    parts: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    # Another order than the one that filled the parts: in that one, the first samples left over
    # would all be of the classes whose share was full first.
    for index in sorted(range(len(labels)), key=lambda i: digests[i][::-1]):
        parts[part_of.get(index, 0)].append(index)
    return parts
