"""Triton's launches, made once and remembered once, with a driver that writes them down.

Run as a program, where Triton compiles and does not interpret, it prints of each call of the public
functions what the driver was told the first time and the second.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch


def calls_of_python(function: Callable[[], Any]) -> int:
    """Functions, Python's and C's, that are called in one call; attributes do not count."""
    count = 0

    def see(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    # the function itself, and `setprofile`
    return count - 2


def calls() -> dict[str, Callable[[], Any]]:
    from nasa_kernels import (
        nag_attention,
        nag_joint_attention,
        nasa_attention,
        nasa_joint_attention,
    )

    def normal(n: int) -> torch.Tensor:
        return torch.randn(2, n, 2, 64).bfloat16()

    q, k, v, k_neg, v_neg, image = (normal(n) for n in (16, 77, 77, 33, 33, 8))
    base: dict[str, Any] = {"q": q, "k_pos": k, "v_pos": v, "k_neg": k_neg, "v_neg": v_neg}
    base["backend"] = "triton"
    mask = torch.ones(2, 77, dtype=torch.bool)
    alpha = torch.full((2, 1, 1), 0.5)
    one = base | {"k_neg": k_neg[:1], "v_neg": v_neg[:1]}
    # the second element of a buffer is where no load of 16 bytes may start
    unaligned = base | {"k_pos": k.as_strided((2, 70, 2, 64), k.stride(), 1), "v_pos": v[:, :70]}
    nag = {"nag_scale": 3.0, "nag_tau": 2.5, "nag_alpha": 0.5}
    return {
        "plain": lambda: nasa_attention(**base, alpha=0.5),
        "masks": lambda: nasa_attention(**base, alpha=0.5, mask_pos=mask),
        "alpha": lambda: nasa_attention(**base, alpha=alpha),
        "zero": lambda: nasa_attention(**base, alpha=0.0),
        "broadcast": lambda: nasa_attention(**one, alpha=0.5),
        "unaligned": lambda: nasa_attention(**unaligned, alpha=0.5),
        "joint": lambda: nasa_joint_attention(k=image, v=image, **base, alpha=0.5),
        "nag": lambda: nag_attention(**base, **nag),
        "joint-nag": lambda: nag_joint_attention(k=image, v=image, **base, **nag),
    }


def told(launches: list[tuple]) -> list:
    """Grids and arguments, without where new tensors are."""

    def plain(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return "tensor"
        return [plain(y) for y in x] if isinstance(x, tuple) else x

    return [plain(launch) for launch in launches]


def operands(launch: tuple) -> list[int]:
    """Where q and the prompts are, which come first."""
    return [x.data_ptr() for x in launch[1] if isinstance(x, torch.Tensor)][:5]


def main() -> None:
    from bench import host_driver
    from nasa_kernels import backends
    from nasa_kernels._triton import launch

    driver = host_driver.use()
    backends.why_not = lambda name, device: None  # type: ignore[assignment]
    found = {}
    for name, call in calls().items():
        # a first call is checked, a second goes another way
        call()
        launch._ready.clear()
        driver.launches = []
        call()
        first, driver.launches = driver.launches, []
        call()
        again, driver.launches = driver.launches, None
        found[name] = {
            "planned": len(launch._ready),
            "launches": len(first),
            "same": told(first) == told(again),
            "operands": operands(first[0]) == operands(again[0]),
            "arguments": len(told(first)[0][1]),
            "calls": calls_of_python(call),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    with torch.no_grad():
        main()
