"""docs/first_steps.ipynb runs from top to bottom, and what it says of its models is true."""

import json

import nbformat
import pytest

pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

from tests.notebook import NOTEBOOK, ROOT, executed

BOUND = 0.2  # of the one-step student's distance to the teacher's ends, in the plane
FIGURES = """
import json
torch.manual_seed(1)
untrained = Denoiser(Perceptron(), "v")
print(json.dumps({
    "mnist": mnist_distances,
    "toy": toy_distances,
    "untrained": {steps: distance(untrained, steps) for steps in students},
    "consistency": distance(consistency, 1),
    "formula": formula_error,
    "landing": landing_error,
    "on the ring": ((flat(end).norm(dim=1) - RADIUS).abs() < 4 * SPREAD).float().mean().item(),
}))
"""


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What the notebook has computed, run in a folder inside the clone."""
    with pytest.MonkeyPatch.context() as patch:  # nothing is written to the home folder
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        notebook = executed(ROOT / "data" / "mnist", FIGURES)
    (output,) = notebook.cells[-1].outputs
    return json.loads(output["text"])


def test_students_end_where_their_teacher_does(figures):
    toy, untrained = figures["toy"], figures["untrained"]
    assert list(toy) == ["8", "4", "2", "1"]
    for steps, (student, undistilled) in toy.items():
        assert student < untrained[steps] / 4
        assert student < undistilled / 2
    assert toy["1"][0] < BOUND < untrained["1"]
    assert figures["consistency"] < BOUND
    assert figures["on the ring"] > 0.9


def test_the_formula_is_the_papers(figures):
    assert figures["formula"] < 1e-4
    assert figures["landing"] < 1e-4


def test_published_students_draw_what_their_teacher_does(figures):
    distances = figures["mnist"]
    assert distances["teacher, 64 steps"] == 0
    for steps in ("4 steps", "1 step"):
        assert 0 < distances[f"student, {steps}"] < distances[f"teacher, {steps}"] / 2


def test_the_stored_notebook_has_been_run_and_is_small():
    text = NOTEBOOK.read_text()
    assert len(text) < 600_000
    assert str(ROOT) not in text
    cells = [cell for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
