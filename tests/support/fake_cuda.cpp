// A CUDA runtime that writes down launches instead of making them, so that the launchers of csrc
// run without a GPU: which kernel, how many blocks, how much shared memory, which arguments, which
// tensor maps. tests/cuda/test_cuda_launch.py links it with the sources in place of the runtime.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../../bench/launch_syntax.h"
#include "../../csrc/nasa.h"
#include "../../csrc/share.h"

namespace {

struct Launch {
    char kernel[256];
    unsigned grid[3], block[3];
    uint64_t shared, allowed;  // dynamic shared memory asked for, and opted in to
    uint64_t overlaps;         // may start while the kernel before it ends
    unsigned char arguments[4096];
};

struct FakeDevice {
    int major, sms, shared_per_block, shared_per_sm;
};

std::vector<Launch> launches;
// kernels are registered before this file's globals are made
std::map<const void*, std::string>& names() {
    static std::map<const void*, std::string> map;
    return map;
}
void register_kernel(const void* kernel, const char* name) { names()[kernel] = name; }
std::map<const void*, int> allowed;
std::vector<FakeDevice> devices(1);
// What cudaOccupancyMaxActiveBlocksPerMultiprocessor knows of a kernel: a part of its name, and its
// registers. Without an entry they are no limit.
std::vector<std::pair<std::string, int>> registers;

// Bytes of the first parameter of a kernel; a Share may follow it.
size_t parameter_bytes(const std::string& name) {
    if (name.find("nag_blend") != std::string::npos) return sizeof(nasa::NagParams);
    if (name.find("backward") != std::string::npos ||
        name.find("sum_splits") != std::string::npos) {
        return sizeof(nasa::BackwardParams);
    }
    if (name.find("forward_image") != std::string::npos) return sizeof(nasa::ImageParams);
    if (name.find("sm90") == std::string::npos) return sizeof(nasa::ForwardParams);
    return (7 * 256 + sizeof(nasa::ForwardParams) + 127) / 128 * 128;
}

// What cuTensorMapEncodeTiled is told, in place of the 128 opaque bytes
struct Told {
    uint64_t address, sizes[4], strides[3];
    uint32_t box[4], swizzle;
};
static_assert(sizeof(Told) <= sizeof(CUtensorMap), "a map holds what it was told");

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* address,
                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    Told told{reinterpret_cast<uint64_t>(address), {}, {}, {}, static_cast<uint32_t>(swizzle)};
    // the limits of the driver
    if (rank != 4 || told.address % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    for (int i = 0; i < 4; ++i) {
        if (sizes[i] < 1 || sizes[i] > uint64_t{1} << 32 || box[i] < 1 || box[i] > 256) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        told.sizes[i] = sizes[i];
        told.box[i] = box[i];
    }
    for (int i = 0; i < 3; ++i) {
        if (strides[i] % 16 != 0 || strides[i] >= uint64_t{1} << 40)
            return CUDA_ERROR_INVALID_VALUE;
        told.strides[i] = strides[i];
    }
    std::memset(map, 0, sizeof(*map));
    std::memcpy(map, &told, sizeof(told));
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
    *device = static_cast<int>(devices.size()) - 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    const FakeDevice& d = devices[device];
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = d.major; break;
        case cudaDevAttrMultiProcessorCount: *value = d.sms; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.shared_per_block; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.shared_per_sm; break;
        default: return cudaErrorInvalidValue;
    }
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
    allowed[kernel] = bytes;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
    const FakeDevice& d = devices.back();
    // each block reserves 1 KiB; registers come in units of 256 for a warp
    int most = std::min(d.shared_per_sm / (static_cast<int>(shared) + 1024), 2048 / threads);
    for (const auto& [name, count] : registers) {
        if (names()[kernel].find(name) == std::string::npos) continue;
        most = std::min(most, 65536 / 256 / ((count + 7) / 8 * (threads / 32)));
    }
    *blocks = most;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *function = reinterpret_cast<void*>(&encode);
    *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
    Launch launch{};
    const std::string& name = names()[kernel];
    name.copy(launch.kernel, sizeof(launch.kernel) - 1);
    std::memcpy(launch.grid, &grid, sizeof(grid));
    std::memcpy(launch.block, &block, sizeof(block));
    launch.shared = shared;
    launch.allowed = allowed[kernel];
    const size_t bytes = parameter_bytes(name);
    std::memcpy(launch.arguments, arguments[0], bytes);
    if (name.find("short") != std::string::npos || name.find("sm90") != std::string::npos) {
        std::memcpy(launch.arguments + bytes, arguments[1], sizeof(nasa::Share));
    }
    launches.push_back(launch);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
    const cudaError_t error =
        cudaLaunchKernel(kernel, config->gridDim, config->blockDim, arguments,
                         config->dynamicSmemBytes, config->stream);
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        const cudaLaunchAttribute& attribute = config->attrs[i];
        launches.back().overlaps |=
            attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
            attribute.val.programmaticStreamSerializationAllowed;
    }
    return error;
}

// ---- for the test ----------------------------------------------------------------------------

// A new current device: the launchers remember what they asked of the others.
void test_use_device(int major, int sms, int shared_per_block, int shared_per_sm) {
    devices.push_back({major, sms, shared_per_block, shared_per_sm});
    allowed.clear();
}
int test_forward(const nasa::ForwardParams* p) {
    launches.clear();
    return nasa::forward(*p, nullptr);
}
int test_image(const nasa::ImageParams* p) {
    launches.clear();
    return nasa::forward(*p, nullptr);
}
void test_registers(const char* name, int count) {
    if (*name == 0) return registers.clear();
    registers.emplace_back(name, count);
}
void test_overlap(bool on) { nasa::overlap_launches(on); }
int test_backward(const nasa::BackwardParams* p) {
    launches.clear();
    return nasa::backward(*p, nullptr);
}
int test_nag_blend(const nasa::NagParams* p) {
    launches.clear();
    return nasa::nag_blend(*p, nullptr);
}
int test_splits(const nasa::BackwardParams* p) {
    int splits = -1;
    nasa::backward_splits(*p, splits);
    return splits;
}
int64_t test_partial_elements(const nasa::BackwardParams* p) { return nasa::partial_elements(*p); }
int test_launches() { return static_cast<int>(launches.size()); }
const Launch* test_launch(int i) { return &launches[i]; }
}
