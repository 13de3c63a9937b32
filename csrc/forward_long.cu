// Forward for prompts of any length: K and V pass by in blocks of 128 keys (sm_80 and up).
//
//     O = softmax(Q K+^T) V+  -  alpha * softmax(Q K-^T) V-
//
// or, beside the shared keys of a joint attention, what rules.cuh makes of the three segments.
//
// A block owns 64 query rows of one head, 16 per warp. It walks over K-, V-, parks Z- in registers,
// and walks over K+, V+. V of a block of keys arrives while its scores are made, K of the next one
// while Z is. The columns of a head_dim above 128 are shared by two blocks or four.
#include "launch.h"
#include "rules.cuh"

namespace nasa {
namespace {

template <int kD>
struct LongLayout {
    static constexpr int kColumns = long_columns(kD);
    static constexpr int kShares = kD / kColumns;
    static_assert(kColumns % 16 == 0, "ldmatrix.x4 brings 16 columns of V");
    // K [128, kD]; V [128, kColumns]; Q [64, kD]; bias [128] in fp32
    static constexpr int kV = tile_bytes(kBlockKeys, kD);
    static constexpr int kQ = kV + tile_bytes(kBlockKeys, kColumns);
    static constexpr int kBias = kQ + tile_bytes(kWarps * kWarpRows, kD);
    static constexpr int kBytes = kBias + kBlockKeys * static_cast<int>(sizeof(float));
    static_assert(kBytes == long_shared_bytes(kD), "bindings refuse a head_dim by this size");
};

template <typename T, int kD>
__global__ void __launch_bounds__(kThreads, 1)
    forward_long_kernel(const __grid_constant__ ForwardParams p) {
    using Layout = LongLayout<kD>;
    constexpr int kColumns = Layout::kColumns;
    constexpr int kRows = kWarps * kWarpRows;
    extern __shared__ __align__(16) unsigned char smem[];
    unsigned char* k_tile = smem;
    unsigned char* v_tile = smem + Layout::kV;
    unsigned char* q_tile = smem + Layout::kQ;
    float* bias = reinterpret_cast<float*>(smem + Layout::kBias);

    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int tiles = (p.l + kRows - 1) / kRows;
    // heads fastest: the heads of one query row are neighbours in memory, and then also in time
    const int h = blockIdx.x % p.h;
    const int column = blockIdx.x / p.h % Layout::kShares * kColumns;
    const int tile = blockIdx.x / p.h / Layout::kShares % tiles;
    const int b = blockIdx.x / p.h / Layout::kShares / tiles;

    // Blocks of keys in the order of the walk: those of the negative prompt come first.
    const auto blocks_of = [&](int side) {
        const int n = attends(p, side, tile * kRows, kRows) ? p.prompt[side].n : 0;
        return (n + kBlockKeys - 1) / kBlockKeys;
    };
    const int blocks_neg = blocks_of(kNeg);
    const int blocks = blocks_neg + blocks_of(kPos);
    const auto load_keys = [&](int block) {
        const int side = block < blocks_neg ? kNeg : kPos;
        const Prompt& prompt = p.prompt[side];
        const int first = (side == kNeg ? block : block - blocks_neg) * kBlockKeys;
        load_tile<kD, kBlockKeys, kThreads>(
            k_tile,
            rows_of(prompt.k, b * prompt.k_stride_b + h * prompt.k_stride_h, prompt.k_stride_n, p.d,
                    p.aligned),
            first, 0, threadIdx.x, [&](int key) { return key < prompt.n; });
        ptx::cp_async_commit();
    };
    const auto load_values = [&](const Prompt& prompt, int first) {
        // the row of an absent key may hold NaN, and 0 * NaN is not 0
        load_tile<kColumns, kBlockKeys, kThreads>(
            v_tile,
            rows_of(prompt.v, b * prompt.v_stride_b + h * prompt.v_stride_h, prompt.v_stride_n, p.d,
                    p.aligned),
            first, column, threadIdx.x, [&](int key) { return bias[key - first] != -INFINITY; });
        ptx::cp_async_commit();
    };

    unsigned char* warp_rows = q_tile + warp * kWarpRows * Tile<kD>::kPitch;
    const int row = tile * kRows + warp * kWarpRows;
    // to where this warp's rows of Q were
    const auto load_shared = [&] {
        if (p.shared.o == nullptr) return;
        load_tile<kColumns, kWarpRows, kWarpSize>(
            warp_rows,
            rows_of(p.shared.o, b * p.shared.o_stride_b + h * p.shared.o_stride_h,
                    p.shared.o_stride_l, p.d, p.aligned),
            row, column, lane, [&](int l) { return l < p.l; });
        ptx::cp_async_commit();
    };

    if (blocks > 0) {
        load_tile<kD, kRows, kThreads>(
            q_tile, rows_of(p.q, b * p.q_stride_b + h * p.q_stride_h, p.q_stride_l, p.d, p.aligned),
            tile * kRows, 0, threadIdx.x, [&](int l) { return l < p.l; });
        load_keys(0);
    } else {
        load_shared();
    }

    // [16, kColumns] of this warp
    float z[kColumns / 8][4], z_neg[kColumns / 8][4];
    OnlineSoftmax softmax, softmax_neg;
    clear(z);
    const auto park = [&] {
        softmax_neg = softmax;
        softmax = OnlineSoftmax{};
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) z_neg[j][i] = z[j][i];
        }
        clear(z);
    };

    for (int block = 0; block < blocks; ++block) {
        if (block == blocks_neg) park();
        const int side = block < blocks_neg ? kNeg : kPos;
        const Prompt& prompt = p.prompt[side];
        const int first = (side == kNeg ? block : block - blocks_neg) * kBlockKeys;
        bias[threadIdx.x] = key_bias(prompt.mask, b, first + threadIdx.x, prompt.n);
        ptx::cp_async_wait<0>();
        __syncthreads();  // K is here; no warp reads the V of the block before
        load_values(prompt, first);

        float s[kBlockKeys / 8][4];
        clear(s);
        multiply_transposed<T, kD>(s, ptx::shared_address(warp_rows), ptx::shared_address(k_tile));
        const float left =
            finish_any_scores(s, prompt, p.scale, bias, first);
        float rescale[2];
        softmax.push(s, left, rescale);
        uint32_t weights[kBlockKeys / 16][4];
        pack_fragments<T>(weights, s);
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) z[j][i] *= rescale[i / 2];
        }

        ptx::cp_async_wait<0>();
        __syncthreads();  // V is here; no warp reads K or the bias any more
        if (block + 1 < blocks) {
            load_keys(block + 1);
        } else {
            load_shared();
        }
        multiply<T, Tile<kColumns>::kPitch>(z, weights, ptx::shared_address(v_tile));
    }
    if (blocks == blocks_neg) park();

    const float inverse[2] = {softmax.inverse_sum(0), softmax.inverse_sum(1)};
    const float inverse_neg[2] = {softmax_neg.inverse_sum(0), softmax_neg.inverse_sum(1)};
    const Ending end =
        end_rows(p, b, row + lane / 4, h, softmax, softmax_neg, inverse, inverse_neg);
    ptx::cp_async_wait<0>();
    __syncwarp();
    finish<true>(z, z_neg, end, [&](int j, float (&c)[4]) {
        fetch<T, Tile<kColumns>::kPitch>(c, warp_rows, j);
    });
    // this warp's rows of Q are used up: they take O
    stage<T, Tile<kColumns>::kPitch>(warp_rows, 0, z);
    __syncwarp();
    uint16_t* o = static_cast<uint16_t*>(p.o) +
                  ((static_cast<int64_t>(b) * p.l + row) * p.h + h) * p.d + column;
    store_rows<kColumns>(o, static_cast<int64_t>(p.h) * p.d, warp_rows, p.l - row, p.d - column,
                         p.aligned);
}

template <typename T, int kD>
cudaError_t launch_long(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    const int64_t tiles = ceil_div(p.l, kWarps * kWarpRows);
    const int64_t blocks = p.b * tiles * LongLayout<kD>::kShares * p.h;
    return launch<forward_long_kernel<T, kD>>(device, blocks, kThreads, LongLayout<kD>::kBytes,
                                              stream, p);
}

}  // namespace

cudaError_t forward_long(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    return dispatch(p.type, p.d, [&](auto type, auto head_dim) {
        return launch_long<typename decltype(type)::type, head_dim>(p, device, stream);
    });
}

}  // namespace nasa
