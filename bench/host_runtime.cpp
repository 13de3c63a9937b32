// A CUDA runtime that launches nothing, and what torch's CUDA library adds to it: with csrc's own
// launchers and bindings, on CPU tensors, all that a call costs the host is left, but for the
// driver's own launch. bench/host.py times it; the target `host` of cmake/cuda.cmake builds it.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "launch_syntax.h"
#include "one_device.h"

namespace {

void register_kernel(const void*, const char*) {}

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    std::memset(map, 0, sizeof(*map));
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// ---- the runtime, of a GPU like H200 -------------------------------------------------------------

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrMultiProcessorCount: *value = 132; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
        default: return cudaErrorInvalidValue;
    }
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                   size_t, unsigned) {
    *blocks = 1;
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "an error of a runtime that launches nothing"; }
cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *function = reinterpret_cast<void*>(&encode);
    *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
    return cudaSuccess;
}
}
