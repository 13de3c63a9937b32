// Which kernel takes a call.
//
// forward_short and forward_long give the same bits, so on sm_80 alpha 0 is the positive prompt
// alone whatever the negative one is. forward_sm90 adds up in the order of wgmma: on Hopper a
// positive prompt that alone is forward_sm90's goes to the other kernels beside a negative one that
// forward_sm90 does not take (too many keys for it, or rows that TMA cannot read), and the two
// agree to the last rounding only. Alpha 0 as a number leaves the negative prompt out before this
// choice.
//
// A joint attention is theirs on every GPU: its prompts are longer than forward_sm90 holds.
#include <algorithm>

#include "device.h"
#include "nasa.h"

namespace nasa {
namespace {

// TMA wants rows on 16 bytes that move from one to the next.
bool sm90_takes(const ForwardParams& p, const Device& device) {
#ifdef NASA_WITH_SM90
    const auto moves = [](int rows, int64_t stride) { return rows <= 1 || stride != 0; };
    if (device.major != 9 || p.shared.o != nullptr || !p.aligned || !has_sm90(p.d, short_keys(p)))
        return false;
    if (!moves(p.l, p.q_stride_l)) return false;
    for (const Prompt& prompt : p.prompt) {
        if (prompt.n > kBlockKeys || !moves(prompt.n, prompt.k_stride_n) ||
            !moves(prompt.n, prompt.v_stride_n)) {
            return false;
        }
    }
    return true;
#else
    return false;
#endif
}

}  // namespace

cudaError_t forward(const ForwardParams& p, cudaStream_t stream) {
    if (p.b == 0 || p.l == 0 || p.h == 0) return cudaSuccess;
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
#ifdef NASA_WITH_SM90
    if (sm90_takes(p, device)) return forward_sm90(p, device, stream);
#endif
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
