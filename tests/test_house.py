"""A line of code is found in a minute: modules and functions stay short."""

from __future__ import annotations

import ast
from pathlib import Path

import heterotune_flwr

ROOT = Path(heterotune_flwr.__file__).parent
MODULE, FUNCTION = 350, 60
#: Modules that are longer, and how long at most; they may shrink, and no other may join them.
LONGER = {"schema.py": 550, "tuning/adapters.py": 390}


def test_modules_are_short():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for path in ROOT.rglob("*.py")
    }
    assert not {name: n for name, n in lengths.items() if n > LONGER.get(name, MODULE)}
    assert not [name for name in LONGER if lengths.get(name, 0) <= MODULE], "take it off the list"


def test_functions_are_short():
    """Without signature and docstring."""
    long = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[ast.get_docstring(node) is not None :]
                lines = node.body[-1].end_lineno - first[0].lineno + 1 if first else 0
                if lines > FUNCTION:
                    long[f"{path.relative_to(ROOT).as_posix()}:{node.name}"] = lines
    assert not long
