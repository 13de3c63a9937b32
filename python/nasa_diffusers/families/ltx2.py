"""LTX-2, 2.3 and 2.5: video and sound, with a text for each.

Gemma's text passes two small transformers outside the denoiser, the connectors, which make one text
for the video and one for the sound and fill up the padding. A negative prompt passes them, too, and
goes against both: `layers="*.attn2"` guides the video alone, `"*.audio_attn2"` the sound. From 2.3
on a block modulates its texts by the time, and a gate, made of the layer's input, multiplies what
the attention gives.

Classifier-free guidance is one doubled batch. The further calls of spatio-temporal guidance and of
isolated modalities carry the prompt and are guided as well: what they are compared with is.
"""

import torch
from torch import Tensor

from nasa_diffusers.alpha import Targets
from nasa_diffusers.caller import find_caller
from nasa_diffusers.encoding import encode_prompt
from nasa_diffusers.families.base import ImageTokens
from nasa_diffusers.families.side_cross import SideCross
from nasa_diffusers.side import Side
from nasa_diffusers.weights import own_weights

try:
    from diffusers.models.transformers import transformer_ltx2 as ltx2
except ImportError:  # before diffusers 0.37
    PROCESSORS: tuple[type, ...] = ()
else:
    PROCESSORS = tuple(ltx2.LTX2Attention._available_processors)

# of Echo, which runs this denoiser
MEMORY_FIRST = "puts its memory_images before the video that is made, and would guide them instead"
# of given tokens, one for each tile
MAX_LAYOUTS = 31
VIDEO, SOUND = "encoder_hidden_states", "audio_encoder_hidden_states"


class LTX2Tokens(ImageTokens):
    """The video that is made comes first; frames and references that are given may follow. Where a
    call does not say how large it is, those are given that are less noisy than the others."""

    def __init__(self, family, denoiser):
        super().__init__(family, denoiser)
        self._targets: dict[tuple, Targets] = {}
        self._by_noise: tuple[Targets, ...] = ()

    def _own(self, inputs):
        sizes = [inputs.get(name) for name in ("num_frames", "height", "width")]
        return None if None in sizes else tuple(sizes)

    def grids(self, sample, inputs):
        own = self._own(inputs)
        if own is None:
            raise ValueError(
                "nasa_diffusers: alpha is a map over the picture, and this call of the transformer "
                "does not say num_frames, height and width; give them, or one alpha per video"
            )
        return (own,)

    def padding(self, sample, inputs):
        frames, height, width = self.grids(sample, inputs)[0]
        return max(sample.shape[1] - frames * height * width, 0)

    def targets(self, inputs):
        sample, own = inputs["hidden_states"], self._own(inputs)
        if sample.is_meta:
            return None
        if own is None:
            return self._less_noisy(sample, inputs.get("timestep"))
        frames, height, width = own
        key = frames * height * width, sample.shape[1], sample.device
        if key[0] >= key[1]:
            return None
        if key not in self._targets:
            # another thread may do the same: both make the same
            are = torch.arange(key[1], device=sample.device) < key[0]
            self._targets = {key: Targets(are)}
        return self._targets[key]

    def _less_noisy(self, sample, timestep):
        """As LTX2DFRPipeline says it: a token's timestep is that of the step times what is to be
        made of it."""
        if timestep is None or timestep.dim() != 2 or timestep.shape[1] != sample.shape[1]:
            return None
        # [l], the same in every row
        are = timestep[0] >= 0.999 * timestep[0].max()
        if are.all():
            return None
        for known in self._by_noise:
            if known.are.device == are.device and torch.equal(known.are, are):
                return known
        # another thread may do the same: both make the same
        self._by_noise = (*self._by_noise[-MAX_LAYOUTS:], Targets(are))
        return self._by_noise[-1]


class LTX2(SideCross):
    name = "LTX-2"
    denoisers = ("LTX2VideoTransformer3DModel",)
    masks_text = True
    text_parts = ("text_encoder", "tokenizer", "connectors")
    text_options = ("max_sequence_length",)
    attentions = ("attn2", "audio_attn2")
    text_arguments = (VIDEO, SOUND)
    processors = PROCESSORS

    def default_alpha(self, denoiser):
        """The paper has none for video: PixArt's, the transformer it does name."""
        return 0.5

    def default_nag(self, denoiser):
        """Where users of a ComfyUI node for it begin: the published code's for Wan."""
        return 11.0, 2.5, 0.25

    # ---- text --------------------------------------------------------------------------------

    def encode(self, pipe, prompts, **options):
        embeds, mask, *_ = encode_prompt(pipe, prompts, options)
        side = getattr(pipe.tokenizer, "padding_side", "left")
        video, sound, mask = pipe.connectors(embeds, mask, padding_side=side)
        return torch.cat([video, sound], dim=2), mask

    def read_embeds(self, embeds, mask):
        """Two texts as the connectors make them, `(video, sound)`, as one of all their channels."""
        if not isinstance(embeds, (tuple, list)) or len(embeds) != 2:
            what = f"{len(embeds)} of them" if isinstance(embeds, (tuple, list)) else "one"
            raise ValueError(
                "enable_nasa: LTX-2 has two texts, for video and for sound: negative_prompt_embeds "
                f"must be both as pipe.connectors makes them, (video, sound), got {what}"
            )
        return torch.cat(list(embeds), dim=2), mask

    def channels(self, text, inputs):
        return text.shape[2] + inputs[SOUND].shape[2]

    def token_limits(self, pipe, tokens, **options):
        return {"tokenizer": options.get("max_sequence_length", tokens)}

    def begin(self, denoiser, side: Side, inputs) -> dict[str, Tensor]:
        """The negative prompts as a block takes them, by the argument they go into."""
        rows, n, _ = inputs[VIDEO].shape
        side.lengths = [n, *(term.text.shape[1] for term in side.text.terms)]
        channels = side.text.text.shape[2]
        texts = torch.cat([term.text.expand(rows, -1, -1) for term in side.text.terms], dim=1)
        video, sound = texts[..., :channels], texts[..., channels:]
        if getattr(denoiser, "caption_projection", None) is not None:
            video, sound = (
                denoiser.caption_projection(video),
                denoiser.audio_caption_projection(sound),
            )
        side.terms = side.text.terms
        return {VIDEO: video, SOUND: sound}

    def before_blocks(self, denoiser):
        names = ("caption_projection", "prompt_adaln")
        parts = (getattr(denoiser, f"{of}{name}", None) for name in names for of in ("", "audio_"))
        return [part for part in parts if part is not None]

    def in_block(self, block):
        return [own_weights(block)]

    def kept_with(self, denoiser, inputs):
        if not self.follows_time(denoiser):
            return [inputs[SOUND]]
        video = inputs.get("sigma")
        sound = inputs.get("audio_sigma")
        sound = video if sound is None else sound
        if video is None:
            return None
        return [video.reshape(-1, 1), sound.reshape(-1, 1), inputs[SOUND]]

    def follows_time(self, denoiser):
        # 2.3's blocks modulate their texts by it
        return getattr(denoiser, "prompt_adaln", None) is not None

    def cache_limit(self, denoiser):
        # 2.3 GiB are a prompt and a negative one of 1024 tokens each, in 48 layers
        return super().cache_limit(denoiser) if self.follows_time(denoiser) else 3 << 30

    # ---- hooks -------------------------------------------------------------------------------

    def image_tokens(self, denoiser):
        return LTX2Tokens(self, denoiser)

    def check_call(self, denoiser, inputs):
        super().check_call(denoiser, inputs)
        caller = find_caller()
        if caller is not None and caller.variables.get("memory_video_token_count"):
            raise RuntimeError(
                f"nasa_diffusers: {caller.name} {MEMORY_FIRST}; leave them out, or call "
                "disable_nasa(pipe)"
            )

    # ---- one layer ---------------------------------------------------------------------------

    def check_alpha(self, name, side):
        if name.endswith("audio_attn2") and side.text.terms[0].alpha.region is not None:
            raise ValueError(
                f"nasa_diffusers: alpha is a map over the picture, and layer {name!r} hears the "
                "sound; guide the video alone with layers='*.attn2', or give one alpha per video"
            )

    def queries(self, attn, hidden_states):
        return attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))

    def projections(self, attn):
        return attn.to_k, attn.to_v, attn.norm_k

    def keys_values(self, attn, text):
        k, v = attn.norm_k(attn.to_k(text)), attn.to_v(text)
        return k.unflatten(2, (attn.heads, -1)), v.unflatten(2, (attn.heads, -1))

    def finish(self, attn, o, hidden_states):
        if attn.to_gate_logits is not None:
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
            o = (o.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2)
        return super().finish(attn, o, hidden_states)
