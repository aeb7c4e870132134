"""The gradients of a chain's tensors: added up on the walk back, those of vectors at its end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._layout import laid_out_as
from .records import cast


class Gradients:
    """Sums of what the walk finds for each tensor.

    Args:
        tensors: The chain's.
        needs: Which of them want a gradient.
    """

    def __init__(self, tensors: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self._tensors, self._needs, self._any = tensors, needs, any(needs)
        self._totals: dict[int, Tensor] = {}
        # Of vectors' gradients, not added up yet: each times a number.
        self._parts: dict[int, list[tuple[Tensor, float]]] = {}

    def wants(self, *places: int | None) -> bool:
        """Whether one of the tensors wants a gradient."""
        return self._any and any(place is not None and self._needs[place] for place in places)

    def add(self, place: int | None, gradient: Tensor | None, factor: float | Tensor = 1.0) -> None:
        """``factor`` times a gradient, to that of a tensor."""
        if gradient is None or not self.wants(place):
            return
        if self._tensors[place].dim() == 1:
            if isinstance(factor, Tensor):
                gradient, factor = gradient * factor.to(gradient.dtype), 1.0
            self._parts.setdefault(place, []).append((gradient, factor))
            return
        # A convolution's weight: gradients too large to be kept until the end, this walk's own, and so written over.
        gradient = cast(gradient, self._tensors[place].dtype)
        if isinstance(factor, Tensor):
            gradient, factor = gradient.mul_(factor.to(gradient.dtype)), 1.0
        total = self._totals.get(place)
        if total is not None:
            gradient = total.add_(gradient, alpha=factor)
        elif factor != 1:
            gradient = gradient.mul_(factor)
        self._totals[place] = gradient

    def found(self, shared: Tensor | None) -> list[Tensor | None]:
        """Each tensor's gradient, laid out as the tensor is, None where none is wanted.

        Args:
            shared: What may have been added to several gradients, which must not be one tensor.
        """
        self._add_up(shared)
        gradients: list[Tensor | None] = [None] * len(self._tensors)
        zeros = []
        for place, (tensor, needed) in enumerate(zip(self._tensors, self._needs, strict=True)):
            if not needed:
                continue
            gradient = self._totals.get(place)
            # Exact zeros are tensors: of a bias that only a batch norm sees, say.
            if gradient is None:
                gradient = torch.empty_like(tensor)
                zeros.append(gradient)
            elif not torch.compiler.is_compiling():  # a weight's is in rows where activations are
                gradient = laid_out_as(gradient, tensor)
            gradients[place] = gradient
        if zeros:
            torch._foreach_zero_(zeros)
        return gradients

    def _add_up(self, shared: Tensor | None) -> None:
        """The vectors' gradients from their parts, of all vectors at once: each op on one is hardly any work.

        A vector's parts are added in the order in which they came, and rounded to its dtype once.
        """
        if not self._parts:
            return
        scaled = [
            (place, k)
            for place, parts in self._parts.items()
            for k, (part, factor) in enumerate(parts)
            if factor != 1 or part is shared  # times 1 is a copy
        ]
        terms = {place: [part for part, _ in parts] for place, parts in self._parts.items()}
        if scaled:
            factors = [self._parts[place][k][1] for place, k in scaled]
            products = torch._foreach_mul([terms[place][k] for place, k in scaled], factors)
            for (place, k), product in zip(scaled, products, strict=True):
                terms[place][k] = product
        totals = {place: first for place, (first, *_) in terms.items()}
        for k in range(1, max(map(len, terms.values()))):
            places = [place for place in terms if len(terms[place]) > k]
            sums = torch._foreach_add([totals[p] for p in places], [terms[p][k] for p in places])
            totals.update(zip(places, sums, strict=True))
        rounded = {
            place: torch.empty_like(self._tensors[place])
            for place, total in totals.items()
            if total.dtype != self._tensors[place].dtype
        }
        if rounded:
            torch._foreach_copy_(list(rounded.values()), [totals[place] for place in rounded])
        self._totals |= totals | rounded
