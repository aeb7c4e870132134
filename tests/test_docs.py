"""README and docs/: the code runs, command lines parse, links and names lead somewhere."""

import contextlib
import importlib.util
import pkgutil
import re
import shlex
from pathlib import Path

import pages
import pytest
from torch.distributed import run as torchrun

import ssp_fused
from ssp_fused import _arguments
from ssp_fused.adversarial import TrainConfig, named_attacks

NO_RUN = "python no-run"
every_page = pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)


@pytest.mark.skipif(
    ssp_fused.available_backends()["cpu"] is not None,
    reason=f"cpu backend: {ssp_fused.available_backends()['cpu']}",
)
@every_page
def test_code(page, tmp_path, monkeypatch):
    """From top to bottom, in one namespace; what is marked is compiled only, and says why."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for info, line, text in pages.code(page):
        assert info in ("python", NO_RUN), f"{page.name}:{line}: ```{info}"
        compiled = compile("\n" * (line - 1) + text, str(page), "exec")
        if info == NO_RUN:
            assert text.startswith("# Not run by the tests: "), f"{page.name}:{line}"
        else:
            exec(compiled, names)


def test_there_is_code():
    blocks = [block for page in pages.PAGES for block in pages.code(page)]
    assert len(blocks) > 20
    assert sum(info == NO_RUN for info, _, _ in blocks) < 3


@every_page
def test_commands(page):
    for command in pages.commands(page):
        try:
            check_command(shlex.split(command))
        except (AssertionError, ValueError, SystemExit) as error:
            pytest.fail(f"{page.name}: {command}: {error}")


def check_command(words):
    """Raise where the command line is none of this repository's, or its arguments are not right."""
    if words[0] == "torchrun":
        options = torchrun.get_args_parser().parse_args(words[1:])
        assert options.module and options.training_script == "ssp_fused.cli", options
        check_arguments(options.training_script_args)
    elif words[0] == "make":
        makefile = (pages.ROOT / "Makefile").read_text()
        targets = [word for word in words[1:] if "=" not in word]
        variables = [word.split("=")[0] for word in words[1:] if "=" in word]
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), targets
        assert all(f"$({name})" in makefile for name in variables), variables
    elif words[0] == "python":
        check_module(words[1:])
    else:
        check_arguments(words[1:])


def check_module(words):
    """`python -m MODULE --option ...`: the module exists, and knows the options of this repository's."""
    if words[:1] != ["-m"]:
        assert words == ["train.py"], "a program of the reader's"
        return
    spec = importlib.util.find_spec(words[1])
    assert spec is not None, f"there is no module {words[1]}"
    if words[1].startswith("benchmarks"):
        own = Path(spec.origin)
        files = own.parent.glob("*.py") if own.name == "__init__.py" else [own]
        shared = pages.ROOT / "benchmarks/arguments.py"
        known = "".join(file.read_text() for file in (*files, shared))
        for option in (word for word in words[2:] if word.startswith("--")):
            assert f'"{option}"' in known, f"{words[1]} has no {option}"


def check_arguments(words):
    """Those of `ssp-fused`, by its own parser; where nothing but a command is named, that it is one."""
    if len(words) < 2:
        with contextlib.redirect_stdout(None), pytest.raises(SystemExit) as end:
            _arguments.make_parser().parse_args([*words, "--help"])
        assert end.value.code == 0
        return
    given = vars(_arguments.make_parser().parse_args(words))
    command = given.pop("command")
    if command == "train" and "resume" not in given:
        for elsewhere in ("device", "graph"):
            given.pop(elsewhere, None)
        TrainConfig(**given).resolved()
    if "attack" in given:
        attacks = given["attack"] if command == "evaluate" else [given["attack"]]
        with contextlib.suppress(ImportError):  # of a library that is not installed
            named_attacks(attacks, eps=0.1, step_size=0.1)


@pytest.mark.parametrize(
    "command",
    [
        "ssp-fused tarin",
        "ssp-fused train --metod pgd",
        "ssp-fused train --method pdg",
        "ssp-fused train --model ssp9 --epochs 1",
        "ssp-fused evaluate runs/x --attack pgd-0",
        "torchrun --nproc-per-node 2 -m ssp_fused.cli train --modle x",
        "torchrun --nproc-per-node 2 -m ssp_fused.main train --model ssp2",
        "make everything",
        "make demo NOTHING=1",
        "python -m benchmarks.nothing",
        "python -m benchmarks.blocks --quik",
    ],
)
def test_wrong_commands_are_seen(command):
    with pytest.raises((AssertionError, ValueError)):
        check_command(shlex.split(command))


@every_page
def test_links(page):
    for link in pages.links(page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in pages.anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_index():
    index = pages.ROOT / "docs/index.md"
    listed = {(index.parent / link).resolve() for link in pages.links(index)}
    assert set(pages.PAGES) - {index} <= listed


@every_page
def test_names(page):
    """Files and modules of this repository that sentences name."""
    folders = {path.name for path in pages.ROOT.iterdir() if path.is_dir()}
    for span in pages.spans(page):
        if "/" in span and span.split("/")[0] in folders - {"runs", "build"} and " " not in span:
            assert list(pages.ROOT.glob(span)), f"{page.name}: there is no {span}"
        if re.fullmatch(r"(ssp_fused|benchmarks)(\.\w+)+", span):
            assert resolves(span), f"{page.name}: there is no {span}"


def resolves(name):
    """Whether a dotted name leads to a module or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True
