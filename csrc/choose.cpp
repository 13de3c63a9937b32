// Which kernel takes a call.
#include <algorithm>

#include "device.h"
#include "nasa.h"

namespace nasa {

cudaError_t forward(const ForwardParams& p, cudaStream_t stream) {
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    const int d = padded_head_dim(p.d);
    const int keys = short_keys(p);
    if (std::max(p.prompt[kPos].n, p.prompt[kNeg].n) <= kBlockKeys && has_short(d, keys) &&
        short_shared_bytes(d, keys) <= device.shared_per_block) {
        return forward_short(p, device, stream);
    }
    return forward_long(p, device, stream);
}

cudaError_t backward(const BackwardParams& p, cudaStream_t stream) {
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    if (const cudaError_t error = backward_queries(p, device, stream)) return error;
    for (int side : {kPos, kNeg}) {
        if (p.dk[side] != nullptr || p.dv[side] != nullptr) return backward_keys(p, device, stream);
    }
    return cudaSuccess;
}

}  // namespace nasa
