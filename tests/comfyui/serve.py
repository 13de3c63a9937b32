"""ComfyUI's own server, with the tests' stand-ins: `python serve.py TREE [its options]`."""

import runpy
import sys
from pathlib import Path

import stand_ins

if __name__ == "__main__":
    # the folder of this script holds none of ComfyUI's modules
    tree, sys.path[0] = sys.argv[1], sys.argv[1]
    sys.argv = [str(Path(tree, "main.py")), *sys.argv[2:]]
    stand_ins.put()
    runpy.run_path(sys.argv[0], run_name="__main__")
