// Which operators a compiled library has, as a number that nasa_kernels/_library.py finds in the file
// before it loads it: a library of other sources would be called with other arguments. One more
// whenever an operator, its arguments or their meaning change, here and there.
#pragma once

#define NASA_ABI "2"

extern "C" {
__attribute__((visibility("default"))) extern const char nasa_kernels_abi[];
const char nasa_kernels_abi[] = "nasa_kernels ABI " NASA_ABI;
}
