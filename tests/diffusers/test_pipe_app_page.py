"""The page itself: served, asked through its API, as a script, and in a browser.

`make app-test` brings gradio and runs it; skipped aloud where gradio or Chromium is not.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from nasa_diffusers import app, nasa
from nasa_diffusers.drawing import enlarged, method_of
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: make app-test")
from gradio_client import Client  # noqa: E402

FIELDS = {
    "prompt": "a photo of a shape", "negative": "striped", "method": "projected", "strength": 1.5,
    "steps": 4, "seed": 0, "guidance": 0.0, "height": None, "width": None,
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A page in a process of its own, up once it answers."""

    def __init__(self, command: list, port: int, folder: Path, **variables: str):
        self.url = f"http://127.0.0.1:{port}/"
        self.port = port
        self.log = (folder / "log.txt").open("w+", encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
        self.process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=self.log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        for _ in range(600):
            assert self.process.poll() is None, self.said()
            try:
                urllib.request.urlopen(self.url, timeout=10).read()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"not up: {self.said()}")

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def addresses(self) -> set[str]:
        """On which it listens, as Linux writes them: of 127.0.0.1, 0100007F."""
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        local = [line.split()[1].split(":") for line in lines if line.split()[3] == "0A"]
        return {address for address, port in local if int(port, 16) == self.port}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    port = free_port()
    command = ["-m", "nasa_diffusers", "app", "--port", str(port)]
    server = Server(command, port, tmp_path_factory.mktemp("page"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def expected():
    pipe = DiffusionPipeline.from_pretrained(app.shipped_model())

    def draw(method=None, strength=None, negative="striped", prompt="a photo of a shape", seed=0):
        def image():
            generator = torch.Generator().manual_seed(seed)
            return pipe(
                prompt, num_inference_steps=4, guidance_scale=0.0, generator=generator
            ).images[0]

        if method is None:
            return enlarged(image())
        with nasa(pipe, negative, method_of(method, strength)):
            return enlarged(image())

    return draw


def same(file, image):
    shown = Image.open(file).convert("RGB")
    return shown.size == image.size and shown.tobytes() == image.tobytes()


def ask(server, **changes):
    client = Client(server.url, verbose=False)
    return client.predict(*{**FIELDS, **changes}.values(), api_name="/draw")


def test_it_listens_on_this_machine_alone(server):
    assert server.addresses() == {"0100007F"}


def test_its_answer_is_the_librarys(server, expected):
    without, guided, report = ask(server)
    assert same(without, expected()) and same(guided, expected("projected", 1.5))
    assert "text cross-attention layers guided" in report
    without, guided, report = ask(server, prompt="")
    assert (without, guided) == (None, None)
    assert report == "error: draw: the prompt is empty; it must be a text"


def test_requests_at_the_same_time(server, expected):
    """Each is answered as if it were alone."""
    changes = [
        {"method": m, "strength": 0.5 if m != "nag" else 3.0} for m in ("nasa", "vsf", "nag")
    ]
    changes += [{"prompt": ""}, {"seed": 7}]
    with ThreadPoolExecutor(len(changes)) as pool:
        answers = list(pool.map(lambda change: ask(server, **change), changes))
    for change, (without, guided, _) in zip(changes[:3], answers, strict=False):
        assert same(without, expected())
        assert same(guided, expected(change["method"], change["strength"]))
    assert answers[3][:2] == (None, None)
    assert same(answers[4][1], expected("projected", 1.5, seed=7))


def test_the_file_is_the_script_of_a_space(tmp_path):
    """Alone in a folder, told by the variables of a Space alone, on every address as they are."""
    shutil.copy(app.__file__, tmp_path / "app.py")
    port = free_port()
    server = Server(
        ["app.py"], port, tmp_path, NASA_APP_MODEL=app.shipped_model(),
        GRADIO_SERVER_NAME="0.0.0.0", GRADIO_SERVER_PORT=str(port),
    )  # fmt: skip
    try:
        assert server.addresses() == {"00000000"}
        assert "asks for no password" in server.said()
        without, guided, _ = ask(server)
        assert Path(without).exists() and Path(guided).exists()
    finally:
        server.stop()


def test_a_port_that_is_taken(server):
    done = subprocess.run(
        [sys.executable, "-m", "nasa_diffusers", "app", "--port", str(server.port)],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and str(server.port) in done.stderr


# ---- in a browser --------------------------------------------------------------------------------

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1200,1190", "--force-device-scale-factor=1",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: make app-test")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium here: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the page does not come to it"
        time.sleep(0.2)
    return value


def test_in_a_browser(server, browser, tmp_path):
    """A person's way: type, choose, draw, read. The picture of it is NASA_APP_SCREENSHOT."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def field(name):
        return browser.find_element(By.CSS_SELECTOR, f"#{name} textarea, #{name} input")

    def pictures():
        found = browser.find_elements(By.CSS_SELECTOR, "#without img, #with img")
        script = "return arguments[0].complete ? arguments[0].naturalWidth : 0"
        return [browser.execute_script(script, image) for image in found]

    def report():
        return field("report").get_attribute("value")

    def write(name, text):
        field(name).send_keys(Keys.CONTROL, "a")
        field(name).send_keys(text)

    browser.get(server.url)
    until(lambda: browser.find_elements(By.ID, "draw"))
    assert field("prompt").get_attribute("value") == "a photo of a shape"
    write("seed", "9")
    write("negative", "striped, red")
    browser.find_element(By.ID, "draw").click()
    until(lambda: "layers guided" in report())
    until(lambda: pictures() == [256, 256])
    assert "'striped, red'" in report()
    shot = Path(os.environ.get("NASA_APP_SCREENSHOT", tmp_path / "app.png"))
    browser.save_screenshot(str(shot))

    # an error is on the page, and no picture of before beside it
    write("negative", " ")
    browser.find_element(By.ID, "draw").click()
    until(lambda: report().startswith("error: draw: the negative prompt is empty"))
    until(lambda: pictures() == [])
    # and the next request is served
    write("negative", "striped" + Keys.ENTER)
    until(lambda: pictures() == [256, 256])
    # nothing that the page tried to load was missing
    severe = [x for x in browser.get_log("browser") if x["level"] == "SEVERE"]
    assert not severe, severe
    # the method sets the slider to its own range
    write("method", "NAG" + Keys.ENTER)
    until(lambda: "Scale" in browser.find_element(By.ID, "strength").text)
