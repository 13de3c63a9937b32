"""The world of 64x64 images: one object or two, marks and a frame, and an exact judge of them."""
