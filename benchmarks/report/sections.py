"""The report's sections: each writes its place in a document from result files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.cases import CHANNELS_LAST, CONTIGUOUS, INPUT_GRADIENT, TRAIN
from benchmarks.hardware import Machine
from benchmarks.kernels import COMPILED
from benchmarks.results import CONTROL, CONVOLUTIONS, COPY, EAGER, OK, Row

from .sources import COMMANDS, CPU, GPU, RESULTS, Sources, provenance_of
from .tables import (
    contenders,
    groups,
    label,
    mebibytes,
    paragraph,
    refusals,
    shortened,
    span,
    table,
)

NOT_MEASURED = {CPU: "Not measured yet.", GPU: "On a GPU: not measured yet."}
PUBLISHED = "published"
_FUSED, _EAGER_CHANNELS_LAST = "fused-", "eager-channels-last"
_STEPS = {TRAIN: "training", INPUT_GRADIENT: "input gradient"}


def memory(sources: Sources) -> str:
    """What is kept for backward, by plain layers and fused ones."""
    source = sources.get("memory", CPU)
    if source is None:
        return NOT_MEASURED[CPU]
    rows = []
    for group in groups(source.rows):
        (plain, fused) = (group[EAGER], next(r for n, r in group.items() if n.startswith(_FUSED)))
        sizes = (plain.kept_bytes, fused.kept_bytes)
        ratio = f"{fused.kept_bytes / plain.kept_bytes:.3f}"
        rows.append((plain.case, _STEPS[plain.direction], *map(mebibytes, sizes), ratio))
    head = ("layers", "step", "plain PyTorch", "fused", "ratio")
    intro = f"Kept for the backward pass ({source.provenance(source.rows)}):"
    return f"{paragraph(intro)}\n\n{table(head, rows)}"


def blocks(
    sources: Sources, device: str, scheme: str | None = None, layout: str | None = None
) -> str:
    """A step through blocks: time over that of the bare convolutions, and memory.

    Args:
        sources: Of the document.
        device: "cpu" or "gpu".
        scheme: Whose table it is; None for all.
        layout: Likewise.
    """
    source = sources.get("blocks", device)
    own = [r for r in source.rows if _matches(r, scheme, layout)] if source else []
    if source is None or not own:
        return NOT_MEASURED[device]
    timed = [n for n in contenders(own) if n not in (CONTROL, CONVOLUTIONS, COPY)]
    common, names = shortened(r.case for r in own)
    rows = []
    for group in groups(own):
        first = next(iter(group.values()))
        times = [_over_convolutions(group, name) for name in timed]
        kept = [mebibytes(group[name].kept_bytes) if name in group else "-" for name in timed]
        rows.append((names[first.case], _STEPS[first.direction], *times, *kept))
    head = ("input", "step", *map(label, timed), *(f"{label(name)} keeps" for name in timed))
    intro = (
        f"A step through blocks ({common or own[0].case}): time over that of its bare convolutions, medians of "
        f"{_repeats(own)}, and what is kept for the backward pass ({source.provenance(own)})."
    )
    if CONTROL in contenders(own):
        intro += " In parentheses the control, eager entered twice: its difference is the noise."
    parts = [paragraph(intro), table(head, rows)]
    if device == GPU:
        parts.append(sources.figure("blocks_time_gpu", "Time over that of the bare convolutions"))
        parts.append(sources.figure("blocks_memory_gpu", "Kept for the backward pass"))
    return "\n\n".join(parts)


def block_summary(sources: Sources, device: str) -> str:
    """The fused layers' time and memory over those of the others, by scheme and step, over all inputs and layouts."""
    source = sources.get("blocks", device)
    if source is None:
        return NOT_MEASURED[device]
    rows = []
    fused = [name for name in contenders(source.rows) if name.startswith(_FUSED)]
    for (scheme, direction), own in _by_scheme_and_step(source.rows).items():
        for name in fused:
            cells = []
            for others in ((EAGER, _EAGER_CHANNELS_LAST), (COMPILED,)):
                pairs = [(g[name], g[o]) for g in own for o in others if _both(g, name, o)]
                cells.append(span(a.median_ms / b.median_ms for a, b in pairs))
                cells.append(span((a.kept_bytes / b.kept_bytes for a, b in pairs), 3))
            rows.append((f"{scheme}, {_STEPS[direction]}, {label(name)}", *cells))
    head = (
        "over all inputs and layouts",
        *(f"{x} over {y}" for y in ("eager", "torch.compile") for x in ("time", "memory")),
    )
    ratios = [
        group[CONVOLUTIONS].median_ms / contiguous.median_ms
        for group in groups(source.rows)
        if _both(group, CONVOLUTIONS)
        and (contiguous := _contiguous_twin(group[CONVOLUTIONS], source.rows))
    ]
    text = table(head, rows)
    if ratios:
        text += f"\n\nIn channels last the bare convolutions take {span(ratios)} of their time in contiguous tensors."
    return text


def _by_scheme_and_step(rows: Sequence[Row]) -> dict[tuple[str, str], list[dict[str, Row]]]:
    found: dict[tuple[str, str], list[dict[str, Row]]] = {}
    for group in groups(rows):
        first = next(iter(group.values()))
        found.setdefault((first.case.split()[0], first.direction), []).append(group)
    return found


def _contiguous_twin(row: Row, rows: Sequence[Row]) -> Row | None:
    """The same measurement in the other layout, of a row in channels last."""
    case = row.case.replace(CHANNELS_LAST, CONTIGUOUS)
    wanted = dataclasses.replace(row, case=case).key
    return next((r for r in rows if r.key == wanted and r.case != row.case), None)


def _matches(row: Row, scheme: str | None, layout: str | None) -> bool:
    words = row.case.split()
    return scheme in (None, words[0]) and layout in (None, words[-1])


def _repeats(rows: Sequence[Row]) -> str:
    return span((r.repeats for r in rows if r.repeats is not None), 0)


def _over_convolutions(group: dict[str, Row], name: str) -> str:
    row = group.get(name)
    if row is None or row.over_convolutions is None:
        return "-" if row is None or row.status == OK else row.status.split(":")[0]
    control = group.get(CONTROL)
    known = control is not None and control.over_convolutions is not None
    noise = f" ({control.over_convolutions:.2f})" if name == EAGER and known else ""
    return f"{row.over_convolutions:.2f}{noise}"


def _both(group: dict[str, Row], *names: str) -> bool:
    return all(name in group and group[name].status == OK for name in names)


def kernels(sources: Sources, device: str) -> str:
    """Each op: logical bytes by time, over those of a copy; a table for each case."""
    source = sources.get("kernels", device)
    if source is None:
        return NOT_MEASURED[device]
    timed = [n for n in contenders(source.rows) if n not in (CONTROL, COPY)]
    common, names = shortened(r.case for r in source.rows)
    intro = (
        f"Logical bytes of an op by its median time of {_repeats(source.rows)}, in GB/s, and in parentheses the share "
        f"of what a copy of as many bytes reaches; {common or ', '.join(names)} ({source.provenance(source.rows)})."
    )
    parts = [paragraph(intro)]
    head = ("op", *map(label, timed), label(COPY))
    for case, name in names.items():
        rows = []
        for group in groups(r for r in source.rows if r.case == case):
            first = next(iter(group.values()))
            copied = group[COPY].gb_per_s if _both(group, COPY) else None
            rates = [_rate(group.get(n), copied) for n in timed]
            rows.append((first.direction, *rates, "-" if copied is None else f"{copied:.1f}"))
        parts += [f"{name}:"] if len(names) > 1 else []
        parts.append(table(head, rows))
    refused = "\n".join(refusals(source.rows))
    parts += [refused] if refused else []
    if device == GPU:
        parts.append(sources.figure("kernels_gpu", "Logical bytes by time, against a copy"))
    return "\n\n".join(parts)


def _rate(row: Row | None, copied: float | None) -> str:
    if row is None or row.gb_per_s is None:
        return "-" if row is None else row.status.split(":")[0]
    share = f" ({row.gb_per_s / copied:.2f})" if copied else ""
    return f"{row.gb_per_s:.1f}{share}"


def adversarial(sources: Sources, device: str) -> str:
    """Steps of adversarial training: images per second, and the peak of memory."""
    source = sources.get("adversarial", device)
    if source is None:
        return NOT_MEASURED[device]
    first = source.rows[0]
    scheme, count, shape, *_ = first.case.split()
    rows, noise = [], []
    for group in groups(source.rows):
        base = group.get(PUBLISHED)
        for row in (r for r in group.values() if r.status == OK):
            *_, sizes, amp, layout = row.case.split()
            batch = int(sizes.split("x")[0])
            placed = (
                layout if amp == "amp-none" else f"{layout}, {amp.removeprefix('amp-')} autocast"
            )
            noise += [row.p20_ms / row.median_ms, row.p80_ms / row.median_ms]
            over = f"{base.median_ms / row.median_ms:.2f}" if _both(group, PUBLISHED) else "-"
            speed = f"{1e3 * batch / row.median_ms:.0f}"
            memory = map(mebibytes, (row.peak_bytes, row.kept_bytes))
            rows.append((label(row.contender), placed, speed, over, *memory))
    head = (
        "loop",
        "layout",
        "images/s",
        "over published",
        "peak of a PGD-10 step" if device == CPU else "peak of a step",
        "kept by an attack step",
    )
    intro = (
        f'One step of {first.direction} of `sspnet_cifar("{scheme}", {count[1:]})` on {shape}, medians of '
        f"{_repeats(source.rows)} ({source.provenance(source.rows)}); 20% and 80% quantiles are "
        f"{span(noise)} of the median."
    )
    return f"{paragraph(intro)}\n\n{table(head, rows)}"


def fashion_mnist(sources: Sources) -> str:
    """The comparison of networks on Fashion-MNIST, as `ssp-fused reproduce` tabulates it."""
    path = sources.path("fmnist_cpu.json")
    if not path.is_file():
        return NOT_MEASURED[CPU]
    from ssp_fused.adversarial.comparison_table import markdown

    found = json.loads(path.read_text())
    parts = markdown(found).rstrip().split("\n\n")
    torch = " and ".join(versions["torch"] for versions in found["provenance"]["versions"])
    facts = [found[key] for key in ("command", "hardware", "commit") if key in found]
    parts.append(", ".join([*facts, f"torch {torch}; [results]({sources.link(path)})"]))
    return "\n\n".join(part if part.startswith("|") else paragraph(part) for part in parts)


def demo(sources: Sources) -> str:
    """Networks of `make demo` under attack, and the speed that it measures."""
    path = sources.path("demo_cpu.json")
    if not path.is_file():
        return NOT_MEASURED[CPU]
    found = json.loads(path.read_text())
    shares = ("clean", "fgsm", "pgd20")
    rows = [
        (
            row["network"],
            f"{row['parameters']:,}",
            str(row["evaluations"]),
            *(f"{row[share]:.1%}" for share in shares),
        )
        for row in found["networks"]
    ]
    head = ("network", "parameters", "evaluations of F per block", "clean", "FGSM", "PGD-20")
    speeds = ", ".join(
        f"{step} {fused:.0f} against {plain:.0f} ({fused / plain:.2f}x)"
        for step, (fused, plain) in found["images_per_second"].items()
    )
    here = Machine(**found["machine"])
    text = (
        f"Test accuracy on {found['images']} digits, l-infinity attacks of radius {found['eps']}, one seed, a standard "
        f"error of up to {100 * found['standard_error']:.1f} points. Images per second of a CIFAR-size SSP-2 network "
        f"(batch {found['batch']}, fp32), fused layers against plain PyTorch, medians of {found['repeats']}: {speeds}. "
        f"`python -m benchmarks.demo`; {provenance_of([here])}; [results]({sources.link(path)})."
    )
    return f"{table(head, rows)}\n\n{paragraph(text)}"


def commands(sources: Sources) -> str:
    """Which command makes which result file."""
    rows = []
    for device, own in COMMANDS.items():
        for benchmark, command in own.items():
            source = sources.get(benchmark, device)
            if source is not None:
                target = f"{RESULTS.as_posix()}/{benchmark}_{device}.csv"
                rows.append((f"[{target}]({source.link})", f"`{command} --out DIR`"))
    return table(("results", "command"), rows)


Section = Callable[[Sources], str]

SECTIONS: dict[str, Section] = {
    "memory": memory,
    "blocks": partial(blocks, device=CPU, scheme="ssp33", layout=CONTIGUOUS),
    "blocks, all contiguous": partial(blocks, device=CPU, layout=CONTIGUOUS),
    "blocks, all channels last": partial(blocks, device=CPU, layout=CHANNELS_LAST),
    "blocks, summary": partial(block_summary, device=CPU),
    "blocks, GPU": partial(blocks, device=GPU),
    "kernels": partial(kernels, device=CPU),
    "kernels, GPU": partial(kernels, device=GPU),
    "adversarial": partial(adversarial, device=CPU),
    "adversarial, GPU": partial(adversarial, device=GPU),
    "demo": demo,
    "fashion-mnist": fashion_mnist,
    "commands": commands,
}
