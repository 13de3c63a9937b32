// The end of normalised attention guidance (NAG), after the launches that make Z+ and Z-.
//
//     G = s Z+ - (s - 1) Z-        O = a G min(1, tau |Z+| / |G|) + (1 - a) Z+
//
// |.| is the norm of a query's row over all of its heads: [h d], the channels. O goes to where Z+ is.
// A row is a warp's, or two's to eight's where a warp would not keep its channels in registers
// between the norms and O; of a row that eight do not keep Z+ and Z- are read twice. Everything is
// computed in fp32 and rounded once.
//
// Where a is 0, and in rows of the positive text's own queries, O is Z+ as it stands; rows of the
// negative text's are Z-.
#include "launch.h"
#include "ptx.cuh"

namespace nasa {
namespace {

constexpr int kLanes = 32;
constexpr int kRowWarps = 8;  // of a block
constexpr int kVector = 8;    // channels of 16 bytes
constexpr int kHeld = 5;      // vectors of Z+ and of Z- that a lane keeps
constexpr int kHeldByWarp = kHeld * kLanes;

// Channels of a row, packed as they are in memory
template <typename T>
struct Vector {
    union {
        uint4 whole;
        uint32_t pairs[kVector / 2];
        T channels[kVector];
    };
    __device__ __forceinline__ Vector() : whole{0, 0, 0, 0} {}

    __device__ __forceinline__ float operator[](int c) const {
        return static_cast<float>(channels[c]);
    }
};

// Channels [first, first + kVector) of a row, zeros past its end. Rows that are not kAligned begin
// anywhere.
template <bool kAligned, typename T>
__device__ __forceinline__ Vector<T> load(const T* row, int first, int channels) {
    Vector<T> x;
    if constexpr (kAligned) {
        if (first < channels) x.whole = *reinterpret_cast<const uint4*>(row + first);
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            if (first + i < channels) x.channels[i] = row[first + i];
        }
    }
    return x;
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store(T* row, int first, int channels, const Vector<T>& x) {
    if constexpr (kAligned) {
        if (first < channels) *reinterpret_cast<uint4*>(row + first) = x.whole;
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            if (first + i < channels) row[first + i] = x.channels[i];
        }
    }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRowWarps * kLanes)
    nag_blend_kernel(const __grid_constant__ NagParams p) {
    __shared__ float2 sums[kRowWarps];
    const int lane = threadIdx.x % kLanes;
    const int warp = threadIdx.x / kLanes;
    const int part = warp % p.row_warps;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kRowWarps / p.row_warps) +
                        warp / p.row_warps;
    const bool exists = row < p.rows;
    const int l = exists ? static_cast<int>(row) % p.l : 0;
    const int b = exists ? static_cast<int>(row) / p.l : 0;
    T* const z_pos = static_cast<T*>(p.o) + row * p.channels;
    const T* const z_neg = static_cast<const T*>(p.z_neg) + row * p.channels;
    float a = p.alpha;
    if (p.alpha_map != nullptr && exists && l < p.first_text_pos) {
        a = p.alpha_map[b * p.alpha_stride_b + l * p.alpha_stride_l];
    }
    const bool is_neg = exists && l >= p.first_text_neg;
    const bool is_guided = exists && l < p.first_text_pos && a != 0.f;

    Vector<T> pos[kHeld], neg[kHeld];
    const auto first_channel = [&](int turn, int i) {
        return (((turn * kHeld + i) * p.row_warps + part) * kLanes + lane) * kVector;
    };
    const auto load_turn = [&](int turn) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const int first = first_channel(turn, i);
            pos[i] = load<kAligned>(z_pos, first, p.channels);
            neg[i] = load<kAligned>(z_neg, first, p.channels);
        }
    };
    const auto guided = [&](int i, int c) {
        return fmaf(p.scale, pos[i][c],
                    __fmul_rn(1.f - p.scale, neg[i][c]));
    };
    const int turns = (p.channels + kVector * kHeldByWarp * p.row_warps - 1) /
                      (kVector * kHeldByWarp * p.row_warps);

    // of Z+, of G
    float2 sum = {0.f, 0.f};
    const auto add = [&](float& to, float x) { to = fmaf(p.norm == 1 ? copysignf(1.f, x) : x, x, to); };
    if (is_guided) {
        for (int turn = 0; turn < turns; ++turn) {
            load_turn(turn);
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
#pragma unroll
                for (int c = 0; c < kVector; ++c) {
                    add(sum.x, pos[i][c]);
                    add(sum.y, guided(i, c));
                }
            }
        }
    }
#pragma unroll
    for (int other = 1; other < kLanes; other *= 2) {
        sum.x += __shfl_xor_sync(~0u, sum.x, other);
        sum.y += __shfl_xor_sync(~0u, sum.y, other);
    }
    if (p.row_warps > 1) {
        if (lane == 0) sums[warp] = sum;
        __syncthreads();
        sum = {0.f, 0.f};
        for (int i = 0; i < p.row_warps; ++i) {
            sum.x += sums[warp - part + i].x;
            sum.y += sums[warp - part + i].y;
        }
    }

    if (is_guided) {
        const float limit = p.tau * (p.norm == 1 ? sum.x : __fsqrt_rn(sum.x));
        const float norm = p.norm == 1 ? sum.y : __fsqrt_rn(sum.y);
        // `norm` is 0 only where it is not over the limit
        const float of_guided = norm > limit ? a * __fdiv_rn(limit, norm) : a;
        const float of_pos = 1.f - a;
        for (int turn = 0; turn < turns; ++turn) {
            if (turns > 1) load_turn(turn);
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                // unpacked anew: as floats they would not all fit
#pragma unroll
                for (int c = 0; c < kVector / 2; ++c) {
                    pos[i].pairs[c] = ptx::in_register(pos[i].pairs[c]);
                    neg[i].pairs[c] = ptx::in_register(neg[i].pairs[c]);
                }
                const auto blend = [&](int c) {
                    return fmaf(of_guided, guided(i, c), __fmul_rn(of_pos, pos[i][c]));
                };
                Vector<T> o;
#pragma unroll
                for (int c = 0; c < kVector / 2; ++c) {
                    o.pairs[c] = ptx::pack<T>(blend(2 * c), blend(2 * c + 1));
                }
                store<kAligned>(z_pos, first_channel(turn, i), p.channels, o);
            }
        }
    } else if (is_neg) {
        for (int c = part * kLanes + lane; c < p.channels; c += p.row_warps * kLanes) {
            z_pos[c] = z_neg[c];
        }
    }
}

}  // namespace

cudaError_t nag_blend(NagParams p, cudaStream_t stream) {
    if (p.rows == 0 || p.channels == 0) return cudaSuccess;
    if (p.rows > INT32_MAX) return cudaErrorInvalidValue;
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    p.row_warps = 1;
    while (p.row_warps < kRowWarps && p.channels > kVector * kHeldByWarp * p.row_warps) {
        p.row_warps *= 2;
    }
    const int64_t blocks = ceil_div(p.rows, kRowWarps / p.row_warps);
    const auto launch_for = [&](auto type) {
        using T = typename decltype(type)::type;
        return p.channels % kVector == 0
                   ? launch<nag_blend_kernel<T, true>>(device, blocks, kRowWarps * kLanes, 0, stream, p)
                   : launch<nag_blend_kernel<T, false>>(device, blocks, kRowWarps * kLanes, 0, stream, p);
    };
    return p.type == Type::kHalf ? launch_for(TypeTag<__half>{}) : launch_for(TypeTag<__nv_bfloat16>{});
}

}  // namespace nasa
