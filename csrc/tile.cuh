// Tiles in shared memory and the two products that a warp takes of them.
//
// A tile is [rows, kD] of 16-bit elements, each row padded by 16 bytes: the row pitch is then an
// odd number of 16-byte units, so the eight rows of an 8x8 matrix lie in distinct banks.
#pragma once

#include "layouts.h"
#include "ptx.cuh"

namespace nasa {

constexpr int kWarpSize = 32;
constexpr int kWarps = 4;  // of a block
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpRows = 16;  // the m of mma.m16n8k16

template <int kD>
struct Tile {
    static_assert(kD % 16 == 0, "mma.m16n8k16 takes head_dim in steps of 16");
    static constexpr int kPitch = tile_bytes(1, kD);
};

// A number that all lanes of a warp have alike, from one register of the warp
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __reduce_or_sync(~0u, x); }

// One head of a [b, rows, h, d] tensor.
struct Rows {
    const uint16_t* data;
    int64_t stride;
    int d;
    bool aligned;
};

__device__ __forceinline__ Rows rows_of(const Matrix& x, int b, int h, const ForwardParams& call) {
    return {static_cast<const uint16_t*>(x.data) + b * x.stride_b + h * x.stride_h, x.stride_row,
            call.d, call.aligned};
}

// The keys or values that head h of Q looks at
__device__ __forceinline__ Rows key_rows_of(const Matrix& x, int b, int h,
                                            const ForwardParams& call) {
    return rows_of(x, b, head_at(call.key_step, h), call);
}

// Start the copy of rows [first, first + kRows), kColumns wide from column `column`, to a tile whose
// rows lie kPitch bytes apart.
// `thread` is one of kCopiers. Rows that are not present(row), and columns past d, become zeros.
// Rows at any address are copied element by element, at once.
template <int kColumns, int kRows, int kCopiers, int kPitch = Tile<kColumns>::kPitch,
          typename Present>
__device__ __forceinline__ void load_tile(unsigned char* tile, const Rows& rows, int first,
                                          int column, int thread, Present present) {
    if (!rows.aligned) {
        uint16_t* target = reinterpret_cast<uint16_t*>(tile);
#pragma unroll 1
        for (int i = thread; i < kRows * kColumns; i += kCopiers) {
            const int row = i / kColumns;
            const int c = i % kColumns;
            const bool valid = column + c < rows.d && present(first + row);
            target[row * (kPitch / 2) + c] =
                valid ? rows.data[(first + row) * rows.stride + column + c] : 0;
        }
        return;
    }
    constexpr int kChunks = kColumns / 8;  // of 16 bytes
    const uint32_t base = ptx::shared_address(tile);
#pragma unroll 2
    for (int i = thread; i < kRows * kChunks; i += kCopiers) {
        const int row = i / kChunks;
        const int c = i % kChunks * 8;
        const bool valid = column + c < rows.d && present(first + row);
        ptx::cp_async_16(base + row * kPitch + 2 * c,
                         rows.data + (valid ? (first + row) * rows.stride + column + c : 0), valid);
    }
}

// Addresses that a lane gives to ldmatrix, relative to the first element of the fragment.
// [16, 16] of a row-major A
template <int kPitch>
__device__ __forceinline__ uint32_t lane_of_a() {
    const int lane = threadIdx.x % kWarpSize;
    return lane % 16 * kPitch + lane / 16 * 16;
}

// two [16, 8] of B, whose columns are the rows of a tile: B = tile^T
template <int kPitch>
__device__ __forceinline__ uint32_t lane_of_b_transposed() {
    const int lane = threadIdx.x % kWarpSize;
    return (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
}

// two [16, 8] of B, whose rows are the rows of a tile (ldmatrix.trans)
template <int kPitch>
__device__ __forceinline__ uint32_t lane_of_b() {
    const int lane = threadIdx.x % kWarpSize;
    return lane % 16 * kPitch + lane / 16 * 16;
}

// c [16 * kParts, 8 * kTiles] += a [16 * kParts, kD] b^T, b [8 * kTiles, kD]; a and b are addresses
// of tiles. What is read of b serves all kParts.
template <typename T, int kD, int kParts, int kTiles>
__device__ __forceinline__ void multiply_transposed(float (&c)[kParts][kTiles][4], uint32_t a,
                                                    uint32_t b) {
    static_assert(kTiles % 2 == 0, "ldmatrix.x4 brings two column tiles of B");
    constexpr int kPitch = Tile<kD>::kPitch;
    a += lane_of_a<kPitch>();
    b += lane_of_b_transposed<kPitch>();
    // not to the end: a longer body only takes longer to compile
    constexpr int kSteps = kD / 16;
    constexpr int kUnroll = kSteps % 4 == 0 ? 4 : kSteps % 5 == 0 ? 5 : kSteps % 3 == 0 ? 3 : 2;
#pragma unroll kUnroll
    for (int k = 0; k < kSteps; ++k) {
        uint32_t fa[kParts][4], fb[4];
#pragma unroll
        for (int m = 0; m < kParts; ++m) {
            ptx::ldmatrix_x4(fa[m], a + m * kWarpRows * kPitch + 32 * k);
        }
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
            ptx::ldmatrix_x4(fb, b + 8 * j * kPitch + 32 * k);
#pragma unroll
            for (int m = 0; m < kParts; ++m) {
                ptx::mma_m16n8k16<T>(c[m][j], fa[m], fb[0], fb[1]);
                ptx::mma_m16n8k16<T>(c[m][j + 1], fa[m], fb[2], fb[3]);
            }
        }
    }
}

template <typename T, int kD, int kTiles>
__device__ __forceinline__ void multiply_transposed(float (&c)[kTiles][4], uint32_t a, uint32_t b) {
    multiply_transposed<T, kD>(reinterpret_cast<float(&)[1][kTiles][4]>(c), a, b);
}

// c [16 * kParts, 8 * kTiles] += a [16 * kParts, 16 * kSteps] b, b [16 * kSteps, 8 * kTiles]; a in
// registers
template <typename T, int kPitch, int kParts, int kSteps, int kTiles>
__device__ __forceinline__ void multiply(float (&c)[kParts][kTiles][4],
                                         const uint32_t (&a)[kParts][kSteps][4], uint32_t b) {
    static_assert(kTiles % 2 == 0, "ldmatrix.x4 brings two column tiles of B");
    b += lane_of_b<kPitch>();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
            uint32_t fb[4];
            ptx::ldmatrix_x4_trans(fb, b + 16 * k * kPitch + 16 * j);
#pragma unroll
            for (int m = 0; m < kParts; ++m) {
                ptx::mma_m16n8k16<T>(c[m][j], a[m][k], fb[0], fb[1]);
                ptx::mma_m16n8k16<T>(c[m][j + 1], a[m][k], fb[2], fb[3]);
            }
        }
    }
}

template <typename T, int kPitch, int kSteps, int kTiles>
__device__ __forceinline__ void multiply(float (&c)[kTiles][4], const uint32_t (&a)[kSteps][4],
                                         uint32_t b) {
    multiply<T, kPitch>(reinterpret_cast<float(&)[1][kTiles][4]>(c),
                        reinterpret_cast<const uint32_t(&)[1][kSteps][4]>(a), b);
}

template <int kTiles>
__device__ __forceinline__ void clear(float (&c)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[j][i] = 0.f;
    }
}

// The accumulators of two column tiles are the A fragment of one k step, once rounded to T.
template <typename T, int kTiles>
__device__ __forceinline__ void pack_fragments(uint32_t (&a)[kTiles / 2][4],
                                               const float (&c)[kTiles][4]) {
#pragma unroll
    for (int k = 0; k < kTiles / 2; ++k) {
        a[k][0] = ptx::pack<T>(c[2 * k][0], c[2 * k][1]);
        a[k][1] = ptx::pack<T>(c[2 * k][2], c[2 * k][3]);
        a[k][2] = ptx::pack<T>(c[2 * k + 1][0], c[2 * k + 1][1]);
        a[k][3] = ptx::pack<T>(c[2 * k + 1][2], c[2 * k + 1][3]);
    }
}

// Write c [16, 8 * kTiles] to a warp's rows of a tile, rounded to T, from column tile `column` on.
template <typename T, int kPitch, int kTiles>
__device__ __forceinline__ void stage(unsigned char* tile, int column,
                                      const float (&c)[kTiles][4]) {
    const int lane = threadIdx.x % kWarpSize;
    unsigned char* target = tile + lane / 4 * kPitch + 16 * column + lane % 4 * 4;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        *reinterpret_cast<uint32_t*>(target + 16 * j) = ptx::pack<T>(c[j][0], c[j][1]);
        *reinterpret_cast<uint32_t*>(target + 16 * j + 8 * kPitch) = ptx::pack<T>(c[j][2], c[j][3]);
    }
}

// Reads back what `stage` wrote as column tile `column`: c[0] and c[1] of the lane's row, c[2] and
// c[3] of the row eight below it, as floats.
template <typename T, int kPitch>
__device__ __forceinline__ void fetch(float (&c)[4], const unsigned char* tile, int column) {
    const int lane = threadIdx.x % kWarpSize;
    const unsigned char* source = tile + lane / 4 * kPitch + 16 * column + lane % 4 * 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const T* pair = reinterpret_cast<const T*>(source + 8 * r * kPitch);
        c[2 * r] = static_cast<float>(pair[0]);
        c[2 * r + 1] = static_cast<float>(pair[1]);
    }
}

// Write `count` rows of a warp's staged tile, kColumns wide, to rows of `stride` elements in global
// memory; `d` columns of them exist.
template <int kColumns, int kRows = kWarpRows, int kPitch = Tile<kColumns>::kPitch>
__device__ __forceinline__ void store_rows(uint16_t* target, int64_t stride,
                                           const unsigned char* tile, int count, int d,
                                           bool aligned) {
    const int lane = threadIdx.x % kWarpSize;
    if (!aligned) {
        const uint16_t* source = reinterpret_cast<const uint16_t*>(tile);
#pragma unroll 1
        for (int i = lane; i < kRows * kColumns; i += kWarpSize) {
            const int row = i / kColumns;
            const int c = i % kColumns;
            if (row < count && c < d) {
                target[row * stride + c] = source[row * (kPitch / 2) + c];
            }
        }
        return;
    }
    constexpr int kChunks = kColumns / 8;
    for (int i = lane; i < kRows * kChunks; i += kWarpSize) {
        const int row = i / kChunks;
        const int c = i % kChunks * 8;
        if (row < count && c < d) {
            *reinterpret_cast<uint4*>(target + row * stride + c) =
                *reinterpret_cast<const uint4*>(tile + row * kPitch + 2 * c);
        }
    }
}

}  // namespace nasa
