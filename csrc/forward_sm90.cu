// Forward for short prompts on Hopper: TMA, mbarriers and wgmma (sm_90a).
//
//     O = softmax(Q K+^T) V+  -  alpha * softmax(Q K-^T) V-
//
// A block loads one head's K+-, V+- once; then each of its warpgroups walks over tiles of 64 query
// rows on its own. One thread per warpgroup keeps the next tile of Q on its way and sends O out.
// Nothing is padded but what the instructions demand: 77 keys are wgmma's n = 80, a head_dim of 40
// is n = 40 in P V and k = 48 in Q K^T, where TMA fills the rest with zeros, as it does past the
// last row.
//
// Tiles are [rows, d] in atoms of 64 columns: 128-byte rows, 16-byte chunks xored with the row
// (swizzle 128B), so that TMA writes and wgmma reads them as they are.
#include <cuda.h>

#include "launch.h"
#include "softmax.cuh"

namespace nasa {
namespace {

constexpr int kGroupThreads = 128;
constexpr int kGroupRows = 64;  // the m of wgmma
constexpr int kAtomColumns = 64;
constexpr int kRowBytes = 128;
constexpr int kQueryStages = 2;  // one tile is multiplied while the next one arrives

// A tensor map, and what a step in h and b adds to its coordinates: 0 where one head, or one batch
// element, is read for all.
struct Mapped {
    CUtensorMap map;  // [b, h, rows, d], boxes of [1, 1, rows of a tile, 64]
    int step_h, step_b;
    int first_row;  // 0, or past the last row for a prompt without keys: TMA then brings zeros
};

struct Sm90Params {
    Mapped q, o;
    Mapped k[2], v[2];  // kPos, kNeg
    ForwardParams call;
};

template <int kD, int kKeys>
struct Sm90Layout {
    static_assert(kD % 8 == 0 && kD <= 256, "wgmma takes n in steps of 8, up to 256");
    static_assert(kKeys % 16 == 0, "P is the A operand of wgmma: keys come in steps of 16");
    static constexpr int kAtoms = (kD + kAtomColumns - 1) / kAtomColumns;
    static constexpr int kKeyAtom = kKeys * kRowBytes;
    static constexpr int kKeyTile = kAtoms * kKeyAtom;
    static constexpr int kRowAtom = kGroupRows * kRowBytes;
    static constexpr int kRowTile = kAtoms * kRowAtom;
    static_assert(kKeyAtom % 1024 == 0, "swizzle 128B repeats every 1024 bytes: atoms start there");
    // two accumulators [64, kD] and the weights want 255 registers above d = 80 or 80 keys
    static constexpr int kGroups = kD <= 80 && kKeys == kClipKeys ? 3 : 2;
    // K+, K-, V+, V- [kKeys, kD]; per warpgroup and stage Q, then O [64, kD]; bias of both in fp32;
    // mbarriers: K, V, and Q per warpgroup and stage
    static constexpr int kQueries = 4 * kKeyTile;
    static constexpr int kBias = kQueries + kGroups * kQueryStages * kRowTile;
    static constexpr int kBarriers = kBias + 2 * kKeys * static_cast<int>(sizeof(float));
    static constexpr int kBytes = kBarriers + 8 * (2 + kGroups * kQueryStages);
    static_assert(kBytes <= 227 * 1024, "a block of sm_90 has 227 KiB");
};

__device__ __forceinline__ void wait(uint32_t barrier, int parity) {
    while (!ptx::mbarrier_try_wait(barrier, parity)) {
    }
}

// Bring [rows, kAtoms * 64] of one head, one box per atom.
template <int kAtoms>
__device__ __forceinline__ void load_atoms(const Mapped& t, uint32_t tile, int atom_bytes,
                                           uint32_t barrier, int row, int h, int b) {
#pragma unroll
    for (int atom = 0; atom < kAtoms; ++atom) {
        ptx::tma_load_4d(tile + atom * atom_bytes, &t.map, barrier, atom * kAtomColumns,
                         row + t.first_row, h * t.step_h, b * t.step_b);
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
    using Layout = Sm90Layout<kD, kKeys>;
#pragma unroll
    for (int i = 0; i < (kD + 15) / 16; ++i) {
        const int atom = i / 4, column = i % 4 * 32;
        ptx::wgmma<T>(s, descriptor(q + atom * Layout::kRowAtom + column, 16),
                      descriptor(k + atom * Layout::kKeyAtom + column, 16), i > 0);
    }
    ptx::wgmma_commit();
}

// z [64, kD] = P V, started
template <typename T, int kD, int kKeys>
__device__ __forceinline__ void start_values(float (&z)[kD / 8][4],
                                             const uint32_t (&weights)[kKeys / 16][4], uint32_t v) {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
        ptx::wgmma_values<T>(z, weights[i],
                             descriptor(v + i * 16 * kRowBytes, Sm90Layout<kD, kKeys>::kKeyAtom),
                             i > 0);
    }
    ptx::wgmma_commit();
}

template <typename T, int kTiles>
__device__ __forceinline__ void weights_of(float (&s)[kTiles][4], const Prompt& prompt, float scale,
                                           const float* bias, uint32_t (&weights)[kTiles / 2][4],
                                           float (&inverse)[2]) {
    const float left = finish_scores(s, is_plain(prompt, scale), scale, bias, prompt.n);
    OnlineSoftmax softmax;
    float rescale[2];
    softmax.push(s, left, rescale);
    pack_fragments<T>(weights, s);
    inverse[0] = softmax.inverse_sum(0);
    inverse[1] = softmax.inverse_sum(1);
}

template <typename T, int kD, int kKeys>
__global__ void __launch_bounds__(kGroupThreads* Sm90Layout<kD, kKeys>::kGroups, 1)
    forward_sm90_kernel(const __grid_constant__ Sm90Params p, const int blocks_per_head) {
    using Layout = Sm90Layout<kD, kKeys>;
    constexpr int kThreadsOfBlock = kGroupThreads * Layout::kGroups;
    const ForwardParams& call = p.call;
    extern __shared__ __align__(1024) unsigned char shared[];
    float* bias = reinterpret_cast<float*>(shared + Layout::kBias);
    const uint32_t base = ptx::shared_address(shared);
    const uint32_t k_arrived = base + Layout::kBarriers;
    const uint32_t v_arrived = k_arrived + 8;

    const int group = threadIdx.x / kGroupThreads;
    const int lane = threadIdx.x % kWarpSize;
    const bool leads_group = threadIdx.x % kGroupThreads == 0;
    // heads fastest: the heads of one query row are neighbours in memory, and then also in time
    const int h = blockIdx.x % call.h;
    const int part = blockIdx.x / call.h % blocks_per_head;
    const int b = blockIdx.x / call.h / blocks_per_head;

    const int tiles = (call.l + kGroupRows - 1) / kGroupRows;
    const int step = blocks_per_head * Layout::kGroups;
    const int first_tile = part * Layout::kGroups + group;
    const uint32_t queries = base + Layout::kQueries + group * kQueryStages * Layout::kRowTile;
    const uint32_t q_arrived = v_arrived + 8 + group * kQueryStages * 8;
    const auto load_queries = [&](int tile, int stage) {
        if (tile >= tiles) return;
        ptx::mbarrier_arrive_expect(q_arrived + 8 * stage, Layout::kRowTile);
        load_atoms<Layout::kAtoms>(p.q, queries + stage * Layout::kRowTile, Layout::kRowAtom,
                                   q_arrived + 8 * stage, tile * kGroupRows, h, b);
    };

    if (threadIdx.x == 0) {
        for (int i = 0; i < 2 + Layout::kGroups * kQueryStages; ++i) {
            ptx::mbarrier_init(k_arrived + 8 * i, 1);
        }
        ptx::fence_mbarrier_init();
    }
    for (int i = threadIdx.x; i < 2 * kKeys; i += kThreadsOfBlock) {
        const Prompt& prompt = call.prompt[i / kKeys];
        bias[i] = key_bias(prompt.mask, b, i % kKeys, prompt.n);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(k_arrived, 2 * Layout::kKeyTile);
        for (int side : {kPos, kNeg}) {
            load_atoms<Layout::kAtoms>(p.k[side], base + side * Layout::kKeyTile, Layout::kKeyAtom,
                                       k_arrived, 0, h, b);
        }
        ptx::mbarrier_arrive_expect(v_arrived, 2 * Layout::kKeyTile);
        for (int side : {kPos, kNeg}) {
            load_atoms<Layout::kAtoms>(p.v[side], base + (2 + side) * Layout::kKeyTile,
                                       Layout::kKeyAtom, v_arrived, 0, h, b);
        }
    }
    if (leads_group) {
        load_queries(first_tile, 0);
        load_queries(first_tile + step, 1);
    }

    if (call.prompt[kPos].mask.type != MaskType::kNone ||
        call.prompt[kNeg].mask.type != MaskType::kNone) {
        // the row of an absent key may hold NaN, and 0 * NaN is not 0
        wait(v_arrived, 0);
        for (int i = threadIdx.x; i < 2 * kKeys * Layout::kAtoms * 8; i += kThreadsOfBlock) {
            const int chunk = i % 8, atom = i / 8 % Layout::kAtoms, key = i / 8 / Layout::kAtoms;
            if (bias[key] == -INFINITY) {
                unsigned char* row = shared + (2 + key / kKeys) * Layout::kKeyTile +
                                     atom * Layout::kKeyAtom + key % kKeys * kRowBytes;
                *reinterpret_cast<uint4*>(row + 16 * chunk) = uint4{0, 0, 0, 0};
            }
        }
        ptx::fence_proxy_async();
        __syncthreads();
    }

    for (int tile = first_tile, round = 0; tile < tiles; tile += step, ++round) {
        const int stage = round % kQueryStages;
        const uint32_t q_tile = queries + stage * Layout::kRowTile;
        wait(k_arrived, 0);
        wait(q_arrived + 8 * stage, round / kQueryStages % 2);

        // [64, kKeys] and [64, kD] of this warpgroup, as its warps hold 16 rows each
        float s_pos[kKeys / 8][4], s_neg[kKeys / 8][4];
        uint32_t p_pos[kKeys / 16][4], p_neg[kKeys / 16][4];
        float inverse_pos[2], inverse_neg[2];
        float z_pos[kD / 8][4], z_neg[kD / 8][4];
        ptx::wgmma_fence();
        start_scores<T, kD, kKeys>(s_pos, q_tile, base);
        start_scores<T, kD, kKeys>(s_neg, q_tile, base + Layout::kKeyTile);
        ptx::wgmma_wait<1>();
        weights_of<T>(s_pos, call.prompt[kPos], call.scale, bias, p_pos, inverse_pos);
        wait(v_arrived, 0);
        ptx::wgmma_fence();
        start_values<T, kD, kKeys>(z_pos, p_pos, base + 2 * Layout::kKeyTile);
        ptx::wgmma_wait<1>();
        // under the product of the positive prompt
        weights_of<T>(s_neg, call.prompt[kNeg], call.scale, bias + kKeys, p_neg, inverse_neg);
        ptx::wgmma_fence();
        start_values<T, kD, kKeys>(z_neg, p_neg, base + 3 * Layout::kKeyTile);
        ptx::wgmma_wait<0>();

        const int row = threadIdx.x % kGroupThreads / kWarpSize * kWarpRows + lane / 4;
        float alpha[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int l = tile * kGroupRows + row + 8 * r;
            alpha[r] = l < call.l ? alpha_of(call, b, l, h) : 0.f;
        }
        subtract(z_pos, inverse_pos, z_neg, inverse_neg, alpha);

        // Every warp's products have read Q: its tile takes O.
        ptx::barrier_sync(1 + group, kGroupThreads);
        unsigned char* o_row = shared + (q_tile - base) + row * kRowBytes + lane % 4 * 4;
#pragma unroll
        for (int j = 0; j < kD / 8; ++j) {
            // rows r and r + 8 have the same swizzle
            unsigned char* target = o_row + j / 8 * Layout::kRowAtom + ((j % 8) ^ (row % 8)) * 16;
            *reinterpret_cast<uint32_t*>(target) = ptx::pack<T>(z_pos[j][0], z_pos[j][1]);
            *reinterpret_cast<uint32_t*>(target + 8 * kRowBytes) =
                ptx::pack<T>(z_pos[j][2], z_pos[j][3]);
        }
        ptx::fence_proxy_async();
        ptx::barrier_sync(1 + group, kGroupThreads);
        if (leads_group) {
#pragma unroll
            for (int atom = 0; atom < Layout::kAtoms; ++atom) {
                ptx::tma_store_4d(&p.o.map, q_tile + atom * Layout::kRowAtom, atom * kAtomColumns,
                                  tile * kGroupRows, h, b);
            }
            ptx::bulk_commit();
            ptx::bulk_wait_read();
            load_queries(tile + kQueryStages * step, stage);
        }
    }
}

// ---- launch ----------------------------------------------------------------------------------

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: nothing links libcuda.
cudaError_t find_encode(Encode& encode) {
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
cudaError_t map_tensor(Mapped& t, const ForwardParams& p, const void* data, int64_t stride_b,
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

template <typename T, int kD, int kKeys>
cudaError_t launch_sm90(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    using Layout = Sm90Layout<kD, kKeys>;
    Sm90Params params;
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
    for (int side : {kPos, kNeg}) {
        const Prompt& prompt = p.prompt[side];
        if (prompt.n == 0) {
            // past the last row of any tensor there are zeros
            if (const cudaError_t error =
                    map_tensor(params.k[side], p, p.q, 0, p.q_stride_l, 0, p.l, kKeys)) {
                return error;
            }
            params.k[side].first_row = p.l;
            params.v[side] = params.k[side];
            continue;
        }
        if (const cudaError_t error =
                map_tensor(params.k[side], p, prompt.k, prompt.k_stride_b, prompt.k_stride_n,
                           prompt.k_stride_h, prompt.n, kKeys)) {
            return error;
        }
        if (const cudaError_t error =
                map_tensor(params.v[side], p, prompt.v, prompt.v_stride_b, prompt.v_stride_n,
                           prompt.v_stride_h, prompt.n, kKeys)) {
            return error;
        }
    }
    // one block per SM: it loads K and V once and walks over its rows
    const int64_t heads = static_cast<int64_t>(p.b) * p.h;
    const int64_t blocks_per_head =
        std::min(ceil_div(p.l, Layout::kGroups * kGroupRows), ceil_div(device.sms, heads));
    return launch<forward_sm90_kernel<T, kD, kKeys>>(
        device, heads * blocks_per_head, kGroupThreads * Layout::kGroups, Layout::kBytes, stream,
        params, static_cast<int>(blocks_per_head));
}

// The kernels that has_sm90 speaks of
template <typename T>
cudaError_t launch_head_dim(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    if (short_keys(p) == kClipKeys) {
        switch (p.d) {
            case 40: return launch_sm90<T, 40, kClipKeys>(p, device, stream);    // SD 1.5, 64x64
            case 64: return launch_sm90<T, 64, kClipKeys>(p, device, stream);    // SD 2.1, SDXL
            case 72: return launch_sm90<T, 72, kClipKeys>(p, device, stream);    // PixArt
            case 80: return launch_sm90<T, 80, kClipKeys>(p, device, stream);    // SD 1.5, 32x32
            case 128: return launch_sm90<T, 128, kClipKeys>(p, device, stream);  // Wan, FLUX
            case 160: return launch_sm90<T, 160, kClipKeys>(p, device, stream);  // SD 1.5, 16x16
        }
    }
    switch (p.d) {
        case 64: return launch_sm90<T, 64, kBlockKeys>(p, device, stream);
        case 72: return launch_sm90<T, 72, kBlockKeys>(p, device, stream);
        case 128: return launch_sm90<T, 128, kBlockKeys>(p, device, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t forward_sm90(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    return p.type == Type::kHalf ? launch_head_dim<__half>(p, device, stream)
                                 : launch_head_dim<__nv_bfloat16>(p, device, stream);
}

}  // namespace nasa
