"""What is measured of each image by several processes, and accuracies with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .distributed import Ranks
from .training import Batches

Measure = Callable[[int, Tensor, Tensor], dict[str, Tensor]]

# The 97.5% quantile of the normal distribution.
_Z = 1.959963984540054


def dealt(batches: Batches, measure: Measure, ranks: Ranks) -> dict[str, Tensor]:
    """What is measured of each image, batches dealt to the processes in turn.

    A batch goes to one process whole: what attacks do to an image may depend on the others in its
    batch, so only then does the number of processes change nothing.

    Args:
        batches: the same in every process.
        measure: from a batch's index, images and labels to named values, `[N]` each; the same names
            for every batch.
        ranks: the processes.

    Returns:
        The values in the order of the images, on the CPU, in every process.

    Raises:
        ValueError: there are no batches.
    """
    mine = [
        (index, {name: values.cpu() for name, values in measure(index, x, y).items()})
        for index, (x, y) in enumerate(batches)
        if index % ranks.size == ranks.rank
    ]
    parts = [part for _, part in sorted(chain(*ranks.gather(mine)), key=lambda pair: pair[0])]
    if not parts:
        raise ValueError("no batch was seen")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def summary(right: Mapping[str, Tensor]) -> dict[str, Any]:
    """Accuracies of an evaluation.

    Args:
        right: by attack, whether each image was classified correctly, bool `[N]`.

    Returns:
        JSON types: "accuracy"; "confidence_95", Wilson's interval of each; "outcomes", a text for
        each with a "1" for every image that was classified correctly and a "0" for every other.
    """
    return {
        "accuracy": {name: values.sum().item() / len(values) for name, values in right.items()},
        "confidence_95": {
            name: wilson_interval(int(values.sum()), len(values)) for name, values in right.items()
        },
        "outcomes": {
            name: "".join("01"[value] for value in values.tolist())
            for name, values in right.items()
        },
    }


def wilson_interval(hits: int, trials: int) -> list[float]:
    """Wilson's 95% interval of a share, [low, high].

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference",
    J. Am. Stat. Assoc. 22 (1927).
    """
    share, z2 = hits / trials, _Z * _Z
    centre = share + z2 / (2 * trials)
    spread = _Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    scale = 1 + z2 / trials
    # Exact at the ends, where rounding would leave the range of shares.
    low = 0.0 if hits == 0 else (centre - spread) / scale
    high = 1.0 if hits == trials else (centre + spread) / scale
    return [low, high]
