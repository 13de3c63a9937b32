"""Models built on Wan, each with a copy of its attention class: ChronoEdit, Wan-Animate, AnyFlow
and Helios. Their text path is Wan's.
"""

from nasa_diffusers.families.versions import stock_class
from nasa_diffusers.families.wan import Wan


class ChronoEdit(Wan):
    """Editing as a short video, from an image whose tokens stand beside the text."""

    name = "ChronoEdit"
    denoisers = ("ChronoEditTransformer3DModel",)
    attention = stock_class("transformer_chronoedit", "WanAttention")
    processors = (stock_class("transformer_chronoedit", "WanAttnProcessor"),)


class WanAnimate(Wan):
    """Its face adapter attends to a motion, not to text, and stays as it is."""

    name = "Wan-Animate"
    denoisers = ("WanAnimateTransformer3DModel",)
    attention = stock_class("transformer_wan_animate", "WanAttention")
    processors = (stock_class("transformer_wan_animate", "WanAttnProcessor"),)


class AnyFlow(Wan):
    """Few-step video in any number of steps."""

    name = "AnyFlow"
    doubles_batch = True
    denoisers = ("AnyFlowTransformer3DModel",)
    attention = stock_class("transformer_anyflow", "AnyFlowAttention")
    processors = (stock_class("transformer_anyflow", "AnyFlowCrossAttnProcessor"),)

    def grids(self, denoiser, sample, inputs):
        # [b, frames, c, height, width]
        return super().grids(denoiser, sample.transpose(1, 2), inputs)

    def check(self, denoiser):
        """An image embedder, which its pipelines do not use, is no reason to refuse it."""

    def check_call(self, denoiser, inputs):
        if inputs.get("encoder_hidden_states_image") is not None:
            raise ValueError(
                "nasa_diffusers: encoder_hidden_states_image is among the keys of the text in "
                "AnyFlow, where the negative prompt cannot leave it out; call without it"
            )


class Helios(Wan):
    """Long video, chunk by chunk; only the frames that are made attend to the text."""

    name = "Helios"
    denoisers = ("HeliosTransformer3DModel",)
    attention = stock_class("transformer_helios", "HeliosAttention")
    processors = (stock_class("transformer_helios", "HeliosAttnProcessor"),)
