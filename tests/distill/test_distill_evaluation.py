"""The evaluation: prompt pairs, seeds, a run that goes on, NAG's search, the picture, pooled
vectors; and the students that learn from the shipped one."""

import json
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from nasa_diffusers import NAG, ProjectedNASA
from nasa_distill.cli import main
from nasa_distill.intervals import Share
from nasa_distill.train.networks import load
from nasa_distill.world import clip, make, shipped
from nasa_distill.world.evaluation import evaluate, plot, pooled, prompts, report
from nasa_distill.world.judge import judge
from nasa_distill.world.kinds import LARGE, SMALL, WORLDS
from nasa_distill.world.large.judge import Verdict
from small_world import RECIPE, UNSEEN

METHODS = (evaluate.NONE, evaluate.Method("projected", 2.0), evaluate.Method("nag", 8.0, 1.25, 1.0))


# ---- what is counted -----------------------------------------------------------------------------


@pytest.mark.parametrize("world", (SMALL, LARGE), ids=lambda world: world.name)
def test_shares_of_values_are_those_of_what_the_world_draws(world):
    shares = world.shares
    of_attribute: dict[str, float] = {}
    for value, share in shares.items():
        attribute, _ = value.split()
        of_attribute[attribute] = of_attribute.get(attribute, 0) + share
    assert of_attribute == pytest.approx(dict.fromkeys(of_attribute, 1))
    drawn = world.draw(4000, torch.Generator().manual_seed(0)).tolist()
    shapes = [x for i in drawn for x in world.describe(i)["shape"].split()]
    for shape in set(shapes):
        assert shares[f"shape {shape}"] == pytest.approx(
            shapes.count(shape) / len(shapes), abs=0.03
        )


def test_a_model_that_leaves_images_out_is_seen():
    """By the value whose share is furthest from the world's, over batches that were added up."""
    even = {value: round(1000 * share) for value, share in LARGE.shares.items()}
    one = evaluate.Counts(values=dict(even))
    one.add(evaluate.Counts(values={"defect blurry": 600}))
    value, here, there = one.furthest(LARGE)
    assert value == "defect blurry" and there == LARGE.shares["defect blurry"]
    assert here == Share(even["defect blurry"] + 600, 1600)
    assert evaluate.Counts(**one.plain()) == one and "values" not in evaluate.Counts().plain()
    cells = [evaluate.Cell("student", 1, evaluate.NONE, [evaluate.Counts(n=1)])]
    for quality, column in ((one, "| defect blurry: "), (evaluate.Counts(), "| mean residual |")):
        quality.n = 10
        results = report.Results(cells, {"world": "large"}, {"student": quality})
        assert column in report.quality_table(results)


# ---- prompts and methods -------------------------------------------------------------------------


EVERY_SCENE = {
    "small": lambda: judge(SMALL.images(torch.arange(288))),
    "large": lambda: Verdict(torch.arange(9984), torch.zeros(9984)),
}


@pytest.mark.parametrize("world", (SMALL, LARGE), ids=lambda world: world.name)
def test_every_negative_is_open_in_its_prompt(world):
    """Of the images that the prompt is true of, some show the negative and some do not."""
    every, rates = EVERY_SCENE[world.name](), world.rates()
    for pairs in prompts.LISTS[world.name].values():
        assert len(pairs) == 11
        for prompt, negative in pairs:
            follows = every.follows(prompt)
            shown = rates[follows & every.shows(negative)].sum() / rates[follows].sum()
            assert 0.04 < shown < 0.8, (prompt, negative, shown)


@pytest.mark.parametrize("lists", prompts.LISTS.values(), ids=prompts.LISTS)
def test_what_is_held_out_is_new(lists):
    assert not set(lists["first"]) & set(lists["held-out"])
    for number in (0, 1):
        words = [{pair[number] for pair in pairs} for pairs in lists.values()]
        # prompts and negative prompts alike: nearly none is in both lists
        assert len(words[0] & words[1]) <= 1


def test_methods_have_all_their_settings():
    method = evaluate.Method("nag", 8.0, 1.25, 0.5)
    assert method.made() == NAG(8.0, 1.25, 0.5)
    assert str(method) == "nag 8, tau 1.25, alpha 0.5" and str(METHODS[1]) == "projected 2"
    assert METHODS[1].made() == ProjectedNASA(2.0)
    grids = [evaluate.nag_grid(joint) for joint in (False, True)]
    assert [len(set(grid)) for grid in grids] == [12, 12] and not set(grids[0]) & set(grids[1])


def test_methods_can_be_named():
    assert evaluate.read_method("nag:8:1.25:0.5") == evaluate.Method("nag", 8.0, 1.25, 0.5)
    assert evaluate.read_method("projected:2") == evaluate.Method("projected", 2.0)
    assert evaluate.read_method("none") == evaluate.NONE
    for wrong in ("nasa", "nasa:much", "none:1", "nag:8:1.25", "best:1"):
        with pytest.raises(ValueError, match=f"cannot read '{wrong}'"):
            evaluate.read_method(wrong)


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def student(world, monkeypatch):
    """With two prompt pairs of each list."""
    lists = {name: pairs[:2] for name, pairs in prompts.LISTS["small"].items()}
    monkeypatch.setitem(prompts.LISTS, "small", lists)
    return world / "four-step" / "pipeline"


def test_seeds_add_up(student):
    options = {"methods": METHODS, "pairs": "held-out"}
    both = evaluate.run(student, [1], 2, [3, 5], **options)
    single = [evaluate.run(student, [1], 2, seed, **options) for seed in (3, 5)]
    for number, cell in enumerate(both.cells):
        alone = [results.cells[number].total for results in single]
        assert cell.seeds == dict(zip((3, 5), alone, strict=True))
        alone[0].add(alone[1])
        assert cell.total == alone[0] and cell.total.n == 2 * 2 * 2
    assert both.quality["student, 1 step"].n == 2 * 2 * 2
    assert both.about["seeds"] == "3, 5" and both.about["prompt pairs"] == "held-out"
    assert report.as_json(both)["pairs"] == [list(pair) for pair in prompts.HELD_OUT[:2]]


def test_a_run_goes_on_where_it_was(student, tmp_path, monkeypatch):
    progress = tmp_path / "cells.jsonl"
    options = {"methods": METHODS, "progress": progress}
    whole = evaluate.run(student, [1], 1, [0, 1], methods=METHODS)
    evaluate.run(student, [1], 1, 0, **options)
    lines = progress.read_text().splitlines()
    assert len(lines) == 1 + 1 + len(METHODS)
    # of one seed all is there, and nothing is drawn for it again
    drawn = []
    monkeypatch.setattr(
        evaluate,
        "pair_by_pair",
        lambda *how, draw=evaluate.pair_by_pair: drawn.append(how[-1]) or draw(*how),
    )
    again = evaluate.run(student, [1], 1, [0, 1], **options)
    assert drawn == [1] * len(METHODS)
    assert again.cells == whole.cells and again.quality == whole.quality
    with pytest.raises(ValueError, match="holds cells of another run"):
        evaluate.run(student, [1], 2, 0, **options)
    with pytest.raises(ValueError, match="pairs must be one of first, held-out, got 'all'"):
        evaluate.run(student, [1], 1, pairs="all")


def cell(name, strength, good, steps=4, **settings):
    counts = evaluate.Counts(1000, 900, 950, 940, 930, 880, good)
    method = evaluate.Method(name, strength, *settings.values())
    return evaluate.Cell("student", steps, method, [counts], {7: counts})


def test_a_search_names_nags_best():
    tuned = evaluate.Results(
        [cell("none", 0.0, 990), cell("nag", 4.0, 700, tau=1.25, share=1.0)]
        + [cell("nag", 8.0, 800, tau=2.5, share=0.5)]
        + [cell("nag", 16.0, 600, steps=1, tau=2.5, share=0.5)],
        {"seeds": "7", "images per pair and seed": 40},
    )
    best = [evaluate.Method("nag", 16.0, 2.5, 0.5), evaluate.Method("nag", 8.0, 2.5, 0.5)]
    assert report.tuned_methods(tuned) == best
    assert "`nag 8, tau 2.5, alpha 0.5`" in report.searched(tuned)
    assert "best of 3 settings" in report.searched(tuned)


def test_each_method_as_it_did_best():
    results = evaluate.Results(
        [cell("none", 0.0, 400), cell("nasa", 0.5, 800), cell("nasa", 1.0, 700)]
        + [cell("projected", 1.0, 850), cell("projected", 2.0, 890)],
        {"seeds": "7"},
    )
    (said,) = report.best_methods(results).items()
    assert said[0] == 4
    assert [str(method) for method in said[1]] == ["projected 2", "nasa 0.5", "none"]
    table = report.best_table(results, 4).splitlines()
    assert table[2].startswith("| projected 2 |") and table[2].endswith("| 89.0 |")


def test_the_commands_of_a_search_and_of_held_out_prompts(student, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "METHODS", METHODS[:2])
    monkeypatch.setattr(evaluate, "nag_grid", lambda joint: METHODS[2:])
    small = ["eval", "--student", str(student), "--images", "1"]
    search, out, held = (tmp_path / name for name in ("search", "out", "held"))
    assert main([*small, "--seeds", "9", "--search", "--out", str(search)]) == 0
    found = report.read(search / "results.json")
    assert [c.method for c in found.cells] == [METHODS[0], METHODS[2]]
    tuned = ["--tuned", str(search / "results.json")]
    page = tmp_path / "page.md"
    assert main([*small, "--seeds", "0,1", *tuned, "--out", str(out), "--page", str(page)]) == 0
    results = report.read(out / "results.json")
    assert [c.method for c in results.cells] == list(METHODS)
    assert "other noise (`--search`), seed 9" in page.read_text()
    # the page is made of the numbers that are kept
    pictures = [out / f"{name}.png" for name in ("price", "samples")]
    assert report.markdown(results, pictures, page.parent) == page.read_text()
    best = ["--best-of", str(out / "results.json"), "--pairs", "held-out"]
    assert main([*small, *best, "--out", str(held)]) == 0
    cells = report.read(held / "results.json").cells
    assert [c.method for c in cells] == report.best_methods(results)[1]
    lacking = [*small, *best, "--steps", "1,2", "--out", str(tmp_path / "no")]
    assert main(lacking) == 1
    assert "results.json lacks 2. Measure them there first" in capsys.readouterr().err
    assert main([*small, *best, "--search", "--out", str(tmp_path / "no")]) == 1


# ---- the picture ---------------------------------------------------------------------------------


def test_the_picture_is_one_curve_a_method(tmp_path):
    results = report.read(report_of_docs())
    for name in ("one.png", "two.png"):
        command = ["plot", "--results", str(report_of_docs()), "--out", str(tmp_path / name)]
        assert main(command) == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    figure = report.frontier(results)
    assert len(figure.axes) == len(report.student_steps(results))
    for axes, steps in zip(figure.axes, report.student_steps(results), strict=True):
        cells = report.sweep(results, steps, "projected")
        expected = [[c.total.shares[name].value for c in cells] for name in ("removed", "valid")]
        drawn = [[list(line.get_xdata()), list(line.get_ydata())] for line in axes.lines]
        assert expected in drawn


# a picture of one number of steps is half as wide
MEASURED = sorted((Path(__file__).parents[2] / "docs" / "distill").glob("**/results.json"))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.parent.name)
def test_the_pictures_words_do_not_overlap(path):
    figure = report.frontier(report.read(path))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [figure._suptitle, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
        texts += [*axes.get_xticklabels(), *axes.get_yticklabels()]
    boxes = [t.get_window_extent(renderer) for t in texts if t.get_text() and t.get_visible()]
    assert len(boxes) > 20
    for i, box in enumerate(boxes):
        assert figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1)
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def report_of_docs():
    return Path(__file__).parents[2] / "docs" / "distill" / "results.json"


def test_without_a_start_there_is_no_picture(tmp_path):
    results = evaluate.Results([cell("nasa", 0.5, 800)], {"seeds": "7"})
    with pytest.raises(ValueError, match="evaluate the method none as well"):
        report.frontier(results)
    report.write(results, tmp_path)
    assert not (tmp_path / "price.png").exists()


def test_equal_labels_have_equal_colours():
    here = (Share(1, 2), Share(1, 2))
    curves = [plot.Curve(label, [here[0]], [here[1]]) for label in ("a", "b")]
    panels = [plot.Panel("p", curves, here), plot.Panel("q", curves[1:], here)]
    figure = plot.frontier("title", ("x", "y"), panels)
    colours = [[line.get_color() for line in axes.lines] for axes in figure.axes]
    assert colours[0][1] == colours[1][0] != colours[0][0]


# ---- the pooled vector ---------------------------------------------------------------------------


def test_tokens_and_vector_are_of_the_prompts_that_are_named(world):
    """And the model of words has no vector."""
    model = load(world / "joint" / "pipeline")
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    one, other = "a photo of a red circle", "a photo of a blue square"

    def drawn(tokens, vector):
        return pooled.swapped(model, tokens, vector, 1, noise, 0)

    expected = evaluate.draw(model, one, "", evaluate.NONE, 1, noise, 0)
    torch.testing.assert_close(drawn(one, one), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(drawn(one, other), drawn(one, one))
    assert not torch.allclose(drawn(one, other), drawn(other, other))
    words = load(world / "words" / "pipeline")
    assert torch.equal(words.encode([one]).pooled, torch.zeros(1, 128))
    assert not torch.equal(words.encode([one]).embeds, words.encode([other]).embeds)


def test_a_guided_vector_keeps_its_length():
    vector, negative = torch.randn(1, 8), torch.randn(1, 8)
    assert torch.equal(pooled.away(vector, negative, 0.0), vector)
    guided = pooled.away(vector, negative, 3.0)
    torch.testing.assert_close(guided.norm(), vector.norm())
    assert (guided * negative).sum() < (vector * negative).sum()
    torch.testing.assert_close(pooled.away(vector, 2 * vector, 3.0), vector)


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_the_swaps_name_the_same_attributes(world):
    for swap in pooled.SWAPS[world.name]:
        first, second = (pooled.owned(prompt, world) for prompt in swap)
        assert first.keys() == second.keys()
        # a single object is what both have: of a pair one could have either value
        assert {name for name in first if first[name] == second[name]} <= {"number"}
        # no image is as both say
        (one,), (other,) = (world.matches([prompt]).bool() for prompt in swap)
        assert one.any() and other.any() and not (one & other).any()


def test_the_command_of_pooled_vectors(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pooled, "STRENGTHS", (0.0, 1.0))
    out, page = tmp_path / "pooled.json", tmp_path / "pooled.md"
    command = ["pooled", "--images", "1", "--steps", "1", "--out", str(out), "--page", str(page)]
    student = str(world / "joint" / "pipeline")
    assert main([*command, "--student", student]) == 0, capsys.readouterr().err
    found = json.loads(out.read_text())
    assert page.read_text() == pooled.page(found)
    assert found["follow"]["colour"]["images"] == 6 and len(found["steer"]) == 4
    # as the evaluation counts it
    steer = found["steer"]["tokens 2, vector 0"]
    cell = evaluate.run(
        world / "joint" / "pipeline", [1], 1, methods=[evaluate.Method("projected", 2.0)]
    ).cells[0]
    assert steer["removed"] == cell.total.removed and steer["good"] == cell.total.good
    assert main([*command, "--student", str(world / "words" / "pipeline")]) == 1
    assert "has no pooled vector" in capsys.readouterr().err


# ---- students of the shipped one -----------------------------------------------------------------


def test_a_projection_that_hands_on_what_it_is_given():
    pipe = load(shipped.path(32)).pipe
    projected = clip.with_identity(pipe.text_encoder)
    tokens = pipe.tokenizer("a photo of a red circle", return_tensors="pt").input_ids
    output = projected(tokens)
    assert torch.equal(output.last_hidden_state, pipe.text_encoder(tokens).last_hidden_state)
    torch.testing.assert_close(output.text_embeds, pipe.text_encoder(tokens).pooler_output)


def test_the_command_that_begins_with_the_shipped_student(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(make.RECIPES, 32, RECIPE)
    monkeypatch.setitem(make.WORLDS, 32, UNSEEN)
    command = ["world", "--from-shipped", "--out", str(tmp_path)]
    assert main(command) == 0, capsys.readouterr().err
    for name in ("words", "joint", "pixart"):
        assert load(tmp_path / name / "pipeline").denoiser is not None
    assert not (tmp_path / "teacher").exists()
    assert main([*command, "--teacher-steps", "3"]) == 1
    assert "--from-shipped trains no teacher" in capsys.readouterr().err
    assert main([*command, "--stage", "teacher"]) == 1
    assert "--stage must be one of joint, words, pixart, got 'teacher'" in capsys.readouterr().err
