// Forward for prompts of any length: K and V pass by in tiles of 64 keys (sm_80 and up).
//
//     O = softmax(Q K+^T) V+  -  alpha * softmax(Q K-^T) V-
//
// or what rules.cuh makes of the two prompts, or of them and the shared keys of a joint attention.
// These, the keys of the image, are another kernel's; or the walk begins with them, and leaves O_s and
// its log-sum-exp in memory where the other kernel would have left them.
//
// A block of 8 warps owns the query rows of one head, 16 per warp. It walks over K-, V-, parks Z- in
// registers, and walks over K+, V+, 128 keys at a time: two tiles of K, a step of the softmax, two
// tiles of V. They pass through a ring in which one tile is multiplied while two arrive. The columns
// of a head_dim above 128 are shared by two warps or four, for two accumulators of all of them would
// not fit the registers.
#include "launch.h"
#include "rules.cuh"

namespace nasa {
namespace {

constexpr int kLongThreads = kLongWarps * kWarpSize;
constexpr int kStages = kLongStages;
constexpr int kHalfKeys = kBlockKeys / 2;  // of a tile
constexpr int kHalfTiles = kHalfKeys / 8;

template <int kD>
struct LongLayout {
    static constexpr int kColumns = long_columns(kD);
    static constexpr int kShares = kD / kColumns;  // warps to a row
    static constexpr int kRows = long_rows(kD);
    // whether Q stays in registers, beside Z+, Z- and the scores
    static constexpr bool kHoldsQ = kD <= 80;
    static constexpr int kTile = tile_bytes(kHalfKeys, kD);
    static_assert(kColumns % 16 == 0, "ldmatrix.x4 brings 16 columns of V");
    // K or V [64, kD] of each stage; Q [kRows, kD]; bias [128] in fp32
    static constexpr int kQ = kStages * kTile;
    static constexpr int kBias = kQ + tile_bytes(kRows, kD);
    static constexpr int kBytes = kBias + kBlockKeys * static_cast<int>(sizeof(float));
    static_assert(kBytes == long_shared_bytes(kD), "bindings refuse a head_dim by this size");
};

// The A operands of 16 rows of a tile
template <int kD>
__device__ __forceinline__ void load_operands(uint32_t (&a)[kD / 16][4], uint32_t rows) {
    rows += lane_of_a<Tile<kD>::kPitch>();
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) ptx::ldmatrix_x4(a[k], rows + 32 * k);
}

// c += a b^T as multiply_transposed does it, a in registers
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void multiply_held(float (&c)[kTiles][4],
                                              const uint32_t (&a)[kD / 16][4], uint32_t b) {
    constexpr int kPitch = Tile<kD>::kPitch;
    b += lane_of_b_transposed<kPitch>();
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
            uint32_t fb[4];
            ptx::ldmatrix_x4(fb, b + 8 * j * kPitch + 32 * k);
            ptx::mma_m16n8k16<T>(c[j], a[k], fb[0], fb[1]);
            ptx::mma_m16n8k16<T>(c[j + 1], a[k], fb[2], fb[3]);
        }
    }
}

// The sums of the warps that share a row, added up in the order of their columns by each of them.
// `scratch` is read and written by all warps of the block.
template <int kShares>
__device__ __forceinline__ void join_sums(RowSums& sums, float* scratch, int row_group) {
    constexpr int kFloats = sizeof(RowSums) / sizeof(float);
    const int lane = threadIdx.x % kWarpSize;
    const auto of_warp = [&](int warp) { return scratch + warp * kFloats * kWarpSize + lane; };
    float* mine = of_warp(threadIdx.x / kWarpSize);
    __syncthreads();  // no warp reads the ring any more
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        mine[(3 * r) * kWarpSize] = sums.pos[r];
        mine[(3 * r + 1) * kWarpSize] = sums.mixed[r];
        mine[(3 * r + 2) * kWarpSize] = sums.neg[r];
    }
    __syncthreads();
#pragma unroll
    for (int share = 0; share < kShares; ++share) {
        const float* source = of_warp(row_group * kShares + share);
        RowSums part;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            part.pos[r] = source[(3 * r) * kWarpSize];
            part.mixed[r] = source[(3 * r + 1) * kWarpSize];
            part.neg[r] = source[(3 * r + 2) * kWarpSize];
        }
        if (share == 0) {
            sums = part;
        } else {
            sums.add(part);
        }
    }
}

// O_s of a warp's 16 rows, normalised, rounded to T: columns [column, column + 8 * kTiles) of rows l to
// l + 15 of a head of the contiguous [b, l, h, d] that starts at `o`.
template <typename T, int kTiles>
__device__ __forceinline__ void store_shared(uint16_t* o, const float (&z)[kTiles][4],
                                             const ForwardParams& p, int l, int column) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t stride = static_cast<int64_t>(p.h) * p.d;
    const int first = column + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = l + lane / 4 + 8 * r;
        if (row >= p.l) continue;
        uint16_t* target = o + row * stride + first;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            const uint32_t pair = ptx::pack<T>(z[j][2 * r], z[j][2 * r + 1]);
            const int left = p.d - first - 8 * j;
            if (p.d % 2 == 0) {
                if (left > 0) *reinterpret_cast<uint32_t*>(target + 8 * j) = pair;
            } else {
                if (left > 0) target[8 * j] = static_cast<uint16_t>(pair);
                if (left > 1) target[8 * j + 1] = static_cast<uint16_t>(pair >> 16);
            }
        }
    }
}

// All that is in this file: O of a call, whose keys of the image are looked at first where kImage says
// so, and else are nobody's or another kernel's.
template <typename T, int kD, bool kImage>
__device__ __forceinline__ void walk(const ForwardParams& p, const Image& image) {
    using Layout = LongLayout<kD>;
    constexpr int kColumns = Layout::kColumns, kRows = Layout::kRows;
    constexpr int kPitch = Tile<kD>::kPitch;
    extern __shared__ __align__(16) unsigned char smem[];
    float* bias = reinterpret_cast<float*>(smem + Layout::kBias);

    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int row_group = warp / Layout::kShares;
    const int column = warp % Layout::kShares * kColumns;
    const int tiles = (p.l + kRows - 1) / kRows;
    // heads fastest: the heads of one query row are neighbours in memory, and then also in time
    const int h = blockIdx.x % p.h;
    const int tile = blockIdx.x / p.h % tiles;
    const int b = blockIdx.x / p.h / tiles;
    const int row = tile * kRows + row_group * kWarpRows;
    // this warp's rows of Q, and later its columns of O_s and O
    unsigned char* warp_rows = smem + Layout::kQ + row_group * kWarpRows * kPitch;

    // Blocks of keys in the order of the walk: those of the image end before end_image, those of the
    // negative prompt before end_neg, and the positive one's come last.
    const auto blocks_for = [](int n) { return (n + kBlockKeys - 1) / kBlockKeys; };
    const auto blocks_of = [&](int side) {
        return attends(p, side, tile * kRows, kRows) ? blocks_for(p.prompt[side].n) : 0;
    };
    const int end_image = kImage ? blocks_for(image.keys.n) : 0;
    const int end_neg = end_image + blocks_of(kNeg);
    const int blocks = end_neg + blocks_of(kPos);
    struct Keys {
        const Prompt& prompt;
        int first;
    };
    const auto keys_of = [&](int block) {
        if (kImage && block < end_image) return Keys{image.keys, block * kBlockKeys};
        const int side = block < end_neg ? kNeg : kPos;
        return Keys{p.prompt[side], (block - (side == kNeg ? end_image : end_neg)) * kBlockKeys};
    };

    // The ring: stage `next` is read next, and the one before it is free.
    int next = 0;
    const auto place = [&](int i) { return smem + i * Layout::kTile; };
    const auto load_keys = [&](int at, int block, int half) {
        const auto [prompt, first] = keys_of(block);
        load_tile<kD, kHalfKeys, kLongThreads>(
            place(at), key_rows_of(prompt.k, b, h, p), first + half * kHalfKeys, 0, threadIdx.x,
            [&, n = prompt.n](int key) { return key < n; });
    };
    const auto load_values = [&](int at, int block, int half) {
        const auto [prompt, first] = keys_of(block);
        // the row of an absent key may hold NaN, and 0 * NaN is not 0
        load_tile<kD, kHalfKeys, kLongThreads>(
            place(at), key_rows_of(prompt.v, b, h, p), first + half * kHalfKeys, 0, threadIdx.x,
            [&, first = first](int key) { return bias[key - first] != -INFINITY; });
    };
    const auto load_shared = [&] {
        if (!is_joint(p)) return;
        load_tile<kColumns, kWarpRows, kWarpSize, kPitch>(
            warp_rows + 2 * column, rows_of(p.shared.o, b, h, p), row, column, lane,
            [&](int l) { return l < p.l; });
    };
    // The next tile, once it is here; load(at) sends another to the stage before it.
    const auto take = [&](auto load) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // no warp reads the tile before this one any more
        load(next == 0 ? kStages - 1 : next - 1);
        ptx::cp_async_commit();
        const uint32_t here = ptx::shared_address(place(next));
        next = next == kStages - 1 ? 0 : next + 1;
        return here;
    };

    if (blocks > 0) {
        load_tile<kD, kRows, kLongThreads>(smem + Layout::kQ, rows_of(p.q, b, h, p), tile * kRows,
                                           0, threadIdx.x, [&](int l) { return l < p.l; });
        for (int half = 0; half < 2; ++half) {
            load_keys(half, 0, half);
            ptx::cp_async_commit();
        }
    } else if (!kImage) {
        load_shared();
        ptx::cp_async_commit();
    }

    // [16, kColumns] of this warp
    float z[kColumns / 8][4], z_neg[kColumns / 8][4];
    OnlineSoftmax softmax, softmax_neg;
    uint32_t q[Layout::kHoldsQ ? kD / 16 : 1][4] = {};
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
    // The image's keys are all seen: O_s and its log-sum-exp go to memory. The barrier is for the warps
    // that share a row.
    const auto leave_image = [&] {
        const float inverse[2] = {softmax.inverse_sum(0), softmax.inverse_sum(1)};
        const float lse[2] = {softmax.lse(0, inverse[0]), softmax.lse(1, inverse[1])};
        normalise(z, inverse);
        uint16_t* o = static_cast<uint16_t*>(image.o) +
                      (static_cast<int64_t>(b) * p.l * p.h + h) * p.d;
        store_shared<T>(o, z, p, row, column);
#pragma unroll 1  // unrolled, it takes a register more than there are
        for (int r = 0; r < 2; ++r) {
            const int l = row + lane / 4 + 8 * r;
            if (column == 0 && lane % 4 == 0 && l < p.l) {
                image.lse[(static_cast<int64_t>(b) * p.h + h) * p.l + l] =
                    (r == 0 ? lse[0] : lse[1]) * (1.f / kLog2E);
            }
        }
        softmax = OnlineSoftmax{};
        clear(z);
        __syncthreads();
    };

    for (int block = 0; block < blocks; ++block) {
        if (kImage && block == end_image) leave_image();
        if (block == end_neg) park();
        const auto [prompt, first] = keys_of(block);
        // its last readers have passed the barriers of V
        if (threadIdx.x < kBlockKeys) {
            bias[threadIdx.x] = key_bias(prompt.mask, b, first + threadIdx.x, prompt.n);
        }
        float s[kBlockKeys / 8][4];
        clear(s);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t k = take([&](int at) { load_values(at, block, half); });
            float(&scores)[kHalfTiles][4] =
                reinterpret_cast<float(&)[kHalfTiles][4]>(s[half * kHalfTiles]);
            if constexpr (Layout::kHoldsQ) {
                if (block == 0 && half == 0) load_operands<kD>(q, ptx::shared_address(warp_rows));
                multiply_held<T, kD>(scores, q, k);
            } else {
                multiply_transposed<T, kD>(scores, ptx::shared_address(warp_rows), k);
            }
        }
        const float left = finish_any_scores(s, prompt, p.scale, bias, first);
        float rescale[2];
        softmax.push(s, left, rescale);
        uint32_t weights[kBlockKeys / 16][4];
        pack_fragments<T>(weights, s);
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) z[j][i] *= rescale[i / 2];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t v = take([&](int at) {
                if (block + 1 < blocks) {
                    load_keys(at, block + 1, half);
                } else if (half == 0 && (!kImage || blocks > end_image)) {
                    load_shared();  // no warp reads Q any more
                }
            });
            multiply<T, kPitch>(z,
                                reinterpret_cast<const uint32_t(&)[kHalfTiles / 2][4]>(
                                    weights[half * kHalfTiles / 2]),
                                v + 2 * column);
        }
    }
    if (kImage && blocks == end_image) {
        leave_image();
        load_shared();
        ptx::cp_async_commit();
    }
    if (blocks == end_neg) park();

    const float inverse[2] = {softmax.inverse_sum(0), softmax.inverse_sum(1)};
    const float inverse_neg[2] = {softmax_neg.inverse_sum(0), softmax_neg.inverse_sum(1)};
    const Ending end =
        end_rows(p, b, row + lane / 4, h, softmax, softmax_neg, inverse, inverse_neg);
    ptx::cp_async_wait<0>();
    __syncwarp();
    unsigned char* mine = warp_rows + 2 * column;
    finish<true>(
        z, z_neg, end, [&](int j, float (&c)[4]) { fetch<T, kPitch>(c, mine, j); },
        [&](RowSums& sums) {
            if constexpr (Layout::kShares > 1) {
                join_sums<Layout::kShares>(sums, reinterpret_cast<float*>(smem), row_group);
            }
        });
    stage<T, kPitch>(mine, 0, z);
    __syncwarp();
    uint16_t* o = static_cast<uint16_t*>(p.o) +
                  ((static_cast<int64_t>(b) * p.l + row) * p.h + h) * p.d + column;
    store_rows<kColumns, kWarpRows, kPitch>(o, static_cast<int64_t>(p.h) * p.d, mine, p.l - row,
                                            p.d - column, p.aligned);
}

template <typename T, int kD>
__global__ void __launch_bounds__(kLongThreads, 1)
    forward_long_kernel(const __grid_constant__ ForwardParams p) {
    walk<T, kD, false>(p, {});
}

template <typename T, int kD>
__global__ void __launch_bounds__(kLongThreads, 1)
    forward_image_kernel(const __grid_constant__ ImageParams p) {
    walk<T, kD, true>(p.call, p.image);
}

template <auto kKernel, int kD, typename Params>
cudaError_t launch_long(const ForwardParams& p, const Device& device, cudaStream_t stream,
                        const Params& params) {
    const int64_t blocks = p.b * ceil_div(p.l, LongLayout<kD>::kRows) * p.h;
    return launch<kKernel>(device, blocks, kLongThreads, LongLayout<kD>::kBytes, stream, params);
}

}  // namespace

cudaError_t forward_long(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    return dispatch(p.type, p.d, [&](auto type, auto head_dim) {
        using T = typename decltype(type)::type;
        return launch_long<forward_long_kernel<T, head_dim>, head_dim>(p, device, stream, p);
    });
}

cudaError_t forward_image(const ImageParams& p, const Device& device, cudaStream_t stream) {
    return dispatch(p.call.type, p.call.d, [&](auto type, auto head_dim) {
        using T = typename decltype(type)::type;
        return launch_long<forward_image_kernel<T, head_dim>, head_dim>(p.call, device, stream, p);
    });
}

}  // namespace nasa
