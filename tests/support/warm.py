"""Runs pytest many times without importing PyTorch many times: a warm parent forks a child each.

The parent imports what takes seconds, and nothing of this repository, so that each child may test
another copy of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    code: int  # of pytest, negative where a signal ended it
    output: str


class WarmPytest:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            # a pool of threads would not survive the fork
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip

    def run(self, root: Path, arguments: Sequence[str]) -> Result:
        """Run pytest in folder `root`, whose packages come before all others of their names."""
        assert self.process.stdin and self.process.stdout
        with tempfile.NamedTemporaryFile() as output:
            request = {"root": str(root), "arguments": list(arguments), "output": output.name}
            print(json.dumps(request), file=self.process.stdin, flush=True)
            code = int(self.process.stdout.readline())
            return Result(code, Path(output.name).read_text())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch.utils.flop_counter  # noqa: F401
    import triton.language  # noqa: F401

    ours = [name for name in sys.modules if name.startswith("nasa_")]
    assert not ours, f"a child could not import its own copy of {ours}"
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run_in_child(**request)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run_in_child(root: str, arguments: list[str], output: str) -> None:
    code = 3
    try:
        target = os.open(output, os.O_WRONLY)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.chdir(root)
        sys.path.insert(0, root)
        # for what a test starts
        others = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (root, others) if path)
        import pytest

        code = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # no clean-up of the parent's: it is not over
        os._exit(code)


if __name__ == "__main__":
    # this folder is no place to import from
    sys.path.pop(0)
    serve()
