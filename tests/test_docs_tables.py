"""Tables of docs/ that repeat what the sources say: schemes, settings of data sets, methods, backends."""

from fractions import Fraction

import pages
import pytest

import ssp_fused
from ssp_fused import schemes
from ssp_fused.adversarial.defaults import data_defaults
from ssp_fused.adversarial.methods import METHODS
from ssp_fused.data import names

DOCS = pages.ROOT / "docs"


def test_schemes():
    (table,) = pages.tables(DOCS / "schemes.md")
    assert [row[0] for row in table] == list(schemes.names())
    for name, *numbers in table:
        scheme = schemes.get(name)
        expected = [scheme.stages, scheme.order, f"{scheme.ssp_coefficient:.3f}"]
        assert numbers[:3] == list(map(str, expected)), name


def test_settings_of_data_sets():
    table, _ = pages.tables(DOCS / "training.md")
    listed = [name for row in table for name in row[0].split(", ")]
    assert sorted(listed) == sorted((*names(), "folder:PATH"))
    for row in table:
        for name in row[0].split(", "):
            found = data_defaults(name)
            assert row[1] == f"{found.network}, {found.blocks}, {found.width}", name
            assert float(Fraction(row[2])) == pytest.approx(found.eps), name
            assert float(Fraction(row[3])) == pytest.approx(found.step_size), name
            assert row[4:] == [str(found.steps), found.augment], name


def test_methods():
    _, table = pages.tables(DOCS / "training.md")
    assert sorted(row[0] for row in table) == sorted(METHODS)


def test_backends():
    (table,) = pages.tables(DOCS / "backends.md")
    assert {row[0] for row in table} == set(ssp_fused.available_backends())


def test_kernels():
    """Every op has its row."""
    ops, _ = pages.tables(DOCS / "kernels.md")
    assert {op for row in ops for op in row[0].split(", ")} == set(ssp_fused._ops.SCHEMAS)
