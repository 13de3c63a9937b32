// Which kernel takes a call.
//
// The kernels of one architecture give the same bits whether they hold the prompts or stream them:
// forward_short those of forward_long, forward_sm90_short those of forward_sm90_long. So the length
// of the negative prompt changes no bit of the positive one's part, and alpha 0 is the positive
// prompt alone whatever the negative one is. forward_image, which attends to the image's keys as well,
// adds up as forward_long does, on Hopper too. Hopper's kernels add up in the order of wgmma, the
// others in that of mma.sync: for rows that TMA cannot read, those of the positive prompt decide,
// because bindings.cpp copies a negative prompt that would make the difference.
#include <algorithm>
#include <atomic>

#include "device.h"
#include "layouts.h"

namespace nasa {
namespace {

// Whether what holds both prompts at once has the room
bool fits_short(const ForwardParams& p) {
    return std::max(p.prompt[kPos].n, p.prompt[kNeg].n) <= kBlockKeys;
}

bool is_empty(const ForwardParams& p) { return p.b == 0 || p.l == 0 || p.h == 0; }

// TMA wants rows on 16 bytes that move from one to the next.
bool sm90_takes(const ForwardParams& p, const Device& device) {
#ifdef NASA_WITH_SM90
    const auto moves = [](int rows, int64_t stride) { return rows <= 1 || stride != 0; };
    if (device.major != 9 || !p.aligned || !has_sm90(p.d)) return false;
    if (!moves(p.l, p.q.stride_row)) return false;
    if (is_joint(p) && !moves(p.l, p.shared.o.stride_row)) return false;
    for (const Prompt& prompt : p.prompt) {
        if (!moves(prompt.n, prompt.k.stride_row) || !moves(prompt.n, prompt.v.stride_row)) {
            return false;
        }
    }
    return true;
#else
    return false;
#endif
}

// Those of mma.sync, short or long
cudaError_t forward_generic(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    const int keys = short_keys(p);
    const int d = padded_head_dim(p.d);
    const bool projects = p.rule != Rule::kProjected || short_projects(d);
    if (fits_short(p) && has_short(d, keys) && projects &&
        short_shared_bytes(d, keys, is_plain(p)) <= device.shared_per_block) {
        return forward_short(p, device, stream);
    }
    return forward_long(p, device, stream);
}

std::atomic<bool> overlap{false};

}  // namespace

void overlap_launches(bool on) { overlap.store(on, std::memory_order_relaxed); }
bool launches_overlap() { return overlap.load(std::memory_order_relaxed); }

cudaError_t forward(const ForwardParams& p, cudaStream_t stream) {
    if (is_empty(p)) return cudaSuccess;
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
#ifdef NASA_WITH_SM90
    if (sm90_takes(p, device)) {
        return fits_short(p) && has_sm90_short(p.d, short_keys(p))
                   ? forward_sm90_short(p, device, stream)
                   : forward_sm90_long(p, device, stream);
    }
#endif
    return forward_generic(p, device, stream);
}

cudaError_t forward(const ImageParams& p, cudaStream_t stream) {
    if (is_empty(p.call)) return cudaSuccess;
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    return forward_image(p, device, stream);
}

cudaError_t forward_beside_image(const ForwardParams& p, cudaStream_t stream) {
    if (is_empty(p)) return cudaSuccess;
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    return forward_generic(p, device, stream);
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
