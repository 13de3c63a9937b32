// From a params struct to a kernel: the head_dim and type it is compiled for, and the launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "device.h"
#include "layouts.h"
#include "schedule.cuh"

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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a kernel that an SM holds at once: the driver knows its registers. Asked for once per
// device.
template <auto kKernel>
cudaError_t resident_blocks(const Device& device, int threads, int bytes, int& blocks) {
    static std::atomic<int> known[kMaxDevices];
    blocks = known[device.index].load(std::memory_order_relaxed);
    if (blocks > 0) return cudaSuccess;
    if (bytes > device.shared_per_block) return cudaErrorInvalidValue;
    if (const cudaError_t error =
            cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) {
        return error;
    }
    if (const cudaError_t error =
            cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, threads, bytes)) {
        return error;
    }
    // a kernel that does not fit says so when it is launched
    blocks = std::max(blocks, 1);
    known[device.index].store(blocks, std::memory_order_relaxed);
    return cudaSuccess;
}

// Launch a kernel whose blocks share the tiles of all heads: as many as the GPU holds at once.
template <auto kKernel, bool kWaits = false, typename Params>
cudaError_t launch_shared(const Device& device, const ForwardParams& p, int64_t tiles_per_head,
                          int threads, int bytes, cudaStream_t stream, const Params& params) {
    int resident = 0;
    if (const cudaError_t error = resident_blocks<kKernel>(device, threads, bytes, resident)) {
        return error;
    }
    const int64_t tiles = tiles_per_head * p.b * p.h;
    const int64_t blocks = std::min<int64_t>(tiles, static_cast<int64_t>(device.sms) * resident);
    if (blocks == 0) return cudaSuccess;
    if (tiles / blocks >= INT32_MAX) return cudaErrorInvalidValue;
    const Share share{static_cast<int>(tiles / blocks), static_cast<int>(tiles % blocks),
                      static_cast<int>(tiles_per_head), p.h};
    return launch<kKernel, kWaits>(device, blocks, threads, bytes, stream, params, share);
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

}  // namespace nasa
