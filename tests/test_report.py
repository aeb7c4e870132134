"""The report: what is written into documents, what is found stale, and what is refused."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from benchmarks import hardware, results
from benchmarks.figures import Bar, bar_chart
from benchmarks.report import tables
from benchmarks.report.__main__ import main
from benchmarks.report.documents import MarkerError, filled
from benchmarks.report.sections import SECTIONS
from benchmarks.report.sources import Sources
from benchmarks.results import Row
from ssp_fused.adversarial import comparison_table

GPU = "An accelerator"
SVG = "{http://www.w3.org/2000/svg}"


def test_the_documents_are_what_the_result_files_say():
    assert main(["--check"]) == 0


# --- a tree of its own ------------------------------------------------------------------------------------------


def row(contender, median, case="ssp22 x1 8x4x2x2 float32 contiguous", **values):
    known = {"benchmark": "blocks", "direction": "train", "device": "cpu", "status": "ok"}
    times = {"p20_ms": median / 2, "median_ms": median, "p80_ms": median * 2, "repeats": 30}
    return Row(case=case, contender=contender, **(known | times | values))


ROWS = [
    row("eager", 4.0, kept_bytes=64 << 20),
    row("eager (control)", 4.4, kept_bytes=64 << 20),
    row("fused-cpu", 3.0, kept_bytes=16 << 20),
    row("compile-default", 2.0, kept_bytes=32 << 20),
    row("convolutions", 2.0),
]


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "# Title\n\n<!-- benchmarks.report: blocks, summary -->\n<!-- end -->\n"
    )
    write(tmp_path, ROWS)
    return tmp_path


def write(root, rows, name="blocks_cpu", gpu=""):
    machine = dataclasses.replace(
        hardware.machine(torch.device("cpu")), gpu=gpu, threads="3", commit="c0ffee"
    )
    rated = [r for own in tables.groups(rows) for r in results.with_ratios(own.values())]
    results.write(root / "benchmarks" / "results" / f"{name}.csv", rated, machine)


def section(root, name, folder="docs"):
    return SECTIONS[name](Sources(root, root / folder))


def test_a_stale_file_is_named_and_mended(tree, capsys):
    assert main(["--check"], tree) == 1
    told = capsys.readouterr().err
    assert "stale: README.md: run" in told and "docs/figures/blocks_time_cpu.svg" in told
    assert "0.75" not in (tree / "README.md").read_text()
    assert main([], tree) == 0
    text = (tree / "README.md").read_text()
    assert (
        text.startswith("# Title\n")
        and "| ssp22, training, fused | 0.75 | 0.250 | 1.50 | 0.500 |" in text
    )
    assert main(["--check"], tree) == 0
    for stale in (tree / "README.md", tree / "docs" / "figures" / "blocks_time_cpu.svg"):
        whole = stale.read_text()
        stale.write_text(whole.replace("1.5", "1.4"))
        assert stale.read_text() != whole and main(["--check"], tree) == 1
        stale.write_text(whole)
    write(tree, [*ROWS[:2], row("fused-cpu", 1.0, kept_bytes=16 << 20), *ROWS[3:]])
    assert main(["--check"], tree) == 1 and main([], tree) == 0
    assert (
        "| ssp22, training, fused | 0.25 | 0.250 | 0.50 | 0.500 |"
        in (tree / "README.md").read_text()
    )


def test_blocks_by_hand(tree):
    text = " ".join(section(tree, "blocks, all contiguous").split())
    assert "| training | 2.00 (2.20) | 1.50 | 1.00 | 64 MiB | 16 MiB | 32 MiB |" in text
    assert (
        "medians of 30" in text and "commit c0ffee" in text and f"torch {torch.__version__}" in text
    )
    assert "3 threads" in text
    assert "[results](../benchmarks/results/blocks_cpu.csv)" in text
    channels_last = [
        dataclasses.replace(r, case=r.case.replace("contiguous", "channels_last")) for r in ROWS
    ]
    write(
        tree, [*ROWS, *(dataclasses.replace(r, median_ms=r.median_ms / 2) for r in channels_last)]
    )
    assert "channels last the bare convolutions take 0.50 of" in section(tree, "blocks, summary")


def test_a_contender_without_a_time_says_why(tree):
    wrong = Row(
        "kernels", "8x4x2x2", "fused-cpu", "linf_step", "cpu", "wrong: x_adv: error 1 exceeds 0"
    )
    rows = [
        row("fused-cpu", 2.0, "8x4x2x2", direction="l2_step", gb_per_s=4.0, bytes=8),
        row("copy", 1.0, "8x4x2x2", direction="l2_step", gb_per_s=8.0, bytes=8),
        wrong,
        dataclasses.replace(wrong, contender="fused-cuda", status="cannot run: no such device"),
    ]
    write(tree, rows, "kernels_cpu")
    text = section(tree, "kernels")
    assert "| l2_step | 4.0 (0.50) | 8.0 |" in text and "| linf_step | wrong | - |" in text
    assert "- fused, linf_step: wrong: x_adv: error 1 exceeds 0" in text
    assert "fused-cuda" not in text and "no such device" not in text


@pytest.mark.parametrize("name", [n for n in SECTIONS if n.endswith("GPU")])
def test_a_gpu_is_not_measured_until_it_is(tree, name):
    assert section(tree, name) == "On a GPU: not measured yet."
    benchmark = name.split(",")[0]
    case = "ssp22 x2 8x3x4x4 amp-none contiguous"
    rows = [
        row(n, 2.0, case, bytes=8, gb_per_s=4.0, device="cuda")
        for n in ("published", "fused-cuda", "copy")
    ]
    write(tree, rows, f"{benchmark}_gpu", GPU)
    text = " ".join(section(tree, name).split())
    assert (
        GPU in text
        and "fused-cuda" in text
        and "python -m benchmarks." in text
        and "--device cuda" in text
    )


@pytest.fixture
def on_gpu(tree):
    """A tree with results of a GPU, as benchmarks there leave them."""

    def rows(benchmark, contenders, cases, directions, **values):
        return [
            row(name, ms, case, benchmark=benchmark, direction=direction, device="cuda", **values)
            for case in cases
            for direction in directions
            for name, ms in contenders.items()
        ]

    times = {"eager": 4.0, "eager-channels-last": 3.0, "fused-cuda": 1.5, "fused-triton": 1.25}
    compiled = {"compile-default": 2.0, "compile-reduce-overhead": 1.75}
    cases = [f"ssp22 x1 {shape} bfloat16 channels_last" for shape in ("8x4x2x2", "8x8x1x1")]
    refused = Row("blocks", cases[0], "fused-cpu", "train", "cuda", "cannot run: no such device")
    entrants = times | compiled | {"convolutions": 1.0}
    steps = ("train", "input-gradient")
    blocks = [*rows("blocks", entrants, cases, steps, kept_bytes=2 << 20), refused]
    cases = [f"8x4x2x2 float32 {layout}" for layout in ("contiguous", "channels_last")]
    ops = ("linf_step", "l2_step")
    entrants = {n: times[n] for n in ("eager", "fused-cuda", "fused-triton")}
    entrants["compile-default"] = 2.0
    kernels = [
        *rows("kernels", entrants, cases, ops, bytes=8, gb_per_s=3.0),
        *rows("kernels", {"copy": 1.0}, cases, ops, bytes=8, gb_per_s=4.0),
    ]
    wrong = dataclasses.replace(kernels[0], contender="compile-default", direction="stage_dots")
    kernels.append(dataclasses.replace(wrong, status="wrong: dots", median_ms=None, gb_per_s=None))
    cases = [f"ssp22 x2 100x3x4x4 amp-{amp} channels_last" for amp in ("none", "bfloat16")]
    entrants = {"published": 50.0, "fused-cuda": 20.0, "fused-cuda-graph": 10.0}
    values = {"peak_bytes": 20 << 20, "kept_bytes": 1 << 20}
    adversarial = rows("adversarial", entrants, cases, ("pgd-7 training",), **values)
    for name, found in (("blocks", blocks), ("kernels", kernels), ("adversarial", adversarial)):
        write(tree, found, f"{name}_gpu", GPU)
    return tree


def test_results_of_a_gpu_by_hand(on_gpu):
    text = section(on_gpu, "blocks, GPU")
    row_of = "4.00 | 3.00 | 1.50 | 1.25 | 2.00 | 1.75 |" + " 2.0 MiB |" * 6
    for shape in ("8x4x2x2", "8x8x1x1"):
        for step in ("training", "input gradient"):
            assert f"| {shape} | {step} | {row_of}" in text
    assert "ssp22 x1 bfloat16 channels_last" in text and "--graph" in text
    assert "control" not in text and "fused-cpu" not in text

    text = section(on_gpu, "kernels, GPU")
    for layout in ("contiguous", "channels_last"):
        (table,) = re.findall(rf"^{layout}:\n\n((?:\|.*\n)+)", text, re.MULTILINE)
        for op in ("linf_step", "l2_step"):
            assert f"| {op} |{' 3.0 (0.75) |' * 4} 4.0 |" in table
        assert ("| stage_dots | - | - | - | wrong | - |" in table) == (layout == "contiguous")
    assert "reaches; 8x4x2x2 float32 (" in " ".join(text.split())
    assert "- torch.compile, stage_dots, 8x4x2x2 float32 contiguous: wrong: dots" in text

    text = section(on_gpu, "adversarial, GPU")
    assert "| fused-cuda-graph | channels_last | 10000 | 5.00 | 20 MiB | 1.0 MiB |" in text
    assert "| fused-cuda | channels_last, bfloat16 autocast | 5000 | 2.50 |" in text
    assert "| peak of a step |" in text


def test_documents_show_the_figures_of_a_gpu(on_gpu):
    names = [name for name in SECTIONS if name.endswith("GPU")]
    marked = "".join(f"<!-- benchmarks.report: {name} -->\n<!-- end -->\n" for name in names)
    for page in ("README.md", "docs/results.md"):
        (on_gpu / page).write_text(marked)
    assert main([], on_gpu) == 0 and main(["--check"], on_gpu) == 0
    for page in (on_gpu / "README.md", on_gpu / "docs" / "results.md"):
        shown = re.findall(r"!\[[\w ,]+\]\((.*)\)", page.read_text())
        assert [name.split("/")[-1] for name in shown] == [
            "blocks_time_gpu.svg",
            "blocks_memory_gpu.svg",
            "kernels_gpu.svg",
        ]
        assert all((page.parent / name).is_file() for name in shown)
        assert "not measured" not in page.read_text()
    texts = (on_gpu / "docs" / "figures" / "blocks_time_gpu.svg").read_text()
    assert "fused-triton" in texts and "8x8x1x1" in texts


def test_adversarial_by_hand(tree):
    case = "ssp22 x2 128x3x32x32 amp-none channels_last"
    rows = [
        row(
            "published",
            4000.0,
            case,
            direction="pgd-7 training",
            peak_bytes=30 << 20,
            kept_bytes=3 << 20,
        ),
        row(
            "fused-cpu",
            1000.0,
            case,
            direction="pgd-7 training",
            peak_bytes=20 << 20,
            kept_bytes=1 << 20,
        ),
    ]
    write(tree, rows, "adversarial_cpu")
    text = section(tree, "adversarial")
    assert "| published | channels_last | 32 | 1.00 | 30 MiB | 3.0 MiB |" in text
    assert "| fused | channels_last | 128 | 4.00 | 20 MiB | 1.0 MiB |" in text
    assert "0.50 to 2.00 of the median" in " ".join(text.split())


def test_the_comparison_of_networks_is_the_commands_own_table(tree):
    number = {"mean": 0.5, "deviation": 0.01, "values": [0.49, 0.51]}
    growth = {"block1": {"l1": number, "l2": number}}
    network = {"method": "pgd", "model": "ssp2", "blocks": 3, "parameters": 1234, "evaluations": 6}
    result = {
        "caption": ["word " * 60],
        "rows": [{**network, "seeds": [0, 1], "clean": number, "growth": growth}],
    }
    result |= {
        "provenance": {"versions": [{"torch": "9.8.7"}]},
        "hardware": "an abacus",
        "commit": "c0ffee",
    }
    (tree / "benchmarks" / "results" / "fmnist_cpu.json").write_text(json.dumps(result))
    text = section(tree, "fashion-mnist")
    assert [
        line for line in comparison_table.markdown(result).split("\n") if line.startswith("|")
    ] == [line for line in text.split("\n") if line.startswith("|")]
    assert "an abacus, c0ffee, torch 9.8.7;" in text
    assert "50.0 ± 1.0" in text and "(../benchmarks/results/fmnist_cpu.json)" in text
    assert max(map(len, text.split("\n"))) <= 120


def test_nothing_measured_is_said(tmp_path):
    for name in SECTIONS.keys() - {"commands"}:
        assert section(tmp_path, name).endswith("ot measured yet."), name
    assert section(tmp_path, "commands").count("\n") == 1


# --- documents --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- benchmarks.report: none -->\n<!-- end -->",
            "page:1: unknown section 'none'; known: a",
        ),
        ("x\n<!-- benchmarks.report: a -->\n", "page:2: must be closed by <!-- end -->"),
        ("<!-- end -->", "page:1: <!-- end --> must follow"),
        ("<!-- benchmarks.report: a -->\n" * 2, "page:2: the marker of line 1 must end"),
    ],
)
def test_markers_that_cannot_be(text, message):
    with pytest.raises(MarkerError, match=re.escape(message)):
        filled(text, {"a": lambda: "new"}, "page")


def test_a_bad_document_or_result_file_is_an_error(tree, capsys):
    (tree / "docs" / "page.md").write_text("<!-- benchmarks.report: none -->\n<!-- end -->\n")
    with pytest.raises(SystemExit):
        main([], tree)
    assert "docs/page.md:1: unknown section 'none'" in capsys.readouterr().err
    (tree / "docs" / "page.md").unlink()
    (tree / "benchmarks" / "results" / "blocks_cpu.csv").write_text("a,b\n")
    with pytest.raises(SystemExit):
        main([], tree)
    assert "must have the columns" in capsys.readouterr().err


def test_paragraphs_are_wrapped_but_not_in_code():
    code = "`python -m benchmarks.blocks --device cpu`"
    lines = tables.paragraph(f"{'word ' * 16}({code}; {'word ' * 10})").split("\n")
    assert len(lines) == 2 and max(map(len, lines)) <= 120 and any(code in line for line in lines)


def test_ranges_and_common_words():
    assert tables.span([0.5]) == tables.span([0.499, 0.5]) == "0.50"
    assert tables.span([0.9, 0.514, 0.7]) == "0.51 to 0.90"
    assert tables.shortened(["a 1 x", "b 1 x"]) == ("1 x", {"a 1 x": "a", "b 1 x": "b"})
    assert tables.shortened(["a 1"]) == ("", {"a 1": "a 1"})


# --- figures ----------------------------------------------------------------------------------------------------


def test_a_chart_by_hand():
    panels = {
        "left": {"one": {"a": Bar(2.0, 1.0, 4.0), "<b>": Bar(1.0), "base": Bar(1.0)}},
        "right": {"two": {"a": Bar(3.0)}},
    }
    chart = bar_chart("Time & more", panels, mark="base")
    assert chart == bar_chart("Time & more", panels, mark="base")
    root = ElementTree.fromstring(chart)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    for text in ("Time & more", "left", "right", "one", "two", "a", "<b>", "base", "2.00", "3.00"):
        assert text in texts
    bars = [e for e in root.iter(f"{SVG}rect") if e.get("height") == "10" and e.get("y") != "26"]
    widths = [float(bar.get("width")) for bar in bars]
    assert len(widths) == 3  # the marked series has a line in place of a bar
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.11)  # one scale for all panels
    assert widths[2] == pytest.approx(3 * widths[1], abs=0.11)
    with pytest.raises(ValueError, match="got none"):
        bar_chart("Nothing", {})


def test_the_demos_table(tree):
    row = {"network": "SSP-2", "parameters": 1234, "evaluations": 2}
    found = {
        "images": 100,
        "eps": 0.15,
        "standard_error": 0.05,
        "networks": [{**row, "clean": 0.5, "fgsm": 0.25, "pgd20": 0.125}],
        "batch": 8,
        "repeats": 7,
        "images_per_second": {"attack step": [30.0, 20.0]},
        "machine": dataclasses.asdict(hardware.machine(torch.device("cpu"))) | {"commit": "c0ffee"},
    }
    path = tree / "benchmarks" / "results" / "demo_cpu.json"
    assert section(tree, "demo") == "Not measured yet."
    path.write_text(json.dumps(found))
    text = " ".join(section(tree, "demo").split())
    assert "| SSP-2 | 1,234 | 2 | 50.0% | 25.0% | 12.5% |" in text
    assert "error of up to 5.0 points" in text and "attack step 30 against 20 (1.50x)" in text
    assert "commit c0ffee" in text
