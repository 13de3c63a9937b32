"""ComfyUI's own server with the node pack among its custom nodes, and its own page in Chromium.

`make comfyui-test` sets it up. `NASA_COMFYUI_SERVER` opts in, and is the folder for the picture.
"""

import asyncio
import copy
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import comfy
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PACK = ROOT / "integrations" / "comfyui"
TREE = Path(comfy.__path__[0]).parent
EXAMPLES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((PACK / "workflows").glob("*.json"))
}
WORKFLOW = EXAMPLES["sdxl-turbo"]
# a machine may be busy with other things
PATIENCE = 300

pytestmark = pytest.mark.skipif(
    "NASA_COMFYUI_SERVER" not in os.environ,
    reason="ComfyUI's own server takes minutes: make comfyui-test",
)


def linked(folder: Path) -> Path:
    """The tree without what whoever packed it has added to its paths."""
    tree = folder / "tree"
    tree.mkdir()
    for path in TREE.iterdir():
        if path.name == "main.py":
            # it looks beside the file that it really is
            shutil.copy(path, tree)
        elif path.name != "extra_model_paths.yaml":
            (tree / path.name).symlink_to(path)
    return tree


class Server:
    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self.folder = folder
        self.log = folder / "server.log"
        script = Path(__file__).with_name("serve.py")
        self.process = subprocess.Popen(
            [
                sys.executable, str(script), str(linked(folder)), "--cpu", "--listen",
                "127.0.0.1", "--port", port, "--base-directory", str(folder),
                "--disable-api-nodes", "--database-url", f"sqlite:///{folder}/comfyui.db",
            ],
            stdout=self.log.open("wb"), stderr=subprocess.STDOUT, cwd=folder,
        )  # fmt: skip

    def get(self, path: str, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def until(self, found):
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if value := found():
                    return value
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-3000:])

    def finished(self, id: str) -> dict:
        return self.until(lambda: self.get(f"/history/{id}").get(id))

    def image(self, entry: dict) -> np.ndarray:
        (output,) = (x for x in entry["outputs"].values() if "images" in x)
        (image,) = output["images"]
        return np.asarray(Image.open(self.folder / image["type"] / image["filename"]), np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from comfyui import checkpoint

    folder = tmp_path_factory.mktemp("comfyui")
    for name in ("models/checkpoints", "custom_nodes", "input", "output", "user/default"):
        (folder / name).mkdir(parents=True)
    (folder / "custom_nodes" / "comfyui-nasa").symlink_to(PACK)
    (name,) = (
        x["widgets_values"][0] for x in WORKFLOW["nodes"] if x["type"] == "CheckpointLoaderSimple"
    )
    checkpoint.write(folder / "models" / "checkpoints" / name)
    # no dialog for those who are here for the first time, and nothing over the nodes
    settings = {
        "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False,
        "Comfy.Graph.CanvasInfo": False, "Comfy.VueNodes.Enabled": False,
    }  # fmt: skip
    (folder / "user/default/comfy.settings.json").write_text(json.dumps(settings))
    server = Server(folder)
    try:
        server.until(lambda: server.get("/object_info/NasaNegativePrompt"))
        yield server
    finally:
        server.process.terminate()
        server.process.wait(60)


@pytest.fixture(scope="module")
def drawn(server, tmp_path_factory):
    """The examples in ComfyUI's own page: their nodes, and of the one that is queued there entry of
    the history and picture."""
    from comfyui import browser

    if browser.CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    profile = tmp_path_factory.mktemp("chromium") / "profile"

    async def draw():
        async with browser.opened(server.url, profile, (1700, 900), PATIENCE) as page:
            ready = "window.app?.graph && window.LiteGraph?.registered_node_types"
            await page.until(f"!!(({ready})?.NasaNegativePrompt)", PATIENCE)
            # the page opens its own workflow, late
            await page.until("app.graph.nodes.length > 0", PATIENCE)
            await asyncio.sleep(5)
            loaded = {}
            for name, example in (*EXAMPLES.items(), ("sdxl-turbo", WORKFLOW)):
                await page.run(f"app.loadGraphData({json.dumps(example)})")
                loaded[name] = await page.run(
                    "app.graph.nodes.map(x => [x.type, x.has_errors || x.inputs.some(i => "
                    "i.link === null && !i.widget), x.widgets?.map(w => w.value) ?? []])"
                )
            await page.run("app.queuePrompt(0, 1)")
            entry = await asyncio.to_thread(
                server.until, lambda: next(iter(server.get("/history").values()), None)
            )
            shown = "app.graph.nodes.some(x => x.type === 'SaveImage' && x.imgs?.length)"
            await page.until(shown, 60)
            await page.run("app.canvas.ds.scale = 0.85, app.canvas.ds.offset = [90, 270]")
            await page.run("app.graph.setDirtyCanvas(true, true)")
            await asyncio.sleep(2)
            return loaded, entry, await page.picture(0, 40, 1700, 680)

    return asyncio.run(draw())


def test_the_example_runs_in_the_page(server, drawn):
    loaded, entry, picture = drawn
    for name, example in EXAMPLES.items():
        expected = [[x["type"], False, x["widgets_values"]] for x in example["nodes"]]
        assert sorted(loaded[name]) == sorted(expected), name
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert server.image(entry).shape == (512, 512, 3)
    picture = Image.open(io.BytesIO(picture))
    assert len(picture.convert("RGB").quantize(64).getcolors()) > 32
    target = Path(os.environ["NASA_COMFYUI_SERVER"])
    if target.is_dir():
        picture.convert("RGB").quantize(255).save(target / "comfyui.png", optimize=True)


def with_inputs(entry: dict, **inputs) -> dict:
    """The prompt of the example as the page sent it, with other settings of our node."""
    prompt = copy.deepcopy(entry["prompt"][2])
    (node,) = (x for x in prompt.values() if x["class_type"] == "NasaNegativePrompt")
    for name, value in inputs.items():
        if value is None:
            del node["inputs"][name]
        else:
            node["inputs"][name] = value
    return prompt


def test_the_negative_prompt_acts_at_cfg_1(server, drawn):
    entry = drawn[1]
    images = [server.image(entry)]
    for strength in (0.0, 1e-6):
        id = server.get("/prompt", {"prompt": with_inputs(entry, strength=strength)})["prompt_id"]
        images.append(server.image(server.finished(id)))
    guided, off, faint = images
    assert np.abs(guided - off).mean() > 1.0
    assert np.abs(faint - off).max() <= 1.0


def refusal(server: Server, prompt: dict) -> str:
    """What the user reads: of the check before the queue, or of the node that did not run."""
    answer = server.get("/prompt", {"prompt": prompt})
    if answer["node_errors"]:
        assert "prompt_id" not in answer
        (node,) = answer["node_errors"].values()
        kind, text = node["class_type"], ". ".join(x["message"] for x in node["errors"])
    else:
        messages = server.finished(answer["prompt_id"])["status"]["messages"]
        (error,) = (content for name, content in messages if name == "execution_error")
        kind, text = error["node_type"], error["exception_message"]
    assert kind == "NasaNegativePrompt"
    return text


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"method": "PAG"}, "Value not in list|method must be one of NASA, .* got 'PAG'"),
        ({"layers": None, "rule": None}, "Required input is missing"),
        ({"strength": -1.0}, "smaller than min"),
        ({"layers": "99"}, "layers must be below 4, the number of attentions"),
    ],
    ids=["a method there is not", "of another version", "a strength out of range", "a layer"],
)
def test_a_workflow_that_does_not_fit_is_refused(server, drawn, inputs, message):
    assert re.search(message, refusal(server, with_inputs(drawn[1], **inputs)))


def test_after_a_refusal_the_server_is_as_it_was(server, drawn):
    refusal(server, with_inputs(drawn[1], layers="one"))
    # every layer by its number: what is kept of the example does not serve
    id = server.get("/prompt", {"prompt": with_inputs(drawn[1], layers="0-3")})["prompt_id"]
    assert np.array_equal(server.image(server.finished(id)), server.image(drawn[1]))
