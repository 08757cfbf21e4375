"""The notebook runs, and its figures and its page are seen."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples/notebook.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_figures():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # they would go out of date
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            last = cell.source.splitlines()[-1].strip()
            found[last] = cell.outputs
    for last, outputs in found.items():
        if "figure(" in last or "draw_" in last or "plot_maps(" in last:
            assert outputs[-1].data["image/png"], last
    (page,) = found["page"]
    assert page.data["text/html"].startswith("<iframe") and "DecompressionStream" in str(page.data)
    printed = "".join(output.get("text", "") for output in found["%cd -q -"])
    assert printed.splitlines()[:2] == ["maps.png", "maps-movement.png"], printed
    assert printed.count("| blocks.") == 4, printed
    printed = "".join(output.text for output in found["plain = train(alpha=0.0, beta=0.0)"])
    scores = re.findall(r"([\d.]+)% of the digits are right", printed)
    assert len(scores) == 2 and all(float(score) > 40 for score in scores), printed
