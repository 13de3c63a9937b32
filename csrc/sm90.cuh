// What the two kernels for Hopper share: tiles by TMA, products by wgmma, the rows of a warpgroup
// from Q to O, and the tensor maps of a call (sm_90a).
//
// Tiles are [rows, d] in atoms of 64 columns: 128-byte rows, 16-byte chunks xored with the row
// (swizzle 128B), so that TMA writes and wgmma reads them as they are. Nothing is padded but what
// the instructions demand: 77 keys are wgmma's n = 80, a head_dim of 40 is n = 40 in P V and k = 48
// in Q K^T, where TMA fills the rest with zeros, as it does past the last row.
#pragma once

#include <cuda.h>

#include "launch.h"
#include "rules.cuh"

namespace nasa::sm90 {

constexpr int kGroupThreads = 128;
constexpr int kGroupRows = 64;  // the m of wgmma
constexpr int kAtomColumns = 64;
constexpr int kRowBytes = 128;
constexpr int kQueryStages = 2;  // one tile is multiplied while the next one arrives

template <int kRows, int kD>
struct SwizzledTile {
    static_assert(kD % 8 == 0 && kD <= 256, "wgmma takes n in steps of 8, up to 256");
    static constexpr int kAtoms = (kD + kAtomColumns - 1) / kAtomColumns;
    static constexpr int kAtom = kRows * kRowBytes;
    static constexpr int kBytes = kAtoms * kAtom;
    static_assert(kAtom % 1024 == 0, "swizzle 128B repeats every 1024 bytes: atoms start there");
};

// A tensor map, and what a step in h and b adds to its coordinates: 0 where one head, or one batch
// element, is read for all.
struct Mapped {
    CUtensorMap map;  // [b, h, rows, d], boxes of [1, 1, rows of a tile, 64]
    int step_h, step_b;
    int first_row;  // 0, or past the last row for a prompt without keys: TMA then brings zeros
};

struct Params {
    Mapped q, o, o_shared;
    Mapped k[2], v[2];  // kPos, kNeg
    ForwardParams call;
};

__device__ __forceinline__ void wait(uint32_t barrier, int parity) {
    while (!ptx::mbarrier_try_wait(barrier, parity)) {
    }
}

// Bring [kRows, kD] of one head from `row` on, one box per atom; `barrier` will have its bytes.
template <int kRows, int kD>
__device__ __forceinline__ void load_tile(const Mapped& t, uint32_t tile, uint32_t barrier, int row,
                                          int h, int b) {
    using Tile = SwizzledTile<kRows, kD>;
#pragma unroll
    for (int atom = 0; atom < Tile::kAtoms; ++atom) {
        ptx::tma_load_4d(tile + atom * Tile::kAtom, &t.map, barrier, atom * kAtomColumns,
                         row + t.first_row, h * t.step_h, b * t.step_b);
    }
}

// The row of an absent key may hold NaN, and 0 * NaN is not 0: make row `key` of V zeros.
template <int kKeys, int kD>
__device__ __forceinline__ void clear_row(unsigned char* v, int key) {
    using Tile = SwizzledTile<kKeys, kD>;
#pragma unroll 1
    for (int i = 0; i < Tile::kAtoms * 8; ++i) {
        unsigned char* row = v + i / 8 * Tile::kAtom + key * kRowBytes;
        // neighbours in distinct banks
        *reinterpret_cast<uint4*>(row + (i + key) % 8 * 16) = uint4{0, 0, 0, 0};
    }
}

// A matrix descriptor of swizzle 128B: 8-row groups lie 1024 bytes apart; `leading` bytes from one
// atom of 64 columns to the next matter only where n is contiguous.
__device__ __forceinline__ uint64_t descriptor(uint32_t shared, uint32_t leading) {
    const uint64_t swizzle_128b = 1;
    return (shared >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(1024 >> 4) << 32 | swizzle_128b << 62;
}

// s [64, kKeys] = Q K^T, started; tiles by address
template <typename T, int kD, int kKeys>
__device__ __forceinline__ void start_scores(float (&s)[kKeys / 8][4], uint32_t q, uint32_t k) {
#pragma unroll
    for (int i = 0; i < (kD + 15) / 16; ++i) {
        const int atom = i / 4, column = i % 4 * 32;
        ptx::wgmma<T>(
            s, descriptor(q + atom * SwizzledTile<kGroupRows, kD>::kAtom + column, 16),
            descriptor(k + atom * SwizzledTile<kKeys, kD>::kAtom + column, 16), i > 0);
    }
    ptx::wgmma_commit();
}

// z [64, kD] = P V, or += where `add`, started
template <typename T, int kD, int kKeys>
__device__ __forceinline__ void start_values(float (&z)[kD / 8][4],
                                             const uint32_t (&weights)[kKeys / 16][4], uint32_t v,
                                             bool add) {
    static_assert(kKeys % 16 == 0, "P is the A operand of wgmma: keys come in steps of 16");
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
        ptx::wgmma_values<T>(
            z, weights[i], descriptor(v + i * 16 * kRowBytes, SwizzledTile<kKeys, kD>::kAtom),
            add || i > 0);
    }
    ptx::wgmma_commit();
}

// The softmax of one prompt's rows r and r + 8
struct Side {
    OnlineSoftmax softmax;
    float inverse[2];  // once it has seen all keys

    // Scores of keys `first` and up become weights; `rescale` is what the earlier ones shrink by.
    template <typename T, int kTiles>
    __device__ __forceinline__ void push(float (&s)[kTiles][4], const Prompt& prompt, float scale,
                                         const float* bias, int first,
                                         uint32_t (&weights)[kTiles / 2][4], float (&rescale)[2]) {
        const float left =
            finish_scores(s, is_plain(prompt, scale), scale, bias, prompt.n - first);
        softmax.push(s, left, rescale);
        pack_fragments<T>(weights, s);
    }

    __device__ __forceinline__ void finish() {
        inverse[0] = softmax.inverse_sum(0);
        inverse[1] = softmax.inverse_sum(1);
    }
};

// The rows of a warpgroup: the next tile of Q arrives while one is multiplied, and the shared
// segment and O take the place of a Q that is used up. One thread keeps the copies on their way.
template <typename T, int kD>
struct Rows64 {
    using Tile = SwizzledTile<kGroupRows, kD>;
    static constexpr int kBytes = kQueryStages * Tile::kBytes;
    static constexpr int kBarriers = kQueryStages + 1;  // Q of each stage, O_s

    const Params& p;
    unsigned char* tiles;
    uint32_t arrived;  // the mbarriers
    int group, h, b;

    __device__ __forceinline__ bool leads() const { return threadIdx.x % kGroupThreads == 0; }
    __device__ __forceinline__ unsigned char* place(int stage) const {
        return tiles + stage * Tile::kBytes;
    }

    // Q of tile `tile`, the `round`-th of this warpgroup; by the leader
    __device__ __forceinline__ void load(int tile, int round) const {
        bring(p.q, tile, round % kQueryStages, round % kQueryStages);
    }

    // The address of the Q of round `round`, once it is there
    __device__ __forceinline__ uint32_t queries(int round) const {
        const int stage = round % kQueryStages;
        wait(arrived + 8 * stage, round / kQueryStages % 2);
        return ptx::shared_address(place(stage));
    }

    // Q is used up by this warp: once it is by all, its tile takes O_s.
    __device__ __forceinline__ void release(int tile, int round) const {
        ptx::barrier_sync(1 + group, kGroupThreads);
        if (p.call.shared.o != nullptr && leads()) {
            bring(p.o_shared, tile, round % kQueryStages, kQueryStages);
        }
    }

    // O from both prompts into z_pos, and on its way to memory; after `release`. The tile is free
    // when the leader returns.
    __device__ __forceinline__ void store(int tile, int round, float (&z_pos)[kD / 8][4],
                                          const Side& pos, const float (&z_neg)[kD / 8][4],
                                          const Side& neg) const {
        const ForwardParams& call = p.call;
        const bool joint = call.shared.o != nullptr;
        const int lane = threadIdx.x % kWarpSize;
        const int row = threadIdx.x % kGroupThreads / kWarpSize * kWarpRows + lane / 4;
        float alpha[2] = {0.f, 0.f};
        Weights weights[2] = {};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int l = tile * kGroupRows + row + 8 * r;
            if (l >= call.l) continue;
            alpha[r] = alpha_of(call, b, l, h);
            if (joint) {
                weights[r] = weigh(call, b, l, h, alpha[r], pos.softmax.lse(r, pos.inverse[r]),
                                   neg.softmax.lse(r, neg.inverse[r]));
            }
        }
        // where z[j][0] and z[j][1] belong; z[j][2] and z[j][3] lie 8 rows, and the same swizzle, on
        unsigned char* o_row = place(round % kQueryStages) + row * kRowBytes + lane % 4 * 4;
        const auto target = [&](int j) {
            return o_row + j / 8 * Tile::kAtom + ((j % 8) ^ (row % 8)) * 16;
        };
        if (joint) {
            wait(arrived + 8 * kQueryStages, round % 2);
            merge(z_pos, pos.inverse, z_neg, neg.inverse, weights, [&](int j, float (&c)[4]) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const unsigned char* pair = target(j) + i / 2 * 8 * kRowBytes;
                    c[i] = static_cast<float>(reinterpret_cast<const T*>(pair)[i % 2]);
                }
            });
        } else {
            subtract(z_pos, pos.inverse, z_neg, neg.inverse, alpha);
        }
#pragma unroll
        for (int j = 0; j < kD / 8; ++j) {
            *reinterpret_cast<uint32_t*>(target(j)) = ptx::pack<T>(z_pos[j][0], z_pos[j][1]);
            *reinterpret_cast<uint32_t*>(target(j) + 8 * kRowBytes) =
                ptx::pack<T>(z_pos[j][2], z_pos[j][3]);
        }
        ptx::fence_proxy_async();
        ptx::barrier_sync(1 + group, kGroupThreads);
        if (!leads()) return;
#pragma unroll
        for (int atom = 0; atom < Tile::kAtoms; ++atom) {
            ptx::tma_store_4d(&p.o.map,
                              ptx::shared_address(place(round % kQueryStages)) + atom * Tile::kAtom,
                              atom * kAtomColumns, tile * kGroupRows, h, b);
        }
        ptx::bulk_commit();
        ptx::bulk_wait_read();
    }

private:
    __device__ __forceinline__ void bring(const Mapped& t, int tile, int stage, int barrier) const {
        ptx::mbarrier_arrive_expect(arrived + 8 * barrier, Tile::kBytes);
        load_tile<kGroupRows, kD>(t, ptx::shared_address(place(stage)), arrived + 8 * barrier,
                                  tile * kGroupRows, h, b);
    }
};

// ---- launch ----------------------------------------------------------------------------------

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: nothing links libcuda.
inline cudaError_t find_encode(Encode& encode) {
    static std::atomic<void*> found{nullptr};
    void* function = found.load(std::memory_order_relaxed);
    if (function == nullptr) {
        cudaDriverEntryPointQueryResult result;
        if (const cudaError_t error = cudaGetDriverEntryPointByVersion(
                "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result)) {
            return error;
        }
        if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
        found.store(function, std::memory_order_relaxed);
    }
    encode = reinterpret_cast<Encode>(function);
    return cudaSuccess;
}

// A map of [b, rows, h, d] in memory, as [b, h, rows, d]. A dimension that does not move (one
// element, or stride 0) is one element long, and its coordinate stays 0.
inline cudaError_t map_tensor(Mapped& t, const ForwardParams& p, const void* data, int64_t stride_b,
                              int64_t stride_rows, int64_t stride_h, int rows, int box_rows) {
    Encode encode;
    if (const cudaError_t error = find_encode(encode)) return error;
    t.step_h = p.h > 1 && stride_h != 0;
    t.step_b = p.b > 1 && stride_b != 0;
    t.first_row = 0;
    constexpr cuuint64_t kAnyStride = 16;
    const bool rows_move = rows > 1;
    const cuuint64_t sizes[4] = {cuuint64_t(p.d), cuuint64_t(rows), t.step_h ? cuuint64_t(p.h) : 1,
                                 t.step_b ? cuuint64_t(p.b) : 1};
    const cuuint64_t strides[3] = {rows_move ? cuuint64_t(stride_rows) * 2 : kAnyStride,
                                   t.step_h ? cuuint64_t(stride_h) * 2 : kAnyStride,
                                   t.step_b ? cuuint64_t(stride_b) * 2 : kAnyStride};
    const cuuint32_t box[4] = {kAtomColumns, cuuint32_t(box_rows), 1, 1};
    const cuuint32_t elements[4] = {1, 1, 1, 1};
    const CUresult result = encode(
        &t.map,
        p.type == Type::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        4, const_cast<void*>(data), sizes, strides, box, elements, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Everything of a call; K and V come in tiles of `keys` rows.
inline cudaError_t map_call(Params& params, const ForwardParams& p, int keys) {
    params.call = p;
    const int64_t o_stride_l = static_cast<int64_t>(p.h) * p.d;
    if (const cudaError_t error = map_tensor(params.q, p, p.q, p.q_stride_b, p.q_stride_l,
                                             p.q_stride_h, p.l, kGroupRows)) {
        return error;
    }
    if (const cudaError_t error =
            map_tensor(params.o, p, p.o, p.l * o_stride_l, o_stride_l, p.d, p.l, kGroupRows)) {
        return error;
    }
    if (const Shared& s = p.shared; s.o != nullptr) {
        if (const cudaError_t error =
                map_tensor(params.o_shared, p, s.o, s.o_stride_b, s.o_stride_l, s.o_stride_h, p.l,
                           kGroupRows)) {
            return error;
        }
    }
    for (int side : {kPos, kNeg}) {
        const Prompt& prompt = p.prompt[side];
        if (prompt.n == 0) {
            // past the last row of any tensor there are zeros
            if (const cudaError_t error =
                    map_tensor(params.k[side], p, p.q, 0, p.q_stride_l, 0, p.l, keys)) {
                return error;
            }
            params.k[side].first_row = p.l;
            params.v[side] = params.k[side];
            continue;
        }
        if (const cudaError_t error =
                map_tensor(params.k[side], p, prompt.k, prompt.k_stride_b, prompt.k_stride_n,
                           prompt.k_stride_h, prompt.n, keys)) {
            return error;
        }
        if (const cudaError_t error =
                map_tensor(params.v[side], p, prompt.v, prompt.v_stride_b, prompt.v_stride_n,
                           prompt.v_stride_h, prompt.n, keys)) {
            return error;
        }
    }
    return cudaSuccess;
}

// Launch a kernel of `groups` warpgroups with rows, one block per SM: each walks over its rows. It
// waits for the grids before it by itself.
template <auto kKernel>
cudaError_t launch_rows(const Params& params, const Device& device, int groups, int threads,
                        int bytes, cudaStream_t stream) {
    const ForwardParams& p = params.call;
    const int64_t heads = static_cast<int64_t>(p.b) * p.h;
    const int64_t blocks_per_head =
        std::min(ceil_div(p.l, groups * kGroupRows), ceil_div(device.sms, heads));
    return launch<kKernel, true>(device, heads * blocks_per_head, threads, bytes, stream, params,
                                 static_cast<int>(blocks_per_head));
}

// As dispatch of launch.h, for the head_dims of has_sm90
template <typename F>
cudaError_t dispatch_exact(Type type, int d, F launch_for) {
    const auto for_type = [&](auto tag) {
        switch (d) {
            case 40: return launch_for(tag, std::integral_constant<int, 40>{});    // SD 1.5, 64x64
            case 64: return launch_for(tag, std::integral_constant<int, 64>{});    // SD 2.1, SDXL
            case 72: return launch_for(tag, std::integral_constant<int, 72>{});    // PixArt
            case 80: return launch_for(tag, std::integral_constant<int, 80>{});    // SD 1.5, 32x32
            case 128: return launch_for(tag, std::integral_constant<int, 128>{});  // Wan, FLUX
            case 160: return launch_for(tag, std::integral_constant<int, 160>{});  // SD 1.5, 16x16
        }
        return cudaErrorInvalidValue;
    };
    return type == Type::kHalf ? for_type(TypeTag<__half>{}) : for_type(TypeTag<__nv_bfloat16>{});
}

}  // namespace nasa::sm90
