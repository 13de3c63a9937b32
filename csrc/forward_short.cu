// Forward for short prompts: K and V of both prompts stay in shared memory (sm_80 and up).
//
//     O = softmax(Q K+^T) V+  -  alpha * softmax(Q K-^T) V-
//
// or, beside the shared keys of a joint attention, what rules.cuh makes of the three segments.
//
// A block loads one head's K+-, V+- once; then each warp walks over tiles of 16 query rows on its
// own, with no barrier between warps. All keys of a row are on chip, so the softmax is not online:
// the weights P+ and P- of a tile wait in registers, rounded, and O is made 16 columns at a time
// from both. Nothing of size d is ever held.
//
// The arithmetic of a row, its order included, is that of forward_long.cu: both give identical
// bits.
#include "launch.h"
#include "rules.cuh"

namespace nasa {
namespace {

constexpr int kQueryStages = 2;  // one tile is multiplied while the next one arrives

template <int kD, int kKeys>
struct ShortLayout {
    static_assert(kKeys % 16 == 0, "P is the A operand of mma.m16n8k16: keys come in steps of 16");
    static constexpr int kPromptTile = tile_bytes(kKeys, kD);
    static constexpr int kQueryTile = tile_bytes(kWarpRows, kD);
    // K+, V+, K-, V- [kKeys, kD]; Q [kWarps, kQueryStages, 16, kD]; bias of both [kKeys] in fp32
    static constexpr int kQueries = 4 * kPromptTile;
    static constexpr int kBias = kQueries + kWarps * kQueryStages * kQueryTile;
    static constexpr int kBytes = kBias + 2 * kKeys * static_cast<int>(sizeof(float));
    static_assert(kBytes == short_shared_bytes(kD, kKeys), "the launcher chooses by this size");
};

// Weights P = exp2(S - max), rounded to T as an A operand, and 1 / rowsum(P) for rows r and r + 8;
// returns what is known of the rows
template <typename T, int kD, int kKeys>
__device__ __forceinline__ OnlineSoftmax attend(const Prompt& prompt, float scale, uint32_t q,
                                                uint32_t k, const float* bias,
                                                uint32_t (&weights)[kKeys / 16][4],
                                                float (&inverse)[2]) {
    float s[kKeys / 8][4];
    clear(s);
    multiply_transposed<T, kD>(s, q, k);
    const float left = finish_scores(s, is_plain(prompt, scale), scale, bias, prompt.n);
    OnlineSoftmax softmax;
    float rescale[2];
    softmax.push(s, left, rescale);
    pack_fragments<T>(weights, s);
    inverse[0] = softmax.inverse_sum(0);
    inverse[1] = softmax.inverse_sum(1);
    return softmax;
}

template <typename T, int kD, int kKeys>
__global__ void __launch_bounds__(kThreads, kKeys == kClipKeys ? 3 : 2)
    forward_short_kernel(const __grid_constant__ ForwardParams p, const int blocks_per_head) {
    using Layout = ShortLayout<kD, kKeys>;
    constexpr int kPitch = Tile<kD>::kPitch;
    extern __shared__ __align__(16) unsigned char shared[];
    float* bias = reinterpret_cast<float*>(shared + Layout::kBias);

    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    // heads fastest: the heads of one query row are neighbours in memory, and then also in time
    const int h = blockIdx.x % p.h;
    const int part = blockIdx.x / p.h % blocks_per_head;
    const int b = blockIdx.x / p.h / blocks_per_head;

    unsigned char* queries = shared + Layout::kQueries + warp * kQueryStages * Layout::kQueryTile;
    const Rows q = rows_of(p.q, b * p.q_stride_b + h * p.q_stride_h, p.q_stride_l, p.d, p.aligned);
    const bool joint = p.shared.o != nullptr;
    const Rows shared_rows = rows_of(p.shared.o, b * p.shared.o_stride_b + h * p.shared.o_stride_h,
                                     p.shared.o_stride_l, p.d, p.aligned);
    const auto load_queries = [&](int tile, int stage) {
        load_tile<kD, kWarpRows, kWarpSize>(queries + stage * Layout::kQueryTile, q,
                                            tile * kWarpRows, 0, lane,
                                            [&](int row) { return row < p.l; });
        ptx::cp_async_commit();
    };
    const auto load_prompt = [&](const Prompt& prompt, int side) {
        unsigned char* k_tile = shared + 2 * side * Layout::kPromptTile;
        float* bias_row = bias + side * kKeys;
        for (int key = threadIdx.x; key < kKeys; key += kThreads) {
            bias_row[key] = key_bias(prompt.mask, b, key, prompt.n);
        }
        load_tile<kD, kKeys, kThreads>(
            k_tile,
            rows_of(prompt.k, b * prompt.k_stride_b + h * prompt.k_stride_h, prompt.k_stride_n, p.d,
                    p.aligned),
            0, 0, threadIdx.x, [&](int key) { return key < prompt.n; });
        __syncthreads();
        // the row of an absent key may hold NaN, and 0 * NaN is not 0
        load_tile<kD, kKeys, kThreads>(
            k_tile + Layout::kPromptTile,
            rows_of(prompt.v, b * prompt.v_stride_b + h * prompt.v_stride_h, prompt.v_stride_n, p.d,
                    p.aligned),
            0, 0, threadIdx.x, [&](int key) { return bias_row[key] != -INFINITY; });
        ptx::cp_async_commit();
    };

    const int tiles = (p.l + kWarpRows - 1) / kWarpRows;
    const int step = blocks_per_head * kWarps;
    int tile = part * kWarps + warp;
    load_prompt(p.prompt[kPos], 0);
    load_prompt(p.prompt[kNeg], 1);
    load_queries(tile, 0);
    ptx::cp_async_wait<1>();
    __syncthreads();

    const uint32_t prompts = ptx::shared_address(shared);
    for (int stage_index = 0; tile < tiles; tile += step, stage_index ^= 1) {
        load_queries(tile + step, stage_index ^ 1);
        ptx::cp_async_wait<1>();
        __syncwarp();
        unsigned char* q_tile = queries + stage_index * Layout::kQueryTile;

        uint32_t p_pos[kKeys / 16][4], p_neg[kKeys / 16][4];
        float inverse_pos[2], inverse_neg[2];
        const OnlineSoftmax pos =
            attend<T, kD, kKeys>(p.prompt[kPos], p.scale, ptx::shared_address(q_tile), prompts,
                                 bias, p_pos, inverse_pos);
        const OnlineSoftmax neg = attend<T, kD, kKeys>(
            p.prompt[kNeg], p.scale, ptx::shared_address(q_tile), prompts + 2 * Layout::kPromptTile,
            bias + kKeys, p_neg, inverse_neg);
        // Q is used up: its tile takes O_s and O
        __syncwarp();
        const int first = tile * kWarpRows;
        if (joint) {
            load_tile<kD, kWarpRows, kWarpSize>(q_tile, shared_rows, first, 0, lane,
                                                [&](int row) { return row < p.l; });
            ptx::cp_async_commit();
        }
        float alpha[2] = {0.f, 0.f};
        Weights weights[2] = {};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int l = first + lane / 4 + 8 * r;
            if (l >= p.l) continue;
            alpha[r] = alpha_of(p, b, l, h);
            if (joint) {
                weights[r] = weigh(p, b, l, h, alpha[r], pos.lse(r, inverse_pos[r]),
                                   neg.lse(r, inverse_neg[r]));
            }
        }
        if (joint) {
            ptx::cp_async_wait<0>();
            __syncwarp();
        }
#pragma unroll 2
        for (int column = 0; column < kD / 8; column += 2) {
            float z_pos[2][4], z_neg[2][4];
            clear(z_pos);
            clear(z_neg);
            multiply<T, kPitch>(z_pos, p_pos, prompts + Layout::kPromptTile + 16 * column);
            multiply<T, kPitch>(z_neg, p_neg, prompts + 3 * Layout::kPromptTile + 16 * column);
            if (joint) {
                merge(z_pos, inverse_pos, z_neg, inverse_neg, weights, [&](int j, float (&c)[4]) {
                    fetch<T, kPitch>(c, q_tile, column + j);
                });
            } else {
                subtract(z_pos, inverse_pos, z_neg, inverse_neg, alpha);
            }
            stage<T, kPitch>(q_tile, column, z_pos);
        }
        __syncwarp();
        uint16_t* o =
            static_cast<uint16_t*>(p.o) + ((static_cast<int64_t>(b) * p.l + first) * p.h + h) * p.d;
        store_rows<kD>(o, static_cast<int64_t>(p.h) * p.d, q_tile, p.l - first, p.d, p.aligned);
        __syncwarp();
    }
    ptx::cp_async_wait<0>();
}

template <typename T, int kD, int kKeys>
cudaError_t launch_short(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    constexpr int kBytes = ShortLayout<kD, kKeys>::kBytes;
    // enough blocks to fill the GPU once; each loads K and V once and walks over its rows
    const int64_t resident = std::max(1, device.shared_per_sm / (kBytes + kReservedShared));
    const int64_t heads = static_cast<int64_t>(p.b) * p.h;
    const int64_t blocks_per_head =
        std::min(ceil_div(p.l, kWarps * kWarpRows), ceil_div(device.sms * resident, heads));
    return launch<forward_short_kernel<T, kD, kKeys>>(device, heads * blocks_per_head, kThreads,
                                                      kBytes, stream, p,
                                                      static_cast<int>(blocks_per_head));
}

}  // namespace

cudaError_t forward_short(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    return dispatch(p.type, p.d, [&](auto type, auto head_dim) {
        using T = typename decltype(type)::type;
        const int keys = short_keys(p);
        if constexpr (has_short(head_dim, kClipKeys)) {
            if (keys == kClipKeys) return launch_short<T, head_dim, kClipKeys>(p, device, stream);
        }
        if constexpr (has_short(head_dim, kBlockKeys)) {
            if (keys == kBlockKeys) return launch_short<T, head_dim, kBlockKeys>(p, device, stream);
        }
        return cudaErrorInvalidValue;
    });
}

}  // namespace nasa
