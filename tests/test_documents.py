"""The documents: their links lead somewhere, and their figures are those that were measured."""

import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import survey
from evaluation.frechet import compare_distances
from evaluation.results import read_results
from evaluation.tables import markdown, summary
from tests.commands import refused
from tests.test_structure import ROOMS

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "docs", "docs/demo/vendor", "docs/mnist", "data/mnist", "pretrained")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
SOURCE = r"[A-Z][a-z]+(?: et al\.| (?:&|and) [A-Z][a-z]+) (?:19|20)\d\d"
SAMPLERS = {"DDPM (ancestral)": "ancestral", "DDIM": "ddim", "DPM-Solver++(2M)": "dpm_solver++"}


def headings(path):
    """The anchors of a document, made of its headings as GitHub makes them."""
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text())
    titles = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(path):
    """The targets of a document's links within the repository."""
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text())
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not link.startswith(("http://", "https://"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(document):
    for link in links(document):
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_links_were_found():
    assert {"docs/methods.md", "docs/race.gif"} <= set(links(ROOT / "README.md"))


def test_every_source_that_is_cited_is_listed_and_every_listed_one_is_cited():
    listed = re.findall(r"(?m)^\| ([A-Z].+? \d{4}) \|", (ROOT / "docs/references.md").read_text())
    assert listed == sorted(set(listed))
    code = [path for room in (*ROOMS, "benchmarks") for path in (ROOT / room).glob("*.py")]
    cited = set()
    for path in [*code, *(ROOT / "docs/demo").rglob("*.js"), *DOCUMENTS]:
        if path.name != "references.md":
            cited |= set(re.findall(SOURCE, " ".join(path.read_text().split())))
    assert cited == set(listed)


def measured(name, sampler, steps, count):
    """A row of docs/mnist/results.json."""
    wanted = (name, sampler, steps, count)
    rows = read_results(ROOT / "docs/mnist/results.json").rows
    (row,) = (r for r in rows if (r.name, r.sampler, r.steps, r.quality.count) == wanted)
    return row


def student(kind, steps, count):
    return measured(f"{kind}-{steps}-step{'s' if steps > 1 else ''}", "ddim", steps, count)


def shown(row):
    """Its distance, as tables show it."""
    return f"{row.quality.frechet:.3f} ± {row.quality.frechet_interval:.3f}"


def test_readme_and_results_show_what_was_measured():
    results = read_results(ROOT / "docs/mnist/results.json")
    assert summary(results) in (ROOT / "README.md").read_text()
    written = (ROOT / "docs/mnist/results.md").read_text()
    assert written.startswith(f"{summary(results)}\n\n{markdown(results)}\n")


def test_the_students_are_as_good_as_the_documents_say():
    """Their distances over the teacher's, in README and, with intervals, in students.md."""
    tables = {}
    for path, before in (("README.md", "10,000 images each"), ("docs/students.md", "## With 10,0")):
        text = (ROOT / path).read_text().partition(before)[2]
        tables[path] = re.findall(r"(?m)^\| ([8421]) \| (.+?) \|(.*)", text)[:4]
        assert len(tables[path]) == 4
    base = measured("mnist-teacher", "ddim", 64, 10_000).quality
    for short, full in zip(tables["README.md"], tables["docs/students.md"], strict=True):
        assert short[0] == full[0]
        of_readme, of_students = ([row[1], *row[2].split(" | ")] for row in (short, full))
        for kind, a, b in zip(("", "-tract", "-adversarial"), of_readme, of_students, strict=False):
            quality = student(f"mnist{kind}", int(full[0]), 10_000).quality
            distances = (quality.frechet, quality.without, base.frechet, base.without)
            ratio = compare_distances(*distances).ratio
            assert a.strip(" |") == f"{ratio.value:.2f}", (short, kind)
            assert b.strip(" |") == f"{ratio.value:.2f} ± {ratio.half:.2f}", (full, kind)


def test_the_model_card_shows_what_was_measured():
    text = (ROOT / "pretrained/README.md").read_text()
    count = int(re.findall(r"distances of ([\d,]+) samples", text)[0].replace(",", ""))
    rows = re.findall(r"(?m)^\| `(.+?)` \| (\d+) \|(.+)\|$", text.partition("| precision |")[2])
    stored = read_results(ROOT / "docs/mnist/results.json").rows
    assert {name for name, *_ in rows} == {row.name for row in stored if row.steps}
    for name, steps, values in rows:
        row = measured(name, "ddim", int(steps), count)
        near = "" if row.to_base is None else f"{row.to_base:.4f}"
        quality = (f"{row.quality.precision:.3f}", f"{row.quality.recall:.3f}", f"{row.faint:.3f}")
        assert [cell.strip() for cell in values.split("|")] == [shown(row), *quality, near], name


def test_the_table_of_methods_shows_what_was_measured():
    text = (ROOT / "docs/methods.md").read_text()
    table = text.partition("## Every method in one table")[2].partition("\n\n- ")[0]
    checked = 0
    for line in re.findall(r"(?m)^\| .*", table):
        method, steps, _, distance, recall = [cell.strip() for cell in line.split("|")[1:6]]
        if "n = " in method:
            count = int(re.findall(r"n = ([\d,]+)", method)[0].replace(",", ""))
        if "10 minutes" in method:
            count = 0  # those are of make methods
        if method == "real images":
            row = measured("real images", "", None, count)
        elif method in SAMPLERS:
            row = measured("mnist-teacher", SAMPLERS[method], int(steps), count)
        elif method == "teacher, DDIM":
            row = measured("mnist-teacher", "ddim", int(steps), count)
        elif method.startswith("`mnist"):
            row = student(re.findall("`(.+)`", method)[0], int(steps), count)
        else:
            continue
        assert (distance, recall) == (shown(row), f"{row.quality.recall:.3f}"), line
        checked += 1
    assert checked == 25


def test_the_picture_of_all_methods_shows_the_table(tmp_path):
    samplers, quick, published = survey.panels_of((ROOT / "docs/methods.md").read_text())
    assert samplers.curves["DDPM (ancestral)"] == [(1024, 0.088, 0.073), (128, 0.185, 0.093)]
    assert (samplers.floor, quick.floor, published.floor) == (0.149, None, 0.075)
    assert [steps for steps, *_ in quick.curves["k:1 in one stage"]] == [8, 4, 2, 1]
    assert "teacher, DDIM" in published.curves
    assert not any(
        "guided" in name for panel in (samplers, quick, published) for name in panel.curves
    )
    file = tmp_path / "survey.png"
    assert survey.main(["--table", str(ROOT / "docs/methods.md"), "--output", str(file)]) == 0
    with Image.open(file) as picture:
        assert picture.size == Image.open(ROOT / "docs/survey.png").size


def test_without_a_table_of_all_methods_there_is_no_picture(tmp_path, capsys):
    table = ("--table", ROOT / "README.md", "--output", tmp_path / "survey.png")
    assert "no table of methods" in refused(capsys, survey, *table)
