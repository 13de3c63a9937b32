"""Normalized attention guidance (arXiv:2505.21179)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nasa_diffusers.methods.base import Method, Strength
from nasa_kernels import nag_attention, nag_joint_attention
from nasa_kernels.nag import reads_image_once


@dataclass(frozen=True, eq=False)
class NAG(Method):
    """Normalized attention guidance (arXiv:2505.21179): extrapolated, clipped, and mixed with Z+.

        G = scale Z+ - (scale - 1) Z-
        O = alpha G min(1, tau |Z+| / |G|) + (1 - alpha) Z+

    In joint attention Z+ is over [image; positive] and Z- over [image; negative], for the image
    queries. It takes one negative prompt, or one per image: its norm is that of one difference.

    Args:
        scale: Extrapolation as the published code counts it, where 1 is off; the paper's scale is
            1 less. `None` takes the family's default from the NAG paper, as for all that follow.
        tau: The most by which the extrapolation may exceed Z+ in magnitude.
        alpha: Share of the guided result, in all the forms of NASA's alpha.
        norm: How magnitude is measured: 1, the default, by the sum of magnitudes, as in the paper
            and most of its published code; 2 by the root of the sum of squares, as in its
            published code for FLUX.
    """

    scale: float | None = None
    tau: float | None = None
    alpha: Strength | None = None
    norm: int | None = None
    name: ClassVar[str] = "NAG"
    # its norms are those of the text
    adds_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        scale, tau, norm = (self._number(name) for name in ("scale", "tau", "norm"))
        if norm is not None and norm not in (1, 2):
            raise ValueError(
                "NAG: norm must be 1, as in its paper and most of its code, or 2, as in its code "
                f"for FLUX, got {norm!r}"
            )
        if scale == 1:
            raise ValueError(
                "NAG: scale 1 is no guidance: it counts as the published code does, where the "
                "paper's scale of 0 is 1; give 1 more than the paper's scale"
            )
        if tau is not None and tau <= 0:
            raise ValueError(f"NAG: tau must be above 0, got {tau!r}")

    def filled_in(self, family, denoiser):
        scale, tau, _ = family.default_nag(denoiser)
        return replace(
            self,
            scale=scale if self.scale is None else self.scale,
            tau=tau if self.tau is None else self.tau,
            norm=1 if self.norm is None else self.norm,
        )

    def default_alpha(self, family, denoiser, has_own_alphas=False):
        return family.default_nag(denoiser)[2]

    def check(self, family, alpha, has_own_alphas):
        if has_own_alphas:
            raise ValueError(
                "NAG: it takes one negative prompt, a string or one per image, since its norm is "
                "that of one difference; put several into one string"
            )

    def cross(self, q, pos, negatives, backend, image=None):
        assert image is None, "adds_images is False"
        (neg,) = negatives
        return nag_attention(
            q, pos.k, pos.v, neg.prompt.k, neg.prompt.v,
            **self._settings(), nag_alpha=neg.alpha.at(q.shape[1]),
            mask_pos=pos.mask, mask_neg=neg.prompt.mask, backend=backend,
        )  # fmt: skip

    def joint(self, streams):
        (term,) = streams.terms
        k_image, k_pos, k_neg = streams.split(streams.k)
        v_image, v_pos, v_neg = streams.split(streams.v)
        return nag_joint_attention(
            streams.first_queries(), k_image, v_image, k_pos, v_pos, k_neg, v_neg,
            **self._settings(), nag_alpha=term.alpha.at(streams.image_tokens),
            text_queries=streams.text_queries(0), mask_pos=streams.mask_pos, mask_neg=term.mask,
            backend=streams.backend,
        )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        """As the op calls them."""
        return {"nag_scale": self.scale, "nag_tau": self.tau, "nag_norm": self.norm}

    def attends_image_twice(self, streams):
        return not reads_image_once(streams.backend, streams.q, streams.k, streams.v)

    def __str__(self) -> str:
        named = {"scale": self.scale, "tau": self.tau}
        named |= {} if self.norm in (None, 1) else {"norm": self.norm}
        settings = (f", {name} {value:g}" for name, value in named.items() if value is not None)
        return self.name + "".join(settings)
