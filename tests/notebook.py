"""Runs docs/first_steps.ipynb and stores what it prints and draws: python -m tests.notebook."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from utils.files import write_text

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"


def executed(folder, *more):
    """The notebook after a run from top to bottom in a folder, with more code at its end.

    Raises CellExecutionError where a cell does.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in more]
    client = NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    return notebook


def main() -> int:
    """Runs the notebook and replaces the file."""
    notebook = executed(NOTEBOOK.parent)
    notebook.metadata = {
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/jpeg", None)  # the same picture as image/png
    write_text(NOTEBOOK, nbformat.writes(notebook) + "\n")
    print(f"{NOTEBOOK.relative_to(ROOT)}: {NOTEBOOK.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
