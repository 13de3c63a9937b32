"""The node: what it asks for. `steering/` has what it does."""

from comfy_api.latest import ComfyExtension, io

from .steering.model import steer
from .steering.terms import METHODS, RULES, Term, layers_of, prompt_of


class NasaNegativePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NasaNegativePrompt",
            display_name="NASA negative prompt",
            description=(
                "Guides away from a negative prompt inside the attention, in the rows of the "
                "positive one: it acts at cfg 1 and in one step. Several nodes in a row add up."
            ),
            category="advanced/guidance",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("negative"),
                io.Combo.Input("method", options=list(METHODS), default="NASA"),
                io.Float.Input(
                    "strength", default=0.2, min=0.0, max=20.0, step=0.01,
                    tooltip="alpha of NASA and VSF, off at 0; the scale of NAG, off at 1",
                ),
                io.Combo.Input(
                    "rule", options=list(RULES), default="nasa-cross",
                    tooltip="how NASA reads joint attention of text and image (FLUX, SD3, Qwen); "
                    "of no other effect",
                ),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.001),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.001),
                io.String.Input(
                    "layers", default="",
                    tooltip="which attentions to text, counted from 0 as they run, as in 0-9, 12; "
                    "empty: all",
                ),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, negative, method, strength, rule, start_percent, end_percent, layers
    ) -> io.NodeOutput:
        text, settings = prompt_of(negative)
        term = Term(
            text, settings, method, float(strength), rule, float(start_percent),
            float(end_percent), layers_of(layers),
        )  # fmt: skip
        return io.NodeOutput(steer(model, term))


class NasaExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [NasaNegativePrompt]


async def comfy_entrypoint() -> NasaExtension:
    return NasaExtension()
