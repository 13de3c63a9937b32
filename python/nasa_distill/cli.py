"""Command line.

    python -m nasa_distill world --out world            the small world's teacher and its students
    python -m nasa_distill train --preset sd15 --teacher DIR_OR_ID --data prompts.txt \\
        --negatives neg.txt --out run                   NASA-T; the same command goes on with it
    python -m nasa_distill eval --out results           negative prompts on the shipped model
    python -m nasa_distill judge --out judge.json       how far the judge can be trusted
    python -m nasa_distill plot --results results/results.json    one picture of it
    python -m nasa_distill sweep --out sweep.png        methods by rising strength, in pictures
    python -m nasa_distill ablate --world world --out ablation    who should see the negatives
    python -m nasa_distill demo                         the same for one prompt, with pictures
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nasa_distill.train.config import PRESETS, Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. An error that the user can correct is one line on stderr, status 1."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nasa_distill",
        description="One-step students that have a negative prompt (NASA-T).",
    )
    commands = parser.add_subparsers(required=True)

    world = commands.add_parser("world", help="train the small world's teacher and its students")
    world.set_defaults(run=run_world)
    add = world.add_argument
    add("--out", type=Path, required=True, help="folder; the same command goes on with it")
    add("--teacher-steps", type=int, help="of each cycle, instead of the recipe's")
    add("--pairs", type=int, help="noise and image pairs of the warm-up, instead of the recipe's")
    add("--student-steps", type=int, help="of each student's cycles, instead of the recipe's")
    add("--size", type=int, choices=(32, 64), default=32, help="of the world's images")
    add("--stage", help="the last stage to run, by the name of its folder; default: all")
    add(
        "--from-shipped",
        action="store_true",
        help="only the students with transformers, of which the shipped one is the teacher",
    )

    train = commands.add_parser("train", help="NASA-T")
    train.set_defaults(run=run_train)
    add = train.add_argument
    add("--preset", choices=PRESETS, required=True, help="settings of the paper's Table 6")
    add("--teacher", required=True, help="folder or hub id of a diffusers pipeline")
    add("--student", help="likewise, what the student begins with; default: the teacher")
    add("--data", type=Path, required=True, help="prompts, one per line")
    add("--negatives", type=Path, help="negative prompts, one per line")
    add("--clip", help="folder or hub id of a CLIPModel, for the clamped CLIP loss")
    add("--out", type=Path, required=True, help="folder; the same command goes on with it")
    add("--save-every", type=int, default=500, help="steps (default: %(default)s)")
    add("--sample-every", type=int, default=500, help="steps (default: %(default)s)")
    add("--fsdp", action="store_true", help="split the networks over the processes")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of nasa_distill.train.config.Settings; ranges as LOW,HIGH; repeat",
    )

    evaluate = commands.add_parser("eval", help="measure negative prompts on the small world")
    evaluate.set_defaults(run=run_eval)
    add = evaluate.add_argument
    add("--student", help="folder of a one-step pipeline; default: the shipped one")
    add("--teacher", help="folder of the many-step pipeline, for its rows")
    add("--images", type=int, default=100, help="per prompt pair (default: %(default)s)")
    add("--steps", type=_integers, default=[1], help="e.g. 1,4 (default: 1)")
    add("--seeds", type=_integers, default=[0], help="of the noise, e.g. 0,1,2 (default: 0)")
    add("--pairs", choices=("first", "held-out"), default="first", help="list of prompt pairs")
    add(
        "--search",
        action="store_true",
        help="NAG alone, over scale, tau and alpha, for --tuned with other seeds",
    )
    add("--tuned", type=Path, help="results.json of a search: also NAG as it did best there")
    add("--best-of", type=Path, help="results.json: each method only as it did best there")
    add("--methods", help="only these, NAME:STRENGTH, of NAG also :TAU:ALPHA; separated by commas")
    add("--out", type=Path, required=True, help="folder of results.json, results.csv and pictures")
    add("--page", type=Path, help="also write the page to this Markdown file")

    judge = commands.add_parser("judge", help="how far a small world's judge can be trusted")
    judge.set_defaults(run=run_judge)
    add = judge.add_argument
    add("--size", type=int, choices=(32, 64), default=32, help="of the world's images")
    add("--autoencoder", help="folder of an AutoencoderKL: also what it makes of images")
    add("--images", type=int, default=2000, help="of each kind (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, help="JSON file")
    add("--page", type=Path, help="also write the page to this Markdown file")

    plot = commands.add_parser("plot", help="results as one picture: what is removed, what breaks")
    plot.set_defaults(run=run_plot)
    add = plot.add_argument
    add("--results", type=Path, required=True, help="results.json of eval")
    add("--out", type=Path, default=Path("docs/sweep.png"), help="PNG; default: %(default)s")

    sweep = commands.add_parser("sweep", help="one picture of it: methods by rising strength")
    sweep.set_defaults(run=run_sweep)
    add = sweep.add_argument
    add("--student", help="folder of a few-step pipeline; default: the shipped one")
    add("--steps", type=int, default=1, help="default: %(default)s")
    add("--seed", type=int, default=0)
    add("--pair", type=int, default=0, help="number of the prompt pair; default: %(default)s")
    add(
        "--out",
        type=Path,
        default=Path("docs/distill/pictures.png"),
        help="PNG; default: %(default)s",
    )

    pooled = commands.add_parser("pooled", help="what a prompt's pooled vector says of an image")
    pooled.set_defaults(run=run_pooled)
    add = pooled.add_argument
    add("--student", type=Path, required=True, help="folder of a pipeline with joint attention")
    add("--steps", type=int, default=4, help="default: %(default)s")
    add("--images", type=int, default=100, help="per prompt (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--alpha", type=float, default=2.0, help="of projected NASA, for the tokens")
    add("--out", type=Path, required=True, help="JSON file")
    add("--page", type=Path, help="also write the page to this Markdown file")

    ablate = commands.add_parser("ablate", help="which networks should see negatives (Table 5)")
    ablate.set_defaults(run=run_ablate)
    add = ablate.add_argument
    add("--world", type=Path, required=True, help="folder that the command world made")
    add("--student", type=Path, help="where to begin; default: the world's one-step student")
    add("--seeds", type=_integers, default=[0, 1, 2], help="e.g. 0,1,2 (default)")
    add("--images", type=int, default=100, help="per prompt pair (default: %(default)s)")
    add(
        "--methods", default="nasa:0.5", help="of the evaluation, as of eval (default: %(default)s)"
    )
    add("--variants", help="only these rows, separated by commas; default: all")
    add("--clip", action="store_true", help="also CLIP+ and CLIP-, by the world's own CLIP")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="as of train")
    add("--out", type=Path, required=True, help="folder; the same command goes on with it")

    score = commands.add_parser(
        "score",
        help="experimental: CLIP, HPSv2 and VBench scores of any images and videos",
    )
    score.set_defaults(run=run_score)
    add = score.add_argument
    what = score.add_mutually_exclusive_group(required=True).add_argument
    what("--pairs", type=Path, help="CSV: image,prompt,negative[,present,absent]")
    what("--videos", type=Path, help="folder: aesthetic and imaging quality of its videos")
    add("--clip", help="folder or hub id of a CLIPModel; --pairs needs it")
    add("--vbench-python", type=Path, help="of an environment with vbench; --videos needs it")
    add("--hps", type=Path, help="weights of HPSv2, e.g. HPS_v2.1_compressed.pt: its score too")
    add("--out", type=Path, required=True, help="JSON file")

    pack = commands.add_parser("pack", help="make a pipeline the shipped one, in half precision")
    pack.set_defaults(run=run_pack)
    pack.add_argument("--pipeline", type=Path, required=True)
    pack.add_argument("--out", type=Path, help="default: the folder of the shipped model")

    demo = commands.add_parser("demo", help="the shipped model with and without a negative prompt")
    demo.set_defaults(run=run_demo)
    demo.add_argument("--out", type=Path, default=Path("demo_output"), help="folder of the PNG")
    return parser


def run_world(options: argparse.Namespace) -> None:
    from nasa_distill.world.make import OTHERS, RECIPES, STAGES, make, make_from_shipped

    recipe = RECIPES[options.size]
    names = ["student", "student_settled", "four_step", "four_step_settled"]
    names += [name for other in OTHERS for name in (other, f"{other}_shown")]
    students = dict.fromkeys(names, options.student_steps)
    for name, steps in {"teacher": options.teacher_steps, **students}.items():
        if steps is not None:
            cycles = tuple(replace(cycle, steps=steps) for cycle in getattr(recipe, name))
            changed: dict[str, Any] = {name: cycles}
            recipe = replace(recipe, **changed)
    if options.pairs is not None:
        recipe = replace(recipe, pairs=options.pairs, shown_pairs=options.pairs)
    if options.from_shipped and options.teacher_steps is not None:
        raise ValueError("world: --from-shipped trains no teacher; leave out --teacher-steps")
    run, stages = (make_from_shipped, OTHERS) if options.from_shipped else (make, STAGES)
    stage = options.stage or stages[-1]
    if stage not in stages:
        raise ValueError(f"world: --stage must be one of {', '.join(stages)}, got {stage!r}")
    run(recipe, options.out, stage)


def run_train(options: argparse.Namespace) -> None:
    from nasa_distill.train.checks import check_data
    from nasa_distill.train.clip import Clip
    from nasa_distill.train.nasa_t import Run
    from nasa_distill.train.networks import load
    from nasa_distill.world.kinds import world_at

    settings = PRESETS[options.preset].changed(**parse_settings(options.set))
    prompts = read_lines(options.data, "--data")
    negatives = read_lines(options.negatives, "--negatives") if options.negatives else []
    if options.preset == "world":
        world = world_at(Path(options.teacher))
        for line in (*prompts, *negatives):
            world.read(line)
    check_data(prompts, negatives, settings)
    teacher, student = load(options.teacher), load(options.student or options.teacher)
    clip = Clip.load(options.clip) if options.clip else None
    identity = {
        "teacher": str(options.teacher),
        "student_begins": str(options.student or options.teacher),
        "clip": options.clip,
    }
    run = Run(
        settings, teacher, student, prompts, negatives, options.out, clip, identity, options.fsdp
    )
    path = run.train(options.save_every, options.sample_every)
    if run.accelerator.is_main_process:
        print(f"wrote {path}")


def run_eval(options: argparse.Namespace) -> None:
    from nasa_distill.train.networks import load
    from nasa_distill.world import shipped
    from nasa_distill.world.evaluation import evaluate, report

    student = options.student or shipped.path()
    tuned = None if options.tuned is None else report.read(options.tuned)
    given = [options.search, options.best_of is not None, options.methods is not None]
    if sum(given) > 1:
        raise ValueError("eval: --search, --best-of and --methods all say which methods; give one")
    methods: Any = None
    if options.methods is not None:
        methods = tuple(map(evaluate.read_method, options.methods.split(",")))
    if options.search:
        methods = (evaluate.NONE, *evaluate.nag_grid(load(student).joint))
    if options.best_of is not None:
        methods = report.best_methods(report.read(options.best_of))
        if missing := set(options.steps) - set(methods):
            raise ValueError(
                f"eval: --best-of must hold every number of --steps; {options.best_of} lacks "
                f"{', '.join(map(str, sorted(missing)))}. Measure them there first, or leave "
                "them out"
            )
    results = evaluate.run(
        Path(student),
        options.steps,
        options.images,
        options.seeds,
        None if options.teacher is None else Path(options.teacher),
        methods,
        [] if tuned is None else report.tuned_methods(tuned),
        options.pairs,
        options.out / "cells.jsonl",
    )
    picture = options.out / "samples.png"
    evaluate.samples(Path(student), options.steps[0], options.seeds[0]).save(picture)
    if tuned is not None:
        results.about["NAG"] = report.searched(tuned)
    report.write(results, options.out, options.page, [picture])


def run_sweep(options: argparse.Namespace) -> None:
    from nasa_distill.world import shipped
    from nasa_distill.world.evaluation import sweep

    student = Path(options.student or shipped.path())
    sweep.write(student, options.out, options.steps, options.seed, options.pair)
    print(f"wrote {options.out}")


def run_judge(options: argparse.Namespace) -> None:
    from nasa_distill.world.evaluation import reliability
    from nasa_distill.world.kinds import WORLDS
    from nasa_distill.world.large import autoencoder

    world, code = WORLDS[options.size], None
    if options.images < 1:
        raise ValueError(f"judge: --images must be at least 1, got {options.images}")
    if options.autoencoder is not None:
        code = autoencoder.load(options.autoencoder, world.size)
    found = reliability.run(world, options.images, options.seed, code)
    reliability.write(found, options.out, options.page)


def run_plot(options: argparse.Namespace) -> None:
    from nasa_distill.world.evaluation import report

    report.plot_frontier(report.read(options.results), options.out)
    print(f"wrote {options.out}")


def run_pooled(options: argparse.Namespace) -> None:
    from nasa_distill.world.evaluation import pooled

    found = pooled.run(options.student, options.steps, options.images, options.seed, options.alpha)
    pooled.write(found, options.out, options.page)


def run_ablate(options: argparse.Namespace) -> None:
    from nasa_distill.train.clip import Clip
    from nasa_distill.world.evaluation import ablation, evaluate

    variants = options.variants.split(",") if options.variants else list(ablation.VARIANTS)
    rows = ablation.run(
        PRESETS["world"].changed(**parse_settings(options.set)),
        options.world / "teacher" / "pipeline",
        options.student or options.world / "student" / "pipeline",
        read_lines(options.world / "prompts.txt", "--world"),
        read_lines(options.world / "negatives.txt", "--world"),
        options.seeds,
        options.out,
        tuple(map(evaluate.read_method, options.methods.split(","))),
        options.images,
        Clip.load(options.world / "clip" / "model") if options.clip else None,
        variants,
    )
    print(ablation.page(rows))


def run_score(options: argparse.Namespace) -> None:
    from nasa_distill.scores import hps, pairs, vbench
    from nasa_distill.train.clip import Clip

    if options.videos is not None:
        if options.vbench_python is None or options.clip is not None or options.hps is not None:
            raise ValueError("score: --videos takes --vbench-python, and neither --clip nor --hps")
        result = vbench.score(options.videos, options.vbench_python)
    else:
        if options.clip is None or options.vbench_python is not None:
            raise ValueError("score: --pairs takes --clip, and not --vbench-python")
        clip = Clip.load(options.clip)
        scorer = None if options.hps is None else hps.load(options.hps, clip.tokenizer)
        result = pairs.score(options.pairs, clip, scorer)
    pairs.write(result, options.out)
    print(", ".join(f"{name} {result[name]}" for name in result if name != "rows"))


def run_pack(options: argparse.Namespace) -> None:
    from nasa_distill.world import shipped
    from nasa_distill.world.kinds import world_at

    out = options.out or shipped.MODELS / shipped.NAMES[world_at(options.pipeline).size]
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{out}: {shipped.pack(options.pipeline, out) / 1e6:.2f} MB of weights")


def run_demo(options: argparse.Namespace) -> None:
    from nasa_distill.demo.show import show

    show(options.out)


def read_lines(path: Path, option: str) -> list[str]:
    """The lines of a file; an empty one in the middle is an error, and so is an empty file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}: cannot read {path}: {error}") from error
    if not lines:
        raise ValueError(f"{option}: {path} is empty; it must hold one prompt per line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{option}: line {number} of {path} is empty; remove it")
    return lines


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` in the type that the setting has."""
    defaults = {field.name: getattr(PRESETS["sd15"], field.name) for field in fields(Settings)}
    parsed: dict[str, Any] = {}
    for item in given:
        name, separator, text = item.partition("=")
        if not separator or name not in defaults:
            raise ValueError(f"--set {item}: must be NAME=VALUE, NAME one of {', '.join(defaults)}")
        parsed[name] = _value(item, text, defaults[name])
    return parsed


def _value(item: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--set {item}: must be true or false")
        return text.lower() == "true"
    try:
        if isinstance(default, tuple):
            kind = type(default[0])
            values = tuple(kind(part) for part in text.split(","))
            if kind is not str and len(values) != len(default):
                raise ValueError(f"{len(default)} values")
            return values
        return type(default)(text)
    except ValueError as error:
        raise ValueError(
            f"--set {item}: must be like {default!r}, a {type(default).__name__}"
        ) from error


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
