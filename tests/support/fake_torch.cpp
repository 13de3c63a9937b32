// The bindings on CPU tensors, for tests/cuda/test_cuda_calls.py: beside the launchers and the runtime
// that writes launches down, fake_cuda.cpp, this is what they need.
#include <cuda_runtime_api.h>

#include "../../bench/one_device.h"

extern "C" {
const char* cudaGetErrorString(cudaError_t) { return "an error of a runtime that makes no launch"; }
cudaError_t cudaDriverGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}
}
