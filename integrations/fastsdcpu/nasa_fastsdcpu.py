"""fastsdcpu with a negative prompt that acts at guidance 1 and in one step.

    cd fastsdcpu/src
    python PATH/nasa_fastsdcpu.py --prompt "a cat" --negative_prompt blurry
    python PATH/nasa_fastsdcpu.py --nasa-method projected --nasa-strength 1.5 --webui

All other arguments are fastsdcpu's own. It draws as before; only while it draws with its PyTorch
pipelines NASA is on, with the negative prompt of its settings.
"""

import argparse
import runpy
import sys
from pathlib import Path

from nasa_diffusers import Method, nasa
from nasa_diffusers.drawing import METHODS, method_of


def generator_class(base: type, method: Method) -> type:
    """fastsdcpu's LCMTextToImage, guided by `method`."""

    class NasaTextToImage(base):
        def generate(self, lcm_diffusion_setting, reshape=False):
            negative = lcm_diffusion_setting.negative_prompt
            if not negative.strip():
                return super().generate(lcm_diffusion_setting, reshape)
            # LCM, LCM-LoRA and ControlNet: all share its denoiser
            if self.txt2img_pipeline is None:
                raise ValueError(
                    "NASA acts in PyTorch pipelines, and this mode (OpenVINO or GGUF) has none; "
                    "switch to LCM or LCM-LoRA, or leave the negative prompt empty"
                )
            with nasa(self.txt2img_pipeline, negative, method) as handle:
                images = super().generate(lcm_diffusion_setting, reshape)
                print(handle.report())
            return images

    return NasaTextToImage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--nasa-method", choices=METHODS, default="nasa")
    parser.add_argument("--nasa-strength", type=float, help="alpha, of nag its scale")
    options, others = parser.parse_known_args()
    try:
        method = method_of(options.nasa_method, options.nasa_strength)
    except ValueError as error:
        parser.error(str(error))
    app = Path("app.py")
    if not Path("context.py").is_file() or not app.is_file():
        parser.error("this is not fastsdcpu's folder src; run it there")
    sys.path.insert(0, str(Path.cwd()))
    import context

    # the one place where its command line, pages and servers make their generator
    context.LCMTextToImage = generator_class(context.LCMTextToImage, method)
    sys.argv = [str(app), *others]
    runpy.run_path(str(app), run_name="__main__")


if __name__ == "__main__":
    main()
