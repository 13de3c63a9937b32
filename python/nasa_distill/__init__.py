"""NASA-T: few-step students that have a negative prompt, and a small world to make them in.

    train/    NASA-T: losses, networks, settings, checkpoints, several processes
    world/    captioned images with an exact judge; their teacher, their students, their evaluation
    scores/   scores of images and videos of any model; experimental
    demo/     the model that comes with the package, and the operator on layers of real sizes
    models/   that model

`world`, `scores` and `demo` import `train`; `train` imports none of them.
"""
