"""A script of SD.Next: a negative prompt that acts at guidance 1 and in one step.

Copy it into SD.Next's folder `scripts`, and install nasa-kernels into its environment.
"""

import gradio as gr
from modules import processing, scripts_manager, shared
from modules.logger import log
from nasa_diffusers import nasa
from nasa_diffusers.drawing import METHODS, method_of


class NasaScript(scripts_manager.Script):
    def title(self):
        return "NASA: negative prompts at any guidance"

    def show(self, is_img2img):
        return True

    def ui(self, is_img2img):
        with gr.Row():
            negative = gr.Textbox(label="Negative prompt, empty: the one above", value="")
        with gr.Row():
            method = gr.Dropdown(label="Method", choices=list(METHODS), value="nasa")
            strength = gr.Number(label="Strength, 0: the model's default", value=0.0)
        with gr.Row():
            start = gr.Slider(label="Start", minimum=0.0, maximum=1.0, step=0.01, value=0.0)
            stop = gr.Slider(label="Stop", minimum=0.0, maximum=1.0, step=0.01, value=1.0)
        return [negative, method, strength, start, stop]

    def run(self, p, negative, method, strength, start, stop):
        """SD.Next's own processing, while NASA is on for its pipeline."""
        if not negative.strip():
            negative = p.negative_prompt
        if not isinstance(negative, str) or not negative.strip():
            raise ValueError("NASA: there is no negative prompt; write one, or choose no script")
        chosen = method_of(method, strength or None)
        window = {"start": float(start), "stop": None if stop >= 1 else float(stop)}
        with nasa(shared.sd_model, negative, chosen, **window) as handle:
            processed = processing.process_images(p)
            report = handle.report()
        # another checkpoint was loaded meanwhile, or another network was in its place
        if report.problem is not None or report.attention_flops is None:
            reason = report.problem or "the model that drew is not the one that NASA was on"
            raise RuntimeError(f"NASA: nothing was guided: {reason}")
        log.info(f"NASA:\n{report}")
        return processed
