"""`make demo`: the shipped model with and without a negative prompt, and what it costs."""
