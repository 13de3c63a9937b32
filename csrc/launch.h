// From a params struct to a kernel: the head_dim and type it is compiled for, and the launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "device.h"
#include "nasa.h"

namespace nasa {

// Launch kKernel with `bytes` of shared memory. The opt-in above 48 KiB is made once per device.
// A kernel that waits for the grids before it, kWaits, may start while they end.
template <auto kKernel, bool kWaits = false, typename... Args>
cudaError_t launch(const Device& device, int64_t blocks, int threads, int bytes,
                   cudaStream_t stream, const Args&... args) {
    static std::atomic<uint64_t> allowed{0};  // one bit per device
    const uint64_t bit = uint64_t{1} << device.index;
    if (blocks == 0) return cudaSuccess;
    if (bytes > device.shared_per_block || blocks > INT32_MAX) return cudaErrorInvalidValue;
    if (!(allowed.load(std::memory_order_relaxed) & bit)) {
        if (const cudaError_t error =
                cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) {
            return error;
        }
        allowed.fetch_or(bit, std::memory_order_relaxed);
    }
    if (kWaits && launches_overlap()) {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = bytes;
        config.stream = stream;
        config.attrs = &attribute;
        config.numAttrs = 1;
        return cudaLaunchKernelEx(&config, kKernel, args...);
    }
    kKernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(args...);
    return cudaGetLastError();
}

template <typename T>
struct TypeTag {
    using type = T;
};

// Call launch_for(TypeTag<T>, integral_constant<int, kD>) with the T and kD of a call.
template <typename F>
cudaError_t dispatch(Type type, int d, F launch_for) {
    const auto for_type = [&](auto tag) {
        switch (padded_head_dim(d)) {
            case 32: return launch_for(tag, std::integral_constant<int, 32>{});
            case 48: return launch_for(tag, std::integral_constant<int, 48>{});
            case 64: return launch_for(tag, std::integral_constant<int, 64>{});
            case 80: return launch_for(tag, std::integral_constant<int, 80>{});
            case 96: return launch_for(tag, std::integral_constant<int, 96>{});
            case 128: return launch_for(tag, std::integral_constant<int, 128>{});
            case 160: return launch_for(tag, std::integral_constant<int, 160>{});
            case 192: return launch_for(tag, std::integral_constant<int, 192>{});
            case 256: return launch_for(tag, std::integral_constant<int, 256>{});
        }
        return cudaErrorInvalidValue;
    };
    return type == Type::kHalf ? for_type(TypeTag<__half>{}) : for_type(TypeTag<__nv_bfloat16>{});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace nasa
