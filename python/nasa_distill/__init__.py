"""NASA-T: one-step students that have a negative prompt, and a small world to make them in."""
