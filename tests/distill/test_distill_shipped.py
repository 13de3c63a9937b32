"""The models that come with the package: their size and quality, pages, and the demonstration."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from matplotlib.backends.backend_agg import FigureCanvasAgg
from nasa_distill import pictures
from nasa_distill.cli import main
from nasa_distill.demo import show
from nasa_distill.train.networks import load
from nasa_distill.train.seeds import generator
from nasa_distill.world import shipped
from nasa_distill.world.evaluation import ablation, evaluate, pooled, report, sweep
from nasa_distill.world.kinds import world_of
from nasa_distill.world.scene import renders, scenes
from PIL import Image

# by size of images; on other noise and captions than those of the card, so a little below it
VALID, FOLLOWED = {32: 0.72, 64: 0.83}, {32: 0.83, 64: 0.88}
README = Path(__file__).parents[2] / "README.md"
DOCS = README.parent / "docs" / "distill"


@pytest.fixture(scope="module", params=shipped.NAMES)
def model(request):
    return load(shipped.path(request.param))


@pytest.mark.parametrize("size", shipped.NAMES)
def test_it_is_small_and_safe(size):
    files = [path for path in shipped.path(size).rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3 and sum(path.stat().st_size for path in weights) <= shipped.LIMIT
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert "## Limits" in (shipped.path(size) / "README.md").read_text()
    with pytest.raises(ValueError, match="size must be 64 or 32 pixels, got 48"):
        shipped.path(48)


def test_packing_is_in_half_precision_and_opens_in_full(tmp_path, monkeypatch, capsys):
    source = shipped.path(64)
    monkeypatch.setattr(shipped, "MODELS", tmp_path)
    monkeypatch.setitem(shipped.NAMES, 64, "again")
    assert main(["pack", "--pipeline", str(source)]) == 0
    size = sum(path.stat().st_size for path in source.rglob("*.safetensors"))
    assert f"again: {size / 1e6:.2f} MB of weights" in capsys.readouterr().out
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    assert opened.unet.dtype == opened.vae.dtype == opened.text_encoder.dtype == torch.float32
    # diffusers would write the folder that the model came from
    for path in (tmp_path / "again").rglob("*.json"):
        assert "_name_or_path" not in path.read_text()


def results_of(page, folder, *pictures):
    """What a page is made of: it says these numbers and no others."""
    results = report.read(folder / "results.json")
    paths = [folder / f"{name}.png" for name in pictures]
    assert report.markdown(results, paths, page.parent) == page.read_text()
    assert all(path.exists() for path in paths)
    return results


def test_the_results_are_those_of_this_model():
    """And the card says no other."""
    results = results_of(DOCS / "results.md", DOCS, "sweep-1", "sweep-4", "price", "samples")
    assert results.about["student"] == evaluate.checksum(shipped.path(32))
    card = (shipped.path(32) / "README.md").read_text()
    for steps in ("1 step", "4 steps"):
        quality = results.quality[f"student, {steps}"].shares
        for name in ("valid", "followed if valid"):
            assert str(quality[name]).replace(" (", " % (") in card


def test_the_larger_models_page_is_made_of_its_numbers():
    """And its card says no other, and the README."""
    pictures = ("sweep-1", "sweep-4", "price", "samples")
    results = results_of(DOCS / "large.md", DOCS / "large", *pictures)
    said = re.findall(r"^- (one step|four steps): (.*)$", README.read_text(), re.MULTILINE)
    line = {{"one step": 1, "four steps": 4}[steps]: text for steps, text in said}
    for steps in report.student_steps(results):
        for name in ("none", "cfg", "nag", "vsf", "nasa", "projected"):
            best = report.best(report.student_cells(results, steps), name)
            assert str(best.total.shares["all three"]) in line[steps]
    assert results.about["student"] == evaluate.checksum(shipped.path(64))
    card = (shipped.path(64) / "README.md").read_text()
    assert len(results.quality) == 4
    for quality in results.quality.values():
        for name in ("valid", "followed if valid"):
            assert str(quality.shares[name]).replace(" (", " % (") in card


@pytest.mark.parametrize("name", ["rules", "words", "words-small"])
def test_the_pages_of_joint_attention_are_made_of_their_numbers(name):
    """And what the documentation of the rules says of them is in them."""
    results = results_of(DOCS / f"{name}.md", DOCS / name, "sweep-4", "price", "samples")
    documented = (DOCS.parent / "diffusers" / "joint.md").read_text()
    for steps in report.student_steps(results):
        for best in report.best_cells(results, steps):
            shares = [best.total.shares[share] for share in ("removed", "valid", "all three")]
            row = f"| `{best.method}` | " + " | ".join(map(str, shares)) + " |"
            assert row in documented, row


def test_the_page_of_held_out_prompts_is_made_of_its_numbers():
    pictures = ("sweep-1", "sweep-4", "price", "samples")
    results = results_of(DOCS / "held-out.md", DOCS / "held-out", *pictures)
    assert results.about["prompt pairs"] == "held-out"
    assert results.about["student"] == evaluate.checksum(shipped.path(64))
    # nothing was chosen on them
    first = report.read(DOCS / "large" / "results.json")
    for steps, methods in report.best_methods(first).items():
        assert [cell.method for cell in report.student_cells(results, steps)] == methods


@pytest.mark.parametrize(
    ("search", "folder"), [("search.json", DOCS), ("search-large.json", DOCS / "large")]
)
def test_nags_settings_are_those_of_its_search(search, folder):
    tuned = report.read(DOCS / "nag" / search)
    results = report.read(folder / "results.json")
    assert results.about["NAG"] == report.searched(tuned)
    assert results.about["student"] == tuned.about["student"]
    assert not set(tuned.about["seeds"].split(", ")) & set(results.about["seeds"].split(", "))
    assert set(report.tuned_methods(tuned)) <= {cell.method for cell in results.cells}


def test_the_page_of_pooled_vectors_is_made_of_its_numbers():
    assert (
        pooled.page(json.loads((DOCS / "pooled.json").read_text()))
        == (DOCS / "pooled.md").read_text()
    )


def test_the_pixart_page_is_made_of_its_numbers():
    results = results_of(DOCS / "pixart.md", DOCS / "pixart", "sweep-4", "price", "samples")
    documented = (DOCS / "training.md").read_text()
    for quality in results.quality.values():
        for name in ("valid", "followed if valid"):
            assert str(quality.shares[name]).replace(" (", " % (") in documented


def test_what_is_said_of_the_projected_rule_is_on_the_pages():
    """Every share with its interval, and those of single prompt pairs."""
    measured = "".join(page.read_text() for page in DOCS.glob("*.md"))
    text = (DOCS.parent / "projected.md").read_text()
    shares = re.findall(r"\d+\.\d \(\d+\.\d-\d+\.\d\)", text)
    assert len(shares) > 30
    for share in shares:
        assert share in measured, share


def test_the_ablation_page_is_made_of_its_numbers():
    rows = json.loads((DOCS / "ablation.json").read_text())
    for name in ("none", "teacher and student (NASA-T)"):
        seeds = [row["seed"] for row in rows if row["variant"] == name]
        assert sorted(set(seeds)) == [0, 1, 2] and len(seeds) == 3 * 4
    # the paper's five rows, and the student before them
    five = ("none", "teacher", "teacher and LoRA teacher", "teacher and student (NASA-T)", "all")
    assert {ablation.BEFORE, *five} <= {row["variant"] for row in rows}
    page = (DOCS / "ablation.md").read_text()
    tables, text = ablation.page(rows), " ".join(page.rpartition("|")[2].split())
    assert tables in page
    # what is concluded is read from the tables
    said = re.findall(r"[+-]\d\.\d ± \d\.\d|\d\d\.\d|-?0\.\d{4}", text)
    assert len(said) > 12 and all(number in tables for number in said), said


def test_what_was_tried_before_the_ablation_is_in_its_numbers():
    page = (DOCS / "ablation.md").read_text()
    lines = [
        line.split(" | ") for line in page.splitlines() if line.startswith(("| 1e-5", "| 3e-5"))
    ]
    rows = json.loads((DOCS / "search.json").read_text())
    assert len(lines) == 4 and len(rows) == 2 * 6
    for row in rows:
        low, high = row["kappa"]
        line = next(
            line
            for line in lines
            if float(line[0].strip("| ")) == row["student_rate"]
            and line[1].startswith(f"{low:g} to {high:g}")
            and int(line[2]) == row["lora_updates"]
        )
        place = 3 if row["variant"] == "none" else 5
        said = [cell.strip("| ") for cell in line[place : place + 2]]
        if row["method"] == "none":
            assert said[0] == f"{100 * row['valid']:.1f}"
        else:
            assert said[1] == f"{100 * row['all three']:.1f}"


def test_a_missing_model_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shipped, "MODELS", tmp_path)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "the model is not installed; in a clone, pip install" in capsys.readouterr().err


def test_the_demonstration(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(show, "IMAGES", 40)
    monkeypatch.setattr(show.layers, "LAYERS", ())
    assert main(["demo", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "alpha 0 equals the stock images, bit for bit: yes" in output
    assert "after disable() likewise: yes" in output
    image = Image.open(tmp_path / "demo.png")
    pitch = 128 + pictures.GAP
    assert image.width == pictures.LABEL_WIDTH + show.SHOWN * pitch
    assert image.height > 2 * len(show.EXAMPLES) * pitch


def test_its_quality_is_what_the_card_says(model):
    quality, size = evaluate.quality(model, 1, 300, seed=1), world_of(model).size
    assert quality.shares["valid"].value > VALID[size]
    assert quality.shares["followed if valid"].value > FOLLOWED[size]


def test_a_negative_prompt_removes_in_one_step(model):
    """What is the same in each pair's measurement: more is gone with NASA than without."""
    prompt, negative = "a photo of a shape", "striped"
    noise = torch.randn(200, *model.latent_shape, generator=generator(2, 0))
    gone = {}
    for method in (evaluate.NONE, evaluate.Method("nasa", 0.5)):
        images = evaluate.draw(model, prompt, negative, method, 1, noise, 0)
        gone[method.name] = evaluate.Counts.of(images, prompt, negative)
    none, guided = gone["none"].shares["removed"], gone["nasa"].shares["removed"]
    # beyond the two intervals, so not by chance
    assert guided.interval[0] > none.interval[1]


@pytest.fixture
def small_sweep(monkeypatch):
    """Few images, two methods; the layout is that of the whole."""
    monkeypatch.setattr(sweep, "IMAGES", 12)
    monkeypatch.setattr(sweep, "ROWS", (sweep.ROWS[0]._replace(strengths=(1.5,)), sweep.ROWS[1]))


def test_the_sweep_is_one_picture(small_sweep, tmp_path):
    for name in ("one.png", "two.png"):
        assert main(["sweep", "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert main(["sweep", "--pair", "11", "--out", str(tmp_path / "no.png")]) == 1


def test_the_sweeps_words_do_not_overlap(small_sweep):
    """All of them are inside the picture, and none stands in another or in an image."""
    figure = sweep.picture(shipped.path(32))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = []
    for axes in figure.axes:
        legend = axes.get_legend()
        texts += [*axes.texts, axes.title, *(legend.get_texts() if legend else ())]
    texts = [text for text in texts if text.get_text()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    images = [axes.get_window_extent(renderer) for axes in figure.axes if axes.images]
    assert len(texts) > 10 and len(images) == 6
    for i, box in enumerate(boxes):
        assert figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1)
        for other in (*boxes[i + 1 :], *images):
            assert not box.overlaps(other), texts[i].get_text()


def test_the_sweeps_frames_are_the_judges():
    """Of three images of the world: without red, with it, and one that is none."""
    first = [next(i for i, s in enumerate(scenes()) if s.colour == c) for c in ("blue", "red")]
    images = torch.cat([renders()[0][first], torch.zeros(1, 3, 32, 32)]).repeat(3, 1, 1, 1)[:8]
    tile = sweep.tile(images, "a photo of a shape", "red")
    side = tile.shape[0] // 2
    for number, colour in enumerate((sweep.AS_ASKED, sweep.STILL_THERE, sweep.BROKEN)):
        pixel = tile[sweep.FRAME + 1, number * side + sweep.FRAME + 1]
        assert [round(255 * x) for x in pixel.tolist()] == list(bytes.fromhex(colour[1:]))
