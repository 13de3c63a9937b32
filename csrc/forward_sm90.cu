// Forward for short prompts on Hopper: K and V of both prompts stay in shared memory (sm_90a).
//
//     O = softmax(Q K+^T) V+  -  alpha * softmax(Q K-^T) V-
//
// or, beside the shared keys of a joint attention, what rules.cuh makes of the three segments.
//
// A block loads one head's K+-, V+- once; then each of its warpgroups walks over tiles of 64 query
// rows on its own. One thread per warpgroup keeps the next tile of Q on its way and sends O out.
#include "sm90.cuh"

namespace nasa {
namespace {

using namespace sm90;

template <typename T, int kD, int kKeys>
struct Sm90Layout {
    using Keys = SwizzledTile<kKeys, kD>;
    using Rows = Rows64<T, kD>;
    // two accumulators [64, kD] and the weights want 255 registers above d = 80 or 80 keys
    static constexpr int kGroups = kD <= 80 && kKeys == kClipKeys ? 3 : 2;
    static constexpr int kThreads = kGroups * kGroupThreads;
    // K+, K-, V+, V- [kKeys, kD]; the rows of each warpgroup; bias of both prompts in fp32;
    // mbarriers: K, V, and those of each warpgroup
    static constexpr int kRows = 4 * Keys::kBytes;
    static constexpr int kBias = kRows + kGroups * Rows::kBytes;
    static constexpr int kBarriers = kBias + 2 * kKeys * static_cast<int>(sizeof(float));
    static constexpr int kBytes = kBarriers + 8 * (2 + kGroups * Rows::kBarriers);
    static_assert(kBytes <= 227 * 1024, "a block of sm_90 has 227 KiB");
};

template <typename T, int kD, int kKeys>
__global__ void __launch_bounds__(Sm90Layout<T, kD, kKeys>::kThreads, 1)
    forward_sm90_kernel(const __grid_constant__ Params p, const int blocks_per_head) {
    using Layout = Sm90Layout<T, kD, kKeys>;
    using Keys = typename Layout::Keys;
    const ForwardParams& call = p.call;
    extern __shared__ __align__(1024) unsigned char shared[];
    float* bias = reinterpret_cast<float*>(shared + Layout::kBias);
    const uint32_t base = ptx::shared_address(shared);
    const uint32_t values = base + 2 * Keys::kBytes;
    const uint32_t k_arrived = base + Layout::kBarriers;
    const uint32_t v_arrived = k_arrived + 8;

    const int group = threadIdx.x / kGroupThreads;
    // heads fastest: the heads of one query row are neighbours in memory, and then also in time
    const int h = blockIdx.x % call.h;
    const int part = blockIdx.x / call.h % blocks_per_head;
    const int b = blockIdx.x / call.h / blocks_per_head;

    const int tiles = (call.l + kGroupRows - 1) / kGroupRows;
    const int step = blocks_per_head * Layout::kGroups;
    const int first_tile = part * Layout::kGroups + group;
    const typename Layout::Rows rows{p, shared + Layout::kRows + group * Layout::Rows::kBytes,
                                     v_arrived + 8 + group * Layout::Rows::kBarriers * 8, group,
                                     h, b};
    const auto load_queries = [&](int tile, int round) {
        if (rows.leads() && tile < tiles) rows.load(tile, round);
    };

    if (threadIdx.x == 0) {
        for (int i = 0; i < 2 + Layout::kGroups * Layout::Rows::kBarriers; ++i) {
            ptx::mbarrier_init(k_arrived + 8 * i, 1);
        }
        ptx::fence_mbarrier_init();
    }
    ptx::wait_for_earlier_grids();
    for (int i = threadIdx.x; i < 2 * kKeys; i += Layout::kThreads) {
        const Prompt& prompt = call.prompt[i / kKeys];
        bias[i] = key_bias(prompt.mask, b, i % kKeys, prompt.n);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(k_arrived, 2 * Keys::kBytes);
        for (int side : {kPos, kNeg}) {
            load_tile<kKeys, kD>(p.k[side], base + side * Keys::kBytes, k_arrived, 0, h, b);
        }
        ptx::mbarrier_arrive_expect(v_arrived, 2 * Keys::kBytes);
        for (int side : {kPos, kNeg}) {
            load_tile<kKeys, kD>(p.v[side], values + side * Keys::kBytes, v_arrived, 0, h, b);
        }
    }
    load_queries(first_tile, 0);
    load_queries(first_tile + step, 1);

    if (call.prompt[kPos].mask.type != MaskType::kNone ||
        call.prompt[kNeg].mask.type != MaskType::kNone) {
        wait(v_arrived, 0);
        for (int key = threadIdx.x; key < 2 * kKeys; key += Layout::kThreads) {
            if (bias[key] == -INFINITY) {
                clear_row<kKeys, kD>(shared + (2 + key / kKeys) * Keys::kBytes, key % kKeys);
            }
        }
        ptx::fence_proxy_async();
        __syncthreads();
    }

    for (int tile = first_tile, round = 0; tile < tiles; tile += step, ++round) {
        wait(k_arrived, 0);
        const uint32_t q = rows.queries(round);

        // [64, kKeys] and [64, kD] of this warpgroup, as its warps hold 16 rows each
        float s_pos[kKeys / 8][4], s_neg[kKeys / 8][4];
        uint32_t p_pos[kKeys / 16][4], p_neg[kKeys / 16][4];
        float z_pos[kD / 8][4], z_neg[kD / 8][4];
        float rescale[2];  // by what there was before: nothing
        Side pos, neg;
        ptx::wgmma_fence();
        start_scores<T, kD, kKeys>(s_pos, q, base);
        start_scores<T, kD, kKeys>(s_neg, q, base + Keys::kBytes);
        ptx::wgmma_wait<1>();
        pos.push<T>(s_pos, call.prompt[kPos], call.scale, bias, 0, p_pos, rescale);
        wait(v_arrived, 0);
        ptx::wgmma_fence();
        start_values<T, kD, kKeys>(z_pos, p_pos, values, false);
        ptx::wgmma_wait<1>();
        // under the product of the positive prompt
        neg.push<T>(s_neg, call.prompt[kNeg], call.scale, bias + kKeys, 0, p_neg, rescale);
        // not under the product: ptxas would run the products one by one for want of registers
        pos.finish();
        neg.finish();
        ptx::wgmma_fence();
        start_values<T, kD, kKeys>(z_neg, p_neg, values + Keys::kBytes, false);
        rows.release(tile, round);
        ptx::wgmma_wait<0>();

        rows.store(tile, round, z_pos, pos, z_neg, neg);
        load_queries(tile + kQueryStages * step, round);
    }
}

template <typename T, int kD, int kKeys>
cudaError_t launch_sm90(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    using Layout = Sm90Layout<T, kD, kKeys>;
    Params params{};
    if (const cudaError_t error = map_call(params, p, kKeys)) return error;
    return launch_rows<forward_sm90_kernel<T, kD, kKeys>>(
        params, device, Layout::kGroups, Layout::kThreads, Layout::kBytes, stream);
}

}  // namespace

cudaError_t forward_sm90(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    return dispatch_exact(p.type, p.d, [&](auto type, auto head_dim) {
        using T = typename decltype(type)::type;
        if (short_keys(p) == kClipKeys) {
            return launch_sm90<T, head_dim, kClipKeys>(p, device, stream);
        }
        if constexpr (has_sm90_short(head_dim, kBlockKeys)) {
            return launch_sm90<T, head_dim, kBlockKeys>(p, device, stream);
        }
        return cudaErrorInvalidValue;
    });
}

}  // namespace nasa
