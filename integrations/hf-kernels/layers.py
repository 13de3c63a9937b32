"""The operation as a layer that `kernels.kernelize` can put in the place of another."""

from torch import Tensor, nn

from .attention import nasa_attention


class NasaAttention(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        q: Tensor,  # [b, l, h, d]
        k_pos: Tensor,  # [b, n, h, d], as all that follow
        v_pos: Tensor,
        k_neg: Tensor,
        v_neg: Tensor,
        alpha: float | Tensor,
        mask_pos: Tensor | None = None,  # [b, n]
        mask_neg: Tensor | None = None,
    ) -> Tensor:
        return nasa_attention(
            q, k_pos, v_pos, k_neg, v_neg, alpha, mask_pos=mask_pos, mask_neg=mask_neg
        )
