"""docs/environment.md has every environment variable that the sources read or set, and no other."""

import ast
import re
import subprocess
from collections.abc import Iterator

import pages

PAGE = pages.ROOT / "docs/environment.md"
NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*_?")
ENVIRONMENTS = {"environ", "env", "environment", "variables"}
READERS = {"get", "setdefault", "pop"}


def tracked(*patterns: str) -> list[str]:
    """Texts of the repository's files, but for this page and README."""
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=pages.ROOT, capture_output=True, text=True, check=True
    )
    paths = [pages.ROOT / name for name in listed.stdout.split()]
    return [path.read_text() for path in paths if path.is_file() and path not in pages.PAGES]


def is_environment(node: ast.expr | None) -> bool:
    """Whether an expression is the environment, or called so."""
    return getattr(node, "attr", getattr(node, "id", None)) in ENVIRONMENTS


def strings(tree: ast.AST) -> dict[str, set[str]]:
    """Names that stand for strings: constants, and variables of loops over tuples of strings."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, (ast.For, ast.comprehension)):
            pairs = [(node.target, element) for element in getattr(node.iter, "elts", [])]
        else:
            continue
        for target, value in pairs:
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                found.setdefault(target.id, set()).add(str(value.value))
    return found


def keys(tree: ast.AST) -> Iterator[ast.expr | str]:
    """What an environment is asked for, or told."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environment(node.value):
            yield node.slice
        elif isinstance(node, ast.Compare) and is_environment(node.comparators[0]):
            yield node.left
        elif isinstance(node, ast.Dict) and any(
            key is None and is_environment(value)
            for key, value in zip(node.keys, node.values, strict=True)
        ):
            yield from filter(None, node.keys)
        elif isinstance(node, ast.Call):
            reader = getattr(node.func, "attr", None) in READERS
            if reader and is_environment(node.func.value):
                yield node.args[0]
            # Variables of another process, by keyword.
            yield from (k.arg for k in node.keywords if k.arg and "_" in k.arg)


def variables() -> set[str]:
    """All of them."""
    trees = [ast.parse(text) for text in tracked("*.py")]
    known = [strings(tree) for tree in trees]
    found: set[str] = set()
    for tree, own in zip(trees, known, strict=True):
        for key in keys(tree):
            if isinstance(key, ast.Constant):
                found.add(str(key.value))
            elif isinstance(key, ast.Name) and key.id in own:
                found |= own[key.id]
            elif isinstance(key, (ast.Name, ast.Attribute)):  # a constant of another module
                name = key.id if isinstance(key, ast.Name) else key.attr
                found |= set().union(*(other.get(name, set()) for other in known))
            elif isinstance(key, str):
                found.add(key)
    for text in tracked("*.cpp", "*.h", "*.cu", "*.cuh"):
        found |= set(re.findall(r'getenv\("(\w+)"\)', text))
    makefile = (pages.ROOT / "Makefile").read_text()
    defined = set(re.findall(r"^(\w+) :?=", makefile, re.MULTILINE))
    found |= set(re.findall(r"\$\((\w+)\)", makefile)) - defined
    found |= set(re.findall(r"\b([A-Z_]+)=\S+ \$\(", makefile))
    return {name for name in found if NAME.fullmatch(name)}


def documented() -> set[str]:
    """The variables in the page's tables, and those named in its sentences."""
    return {span for span in pages.spans(PAGE) if NAME.fullmatch(span)}


def test_the_page_has_every_variable():
    found = variables()
    assert {"SSP_FUSED_BACKEND", "SSP_FUSED_CPU_ISA", "CUDA_PATH", "XDG_CACHE_HOME"} <= found
    assert not found - documented()


def test_every_variable_of_the_page_is_known_to_the_sources():
    sources = "\n".join(tracked("*.py", "*.cpp", "*.h", "*.cu", "*.cuh", "Makefile", "*.sh"))
    assert not {name for name in documented() if not re.search(rf"\b{name}\b", sources)}
