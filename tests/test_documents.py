"""The documents: their links lead somewhere, and their figures are those that were measured."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import survey
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
    """Distance, interval and recall in docs/mnist/results.json, as a table shows them."""
    rows = json.loads((ROOT / "docs/mnist/results.json").read_text())["rows"]
    wanted = (name, sampler, steps, count)
    (quality,) = (
        row["quality"]
        for row in rows
        if (row["name"], row["sampler"], row["steps"], row["quality"]["count"]) == wanted
    )
    distance, interval = quality["frechet"], quality["frechet_interval"]
    return f"{distance:.3f} ± {interval:.3f}", f"{quality['recall']:.3f}"


def test_the_table_of_methods_shows_what_was_measured():
    text = (ROOT / "docs/methods.md").read_text()
    table = text.partition("## Every method in one table")[2].partition("\n\n- ")[0]
    checked = 0
    for line in re.findall(r"(?m)^\| .*", table):
        method, steps, _, distance, recall = [cell.strip() for cell in line.split("|")[1:6]]
        if "n = " in method:
            count = int(re.findall(r"n = ([\d,]+)", method)[0].replace(",", ""))
        if "12 minutes" in method:
            count = 0  # those are of make methods
        if method == "real images":
            found = measured("real images", "", None, count)
        elif method in SAMPLERS:
            found = measured("mnist-teacher", SAMPLERS[method], int(steps), count)
        elif method == "teacher, DDIM":
            found = measured("mnist-teacher", "ddim", int(steps), count)
        elif method.startswith("`mnist"):
            kind = re.findall("`(.+)`", method)[0]
            name = f"{kind}-{steps}-step{'s' if steps != '1' else ''}"
            found = measured(name, "ddim", int(steps), count)
        else:
            continue
        assert (distance, recall) == found, line
        checked += 1
    assert checked == 25


def test_the_picture_of_all_methods_shows_the_table(tmp_path):
    samplers, quick, published = survey.panels_of((ROOT / "docs/methods.md").read_text())
    assert samplers.curves["DDPM (ancestral)"] == [(1024, 0.126, 0.247), (128, 0.185, 0.15)]
    assert (samplers.floor, quick.floor, published.floor) == (0.149, None, 0.077)
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
