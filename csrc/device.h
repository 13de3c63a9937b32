// What the launchers must know of the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

namespace nasa {

struct Device {
    int index;
    int major;  // of the compute capability
    int sms;
    int shared_per_block;  // bytes that a kernel may opt in to
    int shared_per_sm;
};

constexpr int kMaxDevices = 64;

// The current device. Its limits are asked for once: this runs before every launch.
inline cudaError_t current_device(Device& device) {
    static Device devices[kMaxDevices];
    static std::atomic<bool> known[kMaxDevices];
    int index = 0;
    if (const cudaError_t error = cudaGetDevice(&index)) return error;
    if (index >= kMaxDevices) return cudaErrorInvalidDevice;
    if (!known[index].load(std::memory_order_acquire)) {
        Device d{index, 0, 0, 0, 0};
        const auto ask = [&](int& value, cudaDeviceAttr attribute) {
            return cudaDeviceGetAttribute(&value, attribute, index);
        };
        if (const cudaError_t error = ask(d.major, cudaDevAttrComputeCapabilityMajor)) return error;
        if (const cudaError_t error = ask(d.sms, cudaDevAttrMultiProcessorCount)) return error;
        if (const cudaError_t error =
                ask(d.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin)) {
            return error;
        }
        if (const cudaError_t error =
                ask(d.shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor)) {
            return error;
        }
        // two threads that meet here write the same values
        devices[index] = d;
        known[index].store(true, std::memory_order_release);
    }
    device = devices[index];
    return cudaSuccess;
}

}  // namespace nasa
