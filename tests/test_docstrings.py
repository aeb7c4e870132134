"""Public names have docstrings, and these name every parameter."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import ssp_fused
from ssp_fused import adversarial, data, functional, models, nn, schemes

MODULES = (ssp_fused, adversarial, data, functional, models, nn, schemes)


def public() -> Iterator[tuple[str, Any]]:
    """Functions and classes that users may call, by their names."""
    for module in MODULES:
        for name in getattr(module, "__all__", ("ShuOsher", "get", "names")):
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                yield f"{module.__name__}.{name}", value


PUBLIC = dict(public())
SHORT = {name.rpartition(".")[2]: value for name, value in PUBLIC.items()}
every_name = pytest.mark.parametrize("name", PUBLIC)


_SECTION = re.compile(r"^(?:Args|Attributes):\n((?:(?: .*)?\n)*)", re.MULTILINE)


def arguments(value: Any) -> str:
    """The sections of arguments and attributes of its docstring, and of those of public names that it refers to.

    A docstring without such a section is short enough to name its parameters in a sentence.
    """
    own = inspect.getdoc(value) or ""
    referred = re.findall(r"`+~?(?:\w+\.)*(\w+)`+", own)
    others = [inspect.getdoc(SHORT[name]) or "" for name in referred if name in SHORT]
    sections = [found for text in (own, *others) for found in _SECTION.findall(f"{text}\n")]
    return "\n".join(sections if _SECTION.search(own) else [own, *sections])


@every_name
def test_every_parameter_is_named(name):
    value = PUBLIC[name]
    assert value.__doc__, name
    errors = inspect.isclass(value) and issubclass(value, BaseException)
    if errors or "Built by" in value.__doc__:
        return  # not constructed by users
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(value).parameters.values()
    text = arguments(value)
    for parameter in parameters:
        if parameter.kind not in variadic:
            assert re.search(rf"(?<![\w.]){parameter.name}(?!\w)", text), (
                f"{name}: {parameter.name}"
            )


@every_name
def test_every_error_is_named(name):
    """Where a function's own code raises, its docstring has a section that says what."""
    value = PUBLIC[name]
    if inspect.isfunction(value) and re.search(
        r"^\s+raise \w", inspect.getsource(value), re.MULTILINE
    ):
        assert "Raises:" in value.__doc__, name


@every_name
def test_methods(name):
    """Public methods and properties say what they do; `forward` is described by its class."""
    value = PUBLIC[name]
    if not inspect.isclass(value) or not value.__module__.startswith("ssp_fused"):
        return
    for attribute, member in vars(value).items():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if attribute.startswith("_") or not inspect.isfunction(function):
            continue
        if attribute not in ("forward", "extra_repr"):
            assert inspect.getdoc(getattr(value, attribute)), f"{name}.{attribute}"
