"""Negative prompts for one-step and few-step diffusion: NASA attention as one fused operation."""

from nasa_kernels.attention import nasa_attention
from nasa_kernels.joint_attention import nasa_joint_attention
from nasa_kernels.nag import nag_attention, nag_joint_attention
from nasa_kernels.reference import nasa_attention_reference, nasa_joint_attention_reference

__all__ = [
    "nag_attention",
    "nag_joint_attention",
    "nasa_attention",
    "nasa_attention_reference",
    "nasa_joint_attention",
    "nasa_joint_attention_reference",
]
__version__ = "0.1.0"
