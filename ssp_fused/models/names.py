"""Names of networks: published ones, and the schemes of their groups."""

from __future__ import annotations

from collections.abc import Sequence

from .. import schemes

ADAPTIVE = "adaptive"

Scheme = str | Sequence[str]

# The published names of the networks, as the scheme of all groups. The network of "ark" is one
# scheme per group (see `resolve_scheme`).
PUBLISHED_SCHEMES = {
    "res": "euler",
    "midrk2": "sspnet-midrk2",
    "ssp2": "ssp22",
    "ssp3": "ssp33",
    "ark": ADAPTIVE,
}
_PUBLISHED_ARK = {
    1: (ADAPTIVE,),
    3: (ADAPTIVE, "euler", "ssp22"),
    4: (ADAPTIVE, "euler", "ssp22", "ssp22"),
}


def group_schemes(scheme: Scheme, groups: int) -> tuple[str, ...]:
    """The scheme of each group of blocks.

    Args:
        scheme: one name for all groups, or a sequence with one name per group; names are those of
            `schemes.names()` and "adaptive".
        groups: number of groups in the network.

    Raises:
        ValueError: a name is unknown, or the sequence has another length than `groups`.
    """
    chosen = (scheme,) * groups if isinstance(scheme, str) else tuple(scheme)
    if len(chosen) != groups:
        raise ValueError(
            f"scheme must be one name or {groups} names, one per group, got {len(chosen)}: {chosen}"
        )
    known = (*schemes.names(), ADAPTIVE)
    for name in chosen:
        if name not in known:
            raise ValueError(f"unknown scheme {name!r}; known: {', '.join(known)}")
    return chosen


def resolve_scheme(name: str, groups: int) -> tuple[str, ...]:
    """The scheme of each group for a network's published name or its schemes' own names.

    Args:
        name: a published name ("res", "midrk2", "ssp2", "ssp3", "ark"), a name `group_schemes`
            takes, or several of the latter, comma-separated, one per group.
        groups: number of groups in the network.

    Raises:
        ValueError: a name is unknown, or there are not `groups` of them.
    """
    if name == "ark" and groups in _PUBLISHED_ARK:
        return _PUBLISHED_ARK[groups]
    if name in PUBLISHED_SCHEMES:
        return group_schemes(PUBLISHED_SCHEMES[name], groups)
    if "," in name:
        return group_schemes([part.strip() for part in name.split(",")], groups)
    known = (*PUBLISHED_SCHEMES, *schemes.names(), ADAPTIVE)
    if name not in known:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(known)}")
    return group_schemes(name, groups)
