"""Scripts for other programs: integrations/fastsdcpu, sdnext and server, on stand-ins for these.

The programs themselves are not here; docs/recipes.md says with which version each was run.
"""

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from nasa_diffusers import NASA, ProjectedNASA, nasa, testing
from PIL import Image

# before a stand-in takes its name
HAS_FASTAPI = importlib.util.find_spec("fastapi") is not None
FOLDER = Path(__file__).parents[2] / "integrations"
CALL = {"num_inference_steps": 1, "guidance_scale": 0.0}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, FOLDER / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def image(pipe):
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **CALL).images[0].tobytes()


@pytest.fixture(scope="module")
def pipe():
    return testing.stable_diffusion()


@pytest.fixture(scope="module")
def expected(pipe):
    """The stock image, and those of the library guided away from "blurry"."""
    found = {None: image(pipe)}
    for method in (NASA(0.5), ProjectedNASA(1.5)):
        with nasa(pipe, "blurry", method):
            found[method.name] = image(pipe)
    assert len(set(found.values())) == 3
    return found


# ---- fastsdcpu -----------------------------------------------------------------------------------


def test_fastsdcpu(pipe, expected):
    class Base:
        txt2img_pipeline = pipe

        def generate(self, lcm_diffusion_setting, reshape=False):
            return image(self.txt2img_pipeline)

    made = load(Path("fastsdcpu/nasa_fastsdcpu.py")).generator_class(Base, ProjectedNASA(1.5))()
    assert made.generate(SimpleNamespace(negative_prompt=" ")) == expected[None]
    settings = SimpleNamespace(negative_prompt="blurry")
    assert made.generate(settings) == expected["ProjectedNASA"]
    assert made.generate(SimpleNamespace(negative_prompt="")) == expected[None]
    # OpenVINO and GGUF
    made.txt2img_pipeline = None
    with pytest.raises(ValueError, match="NASA acts in PyTorch pipelines"):
        made.generate(settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "this is not fastsdcpu's folder src"),
        (["--nasa-method", "nag", "--nasa-strength", "1"], "NAG: scale 1 is no guidance"),
    ],
)
def test_fastsdcpu_is_started_in_its_folder(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nasa_fastsdcpu.py", *arguments])
    with pytest.raises(SystemExit):
        load(Path("fastsdcpu/nasa_fastsdcpu.py")).main()
    assert message in capsys.readouterr().err


def test_fastsdcpu_gets_its_own_arguments(tmp_path, monkeypatch):
    """Its program runs with the generator replaced in the one place where it is made."""
    (tmp_path / "context.py").write_text("class LCMTextToImage:\n    pass\n")
    (tmp_path / "app.py").write_text(
        "import sys, context\ncontext.seen = sys.argv, context.LCMTextToImage.__name__\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--nasa-method", "vsf", "--webui", "--port", "1"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    load(Path("fastsdcpu/nasa_fastsdcpu.py")).main()
    context = sys.modules.pop("context")
    assert context.seen == (["app.py", "--webui", "--port", "1"], "NasaTextToImage")


# ---- SD.Next -------------------------------------------------------------------------------------


@pytest.fixture
def sdnext(pipe, monkeypatch):
    """The script among modules of the names that it imports; `processing` draws with `pipe`."""
    modules = {name: ModuleType(name) for name in ("gradio", "modules", "modules.logger")}
    modules["modules.logger"].log = SimpleNamespace(info=lambda text: None)
    modules["modules"].processing = SimpleNamespace(process_images=lambda p: image(p.pipe))
    modules["modules"].scripts_manager = SimpleNamespace(Script=object)
    modules["modules"].shared = SimpleNamespace(sd_model=pipe)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return load(Path("sdnext/nasa_negative_prompt.py")).NasaScript()


def test_sdnext(sdnext, pipe, expected):
    p = SimpleNamespace(negative_prompt="blurry", pipe=pipe)
    assert sdnext.run(p, "", "nasa", 0.5, 0.0, 1.0) == expected["NASA"]
    p = SimpleNamespace(negative_prompt="", pipe=pipe)
    assert sdnext.run(p, "blurry", "projected", 1.5, 0.0, 1.0) == expected["ProjectedNASA"]
    assert image(pipe) == expected[None]


def test_sdnext_says_what_is_wrong(sdnext, pipe, expected):
    with pytest.raises(ValueError, match="there is no negative prompt"):
        sdnext.run(SimpleNamespace(negative_prompt="", pipe=pipe), " ", "nasa", 0.5, 0.0, 1.0)
    # another checkpoint drew
    other = SimpleNamespace(negative_prompt="blurry", pipe=testing.stable_diffusion(seed=5))
    with pytest.raises(RuntimeError, match="NASA: nothing was guided: the model that drew is not"):
        sdnext.run(other, "", "nasa", 0.5, 0.0, 1.0)
    assert image(pipe) == expected[None]


# ---- a server ------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("pydantic", reason="pydantic is not installed")
    for name in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            module = ModuleType(name)
            module.FastAPI = module.HTTPException = module.Response = object
            monkeypatch.setitem(sys.modules, name, module)
    return load(Path("server/nasa_server.py"))


def test_the_server_draws_one_at_a_time(server, pipe, expected):
    served, Wanted = server.Server(pipe), server.Wanted
    wanted = {"prompt": "a cat", "steps": 1}
    guided = Wanted(**wanted, negative="blurry", method="projected", strength=1.5)
    assert served.draw(Wanted(**wanted)).tobytes() == expected[None]
    assert served.draw(guided).tobytes() == expected["ProjectedNASA"]
    with pytest.raises(ValueError, match="no method 'x'"):
        served.draw(Wanted(**wanted, negative="blurry", method="x"))
    assert not served.lock.locked()
    assert served.draw(Wanted(**wanted)).tobytes() == expected[None]


def test_the_servers_answers(server, pipe, expected):
    """Through FastAPI itself, which `make app-test` has."""
    if not HAS_FASTAPI:
        pytest.skip("FastAPI is not installed: make app-test")

    from fastapi.testclient import TestClient

    client = TestClient(server.make_app(pipe))
    wanted = {"prompt": "a cat", "steps": 1, "negative": "blurry", "strength": 0.5}
    answer = client.post("/images", json=wanted)
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).tobytes() == expected["NASA"]
    refused = client.post("/images", json=wanted | {"method": "nag", "strength": 1})
    assert refused.status_code == 422 and "NAG: scale 1 is no guidance" in refused.text
    assert client.post("/images", json=wanted | {"steps": 0}).status_code == 422
