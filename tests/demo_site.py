"""A web server for the page in docs/demo, and a browser to look at it with."""

import base64
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

DEMO = Path(__file__).parents[1] / "docs" / "demo"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


class Site:
    """Serves the page under any first folder, e.g. /plain/demo/.

    altered: (first folder, file) -> other content of it, or None for an error 404. asked: the paths
    of all requests.
    """

    def __init__(self):
        self.altered, self.asked = {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def page(self, name):
        return f"{self.address}/{name}/demo/index.html"


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, site, *arguments):
        self.site = site
        super().__init__(*arguments, directory=str(DEMO))

    def translate_path(self, path):
        self.site.asked.append(path)
        _, folder, *rest = path.partition("?")[0].strip("/").split("/")
        if folder != "demo":
            return "/nowhere"
        return str(DEMO.joinpath(*rest))

    def do_GET(self):
        first, _, name = self.path.partition("?")[0].strip("/").partition("/demo/")
        if (first, name) not in self.site.altered:
            super().do_GET()
            return
        content = self.site.altered[first, name]
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(name))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@contextmanager
def chromium(profile):
    """Yields a browser with this folder as its profile."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


DRAW = """
const [name, text, steps, condition, done] = arguments;
const noise = new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const begin = performance.now();
demo.draw(name, noise, steps, condition ?? undefined).then(
  (pixels) => done([Array.from(pixels), performance.now() - begin]),
  (error) => done(error.message),
);
"""


def draw(driver, name, noise, steps, condition=None):
    """Returns what the page draws from the noise (B, 1, H, W), uint8, and the milliseconds."""
    text = base64.b64encode(noise.numpy().astype("<f4").tobytes()).decode()
    answer = driver.execute_async_script(DRAW, name, text, steps, condition)
    assert isinstance(answer, list), answer
    return np.array(answer[0], dtype=np.uint8).reshape(noise.shape), answer[1]
