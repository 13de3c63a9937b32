// What the two kernels for Hopper share: tiles by TMA, products by wgmma, and the rows of a warpgroup
// from Q to O (sm_90a).
//
// Tiles are [rows, d] in atoms of 64 columns: 128-byte rows, 16-byte chunks xored with the row
// (swizzle 128B), so that TMA writes and wgmma reads them as they are. Nothing is padded but what
// the instructions demand: 77 keys are wgmma's n = 80, a head_dim of 40 is n = 40 in P V and k = 48
// in Q K^T, where TMA fills the rest with zeros, as it does past the last row.
#pragma once

#include "launch.h"
#include "rules.cuh"
#include "tensor_maps.h"

namespace nasa::sm90 {

constexpr int kGroupThreads = 128;
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
                         row + t.first_row, head_at(t.step_h, h), b * t.step_b);
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

// A matrix descriptor of swizzle 128B: 8-row groups lie 1024 bytes apart; kLeading bytes from one
// atom of 64 columns to the next matter only where n is contiguous.
template <int kLeading>
struct Descriptor {
    uint32_t low;

    __device__ __forceinline__ explicit Descriptor(uint32_t shared)
        : low(shared >> 4 | (kLeading >> 4) << 16) {}

    // `bytes` on. Shared memory ends at 256 KiB: the sum stays in the field of the address.
    __device__ __forceinline__ uint64_t at(int bytes) const {
        constexpr uint64_t kSwizzle128B = 1;
        constexpr uint64_t kHigh = static_cast<uint64_t>(1024 >> 4) << 32 | kSwizzle128B << 62;
        return kHigh | (low + (bytes >> 4));
    }
};

// s [64, kKeys] = Q K^T, started; tiles by address
template <typename T, int kD, int kKeys>
__device__ __forceinline__ void start_scores(float (&s)[kKeys / 8][4], uint32_t q, uint32_t k) {
    const Descriptor<16> queries(q), keys(k);
#pragma unroll
    for (int i = 0; i < (kD + 15) / 16; ++i) {
        const int atom = i / 4, column = i % 4 * 32;
        ptx::wgmma<T>(s, queries.at(atom * SwizzledTile<kGroupRows, kD>::kAtom + column),
                      keys.at(atom * SwizzledTile<kKeys, kD>::kAtom + column), i > 0);
    }
    ptx::wgmma_commit();
}

// z [64, kD] = P V, or += where `add`, started
template <typename T, int kD, int kKeys>
__device__ __forceinline__ void start_values(float (&z)[kD / 8][4],
                                             const uint32_t (&weights)[kKeys / 16][4], uint32_t v,
                                             bool add) {
    static_assert(kKeys % 16 == 0, "P is the A operand of wgmma: keys come in steps of 16");
    const Descriptor<SwizzledTile<kKeys, kD>::kAtom> values(v);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
        ptx::wgmma_values<T>(z, weights[i], values.at(i * 16 * kRowBytes), add || i > 0);
    }
    ptx::wgmma_commit();
}

// The softmax of one prompt's rows r and r + 8
struct Side {
    OnlineSoftmax softmax;
    float inverse[2] = {0.f, 0.f};  // once it has seen all keys

    // Scores of keys `first` and up become weights; `rescale` is what the earlier ones shrink by.
    template <bool kPlain, int kTiles>
    __device__ __forceinline__ void weigh(float (&s)[kTiles][4], const Prompt& prompt, float scale,
                                          const float* bias, int first, float (&rescale)[2]) {
        const float left = finish_scores<kPlain>(s, prompt, scale, bias, first);
        softmax.push(s, left, rescale);
    }

    // The same for all keys at once, rounded to T
    template <typename T, bool kPlain, int kTiles>
    __device__ __forceinline__ void push_all(float (&s)[kTiles][4], const Prompt& prompt,
                                             float scale, const float* bias,
                                             uint32_t (&weights)[kTiles / 2][4]) {
        const float left = finish_scores<kPlain>(s, prompt, scale, bias, 0);
        softmax.push_all(s, left);
        pack_fragments<T>(weights, s);
    }

    __device__ __forceinline__ void finish() {
        inverse[0] = softmax.inverse_sum(0);
        inverse[1] = softmax.inverse_sum(1);
    }
};

// By one thread, while it waits for other things
template <int kSides>
__device__ __forceinline__ void prefetch_maps(const Params& p) {
    for (const Mapped* t : {&p.q, &p.k[kPos], &p.v[kPos], &p.o}) ptx::prefetch_map(&t->map);
    if constexpr (kSides == 2) {
        for (const Mapped* t : {&p.k[kNeg], &p.v[kNeg]}) ptx::prefetch_map(&t->map);
    }
    if (is_joint(p.call)) ptx::prefetch_map(&p.o_shared.map);
}

// The rows of a warpgroup: the next tile of Q arrives while one is multiplied, and the shared
// segment and O take the place of a Q that is used up. One thread keeps the copies on their way.
template <typename T, int kD>
struct Rows64 {
    using Tile = SwizzledTile<kGroupRows, kD>;
    static constexpr int kBytes = kQueryStages * Tile::kBytes;
    static constexpr int kBarriers = kQueryStages + 1;  // Q of each stage, O_s

    const Params& p;
    unsigned char* tiles;
    uint32_t base;     // the address of `tiles`
    uint32_t arrived;  // the mbarriers
    int group;

    __device__ __forceinline__ bool leads() const { return threadIdx.x % kGroupThreads == 0; }

    // Q of a tile, the `round`-th of this warpgroup; by the leader
    __device__ __forceinline__ void load(int tile, int h, int b, int round) const {
        bring(p.q, tile, h, b, round % kQueryStages, round % kQueryStages);
    }

    // The address of the Q of round `round`, once it is there
    __device__ __forceinline__ uint32_t queries(int round) const {
        const int stage = round % kQueryStages;
        wait(arrived + 8 * stage, round / kQueryStages % 2);
        return base + stage * Tile::kBytes;
    }

    // Q is used up by this warp: once it is by all, its tile takes O_s.
    __device__ __forceinline__ void release(int tile, int h, int b, int round) const {
        ptx::barrier_sync(1 + group, kGroupThreads);
        if (is_joint(p.call) && leads()) {
            bring(p.o_shared, tile, h, b, round % kQueryStages, kQueryStages);
        }
    }

    // The first of a lane's two rows in a tile; the other is 8 on.
    __device__ __forceinline__ int row() const {
        return threadIdx.x % kGroupThreads / kWarpSize * kWarpRows + threadIdx.x % kWarpSize / 4;
    }

    // O of both prompts on its way to memory; after `release`. The tile is free when the leader
    // returns.
    template <bool kBoth>
    __device__ __forceinline__ void store(int tile, int h, int b, int round,
                                          float (&z_pos)[kD / 8][4],
                                          float (&z_neg)[kD / 8][4], const Ending& end) const {
        // where z[j][0] and z[j][1] belong; z[j][2] and z[j][3] lie 8 rows, and the same swizzle, on
        unsigned char* o_row = tiles + round % kQueryStages * Tile::kBytes + row() * kRowBytes +
                               threadIdx.x % 4 * 4;
        const int swizzle = row() % 8 * 16;
        const auto target = [&](int j) {
            return o_row + j / 8 * Tile::kAtom + (j % 8 * 16 ^ swizzle);
        };
        if (end.joint) wait(arrived + 8 * kQueryStages, round % 2);
        finish<kBoth>(z_pos, z_neg, end, [&](int j, float (&c)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const unsigned char* pair = target(j) + i / 2 * 8 * kRowBytes;
                c[i] = static_cast<float>(reinterpret_cast<const T*>(pair)[i % 2]);
            }
        });
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
            ptx::tma_store_4d(&p.o.map, base + round % kQueryStages * Tile::kBytes + atom * Tile::kAtom,
                              atom * kAtomColumns, tile * kGroupRows, h, b);
        }
        ptx::bulk_commit();
        ptx::bulk_wait_read();
    }

private:
    __device__ __forceinline__ void bring(const Mapped& t, int tile, int h, int b, int stage,
                                          int barrier) const {
        ptx::mbarrier_arrive_expect(arrived + 8 * barrier, Tile::kBytes);
        load_tile<kGroupRows, kD>(t, base + stage * Tile::kBytes, arrived + 8 * barrier,
                                  tile * kGroupRows, h, b);
    }
};

// As dispatch of launch.h, for the head_dims that has_sm90 speaks of
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
