"""Two repairs of bf16 in Triton's interpreter (Triton 3.6 to 3.9).

It keeps bf16 as its 16 bits. `tl.dot` multiplies those bits as integers, and the conversion from
fp32 truncates where a GPU rounds to nearest. A GPU has neither fault, nor has compiled code.
"""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter


def repair_bf16() -> None:
    create_dot = interpreter.InterpreterBuilder.create_dot
    convert_float = interpreter._convert_float
    if hasattr(create_dot, "repaired"):
        return

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        wide = convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def dot(self, a, b, accumulator, input_precision, max_imprecise_acc):
        return create_dot(self, widen(a), widen(b), accumulator, input_precision, max_imprecise_acc)

    def convert(x, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert_float(x, source, target, rounding_mode)
        bits = x.view(np.uint32).astype(np.uint64)
        # round half to even at bit 16
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(x.view(np.float32)), np.uint16(0x7FFF), rounded)

    dot.repaired = True
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._convert_float = convert
