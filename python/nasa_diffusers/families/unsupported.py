"""Denoisers of diffusers that no family knows, and why: what a family of them would need."""

# reasons by the class of the denoiser
REASONS: dict[str, str] = {}


def _because(reason: str, *denoisers: str) -> None:
    REASONS.update(dict.fromkeys(denoisers, reason))


_because(
    "text and image share its attention and the text changes from block to block, in an order "
    "and with positions of its own",
    "MiniMaxH3Transformer3DModel",
    "Flux3Transformer2DModel",
)  # fmt: skip
_because(
    "its text passes blocks that depend on the timestep before it meets the image, so a negative "
    "prompt would have to pass them in every step",
    "Kandinsky5Transformer3DModel", "Kandinsky6Transformer3DModel",
)  # fmt: skip
_because(
    "its text is read once for all steps, in the same attention as the image",
    "NucleusMoEImageTransformer2DModel",
    "StableCascadeUNet",
)  # fmt: skip
_because(
    "prompt and image are one sequence of a language model",
    "Cosmos3OmniTransformer", "OmniGenTransformer2DModel",
)  # fmt: skip
_because(
    "it draws an embedding for another model, and does not attend to a text",
    "PriorTransformer", "WuerstchenPrior",
)  # fmt: skip
_because(
    "its prompt is read together with lyrics and the timbre of a recording, so a negative prompt "
    "would need those of the call", "AceStepTransformer1DModel",
)  # fmt: skip
_because(
    "its prompt is encoded for a task, when editing together with the image of the call",
    "DreamLiteUNetModel",
)  # fmt: skip
_because(
    "the start and the duration of the sound, which the call sets, are tokens of its text",
    "StableAudioDiTModel",
)  # fmt: skip
_because("its attention is a difference of two, with layers of its own", "StableAudio3DiTModel")
_because(
    "a layer attends to several texts", "AudioLDM2UNet2DConditionModel", "UniDiffuserModel",
    "UNetFlatConditionModel",
)  # fmt: skip
_because(
    "its text goes through a module that mixes tokens", "BriaFibo2Transformer2DModel",
    "Kandinsky3UNet", "WuerstchenDiffNeXt", "I2VGenXLUNet",
)  # fmt: skip
_because(
    "its text layers have other names and projections", "LongCatAudioDiTTransformer",
    "SanaWMTransformer3DModel",
)  # fmt: skip
_because("it keeps keys of earlier chunks inside its layers", "AnyFlowFARTransformer3DModel")
_because(
    "its pipelines are deprecated in diffusers", "Transformer2DModel", "UNet3DConditionModel",
    "UNetControlNetXSModel", "UVit2DModel",
)  # fmt: skip
_because(
    "a language model draws its prompt as tokens of the image first; its text is only what is to "
    "be written there",
    "GlmImageTransformer2DModel",
)
_because(
    "a block attends to its text twice, the second time without the image",
    "MotifVideoTransformer3DModel",
)
_because(
    "images of several sizes are filled up and masked in the attention that its text shares",
    "JoyImageEditPlusTransformer3DModel",
)
