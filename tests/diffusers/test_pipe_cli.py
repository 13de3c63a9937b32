"""The command line, on small checkpoints saved by the test."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.pipelines.wan import pipeline_wan
from nasa_diffusers import NAG, VSF, ProjectedNASA, nasa, testing
from nasa_diffusers.cli import main
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    testing.stable_diffusion().save_pretrained(folder)
    return folder


def generate(checkpoint, out, *more):
    return main(
        ["generate", "--model", str(checkpoint), "--prompt", "a cat", "--steps", "1"]
        + ["--out", str(out), *more]
    )


def pixels(path):
    return Image.open(path).tobytes()


def test_one_image(checkpoint, tmp_path, capsys):
    assert generate(checkpoint, tmp_path, "--negative", "blurry", "--alpha", "0.5") == 0
    out = capsys.readouterr().out
    assert "seed0-alpha0.5.png" in out
    assert "7 of 7 text cross-attention layers guided" in out
    assert Image.open(tmp_path / "seed0-alpha0.5.png").size == (32, 32)


def test_the_image_is_the_one_of_the_library(checkpoint, tmp_path):
    pipe = testing.stable_diffusion()
    generate(checkpoint, tmp_path, "--negative", "blurry", "--sweep", "0,0.5", "--seed", "3")
    call = {"num_inference_steps": 1, "guidance_scale": 0.0}
    for alpha in (0, 0.5):
        with nasa(pipe, "blurry", alpha=alpha):
            expected = pipe("a cat", generator=torch.Generator().manual_seed(3), **call).images[0]
        assert pixels(tmp_path / f"seed3-alpha{alpha:g}.png") == expected.tobytes()


def test_sweep_makes_a_grid(checkpoint, tmp_path, capsys):
    assert generate(checkpoint, tmp_path, "--negative", "blurry", "--sweep", "0,0.25,0.5,1") == 0
    grid = Image.open(tmp_path / "seed0-sweep.png")
    assert grid.size == (4 * 32 + 3 * 4, 32 + 16)
    parts = [Image.open(tmp_path / f"seed0-alpha{alpha}.png") for alpha in (0, 0.25, 0.5, 1)]
    for i, part in enumerate(parts):
        assert grid.crop((36 * i, 0, 36 * i + 32, 32)).tobytes() == part.tobytes()
    assert pixels(tmp_path / "seed0-alpha0.png") != pixels(tmp_path / "seed0-alpha1.png")


@pytest.mark.parametrize(
    ("arguments", "method", "name"),
    [
        (["--method", "vsf"], VSF(0.5), "VSF"),
        (["--method", "projected"], ProjectedNASA(0.5), "ProjectedNASA"),
        (
            ["--method", "nag", "--nag-scale", "8", "--nag-tau", "2"],
            NAG(scale=8.0, tau=2.0, alpha=0.5),
            "NAG, scale 8, tau 2",
        ),
    ],
    ids=["vsf", "projected", "nag"],
)
def test_other_methods(checkpoint, tmp_path, capsys, arguments, method, name):
    assert generate(checkpoint, tmp_path, "--negative", "blurry", "--alpha", "0.5", *arguments) == 0
    assert name in capsys.readouterr().out
    pipe = testing.stable_diffusion()
    with nasa(pipe, "blurry", method):
        call = {"num_inference_steps": 1, "guidance_scale": 0.0}
        expected = pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images[0]
    assert pixels(tmp_path / "seed0-alpha0.5.png") == expected.tobytes()


def test_several_negatives_layers_and_steps(checkpoint, tmp_path, capsys):
    negatives = ["--negative", "blurry", "0.3", "--negative", "red", "0.8"]
    more = ["--layers", "up_blocks.*", "--start", "0", "--stop", "0.5", "--guidance", "5"]
    more += ["--height", "64", "--width", "32"]
    assert generate(checkpoint, tmp_path, *negatives, *more) == 0
    out = capsys.readouterr().out
    assert "'red' (77 tokens, alpha 0.8)" in out
    assert "4 of 7" in out
    assert "steps 0 to 0.5" in out
    assert Image.open(tmp_path / "seed0-alpha1.png").size == (32, 64)


def test_other_families(tmp_path):
    """SDXL at its own default alpha, and a video as one file of frames."""
    testing.stable_diffusion_xl().save_pretrained(tmp_path / "sdxl")
    assert generate(tmp_path / "sdxl", tmp_path, "--negative", "blurry") == 0
    assert (tmp_path / "seed0-alpha0.2.png").exists()


def test_video(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    testing.wan().save_pretrained(tmp_path / "wan")
    size = ["--height", "16", "--width", "32"]
    assert generate(tmp_path / "wan", tmp_path, "--negative", "blurry", *size) == 0
    video = Image.open(tmp_path / "seed0-alpha0.5.gif")
    assert video.size == (32, 16)
    assert video.n_frames > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--negative", ""], "the negative prompt is empty"),
        (["--negative", "a", "--negative", "b"], "a prompt and its alpha"),
        (["--negative", "a", "b", "c"], "a prompt and its alpha"),
        (["--negative", "a", "--layers", "x"], "matches none of the 7 layers"),
        (["--negative", "a", "--start", "1"], "leave none of the 1 steps guided"),
        (["--negative", "a", "--backend", "x"], "backend must be None or one of"),
        (["--negative", "a", "--width", "64"], "height and width go together"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_those_of_the_library(checkpoint, tmp_path, capsys, arguments, message):
    assert generate(checkpoint, tmp_path, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nag-scale", "3"], "--nag-scale goes with --method nag, and the method is nasa"),
        (["--method", "vsf", "--nag-norm", "2"], "--nag-norm goes with --method nag"),
        (["--method", "nag", "--rule", "nasa"], "--rule goes with --method nasa"),
        (["--method", "nag", "--nag-scale", "1"], "NAG: scale 1 is no guidance"),
        (["--rule", "vsf"], "write VSF(alpha)"),
    ],
    ids=str,
)
def test_flags_of_another_method(tmp_path, capsys, arguments, message):
    """Refused before a model is loaded."""
    assert generate(tmp_path / "nothing", tmp_path, "--negative", "a", *arguments) == 1
    assert message in capsys.readouterr().err


def test_no_such_checkpoint(tmp_path, capsys):
    assert generate(tmp_path / "nothing", tmp_path, "--negative", "a") == 1
    assert "error:" in capsys.readouterr().err


def test_flops_table(capsys):
    assert main(["flops", "--model", "SD 1.5, 512 px"]) == 0
    assert "| SD 1.5, 512 px | 77 + 77 | 0.803 | +0.81% | +0.08% |" in capsys.readouterr().out
    assert main(["flops", "--model", "SD 9"]) == 1
    assert "no model 'SD 9'" in capsys.readouterr().err


# ---- one file of weights -------------------------------------------------------------------------


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_name(name):
    """Of a weight of the small UNet, as the first Stable Diffusion code called it."""
    for new, old in OUTSIDE.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    where, *rest = name.split(".")
    if where == "mid_block":
        kind, i, *rest = rest
        block = f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}"
    else:
        b, kind, i, *rest = rest
        # one layer in a block going down, two going up
        first = 2 * int(b) + (1 if where == "down_blocks" else 0)
        side = "input_blocks" if where == "down_blocks" else "output_blocks"
        if kind == "downsamplers":
            return f"{side}.{first + 1}.0.op.{rest[-1]}"
        if kind == "upsamplers":
            return f"{side}.{first + 1}.2.conv.{rest[-1]}"
        block = f"{side}.{first + int(i)}.{int(kind == 'attentions')}"
    if kind == "resnets":
        rest[0] = RESNET[rest[0]]
    return ".".join([block, *rest])


@pytest.fixture
def single_file(tmp_path):
    """The UNet of another seed than the checkpoint's, in one file."""
    unet = testing.stable_diffusion(seed=5).unet
    weights = {f"model.diffusion_model.{original_name(n)}": x for n, x in unet.state_dict().items()}
    save_file({n: x.contiguous() for n, x in weights.items()}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def other_parts(monkeypatch):
    """A file of a whole pipeline would bring them; this one is of the UNet."""
    load = diffusers.StableDiffusionPipeline.from_single_file
    pipe = testing.stable_diffusion()
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer")}
    calls = []

    def from_single_file(path, **options):
        calls.append(options)
        return load(path, **options, **parts, safety_checker=None)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", from_single_file)
    return calls


def test_a_single_file(checkpoint, single_file, other_parts, tmp_path, capsys):
    more = ["--config", str(checkpoint), "--negative", "blurry", "--alpha", "0.5"]
    assert generate(single_file, tmp_path, *more) == 0, capsys.readouterr().err
    pipe = testing.stable_diffusion()
    pipe.unet = testing.stable_diffusion(seed=5).unet
    with nasa(pipe, "blurry", alpha=0.5):
        call = {"num_inference_steps": 1, "guidance_scale": 0.0}
        expected = pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images[0]
    assert pixels(tmp_path / "seed0-alpha0.5.png") == expected.tobytes()
    assert other_parts == [{"config": str(checkpoint), "torch_dtype": torch.float32}]


def test_the_configuration_is_found_by_the_weights(
    checkpoint, single_file, other_parts, tmp_path, monkeypatch, capsys
):
    found = {"pretrained_model_name_or_path": str(checkpoint)}
    seen = []
    monkeypatch.setattr(
        single_file_utils, "fetch_diffusers_config", lambda weights: seen.append(weights) or found
    )
    assert generate(single_file, tmp_path, "--negative", "blurry") == 0, capsys.readouterr().err
    assert "model.diffusion_model.input_blocks.0.0.weight" in seen[0]
    assert other_parts[0]["config"] == str(checkpoint)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("nothing.safetensors", [], "there is no file"),
        ("nothing", ["--config", "x"], "--config goes with a --model that is one file"),
    ],
)
def test_a_file_that_is_not_there(tmp_path, capsys, model, more, message):
    assert generate(tmp_path / model, tmp_path, "--negative", "a", *more) == 1
    assert message in capsys.readouterr().err


def test_a_pipeline_that_has_no_single_files(single_file, tmp_path, capsys):
    testing.pixart().save_pretrained(tmp_path / "pixart")
    more = ["--config", str(tmp_path / "pixart"), "--negative", "a"]
    assert generate(single_file, tmp_path, *more) == 1
    assert "a PixArtAlphaPipeline cannot be read from one file" in capsys.readouterr().err
