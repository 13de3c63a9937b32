// Forward for short prompts: K and V of both prompts stay in shared memory (sm_80 and up).
//
//     O = softmax(Q K+^T) V+  -  alpha * softmax(Q K-^T) V-
//
// or what rules.cuh makes of the two prompts, or of them and the shared keys of a joint attention.
//
// A block walks over its range of tiles of 32 query rows, or of 16 where two would not fit, a tile
// per warp; where the head changes it loads K+-, V+- anew. Between the heads there is no
// barrier. All keys of a row are on chip, so the softmax is not online: the weights P+ and P- of a
// tile wait in registers, rounded, until Z+ and Z- are made of them: all columns at once, as the sums
// of a projection want it, or 16 of them where all would not fit. With 128 keys a few of P+ are
// parked in shared memory while the scores of the negative prompt have the registers.
//
// The arithmetic of a row, its order included, is that of forward_long.cu: both give the same bits.
#include "launch.h"
#include "rules.cuh"

namespace nasa {
namespace {

constexpr int kShortThreads = kShortWarps * kWarpSize;

template <int kD, int kKeys, bool kPlain>
struct ShortLayout {
    static_assert(kKeys % 16 == 0, "P is the A operand of mma.m16n8k16: keys come in steps of 16");
    static constexpr int kParts = short_parts(kD, kKeys, kPlain);
    static constexpr int kRows = short_rows(kD, kKeys, kPlain);
    // of which the registers hold all columns of Z+ and Z-
    static constexpr int kHeld = kParts * kD <= 128 ? kParts : 1;
    static constexpr bool kHoldsAll = kParts == kHeld && kD <= 128;
    static constexpr bool kProjectsApart = !kHoldsAll && short_projects(kD);
    static constexpr int kPromptTile = tile_bytes(kKeys, kD);
    static constexpr int kRowTile = tile_bytes(kRows, kD);
    static constexpr int kParked = short_parked(kD, kKeys, kPlain);
    // K+, V+, K-, V- [kKeys, kD]; Q [kShortWarps, kRows, kD]; what is parked of each warp's P+; bias
    // of both [kKeys] in fp32
    static constexpr int kQueries = 4 * kPromptTile;
    static constexpr int kPark = kQueries + kShortWarps * kRowTile;
    static constexpr int kBias = kPark + kShortWarps * kParked * kOperandBytes;
    static constexpr int kBytes = short_shared_bytes(kD, kKeys, kPlain);
    static_assert(kBytes >= kBias, "the launcher chooses by this size");
};

template <int kNumber>
using Number = std::integral_constant<int, kNumber>;

// The softmax of a prompt in all rows of a warp: its weights P = exp2(S - max), rounded to T as an A
// operand, and what else is known of the rows
template <int kParts, int kKeys>
struct Attended {
    uint32_t weights[kParts][kKeys / 16][4] = {};
    OnlineSoftmax softmax[kParts];
    float inverse[kParts][2] = {};
};

template <typename T, int kD, bool kPlain, int kParts, int kKeys>
__device__ __forceinline__ void attend(Attended<kParts, kKeys>& out, const Prompt& prompt,
                                       float scale, uint32_t q, uint32_t k, const float* bias) {
    float s[kParts][kKeys / 8][4];
#pragma unroll
    for (int m = 0; m < kParts; ++m) clear(s[m]);
    multiply_transposed<T, kD>(s, q, k);
#pragma unroll
    for (int m = 0; m < kParts; ++m) {
        const float left = finish_scores<kPlain>(s[m], prompt, scale, bias, 0);
        out.softmax[m].push_all(s[m], left);
        pack_fragments<T>(out.weights[m], s[m]);
        out.inverse[m][0] = out.softmax[m].inverse_sum(0);
        out.inverse[m][1] = out.softmax[m].inverse_sum(1);
    }
}

template <typename T, int kD, int kKeys, bool kPlain>
__global__ void __launch_bounds__(kShortThreads, 1)
    forward_short_kernel(const __grid_constant__ ForwardParams p, const Share share) {
    using Layout = ShortLayout<kD, kKeys, kPlain>;
    constexpr int kPitch = Tile<kD>::kPitch;
    constexpr int kParts = Layout::kParts, kRows = Layout::kRows;
    extern __shared__ __align__(16) unsigned char smem[];
    float* bias = reinterpret_cast<float*>(smem + Layout::kBias);
    const uint32_t prompts = ptx::shared_address(smem);

    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const bool joint = is_joint(p);
    // without a negative prompt its scores, exponentials and products are left out
    const bool both = p.prompt[kNeg].n > 0;
    unsigned char* row_tile = smem + Layout::kQueries + warp * Layout::kRowTile;
    const uint32_t q_tile = ptx::shared_address(row_tile);

    const auto load_rows = [&](const Rows& rows, int first) {
        load_tile<kD, kRows, kWarpSize>(row_tile, rows, first, 0, lane,
                                        [&](int row) { return row < p.l; });
        ptx::cp_async_commit();
    };
    const auto load_queries = [&](const Span& at) {
        load_rows(rows_of(p.q, at.b, at.h, p),
                  at.first * kRows);
    };
    const auto load_prompt = [&](int side, int b, int h) {
        const Prompt& prompt = p.prompt[side];
        unsigned char* k_tile = smem + 2 * side * Layout::kPromptTile;
        load_tile<kD, kKeys, kShortThreads>(
            k_tile,
            key_rows_of(prompt.k, b, h, p),
            0, 0, threadIdx.x, [&](int key) { return key < prompt.n; });
        // the row of an absent key may hold NaN, and 0 * NaN is not 0
        const float* side_bias = bias + side * kKeys;
        load_tile<kD, kKeys, kShortThreads>(
            k_tile + Layout::kPromptTile,
            key_rows_of(prompt.v, b, h, p),
            0, 0, threadIdx.x, [&](int key) {
                return kPlain ? key < prompt.n : side_bias[key] != -INFINITY;
            });
    };

    Span next(share);  // the tile of this warp whose Q is asked for
    next.first += warp - kShortWarps;
    advance<kShortWarps>(next, warp, share);
    if (next.any()) load_queries(next);
    for (Span span(share); span.any(); span.next(share)) {
        const int h = span.h, b = span.b;
        // nobody reads the K, V and biases of the head before
        __syncthreads();
        if constexpr (!kPlain) {
            for (int i = threadIdx.x; i < 2 * kKeys; i += kShortThreads) {
                const Prompt& prompt = p.prompt[i / kKeys];
                bias[i] = key_bias(prompt.mask, b, i % kKeys, prompt.n);
            }
            __syncthreads();
        }
        load_prompt(kPos, b, h);
        if (both) load_prompt(kNeg, b, h);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        __syncthreads();

        for (span.first += warp; span.any(); span.first += kShortWarps) {
            const int first = span.first * kRows;
            ptx::cp_async_wait<0>();
            __syncwarp();
            Attended<kParts, kKeys> pos, neg;
            const auto each_parked = [&](auto move) {
                uint4* place = reinterpret_cast<uint4*>(smem + Layout::kPark);
                place += warp * Layout::kParked * kWarpSize + lane;
#pragma unroll
                for (int i = 0; i < Layout::kParked; ++i) {
                    move(place[i * kWarpSize], pos.weights[i % kParts][i / kParts]);
                }
            };
            attend<T, kD, kPlain>(pos, p.prompt[kPos], p.scale, q_tile, prompts, bias);
            if (both) {
                each_parked([](uint4& place, const uint32_t (&a)[4]) {
                    place = make_uint4(a[0], a[1], a[2], a[3]);
                });
                attend<T, kD, kPlain>(neg, p.prompt[kNeg], p.scale, q_tile,
                                      prompts + 2 * Layout::kPromptTile, bias + kKeys);
                each_parked([](const uint4& place, uint32_t (&a)[4]) {
                    a[0] = place.x, a[1] = place.y, a[2] = place.z, a[3] = place.w;
                });
            }
            // Q is used up: its tile takes O_s and O
            __syncwarp();
            if (joint) load_rows(rows_of(p.shared.o, b, h, p), first);
            const auto ending_of = [&](int part) {
                return end_rows(p, b, first + part * kWarpRows + lane / 4, h, pos.softmax[part],
                                neg.softmax[part], pos.inverse[part], neg.inverse[part]);
            };
            const auto wait_for_shared = [&] {
                if (!joint) return;
                ptx::cp_async_wait<0>();
                __syncwarp();
            };
            // O of the columns [8 * column, 8 * (column + kTiles)) of the parts [part, part + kCount),
            // to where Q was
            const auto make = [&](auto count, auto tiles, int part, int column, auto end_of) {
                constexpr int kCount = decltype(count)::value, kTiles = decltype(tiles)::value;
                float z_pos[kCount][kTiles][4], z_neg[kCount][kTiles][4];
#pragma unroll
                for (int m = 0; m < kCount; ++m) {
                    clear(z_pos[m]);
                    clear(z_neg[m]);
                }
                const auto weights_of = [&](const auto& side) -> const auto& {
                    return reinterpret_cast<const uint32_t(&)[kCount][kKeys / 16][4]>(
                        side.weights[part]);
                };
                multiply<T, kPitch>(z_pos, weights_of(pos),
                                    prompts + Layout::kPromptTile + 16 * column);
                if (both) {
                    multiply<T, kPitch>(z_neg, weights_of(neg),
                                        prompts + 3 * Layout::kPromptTile + 16 * column);
                }
#pragma unroll
                for (int m = 0; m < kCount; ++m) {
                    unsigned char* rows = row_tile + (part + m) * kWarpRows * kPitch;
                    finish<true, kTiles != kD / 8>(
                        z_pos[m], z_neg[m], end_of(part + m),
                        [&](int j, float (&c)[4]) { fetch<T, kPitch>(c, rows, column + j); });
                    stage<T, kPitch>(rows, column, z_pos[m]);
                }
            };
            if (Layout::kProjectsApart && p.rule == Rule::kProjected) {
                wait_for_shared();
#pragma unroll
                for (int part = 0; part < kParts; part += Layout::kHeld) {
                    make(Number<Layout::kHeld>{}, Number<kD / 8>{}, part, 0, ending_of);
                }
            } else {
                Ending end[kParts];
#pragma unroll
                for (int m = 0; m < kParts; ++m) end[m] = ending_of(m);
                wait_for_shared();
                // what is read of V serves all parts; two turns at once, where that leaves no odd one
                constexpr int kTiles = Layout::kHoldsAll ? kD / 8 : 2;
#pragma unroll(kD / 16 % 2 == 0 ? 2 : 1)
                for (int column = 0; column < kD / 8; column += kTiles) {
                    make(Number<kParts>{}, Number<kTiles>{}, 0, column,
                         [&](int part) { return end[part]; });
                }
            }
            __syncwarp();
            uint16_t* o = static_cast<uint16_t*>(p.o) +
                          ((static_cast<int64_t>(b) * p.l + first) * p.h + h) * p.d;
            store_rows<kD, kRows>(o, static_cast<int64_t>(p.h) * p.d, row_tile, p.l - first, p.d,
                                  p.aligned);
            __syncwarp();
            advance<kShortWarps>(next, warp, share);
            if (next.any()) load_queries(next);
        }
    }
    ptx::cp_async_wait<0>();
}

template <typename T, int kD, int kKeys, bool kPlain>
cudaError_t launch_short(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    using Layout = ShortLayout<kD, kKeys, kPlain>;
    return launch_shared<forward_short_kernel<T, kD, kKeys, kPlain>>(
        device, p, ceil_div(p.l, Layout::kRows), kShortThreads, Layout::kBytes, stream, p);
}

template <typename T, int kD, int kKeys>
cudaError_t launch_scores(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    return is_plain(p) ? launch_short<T, kD, kKeys, true>(p, device, stream)
                       : launch_short<T, kD, kKeys, false>(p, device, stream);
}

}  // namespace

cudaError_t forward_short(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    return dispatch(p.type, p.d, [&](auto type, auto head_dim) {
        using T = typename decltype(type)::type;
        const int keys = short_keys(p);
        if constexpr (has_short(head_dim, kClipKeys)) {
            if (keys == kClipKeys) return launch_scores<T, head_dim, kClipKeys>(p, device, stream);
        }
        if constexpr (has_short(head_dim, kBlockKeys)) {
            if (keys == kBlockKeys) {
                return launch_scores<T, head_dim, kBlockKeys>(p, device, stream);
            }
        }
        return cudaErrorInvalidValue;
    });
}

}  // namespace nasa
