// Forward for prompts of any length on Hopper: K and V pass by in a ring of tiles (sm_90a).
//
//     O = softmax(Q K+^T) V+  -  alpha * softmax(Q K-^T) V-
//
// or, beside the shared keys of a joint attention, what rules.cuh makes of the three segments.
//
// A block owns tiles of 128 query rows of one head, 64 per warpgroup, and walks over K-, V- and then
// K+, V+ for each. A third warpgroup feeds the ring: one thread of it keeps TMA busy, and where keys
// are masked the other warps write the biases and clear the absent rows of V.
//
// The arithmetic of a row, its order included, is that of forward_sm90.cu: both give identical
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
    // K and V in turns, [kKeys, kD] each; the rows of each warpgroup; what is parked of Z-; a bias
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
    int item = 0;

    __device__ __forceinline__ int slot() const { return item % Layout::kSlots; }
    __device__ __forceinline__ int parity() const { return item / Layout::kSlots % 2; }
    __device__ __forceinline__ uint32_t tile() const {
        return base + slot() * Layout::Keys::kBytes;
    }
    __device__ __forceinline__ int bias() const { return slot() * Layout::kKeys; }
    __device__ __forceinline__ uint32_t arrived() const { return barriers + 8 * slot(); }
    __device__ __forceinline__ uint32_t clean() const { return arrived() + 8 * Layout::kSlots; }
    __device__ __forceinline__ uint32_t free() const { return arrived() + 16 * Layout::kSlots; }
    __device__ __forceinline__ void wait_free() const { wait(free(), parity() ^ 1); }
};

// One arrival for all lanes of a warp
__device__ __forceinline__ void arrive_as_warp(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(barrier);
}

template <typename T, int kD>
__global__ void __launch_bounds__(kThreadsOfBlock, 1)
    forward_sm90_long_kernel(const __grid_constant__ Params p, const int blocks_per_head) {
    using Layout = StreamLayout<T, kD>;
    using Keys = typename Layout::Keys;
    constexpr int kKeys = Layout::kKeys;
    const ForwardParams& call = p.call;
    extern __shared__ __align__(1024) unsigned char shared[];
    float* biases = reinterpret_cast<float*>(shared + Layout::kBias);
    const uint32_t base = ptx::shared_address(shared);
    Ring<Layout> ring{base, base + Layout::kBarriers};
    const uint32_t row_barriers = ring.barriers + 8 * 3 * Layout::kSlots;

    const int group = threadIdx.x / kGroupThreads;
    // heads fastest: the heads of one query row are neighbours in memory, and then also in time
    const int h = blockIdx.x % call.h;
    const int part = blockIdx.x / call.h % blocks_per_head;
    const int b = blockIdx.x / call.h / blocks_per_head;
    const bool masked = call.prompt[kPos].mask.type != MaskType::kNone ||
                        call.prompt[kNeg].mask.type != MaskType::kNone;

    // A round is kGroups tiles of rows, from tile `first` on; each takes the keys of both prompts.
    const int tiles = (call.l + kGroupRows - 1) / kGroupRows;
    const int step = blocks_per_head * kGroups;
    const int first_tile = part * kGroups;
    const auto keys_of = [&](int side, int first) {
        const bool any = attends(call, side, first * kGroupRows, kGroups * kGroupRows);
        return any ? call.prompt[side].n : 0;
    };
    const auto each_block = [&](auto take) {
        for (int first = first_tile; first < tiles; first += step) {
            for (int side : {kNeg, kPos}) {
                const int n = keys_of(side, first);
                for (int key = 0; key < n; key += kKeys) take(side, key);
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
    }
    ptx::wait_for_earlier_grids();
    __syncthreads();

    if (group == kGroups) {
        ptx::give_registers<40>();
        const int thread = threadIdx.x - kGroups * kGroupThreads;
        if (thread == 0) {
            each_block([&](int side, int key) {
                for (const Mapped* t : {&p.k[side], &p.v[side]}) {
                    ring.wait_free();
                    ptx::mbarrier_arrive_expect(ring.arrived(), Keys::kBytes);
                    load_tile<kKeys, kD>(*t, ring.tile(), ring.arrived(), key, h, b);
                    ++ring.item;
                }
            });
        } else if (masked && thread >= kWarpSize) {
            each_block([&](int side, int key) {
                const Prompt& prompt = call.prompt[side];
                float* bias = biases + ring.bias();
                // this thread's keys are nobody else's
                const int mine = thread - kWarpSize;
                constexpr int kStep = kCleaners * kWarpSize;
                ring.wait_free();
                for (int i = mine; i < kKeys; i += kStep) {
                    bias[i] = key_bias(prompt.mask, b, key + i, prompt.n);
                }
                arrive_as_warp(ring.clean());
                ++ring.item;
                wait(ring.arrived(), ring.parity());
                for (int i = mine; i < kKeys; i += kStep) {
                    if (bias[i] != -INFINITY) continue;
                    clear_row<kKeys, kD>(shared + ring.slot() * Keys::kBytes, i);
                }
                ptx::fence_proxy_async();
                arrive_as_warp(ring.clean());
                ++ring.item;
            });
        }
        return;
    }

    ptx::take_registers<232>();
    const typename Layout::Rows rows{p, shared + Layout::kRows + group * Layout::Rows::kBytes,
                                     row_barriers + 8 * group * Layout::Rows::kBarriers, group,
                                     h, b};
    // a warpgroup without a tile in the last round multiplies zeros, and TMA stores none of it
    const auto load_queries = [&](int first, int round) {
        if (rows.leads() && first < tiles) rows.load(first + group, round);
    };
    load_queries(first_tile, 0);
    load_queries(first_tile + step, 1);
    const auto take = [&] {
        wait(ring.arrived(), ring.parity());
        if (masked) wait(ring.clean(), ring.parity());
        return ring.tile();
    };
    const auto give_back = [&] {
        arrive_as_warp(ring.free());
        ++ring.item;
    };

    for (int first = first_tile, round = 0; first < tiles; first += step, ++round) {
        const uint32_t q = rows.queries(round);
        // [64, kD] of this warpgroup, as its warps hold 16 rows each
        float z_pos[kD / 8][4], z_neg[kD / 8][4];
        Side pos, neg;
        const auto walk = [&](int which, float (&z)[kD / 8][4], Side& side) {
            const Prompt& prompt = call.prompt[which];
            const int n = keys_of(which, first);
            clear(z);
            for (int key = 0; key < n; key += kKeys) {
                float s[kKeys / 8][4];
                const uint32_t k = take();
                ptx::wgmma_fence();
                start_scores<T, kD, kKeys>(s, q, k);
                ptx::wgmma_wait<0>();
                uint32_t weights[kKeys / 16][4];
                float rescale[2];
                side.push<T>(s, prompt, call.scale, biases + ring.bias(), key, weights, rescale);
                give_back();
#pragma unroll
                for (int j = 0; j < kD / 8; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) z[j][i] *= rescale[i / 2];
                }
                const uint32_t v = take();
                ptx::wgmma_fence();
                start_values<T, kD, kKeys>(z, weights, v, key > 0);
                ptx::wgmma_wait<0>();
                give_back();
            }
            side.finish();
        };
        walk(kNeg, z_neg, neg);
        float4* parked = reinterpret_cast<float4*>(shared + Layout::kPark) + threadIdx.x;
#pragma unroll
        for (int j = 0; j < Layout::kParked; ++j) {
            const float(&z)[4] = z_neg[j];
            parked[j * kGroups * kGroupThreads] = float4{z[0], z[1], z[2], z[3]};
        }
        walk(kPos, z_pos, pos);
        rows.release(first + group, round);
#pragma unroll
        for (int j = 0; j < Layout::kParked; ++j) {
            const float4 z = parked[j * kGroups * kGroupThreads];
            z_neg[j][0] = z.x, z_neg[j][1] = z.y, z_neg[j][2] = z.z, z_neg[j][3] = z.w;
        }
        rows.store(first + group, round, z_pos, pos, z_neg, neg);
        load_queries(first + kQueryStages * step, round);
    }
}

template <typename T, int kD>
cudaError_t launch_stream(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    using Layout = StreamLayout<T, kD>;
    Params params{};
    if (const cudaError_t error = map_call(params, p, Layout::kKeys)) return error;
    return launch_rows<forward_sm90_long_kernel<T, kD>>(params, device, kGroups, kThreadsOfBlock,
                                                        Layout::kBytes, stream);
}

}  // namespace

cudaError_t forward_sm90_long(const ForwardParams& p, const Device& device, cudaStream_t stream) {
    return dispatch_exact(p.type, p.d, [&](auto type, auto head_dim) {
        return launch_stream<typename decltype(type)::type, head_dim>(p, device, stream);
    });
}

}  // namespace nasa
