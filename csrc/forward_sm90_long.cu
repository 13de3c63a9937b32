// Forward for prompts of any length on Hopper: K and V pass by in a ring of tiles (sm_90a).
//
//     O = softmax(Q K+^T) V+  -  alpha * softmax(Q K-^T) V-
//
// or what rules.cuh makes of the two prompts, or of them and the shared keys of a joint attention.
//
// A block takes a range of tiles of 128 query rows, 64 per warpgroup, and walks over K-, V- and then
// K+, V+ for each. The softmax of a tile of keys runs under the product of the one before it with its
// V. A third warpgroup feeds the ring: one thread of it keeps TMA busy, and where keys are masked the
// other warps write the biases and clear the absent rows of V.
//
// The arithmetic of a row, its order included, is that of forward_sm90_short.cu: both give the same
// bits.
#include "sm90.cuh"

namespace nasa {
namespace {

using namespace sm90;

constexpr int kGroups = 2;
constexpr int kThreadsOfBlock = (kGroups + 1) * kGroupThreads;
constexpr int kConsumers = kGroups * kWarps;  // warps that must be done with a tile
constexpr int kCleaners = kWarps - 1;         // warps that clean it

template <typename T, int kD>
struct StreamLayout {
    static constexpr int kKeys = sm90_stream_keys(kD);
    using Keys = SwizzledTile<kKeys, kD>;
    using Rows = Rows64<T, kD>;
    static constexpr int kSlots = kD <= 64 ? 8 : kD <= 80 ? 4 : 3;
    // column tiles of Z- that wait in shared memory: beside them, Z+ and its scores would not fit
    // the registers
    static constexpr int kParked = kD <= 80 ? 0 : kD <= 128 ? 16 : 8;
    // K and V, [kKeys, kD] each; the rows of each warpgroup; what is parked of Z-; a bias
    // for each slot in fp32; mbarriers: arrived, clean and free for each slot, and those of each
    // warpgroup
    static constexpr int kRows = kSlots * Keys::kBytes;
    static constexpr int kPark = kRows + kGroups * Rows::kBytes;
    static constexpr int kBias = kPark + kGroups * kGroupThreads * kParked * 16;
    static constexpr int kBarriers = kBias + kSlots * kKeys * static_cast<int>(sizeof(float));
    static constexpr int kBytes = kBarriers + 8 * (3 * kSlots + kGroups * Rows::kBarriers);
    static_assert(kBytes <= 227 * 1024, "a block of sm_90 has 227 KiB");
};

// A place in the sequence of tiles that pass through the ring, as each of its users counts it.
template <typename Layout>
struct Ring {
    uint32_t base, barriers;  // addresses of slot 0 and of the mbarriers
    int slot = 0;
    int parity = 0;

    __device__ __forceinline__ void next() {
        if (++slot == Layout::kSlots) {
            slot = 0;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ uint32_t tile() const { return base + slot * Layout::Keys::kBytes; }
    __device__ __forceinline__ int bias() const { return slot * Layout::kKeys; }
    __device__ __forceinline__ uint32_t arrived() const { return barriers + 8 * slot; }
    __device__ __forceinline__ uint32_t clean() const { return arrived() + 8 * Layout::kSlots; }
    __device__ __forceinline__ uint32_t free() const { return arrived() + 16 * Layout::kSlots; }
    __device__ __forceinline__ void wait_free() const { wait(free(), parity ^ 1); }
};

// One arrival for all lanes of a warp
__device__ __forceinline__ void arrive_as_warp(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(barrier);
}

template <typename T, int kD, bool kPlain>
__global__ void __launch_bounds__(kThreadsOfBlock, 1)
    forward_sm90_long_kernel(const __grid_constant__ Params p, const Share share) {
    using Layout = StreamLayout<T, kD>;
    using Keys = typename Layout::Keys;
    constexpr int kKeys = Layout::kKeys;
    const ForwardParams& call = p.call;
    extern __shared__ __align__(1024) unsigned char smem[];
    float* biases = reinterpret_cast<float*>(smem + Layout::kBias);
    const uint32_t base = ptx::shared_address(smem);
    Ring<Layout> ring{base, base + Layout::kBarriers};
    const uint32_t row_barriers = ring.barriers + 8 * 3 * Layout::kSlots;
    const int group = uniform(threadIdx.x / kGroupThreads);

    // A round is kGroups tiles of rows of one head; each takes the keys of both prompts.
    const auto keys_of = [&](int side, int round_tile) {
        const int first = round_tile * kGroups * kGroupRows;
        return attends(call, side, first, kGroups * kGroupRows) ? call.prompt[side].n : 0;
    };
    // The ring's tiles in the order in which they are used: K of the first keys of a prompt, K of the
    // next and V of those before it, V of the last.
    const auto each_tile = [&](auto take_k, auto take_v) {
        for (Span span(share); span.any(); span.next(share)) {
            for (; span.any(); ++span.first) {
                for (int side : {kNeg, kPos}) {
                    const int n = keys_of(side, span.first);
                    for (int key = 0; key < n + kKeys; key += kKeys) {
                        if (key < n) take_k(side, key, span);
                        if (key > 0 && n > 0) take_v(side, key - kKeys, span);
                    }
                }
            }
        }
    };

    if (threadIdx.x == 0) {
        for (int i = 0; i < Layout::kSlots; ++i) {
            ptx::mbarrier_init(ring.barriers + 8 * i, 1);
            ptx::mbarrier_init(ring.barriers + 8 * (Layout::kSlots + i), kCleaners);
            ptx::mbarrier_init(ring.barriers + 8 * (2 * Layout::kSlots + i), kConsumers);
        }
        for (int i = 0; i < kGroups * Layout::Rows::kBarriers; ++i) {
            ptx::mbarrier_init(row_barriers + 8 * i, 1);
        }
        ptx::fence_mbarrier_init();
        prefetch_maps<2>(p);
    }
    ptx::wait_for_earlier_grids();
    __syncthreads();

    if (group == kGroups) {
        ptx::give_registers<40>();
        const int thread = threadIdx.x - kGroups * kGroupThreads;
        if (thread == 0) {
            const auto bring = [&](const Mapped& t, int key, const Span& at) {
                ring.wait_free();
                ptx::mbarrier_arrive_expect(ring.arrived(), Keys::kBytes);
                load_tile<kKeys, kD>(t, ring.tile(), ring.arrived(), key, at.h, at.b);
                ring.next();
            };
            each_tile([&](int side, int key, const Span& at) { bring(p.k[side], key, at); },
                      [&](int side, int key, const Span& at) { bring(p.v[side], key, at); });
        } else if (!kPlain && thread >= kWarpSize) {
            // this thread's keys are nobody else's; those of V are those of the K before the last
            const int mine = thread - kWarpSize;
            constexpr int kStep = kCleaners * kWarpSize;
            float *bias = nullptr, *next_bias = nullptr;
            const auto write_bias = [&](int side, int key, const Span& at) {
                const Prompt& prompt = call.prompt[side];
                bias = next_bias;
                next_bias = biases + ring.bias();
                ring.wait_free();
                for (int i = mine; i < kKeys; i += kStep) {
                    next_bias[i] = key_bias(prompt.mask, at.b, key + i, prompt.n);
                }
                arrive_as_warp(ring.clean());
                ring.next();
            };
            const auto clear_absent = [&](int side, int key, const Span&) {
                // after the last K of a prompt comes V alone
                if (key + kKeys >= call.prompt[side].n) bias = next_bias;
                wait(ring.arrived(), ring.parity);
                for (int i = mine; i < kKeys; i += kStep) {
                    if (bias[i] != -INFINITY) continue;
                    clear_row<kKeys, kD>(smem + ring.slot * Keys::kBytes, i);
                }
                ptx::fence_proxy_async();
                arrive_as_warp(ring.clean());
                ring.next();
            };
            each_tile(write_bias, clear_absent);
        }
        return;
    }

    ptx::take_registers<232>();
    const typename Layout::Rows rows{p, smem + Layout::kRows + group * Layout::Rows::kBytes,
                                     base + Layout::kRows + group * Layout::Rows::kBytes,
                                     row_barriers + 8 * group * Layout::Rows::kBarriers, group};
    // By the leader: the rows of this warpgroup in the round `steps` after that of `here`. Without a
    // tile in the last round of a head it multiplies zeros, and TMA stores none of it.
    const auto load_queries = [&](Span here, int steps, int round) {
        for (int i = 0; i < steps; ++i) advance<1>(here, 0, share);
        if (here.any()) rows.load(here.first * kGroups + group, here.h, here.b, round);
    };
    Span span(share);
    if (rows.leads()) {
        load_queries(span, 0, 0);
        load_queries(span, 1, 1);
    }
    // The next tile, once it is here; give_back when nothing reads it any more.
    const auto take = [&] {
        wait(ring.arrived(), ring.parity);
        if (!kPlain) wait(ring.clean(), ring.parity);
        const Ring<Layout> here = ring;
        ring.next();
        return here;
    };
    const auto give_back = [&](const Ring<Layout>& tile) { arrive_as_warp(tile.free()); };

    for (int round = 0; span.any(); advance<1>(span, 0, share), ++round) {
        const int tile = span.first * kGroups + group;
        const uint32_t q = rows.queries(round);
        // [64, kD] of this warpgroup, as its warps hold 16 rows each
        float z_pos[kD / 8][4], z_neg[kD / 8][4];
        Side pos, neg;
        const auto walk = [&](int which, float (&z)[kD / 8][4], Side& side) {
            const Prompt& prompt = call.prompt[which];
            const int n = keys_of(which, span.first);
            clear(z);
            if (n == 0) {
                side.finish();
                return;
            }
            float s[kKeys / 8][4], rescale[2];
            uint32_t weights[kKeys / 16][4];
            // from a register of each thread ptxas would make each descriptor anew
            const uint32_t queries = uniform(q);
            const auto start_next = [&] {
                const auto k = take();
                ptx::wgmma_fence();
                start_scores<T, kD, kKeys>(s, queries, k.tile());
                return k;
            };
            const auto weigh = [&](const Ring<Layout>& k, int key) {
                ptx::arrived(s);
                side.template weigh<kPlain>(s, prompt, call.scale, biases + k.bias(), key, rescale);
                give_back(k);
            };
            const auto k = start_next();
            ptx::wgmma_wait<0>();
            weigh(k, 0);
            pack_fragments<T>(weights, s);
            for (int key = kKeys; key < n; key += kKeys) {
                const auto k = start_next();
                const auto v = take();
                ptx::wgmma_fence();
                start_values<T, kD, kKeys>(z, weights, v.tile(), true);
                ptx::wgmma_wait<1>();
                weigh(k, key);
                ptx::wgmma_wait<0>();
                ptx::arrived(z);
                give_back(v);
#pragma unroll
                for (int j = 0; j < kD / 8; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) z[j][i] *= rescale[i / 2];
                }
                pack_fragments<T>(weights, s);
            }
            const auto v = take();
            ptx::wgmma_fence();
            start_values<T, kD, kKeys>(z, weights, v.tile(), true);
            ptx::wgmma_wait<0>();
            ptx::arrived(z);
            give_back(v);
            side.finish();
        };
        walk(kNeg, z_neg, neg);
        float4* parked = reinterpret_cast<float4*>(smem + Layout::kPark) + threadIdx.x;
#pragma unroll
        for (int j = 0; j < Layout::kParked; ++j) {
            const float(&z)[4] = z_neg[j];
            parked[j * kGroups * kGroupThreads] = float4{z[0], z[1], z[2], z[3]};
        }
        walk(kPos, z_pos, pos);
        rows.release(tile, span.h, span.b, round);
#pragma unroll
        for (int j = 0; j < Layout::kParked; ++j) {
            const float4 z = parked[j * kGroups * kGroupThreads];
            z_neg[j][0] = z.x, z_neg[j][1] = z.y, z_neg[j][2] = z.z, z_neg[j][3] = z.w;
        }
        rows.template store<true>(
            tile, span.h, span.b, round, z_pos, z_neg,
            end_rows(call, span.b, tile * kGroupRows + rows.row(), span.h, pos.softmax,
                     neg.softmax, pos.inverse, neg.inverse));
        if (rows.leads()) load_queries(span, kQueryStages, round);
    }
}

template <typename T, int kD, bool kPlain>
cudaError_t launch_stream(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    using Layout = StreamLayout<T, kD>;
    Params params{};
    if (const cudaError_t error = map_call(params, p, Layout::kKeys)) return error;
    return launch_shared<forward_sm90_long_kernel<T, kD, kPlain>, true>(
        device, p, ceil_div(p.l, kGroups * kGroupRows), kThreadsOfBlock, Layout::kBytes, stream,
        params);
}

}  // namespace

cudaError_t forward_sm90_long(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    return dispatch_exact(p.type, p.d, [&](auto type, auto head_dim) {
        using T = typename decltype(type)::type;
        return is_plain(p) ? launch_stream<T, head_dim, true>(p, device, stream)
                           : launch_stream<T, head_dim, false>(p, device, stream);
    });
}

}  // namespace nasa
