// Forward for short prompts on Hopper: K and V of both prompts stay in shared memory (sm_90a).
//
//     O = softmax(Q K+^T) V+  -  alpha * softmax(Q K-^T) V-
//
// or, beside the shared keys of a joint attention, what rules.cuh makes of the three segments.
//
// A block walks over its range of tiles of 64 query rows, a tile per warpgroup; where the head
// changes it loads K+-, V+- anew. One thread per warpgroup keeps the next tile of Q on its way and
// sends O out. Kernels without masks and without the negative prompt leave out what they do not need.
#include "sm90.cuh"

namespace nasa {
namespace {

using namespace sm90;

template <typename T, int kD, int kKeys, int kSides>
struct Sm90Layout {
    using Keys = SwizzledTile<kKeys, kD>;
    using Rows = Rows64<T, kD>;
    // two accumulators [64, kD] and the weights want 255 registers above d = 80 or 80 keys; those of
    // one prompt leave room for a second block
    static constexpr bool kSmall = kD <= 80 && kKeys == kClipKeys;
    static constexpr int kGroups = kSides == 2 && kSmall ? 3 : 2;
    static constexpr int kBlocks = kSides == 1 && kSmall ? 2 : 1;
    static constexpr int kThreads = kGroups * kGroupThreads;
    // K+, K-, V+, V- [kKeys, kD]; the rows of each warpgroup; bias of the prompts in fp32;
    // mbarriers: K, V, and those of each warpgroup
    static constexpr int kValues = kSides * Keys::kBytes;
    static constexpr int kRows = 2 * kSides * Keys::kBytes;
    static constexpr int kBias = kRows + kGroups * Rows::kBytes;
    static constexpr int kBarriers = kBias + kSides * kKeys * static_cast<int>(sizeof(float));
    static constexpr int kBytes = kBarriers + 8 * (2 + kGroups * Rows::kBarriers);
    static_assert(kBytes <= 227 * 1024, "a block of sm_90 has 227 KiB");
};

template <typename T, int kD, int kKeys, int kSides, bool kPlain>
__global__ void __launch_bounds__(Sm90Layout<T, kD, kKeys, kSides>::kThreads,
                                  Sm90Layout<T, kD, kKeys, kSides>::kBlocks)
    forward_sm90_short_kernel(const __grid_constant__ Params p, const Share share) {
    using Layout = Sm90Layout<T, kD, kKeys, kSides>;
    using Keys = typename Layout::Keys;
    using Rows = typename Layout::Rows;
    constexpr int kGroups = Layout::kGroups;
    constexpr bool kBoth = kSides == 2;
    const ForwardParams& call = p.call;
    extern __shared__ __align__(1024) unsigned char smem[];
    float* bias = reinterpret_cast<float*>(smem + Layout::kBias);
    const uint32_t base = ptx::shared_address(smem);
    const uint32_t values = base + Layout::kValues;
    const uint32_t k_arrived = base + Layout::kBarriers;
    const uint32_t v_arrived = k_arrived + 8;

    const int group = uniform(threadIdx.x / kGroupThreads);
    const Rows rows{p, smem + Layout::kRows + group * Rows::kBytes,
                    base + Layout::kRows + group * Rows::kBytes,
                    v_arrived + 8 + group * Rows::kBarriers * 8, group};
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2 + kGroups * Rows::kBarriers; ++i) {
            ptx::mbarrier_init(k_arrived + 8 * i, 1);
        }
        ptx::fence_mbarrier_init();
        prefetch_maps<kSides>(p);
    }
    ptx::wait_for_earlier_grids();
    __syncthreads();

    // by the leader: the tile of Q that this warpgroup takes `steps` after the one of `here`
    const auto load_queries = [&](Span here, int steps, int round) {
        for (int i = 0; i < steps; ++i) advance<kGroups>(here, group, share);
        if (here.any()) rows.load(here.first, here.h, here.b, round);
    };
    Span span(share);
    if (rows.leads()) {
        Span mine = span;
        mine.first += group - kGroups;
        load_queries(mine, 1, 0);
        load_queries(mine, 2, 1);
    }

    int round = 0;
    int parity = 0;  // of K and V
    for (; span.any(); span.next(share), parity ^= 1) {
        const int h = span.h, b = span.b;
        // nobody reads the K, V and biases of the head before
        __syncthreads();
        if (threadIdx.x == 0) {
            ptx::mbarrier_arrive_expect(k_arrived, kSides * Keys::kBytes);
            for (int side = 0; side < kSides; ++side) {
                load_tile<kKeys, kD>(p.k[side], base + side * Keys::kBytes, k_arrived, 0, h, b);
            }
            ptx::mbarrier_arrive_expect(v_arrived, kSides * Keys::kBytes);
            for (int side = 0; side < kSides; ++side) {
                load_tile<kKeys, kD>(p.v[side], values + side * Keys::kBytes, v_arrived, 0, h, b);
            }
        }
        if constexpr (!kPlain) {
            for (int i = threadIdx.x; i < kSides * kKeys; i += Layout::kThreads) {
                const Prompt& prompt = call.prompt[i / kKeys];
                bias[i] = key_bias(prompt.mask, b, i % kKeys, prompt.n);
            }
            wait(v_arrived, parity);
            __syncthreads();
            for (int key = threadIdx.x; key < kSides * kKeys; key += Layout::kThreads) {
                if (bias[key] == -INFINITY) {
                    clear_row<kKeys, kD>(smem + Layout::kValues + key / kKeys * Keys::kBytes,
                                         key % kKeys);
                }
            }
            ptx::fence_proxy_async();
            __syncthreads();
        }
        wait(k_arrived, parity);

        for (span.first += group; span.any(); span.first += kGroups, ++round) {
            const int tile = span.first;
            const uint32_t q = rows.queries(round);

            // [64, kKeys] and [64, kD] of this warpgroup, as its warps hold 16 rows each
            float s_pos[kKeys / 8][4], s_neg[kKeys / 8][4];
            uint32_t p_pos[kKeys / 16][4], p_neg[kKeys / 16][4];
            float z_pos[kD / 8][4], z_neg[kD / 8][4];
            Side pos, neg;
            // Q is used up. Its barriers keep the sums out of the products that follow: ptxas would
            // run those one by one for want of registers.
            const auto end_scores = [&] {
                pos.finish();
                neg.finish();
                rows.release(tile, h, b, round);
            };
            ptx::wgmma_fence();
            start_scores<T, kD, kKeys>(s_pos, q, base);
            if constexpr (kBoth) start_scores<T, kD, kKeys>(s_neg, q, base + Keys::kBytes);
            ptx::wgmma_wait<kBoth ? 1 : 0>();
            ptx::arrived(s_pos);
            pos.push_all<T, kPlain>(s_pos, call.prompt[kPos], call.scale, bias, p_pos);
            if constexpr (!kBoth) end_scores();
            wait(v_arrived, parity);
            ptx::wgmma_fence();
            start_values<T, kD, kKeys>(z_pos, p_pos, values, false);
            if constexpr (kBoth) {
                // under the product of the positive prompt, where masks leave it the registers
                ptx::wgmma_wait<kPlain ? 1 : 0>();
                ptx::arrived(s_neg);
                neg.push_all<T, kPlain>(s_neg, call.prompt[kNeg], call.scale, bias + kKeys, p_neg);
                end_scores();
                ptx::wgmma_fence();
                start_values<T, kD, kKeys>(z_neg, p_neg, values + Keys::kBytes, false);
            }
            ptx::wgmma_wait<0>();
            ptx::arrived(z_pos);
            if constexpr (kBoth) ptx::arrived(z_neg);

            rows.template store<kBoth>(
                tile, h, b, round, z_pos, z_neg,
                end_rows(call, b, tile * kGroupRows + rows.row(), h, pos.softmax, neg.softmax,
                         pos.inverse, neg.inverse));
            if (rows.leads()) load_queries(span, kQueryStages, round);
        }
    }
}

template <typename T, int kD, int kKeys, int kSides, bool kPlain>
cudaError_t launch_sm90(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    using Layout = Sm90Layout<T, kD, kKeys, kSides>;
    Params params{};
    if (const cudaError_t error = map_call(params, p, kKeys)) return error;
    return launch_shared<forward_sm90_short_kernel<T, kD, kKeys, kSides, kPlain>, true>(
        device, p, ceil_div(p.l, kGroupRows), Layout::kThreads, Layout::kBytes, stream, params);
}

template <typename T, int kD, int kKeys>
cudaError_t launch_sides(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    const bool plain = is_plain(p);
    // beside shared keys a Z- without keys of its own may be projected: it is O_s
    if (p.prompt[kNeg].n == 0 && !(is_joint(p) && p.rule == Rule::kProjected)) {
        return plain ? launch_sm90<T, kD, kKeys, 1, true>(p, device, stream)
                     : launch_sm90<T, kD, kKeys, 1, false>(p, device, stream);
    }
    return plain ? launch_sm90<T, kD, kKeys, 2, true>(p, device, stream)
                 : launch_sm90<T, kD, kKeys, 2, false>(p, device, stream);
}

}  // namespace

cudaError_t forward_sm90_short(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    return dispatch_exact(p.type, p.d, [&](auto type, auto head_dim) {
        using T = typename decltype(type)::type;
        if (short_keys(p) == kClipKeys) {
            return launch_sides<T, head_dim, kClipKeys>(p, device, stream);
        }
        if constexpr (has_sm90_short(head_dim, kBlockKeys)) {
            return launch_sides<T, head_dim, kBlockKeys>(p, device, stream);
        }
        return cudaErrorInvalidValue;
    });
}

}  // namespace nasa
