// What nvcc's code calls for <<<>>> and when it is loaded, of a CUDA runtime that launches nothing:
// bench/host_runtime.cpp, and tests/support/fake_cuda.cpp, which writes launches down. Both have
// `cudaLaunchKernel`, and a `register_kernel` for the kernels' names.
#pragma once

#include <cuda_runtime_api.h>

namespace {

struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} configuration;

void register_kernel(const void* kernel, const char* name);

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* kernel) {
    *handle = reinterpret_cast<cudaKernel_t>(const_cast<void*>(kernel));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t handle, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
    return cudaLaunchKernel(handle, grid, block, arguments, shared, stream);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
    return cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
    register_kernel(kernel, name);
}
char __cudaInitModule(void**) { return 0; }
}
