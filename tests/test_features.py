"""docs/features.md: each of our cells names tests that exist, and each row has a cell for everyone."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FEATURES = (TESTS.parent / "docs" / "features.md").read_text(encoding="utf-8")
TABLES = FEATURES.partition("## Sources")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*", TABLES, re.M)]
HEADS = [row for row in ROWS if row[0] == "" and row[1] == "this worker"]
FEATURE_ROWS = [row for row in ROWS if row not in HEADS and set("".join(row)) != {"-"}]
NAMED = re.compile(r"`(test_\w+\.py)::([\w:]+)`")


@cache
def defined_in(name: str) -> frozenset[str]:
    """`test_x` and `TestX::test_y` of a test file."""
    found = set()
    for node in ast.parse((TESTS / name).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
    return frozenset(name for name in found if name.split("::")[-1].startswith("test_"))


@pytest.mark.parametrize("row", FEATURE_ROWS, ids=lambda row: row[0])
def test_ours_names_tests_that_exist(row):
    ours = row[1]
    for file, test in NAMED.findall(ours):
        assert test in defined_in(file), f"{file} has no {test}"
    rest = [part.strip() for part in NAMED.sub("", ours).split(",")]
    assert not any(rest) or ours == "no", ours
    assert ours


def test_every_row_has_a_cell_for_everyone():
    assert len(HEADS) == 4
    assert len({tuple(head) for head in HEADS}) == 1
    assert {len(row) for row in FEATURE_ROWS} == {len(HEADS[0])}
    assert len(FEATURE_ROWS) > 40
