"""The notebook of examples/: it has outputs, and runs again from the top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook" / "take_home.ipynb"


def printed(cells: list[dict[str, Any]]) -> str:
    """All that the code cells of a notebook print or show."""
    outputs = [out for cell in cells if cell["cell_type"] == "code" for out in cell["outputs"]]
    texts = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs]
    return "\n".join("".join(text) for text in texts)


def test_it_was_executed_and_nothing_failed() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell["outputs"] if o["output_type"] == "error"]
    assert "6 clients: 2 x tiny-a@bf16" in printed(cells)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs_again_from_the_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1000, resources=resources).execute()
    shown = printed(notebook.cells)
    assert "took " in shown
    assert shown.rstrip().endswith("True")
