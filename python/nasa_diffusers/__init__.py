"""NASA on stock diffusers pipelines."""
