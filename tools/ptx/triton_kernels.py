"""Run a Triton kernel on CPU tensors: compile its PTX for a GPU that is not there and execute it.

    report = ptx.run_triton(kernel, grid, {"Q": q, "O": o, "n": 77}, {"BLOCK": 64}, num_warps=4)

    with ptx.triton_on_cpu(arch=80):
        launcher(q, o)

The arguments are specialized as Triton's own launcher does: tensors and integers that divide by 16
are marked, the integer 1 and None become constants. Results are written into the tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from .launch import LoadedKernel, Report, load
from .memory import Memory
from .tensor_map import tensor_map

_POINTER = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.bool: "*i1", torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip

_compiled: dict[tuple, tuple] = {}


def compile_triton(
    fn, args: dict, constexprs: dict, num_warps: int = 4, num_stages: int = 3, arch: int = 90,
    enable_fp_fusion: bool = True, maxnreg: int | None = None,
) -> tuple[LoadedKernel, object, list[str]]:  # fmt: skip
    """``(kernel, Triton's compiled kernel, names of the arguments it takes)``; cached."""
    # imported here: the interpreter also serves where Triton is not installed
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    unknown = set(args) | set(constexprs)
    unknown ^= set(fn.arg_names)
    if unknown:
        raise ValueError(f"{fn.__name__}: arguments missing or unknown: {sorted(unknown)}")
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(fn.params):
        name = parameter.name
        value = constexprs[name] if name in constexprs else args[name]
        kind, divisible = _specialize(value, parameter)
        if name in constexprs or kind == "constexpr":
            signature[name], constants[i,] = "constexpr", value
            continue
        signature[name] = kind
        if divisible:
            attributes[i,] = [["tt.divisibility", 16]]
    key = (
        fn, tuple(signature.items()), tuple(map(str, constants.items())), tuple(attributes),
        num_warps, num_stages, arch, enable_fp_fusion, maxnreg,
    )  # fmt: skip
    if key not in _compiled:
        source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
        options = {
            "num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion,
            "maxnreg": maxnreg,
        }  # fmt: skip
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        names = [name for name, kind in signature.items() if kind != "constexpr"]
        _compiled[key] = load(compiled.asm["ptx"]), compiled, names
    return _compiled[key]


def _specialize(value, parameter) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is known to divide by 16."""
    free = not parameter.do_not_specialize
    if isinstance(value, torch.Tensor):
        # a tensor lies at its storage offset from an aligned address, see Memory.upload
        offset = value.storage_offset() * value.element_size()
        return _POINTER[value.dtype], offset % 16 == 0 and free
    if _is_descriptor(value):
        item = _POINTER[value.base.dtype][1:]
        return f"tensordesc<{item}[{', '.join(map(str, value.block_shape))}]>", False
    if value is None:
        return "constexpr", False
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        if value == 1 and free:
            return "constexpr", False
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return kind, value % 16 == 0 and free
    if isinstance(value, float):
        return "fp32", False
    return "constexpr", False


def _is_descriptor(value) -> bool:
    """A triton.tools.tensor_descriptor.TensorDescriptor: a tensor that TMA loads and stores."""
    return hasattr(value, "block_shape")


def run_triton(
    fn,
    grid: tuple[int, ...] | Callable,
    args: dict,
    constexprs: dict,
    num_warps: int = 4,
    num_stages: int = 3,
    arch: int = 90,
    enable_fp_fusion: bool = True,
    maxnreg: int | None = None,
    edit: Callable[[str], str] | None = None,
    **launch_options,
) -> Report:
    """Compile, run, and write the results back into the tensors of ``args``.

    ``edit`` changes the PTX before it runs, for planted faults. Tensors that share storage are
    copied apart.
    """
    kernel, compiled, names = compile_triton(
        fn, args, constexprs, num_warps, num_stages, arch, enable_fp_fusion, maxnreg
    )
    if edit:
        kernel = load(edit(compiled.asm["ptx"]))
    grid = grid(args | constexprs) if callable(grid) else grid
    memory = Memory()
    tensors = {n: v.base if _is_descriptor(v) else v for n, v in args.items()}
    tensors = {n: v for n, v in tensors.items() if isinstance(v, torch.Tensor)}
    addresses = {name: memory.upload(tensor, name) for name, tensor in tensors.items()}
    maps = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    values = []
    for name in names:
        if _is_descriptor(args[name]):
            values += _descriptor(memory, addresses[name], args[name], next(maps))
        else:
            values.append(addresses.get(name, args[name]))
    programs = 1
    for n in grid:
        programs *= n
    # hidden parameters: scratch memory, one piece per program, where the kernel asked for it
    metadata = compiled.metadata
    for size in (metadata.global_scratch_size, getattr(metadata, "profile_scratch_size", 0)):
        if len(values) < len(kernel.kernel.parameters):
            values.append(memory.allocate(size * programs, "scratch") if size else 0)
    block = kernel.kernel.required_block or (32 * num_warps,)
    report = kernel.launch(grid, block, values, memory, metadata.shared, **launch_options)
    for name, tensor in tensors.items():
        result = memory.download(addresses[name], tensor)
        if not torch.equal(_bits(result), _bits(tensor)):
            tensor.copy_(result)
    return report


def _descriptor(memory: Memory, address: int, descriptor, layout: dict) -> list:
    """The parameters Triton passes: the tensor map, the shape, the strides."""
    tensor = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
    # CUtensorMapSwizzle: none, 32, 64, 128 bytes
    swizzle = (0, 32, 64, 128)[layout["swizzle"]]
    box, nan = tuple(layout["block_size"]), descriptor.padding == "nan"
    return [
        tensor_map(memory, address, tensor, box, swizzle, nan),
        *descriptor.shape, *descriptor.strides,
    ]  # fmt: skip


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN equals itself as an integer."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])


@contextmanager
def triton_on_cpu(arch: int = 90, **launch_options) -> Iterator[list[Report]]:
    """Every ``kernel[grid](...)`` inside runs its PTX here, launchers and all.

    Yields the list of reports, one per launch.
    """
    from triton.runtime.jit import JITFunction

    reports: list[Report] = []

    def run(
        fn, *values, grid, warmup, num_warps=4, num_stages=3, enable_fp_fusion=True, maxnreg=None,
        **named,
    ):  # fmt: skip
        args = dict(zip(fn.arg_names, values, strict=False)) | named
        constexprs = {p.name: args.pop(p.name) for p in fn.params if p.is_constexpr}
        options = {
            "num_warps": num_warps, "num_stages": num_stages, "arch": arch,
            "enable_fp_fusion": enable_fp_fusion, "maxnreg": maxnreg,
        }  # fmt: skip
        reports.append(run_triton(fn, grid, args, constexprs, **options, **launch_options))

    with mock.patch.object(JITFunction, "run", run):
        yield reports
