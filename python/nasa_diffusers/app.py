"""A page in the browser: the image without and with a negative prompt, side by side.

    python -m nasa_diffusers app --model DIR_OR_ID

Copied into a Space of Hugging Face as its `app.py`, this file is that Space's page: docs/app.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from nasa_diffusers.api import find_denoisers
from nasa_diffusers.command import add_model_options, load_on_device, status_of
from nasa_diffusers.drawing import METHODS, Wish, compare, enlarged, method_of, save
from nasa_diffusers.families import family_of
from nasa_diffusers.methods import NAG

HOST = "127.0.0.1"
SHIPPED = "the small model that comes with the package"
WAITING = 16  # requests; to one more the page says that it is full
LABELS = {"nasa": "NASA", "projected": "NASA, projected", "nag": "NAG", "vsf": "VSF"}
# where each slider ends; at its beginning NASA and VSF are off, NAG nearly
HIGHEST = {"nasa": 2.0, "projected": 6.0, "nag": 12.0, "vsf": 4.0}

# a report is a table
CSS = "#report textarea { font-family: monospace }"


class Studio:
    """A loaded pipeline that draws for one request at a time."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.denoiser = find_denoisers(pipe)[0]
        self.family = family_of(self.denoiser)
        self.folder = tempfile.TemporaryDirectory(prefix="nasa-app-")
        self.lock = threading.Lock()
        self.drawn = 0

    def default_strength(self, name: str) -> float:
        """The family's own: alpha, of NAG its scale."""
        if METHODS[name] is NAG:
            return self.family.default_nag(self.denoiser)[0]
        return METHODS[name]().default_alpha(self.family, self.denoiser)

    def strength_slider(self, name: str) -> dict[str, Any]:
        """What the slider is for one method, in gradio's words."""
        is_nag = METHODS[name] is NAG
        return {
            "label": "Scale" if is_nag else "Strength",
            "info": "1 is off" if is_nag else "0 is off",
            "minimum": 1.05 if is_nag else 0.0,
            "maximum": HIGHEST[name],
            "step": 0.05,
            "value": self.default_strength(name),
        }

    def answer(
        self,
        prompt: str,
        negative: str,
        method: str,
        strength: float,
        steps: int,
        seed: int,
        guidance: float,
        height: int | None,
        width: int | None,
    ) -> tuple[Image.Image | str | None, Image.Image | str | None, str]:
        """Both pictures and the report; or no picture, and one sentence on what was wrong."""
        with self.lock:
            try:
                wish = Wish(prompt, negative, steps, seed, guidance, height, width)
                compared = compare(self.pipe, wish, [method_of(method, strength)])
            except Exception as error:
                # what the user cannot correct is wanted whole, where the program runs
                if not isinstance(error, (ValueError, NotImplementedError)):
                    traceback.print_exc()
                return None, None, f"error: {error or type(error).__name__}"
            pictures = [self.picture(x) for x in (compared.without, *compared.guided)]
        return pictures[0], pictures[1], str(compared.reports[0])

    def picture(self, images: list[Image.Image]) -> Image.Image | str:
        """An image to show, or the file of a video."""
        images = [enlarged(image) for image in images]
        if len(images) == 1:
            return images[0]
        folder = Path(self.folder.name)
        self.drawn += 1
        # the page has its own copy of what was answered
        (folder / f"video-{self.drawn - WAITING}.gif").unlink(missing_ok=True)
        return str(save(images, folder / f"video-{self.drawn}"))


def make_page(studio: Studio, title: str, prompt: str, negative: str, method: str, steps: int):
    """The page; `prompt` to `steps` are what its fields hold at first."""
    gr = import_gradio()
    with gr.Blocks(
        title="NASA negative prompts", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gr.Markdown(f"# Negative prompts\n{title}; the same noise, without and with.")
        with gr.Row():
            fields: list[Any] = [
                gr.Textbox(prompt, label="Prompt", elem_id="prompt"),
                gr.Textbox(negative, label="Negative prompt", elem_id="negative"),
            ]
        with gr.Row():
            choices = [(LABELS[name], name) for name in METHODS]
            chosen = gr.Dropdown(choices, value=method, label="Method", elem_id="method")
            slider = gr.Slider(**studio.strength_slider(method), elem_id="strength")
            fields += [
                chosen,
                slider,
                gr.Slider(1, 50, steps, step=1, label="Steps", elem_id="steps"),
                gr.Number(0, precision=0, label="Seed", elem_id="seed"),
            ]
        with gr.Accordion("More", open=False), gr.Row():
            fields += [
                gr.Number(0.0, label="Guidance scale, 0 is off", elem_id="guidance"),
                gr.Number(None, precision=0, label="Height, empty: the model's", elem_id="height"),
                gr.Number(None, precision=0, label="Width, empty: the model's", elem_id="width"),
            ]
        button = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Row():
            # png: no pixel is lost
            picture = {
                "format": "png", "interactive": False, "buttons": ["download", "fullscreen"]
            }  # fmt: skip
            answers: list[Any] = [
                gr.Image(label="Without", elem_id="without", **picture),
                gr.Image(label="With the negative prompt", elem_id="with", **picture),
            ]
        answers.append(gr.Textbox(label="Report", lines=9, elem_id="report", interactive=False))
        chosen.change(
            lambda name: gr.Slider(**studio.strength_slider(name)), chosen, slider, api_name=False
        )
        gr.on(
            [button.click, *(field.submit for field in fields[:2])],
            studio.answer, fields, answers, api_name="draw", concurrency_limit=1,
        )  # fmt: skip
    return page.queue(max_size=WAITING, default_concurrency_limit=1)


def import_gradio() -> Any:
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise RuntimeError('app: the page needs gradio; pip install "nasa-kernels[app]"') from error
    return gradio


def shipped_model() -> str:
    """Folder of the model that comes with the package."""
    from nasa_distill.world import shipped

    return str(shipped.path())


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, default=SHIPPED)
    add = parser.add_argument
    add("--prompt", help="in the field at first")
    add("--negative", help="in the field at first")
    add("--method", choices=METHODS, help="at first; default: nasa, of the shipped model projected")
    add("--steps", type=int, default=4, help="at first; default: %(default)s")
    add("--host", default=HOST, help="address to listen on; default: %(default)s, this machine")
    add("--port", type=int, help="default: the first that is free from 7860 on")


def run(options: argparse.Namespace) -> None:
    """Load the model and serve the page until it is interrupted."""
    gradio = import_gradio()
    title, prompt, negative, method = options.model, "a photo of a cat", "blurry", "nasa"
    if options.model is None:
        options.model = shipped_model()
        title, prompt, negative, method = SHIPPED, "a photo of a shape", "striped", "projected"
    studio = Studio(load_on_device(options))
    page = make_page(
        studio,
        title[0].upper() + title[1:],
        prompt if options.prompt is None else options.prompt,
        negative if options.negative is None else options.negative,
        options.method or method,
        options.steps,
    )
    if options.host != HOST:
        print(f"whoever reaches {options.host} can use this page: it asks for no password")
    # fonts of the system: the page loads nothing from elsewhere
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(
        server_name=options.host, server_port=options.port, share=False, show_error=True,
        ssr_mode=False, theme=theme, css=CSS, footer_links=[],
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """As a script, which in a Space is told by its variables what a command line would say."""
    parser = argparse.ArgumentParser(description="Negative prompts, without and with.")
    add_options(parser)
    parser.set_defaults(
        model=os.environ.get("NASA_APP_MODEL"), host=os.environ.get("GRADIO_SERVER_NAME", HOST)
    )
    return status_of(run, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
