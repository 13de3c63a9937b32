"""Negative prompts for one-step and few-step diffusion: NASA attention as one fused operation."""

from nasa_kernels.attention import nasa_attention
from nasa_kernels.joint_attention import nasa_joint_attention
from nasa_kernels.nag import nag_attention, nag_joint_attention
from nasa_kernels.projected import Negative, projected_attention, projected_joint_attention
from nasa_kernels.reference import nasa_attention_reference, nasa_joint_attention_reference

__all__ = [
    "Negative",
    "nag_attention",
    "nag_joint_attention",
    "nasa_attention",
    "nasa_attention_reference",
    "nasa_joint_attention",
    "nasa_joint_attention_reference",
    "projected_attention",
    "projected_joint_attention",
]
__version__ = "0.1.0"
