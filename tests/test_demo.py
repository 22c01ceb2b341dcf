"""The page in docs/demo, in a browser: it draws what PyTorch draws, and every control works."""

import gzip
import hashlib
import json
import re
import tempfile
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.gaussian import clipped, conditioned
from diffusion.samplers import ddim
from pipeline.build import load_denoiser
from pipeline.checkpoint import load_checkpoint
from pipeline.codec import decode
from tests.demo_site import CHROMIUM, DEMO, DRIVER, Site, chromium, draw

pytest.importorskip("selenium", reason="drives the browser: pip install selenium")

from selenium.webdriver import ActionChains, Keys

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no chromium and chromedriver: make test-demo installs them",
)
ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "output" / "demo-screenshots"
CPU = torch.device("cpu")
MANIFEST = json.loads((DEMO / "models" / "manifest.json").read_text())
PRETRAINED = {
    "teacher": "mnist-teacher",
    "student-8": "mnist-adversarial-8-steps",
    "student-4": "mnist-adversarial-4-steps",
    "student-2": "mnist-adversarial-2-steps",
    "student-1": "mnist-adversarial-1-step",
}
GUIDED = "mnist-by-class-8-steps"
CODE = sorted(p for suffix in ("js", "html", "css") for p in DEMO.rglob(f"*.{suffix}"))
CODE = [path for path in CODE if path.parent.name != "vendor"]


def expected(path, steps, noise, **condition):
    """What PyTorch draws from the noise."""
    checkpoint = load_checkpoint(path)
    denoise = conditioned(load_denoiser(checkpoint, path, CPU), **condition)
    denoise = clipped(denoise) if checkpoint.config.sampling.clip else denoise
    return decode(ddim(denoise, noise, checkpoint.levels(steps))).numpy()


def share_alike(a, b):
    return (np.abs(a.astype(int) - b.astype(int)) <= 1).mean()


# --- the files, without a browser -----------------------------------------------------------------


def test_the_page_is_small_and_its_code_is_short():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 25e6
    for path in CODE:
        lines = path.read_text().splitlines()
        assert len(lines) <= 300, path
        assert max(map(len, lines)) <= 100, path


def test_the_page_asks_for_nothing_outside_its_folder():
    for path in CODE:
        text = path.read_text()
        assert not re.findall(r"https?://|\b(?:src|href)=\"/|url\(/|import\(", text), path
        for name in re.findall(r"(?:from|src=|href=|URL\()\s*\"([^\"#:]+)\"", text):
            base = DEMO / "models" if name == "manifest.json" else path.parent
            assert (base / name).exists(), f"{path}: {name}"


def test_the_runtime_is_the_one_that_its_digest_says():
    text = (DEMO / "runtime-file.js").read_text()
    stated = dict(re.findall(r"(\w+): \"?([\w.-]+)\"?,", text))
    packed = (DEMO / "vendor" / stated["packed"]).read_bytes()
    assert len(packed) == int(stated["packedBytes"])
    binary = gzip.decompress(packed)
    assert len(binary) == int(stated["bytes"])
    assert hashlib.sha256(binary).hexdigest() == stated["sha256"]
    assert "MIT License" in (DEMO / "vendor" / "LICENSE").read_text()


def test_the_models_are_the_published_ones():
    assert [model["name"] for model in MANIFEST["models"]] == list(PRETRAINED)
    for model in (*MANIFEST["models"], MANIFEST["guided"]):
        name = PRETRAINED.get(model["name"], GUIDED)
        checkpoint = load_checkpoint(ROOT / f"pretrained/{name}.safetensors")
        assert model["levels"] == checkpoint.levels(model["steps"]).tolist()[:-1]
        content = gzip.decompress((DEMO / "models" / model["weights"]["packed"]).read_bytes())
        assert hashlib.sha256(content).hexdigest() == model["weights"]["sha256"]
        stored = np.sort(np.frombuffer(content, "<f2").astype(np.float32))
        flat = torch.cat([t.flatten() for t in checkpoint.weights.values()])
        assert np.array_equal(stored, np.sort(flat.numpy()))


# --- in the browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site():
    return Site()


@pytest.fixture(scope="module")
def browser():
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, chromium(profile) as driver:
        yield driver


def until(driver, script, seconds=60):
    """Waits until the script returns something true, and returns that."""
    end = time.monotonic() + seconds
    while not (answer := driver.execute_script(f"return ({script})")):
        assert time.monotonic() < end, f"not in {seconds} seconds: {script}"
        time.sleep(0.02)
    return answer


def pixels_of(driver, selector):
    """The grey values of a canvas; none while it does not exist."""
    script = """
        const c = document.querySelector(arguments[0]);
        if (!c) return [0, 0, []];
        const copy = new OffscreenCanvas(c.width, c.height).getContext(
          "2d", { willReadFrequently: true });  // else Chromium notes that reading is slow
        copy.drawImage(c, 0, 0);
        const { data } = copy.getImageData(0, 0, c.width, c.height);
        return [c.height, c.width, Array.from(data).filter((_, i) => i % 4 === 0)]"""
    height, width, values = driver.execute_script(script, selector)
    return np.array(values, dtype=np.uint8).reshape(height, width)


def text_of(driver, selector):
    return driver.execute_script(
        "return document.querySelector(arguments[0]).textContent", selector
    )


def changes(driver, selector, act, seconds=60):
    """Acts, and returns the canvas's new grey values once they differ from the old ones."""
    before = pixels_of(driver, selector)
    act()
    end = time.monotonic() + seconds
    while not (after := pixels_of(driver, selector)).size or np.array_equal(after, before):
        assert time.monotonic() < end, f"{selector} does not change"
        time.sleep(0.05)
    return after


def find(driver, selector):
    element = driver.find_element("css selector", selector)
    driver.execute_script("arguments[0].scrollIntoView({ block: 'center' })", element)
    return element


def press(driver, element, *keys):
    driver.execute_script("arguments[0].focus()", element)
    ActionChains(driver).send_keys(*keys).perform()


COMPARED = """[...document.querySelectorAll("#compare figcaption span")]
    .every((e) => e.textContent.endsWith(" ms"))"""


LISTEN = """
window.said = [];
new MutationObserver(() => {
  const text = document.getElementById("status")?.textContent;
  if (text && said.at(-1) !== text) said.push(text);
}).observe(document, { childList: true, subtree: true, characterData: true });
"""


@contextmanager
def before_loading(driver, source):
    """Runs a script before those of the pages that are opened in the block."""
    command = "Page.addScriptToEvaluateOnNewDocument"
    added = driver.execute_cdp_cmd(command, {"source": source})
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


@pytest.fixture(scope="module")
def first_picture(browser, site):
    """Opens the page. Seconds until a digit of one step was there."""
    browser.set_window_size(1280, 900)
    begin = time.monotonic()
    with before_loading(browser, LISTEN):
        browser.get(site.page("plain"))
    canvas = """document.querySelector('canvas[data-model="student-1"]')"""
    until(browser, f"{canvas} && {canvas}.width > 1")
    return time.monotonic() - begin


@pytest.fixture(scope="module")
def page(browser, site, first_picture):
    """The page, loaded, with all models compared."""
    browser.execute_async_script("demo.loaded.then(arguments[0])")
    until(browser, COMPARED)
    return browser


@pytest.fixture(autouse=True)
def _quiet(request):
    """No test of the whole page leaves anything on the console: error, warning or note."""
    yield
    if "page" in request.fixturenames:
        assert request.getfixturevalue("page").get_log("browser") == []


@needs_browser
def test_the_first_picture_comes_soon(first_picture, page, site):
    print(f"\nfirst picture after {first_picture:.1f} s")
    assert first_picture < 30, "3 s on an idle machine"
    asked = [path for path in site.asked if path.startswith("/plain/") and ".bin" in path]
    order = [re.findall(r"([\w-]+)\.bin", path)[0] for path in asked]
    assert order == [*list(PRETRAINED)[::-1], "guided"], "what the first picture needs comes first"
    assert text_of(page, "#error") == ""
    assert "All models are loaded" in text_of(page, "#status")
    said = page.execute_script("return said")
    counts = [re.fullmatch(r"Loading: ([\d.]+) of ([\d.]+) MB", text) for text in said]
    loaded = [float(match[1]) for match in counts if match]
    total = sum(p.stat().st_size for p in (DEMO / "models").iterdir()) + len(WASM)
    assert len(loaded) > 10
    assert loaded == sorted(loaded)
    assert loaded[-1] == pytest.approx(total / 1e6, abs=0.1)
    assert not page.find_element("id", "loading").is_displayed()


@needs_browser
@pytest.mark.parametrize(
    ("name", "count"),
    [
        *((f"student-{n}", 16) for n in (8, 4, 2, 1)),
        pytest.param("teacher", 16, marks=pytest.mark.slow),
    ],
)
def test_the_page_draws_what_pytorch_draws(page, name, count):
    steps = next(model["steps"] for model in MANIFEST["models"] if model["name"] == name)
    noise = torch.randn(count, 1, 32, 32)
    made, _ = draw(page, name, noise, steps)
    wanted = expected(ROOT / f"pretrained/{PRETRAINED[name]}.safetensors", steps, noise)
    assert share_alike(made, wanted) >= 0.999
    assert share_alike(made[::-1], wanted) < 0.9, "the test can fail"


@needs_browser
def test_digits_in_one_step_a_second(page):
    noise = torch.randn(64, 1, 32, 32)
    rates = [64e3 / draw(page, "student-1", noise, 1)[1] for _ in range(3)]
    print(f"\nin one step, 64 at a time: {max(rates):.0f} digits a second")
    assert max(rates) > 10, "60 and more on an idle machine"


@needs_browser
def test_the_hook_refuses_what_it_cannot_draw(page):
    for name, steps, reason in (("student-3", 3, "no model"), ("student-4", 8, "in 4 steps")):
        with pytest.raises(AssertionError, match=reason):
            draw(page, name, torch.zeros(1, 1, 32, 32), steps)


@needs_browser
def test_noise_is_normal_and_arcs_keep_its_length(page):
    script = """
        const done = arguments[0];
        import("./noise.js").then(({ normals, slerp }) => {
          const [a, b] = [normals(1, 20000), normals(2, 20000)];
          const ways = [0, 0.5, 1].map((t) => Array.from(slerp(a, b, t)));
          done([Array.from(a), Array.from(b), ...ways, Array.from(normals(1, 20000))]);
        });"""
    a, b, start, middle, end, again = map(np.array, page.execute_async_script(script))
    assert np.array_equal(a, again)
    for noise in (a, b, middle):
        assert abs(noise.mean()) < 0.03
        assert abs(noise.std() - 1) < 0.02
        assert abs(np.mean(np.abs(noise) < 1) - 0.6827) < 0.015
        assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.03
    assert np.allclose(start, a, atol=1e-5)
    assert np.allclose(end, b, atol=1e-5)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


@needs_browser
def test_new_noise_draws_every_model_anew_from_the_same_noise(page):
    names = list(PRETRAINED)
    before = {n: pixels_of(page, f'canvas[data-model="{n}"]') for n in names}
    find(page, "#compare button").click()
    until(page, f"!({COMPARED})")
    # The page goes on while the teacher computes.
    script = """
        const [done, seen] = [arguments[0], { frames: 0, longest: 0 }];
        const begin = performance.now();
        let before = begin;
        requestAnimationFrame(function frame(now) {
          seen.frames++;
          seen.longest = Math.max(seen.longest, now - before);
          before = now;
          if (now - begin < 1500) requestAnimationFrame(frame);
          else done(seen);
        });"""
    seen = page.execute_async_script(script)
    assert seen["frames"] >= 5
    assert seen["longest"] < 1000
    until(page, COMPARED)
    after = {n: pixels_of(page, f'canvas[data-model="{n}"]') for n in names}
    assert all(not np.array_equal(before[n], after[n]) for n in names)
    teacher, student = (after[n].astype(float).ravel() for n in ("teacher", "student-8"))
    other = before["student-8"].astype(float).ravel()
    assert np.corrcoef(teacher, student)[0, 1] > 0.7, "the same digits"
    assert np.corrcoef(teacher, other)[0, 1] < 0.6, "others than before"


@needs_browser
def test_the_slider_of_steps_by_keyboard(page):
    slider = find(page, "#steps-slider")
    pictures = [pixels_of(page, "#steps canvas")]
    for steps in (2, 4, 8, 64):
        press(page, slider, Keys.ARROW_RIGHT)
        assert slider.get_attribute("aria-valuetext") == f"{steps} steps"
        wanted = f"{steps} steps: "
        script = f"""(t => t.includes({wanted!r}) && t.endsWith(" ms"))
            (document.querySelector("#steps output").textContent)"""
        until(page, script)
        pictures.append(pixels_of(page, "#steps canvas"))
    for one, two in pairwise(pictures):
        assert not np.array_equal(one, two)
        assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.6, "the same digits"
    again = changes(page, "#steps canvas", lambda: press(page, slider, Keys.HOME))
    assert np.array_equal(again, pictures[0]), "the seed is fixed"


@needs_browser
def test_the_walk_starts_and_stops(page):
    button = find(page, "#walk button")
    for key in (Keys.ENTER, Keys.SPACE):
        pictures = [changes(page, "#walk canvas", lambda key=key: press(page, button, key))]
        assert button.text == "Stop"
        for _ in range(3):
            pictures.append(changes(page, "#walk canvas", lambda: None))
        near = np.corrcoef(pictures[0].ravel(), pictures[1].ravel())[0, 1]
        assert near > 0.5, "neighbouring noises give similar digits"
        time.sleep(1)
        rate = int(text_of(page, "#walk output").split()[0])
        assert rate > 5
        button.click()
        assert button.text == "Start"
        time.sleep(0.5)  # the two that were asked for
        still = pixels_of(page, "#walk canvas")
        time.sleep(0.3)
        assert np.array_equal(pixels_of(page, "#walk canvas"), still)
    print(f"\nthe walk: {rate} digits a second")


@needs_browser
def test_step_by_step_shows_every_step_of_the_chosen_model(page):
    items = """document.querySelectorAll("#trajectory li")"""
    until(page, f"{items}.length === 8")
    first = "#trajectory li:first-child .noisy"
    last = "#trajectory li:last-child .clean"
    assert pixels_of(page, first).std() > 80, "noise"
    changes(page, first, lambda: find(page, "#trajectory button").click())
    until(page, f"{items}.length === 8")
    select = find(page, "#trajectory select")
    heads = {}
    for name, count in (("student-2", 2), ("student-1", 1), ("teacher", 9), ("student-4", 4)):
        script = (
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
        )
        page.execute_script(script, select, name)
        until(page, f"{items}.length === {count}")
        assert pixels_of(page, last).max() > 150
        heads[name] = page.execute_script(
            f"return [...{items}].map((e) => e.querySelector('.quiet').textContent)"
        )
    assert {of_model[0] for of_model in heads.values()} == {"logsnr \u221220.0"}
    assert heads["teacher"][4] == "logsnr 0.0", "neither -0.0"
    press(page, select, Keys.ARROW_UP)
    until(page, f"{items}.length === 8")


@needs_browser
def test_a_stroke_with_the_mouse_is_finished_by_the_student(page):
    pen, clean = find(page, "#stroke .pen"), "#stroke .clean"
    example = pixels_of(page, "#stroke .pen")
    assert 0.02 < (example > 127).mean() < 0.3
    changes(page, clean, lambda: find(page, "#stroke .clear").click())
    assert pixels_of(page, "#stroke .pen").max() == 0
    find(page, "#stroke .pen")

    def one():
        chain = ActionChains(page).move_to_element_with_offset(pen, 5, -60).click_and_hold()
        chain.move_by_offset(0, 60).move_by_offset(0, 60).release().perform()

    drawn = changes(page, clean, one)
    ink = pixels_of(page, "#stroke .pen") > 127
    assert 0.01 < ink.mean() < 0.2
    rows = np.flatnonzero(ink.any(axis=1))
    assert rows.max() - rows.min() > 120, "a long line"
    # With little noise the student keeps to the drawing; with much it does not.
    slider = find(page, "#stroke-level")
    kept = changes(page, clean, lambda: press(page, slider, Keys.END))
    small = ink.reshape(32, 10, 32, 10).mean(axis=(1, 3)).ravel()
    assert "1 step to go" in text_of(page, "#stroke output")
    lost = changes(page, clean, lambda: press(page, slider, Keys.HOME))
    assert "0.00 \u00d7 drawing" in text_of(page, "#stroke output")
    assert "8 steps to go" in text_of(page, "#stroke output")
    assert np.corrcoef(kept.ravel(), small)[0, 1] > 0.9
    assert np.corrcoef(lost.ravel(), small)[0, 1] < np.corrcoef(drawn.ravel(), small)[0, 1] + 0.3
    changes(page, clean, lambda: find(page, "#stroke .renew").click())
    changes(page, "#stroke .pen", lambda: find(page, "#stroke .example").click())
    assert np.array_equal(pixels_of(page, "#stroke .pen"), example)


@needs_browser
def test_a_stroke_with_keys_and_with_a_finger(page):
    find(page, "#stroke .clear").click()
    pen = find(page, "#stroke .pen")
    press(page, pen, *[Keys.ARROW_UP] * 8)
    blank = (pixels_of(page, "#stroke .pen") > 200).mean()
    assert blank < 0.01, "a lifted pen leaves no ink"
    press(page, pen, Keys.SPACE, *[Keys.ARROW_DOWN] * 12, Keys.SPACE, *[Keys.ARROW_LEFT] * 8)
    page.execute_script("arguments[0].blur()", pen)
    by_keys = pixels_of(page, "#stroke .pen")
    assert set(np.unique(by_keys[:, :120])) == {0}, "and none on its way"
    assert (by_keys > 200).mean() > 0.02
    find(page, "#stroke .clear").click()
    press(page, pen, *[Keys.ARROW_UP] * 32, Keys.SPACE)  # from the edge, wherever it was
    held = "{key: ' ', repeat: true, cancelable: true}"
    back = "{key: 'ArrowLeft', altKey: true, cancelable: true}"
    for event, taken in ((held, True), (back, False)):
        script = f"return arguments[0].dispatchEvent(new KeyboardEvent('keydown', {event}))"
        assert page.execute_script(script, pen) != taken
    press(page, pen, *[Keys.ARROW_DOWN] * 12)
    page.execute_script("arguments[0].blur()", pen)
    by_keys = pixels_of(page, "#stroke .pen")
    assert (by_keys > 200).mean() > 0.02, "a held key lifts no pen"
    x, y = page.execute_script(
        "const b = arguments[0].getBoundingClientRect(); return [b.x, b.y]", pen
    )
    finger = [
        {"x": x + 20, "y": y + 20},
        {"x": x + 60, "y": y + 40},
        {"x": x + 100, "y": y + 20},
    ]
    scrolled = page.execute_script("return scrollY")
    for kind, points in (
        ("touchStart", finger[:1]),
        ("touchMove", finger[1:2]),
        ("touchMove", finger[2:]),
        ("touchEnd", []),
    ):
        event = {"type": kind, "touchPoints": points}
        page.execute_cdp_cmd("Input.dispatchTouchEvent", event)
    by_finger = pixels_of(page, "#stroke .pen")
    assert (by_finger > 200).sum() > (by_keys > 200).sum() + 500
    assert page.execute_script("return scrollY") == scrolled


@needs_browser
def test_every_control_has_a_name_and_is_reached_by_the_tab_key(page):
    script = """
        const shown = (e) => e.checkVisibility();
        const all = [...document.querySelectorAll("button, input, select, canvas[tabindex]")];
        return all.filter(shown).map((e) => [e, e.labels?.length ? e.labels[0].textContent
          : e.getAttribute("aria-label") ?? e.textContent])"""
    controls = page.execute_script(script)
    assert len(controls) == 12
    assert all(name.strip() for _, name in controls)
    pictures = page.find_elements("css selector", "main section:not([hidden]) canvas")
    assert all(p.get_attribute("aria-label") for p in pictures)
    page.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    reached = []
    for _ in range(20):
        ActionChains(page).send_keys(Keys.TAB).perform()
        reached.append(page.switch_to.active_element.id)
    assert {element.id for element, _ in controls} <= set(reached)
    page.execute_script("document.activeElement.blur()")


@needs_browser
def test_ten_digits_by_the_guided_student(page):
    assert page.find_element("id", "guided").is_displayed()
    until(page, "document.querySelector('#guided .time').textContent.endsWith(' ms')")
    noise = torch.randn(20, 1, 32, 32)
    label, weight = torch.arange(20) % 11 - 1, torch.linspace(0, 4, 20)
    condition = {"label": label.tolist(), "guidance": weight.tolist()}
    steps = MANIFEST["guided"]["steps"]
    made, _ = draw(page, "guided", noise, steps, condition)
    file = ROOT / f"pretrained/{GUIDED}.safetensors"
    wanted = expected(file, steps, noise, label=label, guidance=weight)
    assert share_alike(made, wanted) >= 0.999
    other, _ = draw(page, "guided", noise, steps, {**condition, "label": [0] * 20})
    assert share_alike(other, wanted) < 0.999, "the label counts"
    picture = "#guided canvas"
    assert pixels_of(page, picture).shape == (64, 160)
    slider = find(page, "#guided-weight")
    changes(page, picture, lambda: press(page, slider, Keys.END))
    assert text_of(page, "#guided output") == "4.0"
    changes(page, picture, lambda: find(page, "#guided button").click())
    assert page.find_element("id", "guided").screenshot(str(SCREENSHOTS / "guided.png"))


@needs_browser
def test_nothing_is_asked_of_another_place(page, site):
    script = "return performance.getEntriesByType('resource').map((e) => e.name)"
    names = page.execute_script(script)
    assert names
    assert all(name.startswith(f"{site.address}/plain/demo/") for name in names)
    assert all(path.split("/")[2] == "demo" for path in site.asked)


SHOTS = [(w, s) for w in (1280, 360) for s in ("light", "dark")]


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), SHOTS)
def test_wide_and_narrow_dark_and_light(page, width, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        size = (
            "return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        )
        across, height = page.execute_script(size)
        assert across <= width, "nothing is wider than the screen"
        colour = "return getComputedStyle(document.body).backgroundColor"
        ground = [int(n) for n in re.findall(r"\d+", page.execute_script(colour))[:3]]
        assert (sum(ground) > 600) == (scheme == "light")
        metrics["height"] = height
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert page.save_screenshot(str(SCREENSHOTS / f"{width}-{scheme}.png"))
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# --- other copies of the page; they come last, as they leave the one above ------------------------


PACKED = (DEMO / "models" / "student-4.bin.gz").read_bytes()
WEIGHTS = gzip.decompress(PACKED)
FOUR = "models/student-4.bin.gz"
WASM = (DEMO / "vendor" / "ort-wasm-simd-threaded.wasm.gz").read_bytes()
DAMAGES = {
    "truncated": (FOUR, PACKED[:-1000], "student-4.bin.gz is damaged: it cannot be unpacked"),
    "short": (FOUR, gzip.compress(WEIGHTS[:-1000]), "student-4.bin is damaged: it has 3,488,224"),
    "altered": (FOUR, gzip.compress(WEIGHTS[:-1] + b"\0"), "student-4.bin is damaged: its content"),
    "unpacked": (FOUR, WEIGHTS[:-1] + b"\0", "damaged: its content"),
    "missing": (FOUR, None, "student-4.bin.gz could not be loaded: the server says"),
    "graph": ("models/graph.onnx", b"no graph", "graph.onnx is damaged: it has 8 bytes"),
    "manifest": ("models/manifest.json", b'{"format": ', "manifest.json is damaged: it is not"),
    "foreign": ("models/manifest.json", b"{}", "manifest.json is not one that this page reads"),
    "runtime": ("vendor/ort-wasm-simd-threaded.wasm.gz", WASM[:9999], "wasm.gz is damaged"),
}


@needs_browser
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named_in_a_sentence(browser, site, name):
    file, content, sentence = DAMAGES[name]
    site.altered[name, file] = content
    browser.get(site.page(name))
    until(browser, "!document.getElementById('error').hidden")
    said = text_of(browser, "#error")
    assert sentence in said
    assert said.endswith(".")
    assert browser.find_element("id", "error").is_displayed()
    if file == FOUR:  # the other models draw all the same
        browser.execute_async_script("demo.loaded.then(arguments[0])")
        made, _ = draw(browser, "student-1", torch.randn(1, 1, 32, 32), 1)
        assert made.max() > 100
        assert text_of(browser, "#status") == "Some models are not available."
    browser.get_log("browser")  # the browser's own note on a missing file


@needs_browser
def test_without_webassembly_the_page_says_so(browser, site):
    with before_loading(browser, "delete globalThis.WebAssembly"):
        browser.get(site.page("without"))
    until(browser, "!document.getElementById('error').hidden")
    assert "does not run WebAssembly" in text_of(browser, "#error")
    assert browser.get_log("browser") == []


@needs_browser
def test_a_missing_module_is_told_of(browser, site):
    site.altered["modules", "noise.js"] = None
    browser.get(site.page("modules"))
    until(browser, "document.getElementById('status').textContent.startsWith('A part of this')")
    browser.get_log("browser")


@needs_browser
def test_a_broken_worker_leaves_nothing_waiting(browser, site):
    site.altered["worker", "worker.js"] = b"throw new Error('broken');"
    browser.get(site.page("worker"))
    until(browser, "!document.getElementById('error').hidden")
    assert "worker has failed" in text_of(browser, "#error")
    browser.execute_async_script("demo.loaded.then(arguments[0])")
    assert text_of(browser, "#status") == "Some models are not available."
    assert "waiting" not in text_of(browser, "#compare")
    for output in ("#walk output", "#steps output", "#guided .time", "#trajectory .strip"):
        assert "not available" in text_of(browser, output)
    browser.get_log("browser")


@needs_browser
def test_a_second_finger_draws_nothing(browser, site):
    browser.get(site.page("plain"))
    until(browser, "window.demo")
    script = """
        const pen = document.querySelector('#stroke .pen');
        document.querySelector('#stroke .clear').click();
        const box = pen.getBoundingClientRect();
        const send = (kind, id, x) => pen.dispatchEvent(new PointerEvent(kind, {
            pointerId: id, isPrimary: id === 1, button: 0, pointerType: 'touch',
            clientX: box.left + x * box.width, clientY: box.top + box.height / 2 }));
        pen.setPointerCapture = () => {};
        const ink = () => {
            const { data } = pen.getContext('2d').getImageData(0, 0, pen.width, pen.height);
            return data.reduce((sum, value, i) => sum + (i % 4 ? 0 : value), 0);
        };
        send('pointerdown', 1, 0.2);
        const dot = ink();
        send('pointerdown', 2, 0.8);
        send('pointermove', 2, 0.9);
        const after = ink();
        send('pointerup', 2, 0.9);
        send('pointermove', 1, 0.4);
        return [dot, after, ink()];
    """
    dot, after, line = browser.execute_script(script)
    assert dot == after > 0
    assert line > after, "the first one is still down"
