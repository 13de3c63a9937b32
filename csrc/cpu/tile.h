// The microkernel, and rows to and from its layout.
//
// Lanes are query rows. A block of R * kLanes rows of Q is transposed once; then every product is
// one microkernel, scalars from one matrix times vectors from another:
//
//     S^T  [n, rows] = K   [n, d] . Q^T  [d, rows]
//     Z^T  [d, rows] = V^T [d, n] . P^T  [n, rows]
//     dP^T [n, rows] = V   [n, d] . dO^T [d, rows]
//     dQ^T [d, rows] = K^T [d, n] . dS^T [n, rows]
//
// Neither n nor d is padded, no maximum and no sum crosses lanes, and one source serves vectors of
// 4, 8 and 16. Only dK and dV have columns as lanes.
#pragma once

#include "vec.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

constexpr int kRows = kPanels * kLanes;  // of a whole block

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls f with t, which is 1 .. T, as a constant.
template <int N>
struct Constant {
    static constexpr int value = N;
};
template <int T, class F>
NASA_INLINE void with_tile(int64_t t, const F& f) {
    if (t >= T) {
        f(Constant<T>());
    } else if constexpr (T > 1) {
        with_tile<T - 1>(t, f);
    }
}

// f(constant, first) for tiles of [0, count): whole ones, then a smaller one.
template <int T, class F>
NASA_INLINE void for_tiles(int64_t count, const F& f) {
    for (int64_t first = 0; first < count; first += T) {
        with_tile<T>(count - first, [&](auto tile) __attribute__((always_inline)) {
            f(tile, first);
        });
    }
}

// c[t][r] += sum over k of a[k * a_step + t * a_tile] * b[k * b_step + r]
template <class Math, int T, int R>
NASA_INLINE void product(Vec (&c)[T][R], int64_t steps, const float* a, ptrdiff_t a_tile,
                         ptrdiff_t a_step, const float* b, ptrdiff_t b_step) {
    for (int64_t k = 0; k < steps; ++k, a += a_step, b += b_step) {
        Vec rows[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) keep(rows[r] = load(b + r * kLanes));
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const Vec x = broadcast(a[t * a_tile]);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) c[t][r] = Math::multiply_add(x, rows[r], c[t][r]);
        }
    }
}

// The same over d, of T rows [d / kPack] of keys. More than 128 products are two sums: a single one
// would round more than eager PyTorch's.
template <class Math, int T, int R>
NASA_INLINE void product_along_d(Vec (&c)[T][R], int64_t steps, const float* keys,
                                 const float* rows) {
    constexpr int kWidth = R * kLanes;
    const int64_t half = Math::kPack == 1 && steps > 128 ? steps / 2 : 0;
    product<Math>(c, steps - half, keys + half, steps, 1, rows + half * kWidth, kWidth);
    if (half == 0) return;
    Vec rest[T][R] = {};
    product<Math>(rest, half, keys, steps, 1, rows, kWidth);
    for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) c[t][r] += rest[t][r];
    }
}

// x [count, d] with rows `stride` apart, transposed: [d / kPack, R * kLanes]. The last row is
// repeated.
template <class T, class Math, int R>
void load_transposed(const T* x, int64_t stride, int64_t count, int64_t d, float* to) {
    constexpr int kWidth = R * kLanes, kPack = Math::kPack;
    const int64_t columns = d / kPack;
    const auto row = [&](int64_t i) { return x + smaller(i, count - 1) * stride; };
    if (columns < kLanes || d % kPack != 0) {
        for (int i = 0; i < kWidth; ++i) {
            for (int64_t c = 0; c < divide_up(d, kPack); ++c) {
                if constexpr (kPack == 1) {
                    to[c * kWidth + i] = to_float(row(i)[c]);
                } else {
                    const uint32_t high = 2 * c + 1 < d ? row(i)[2 * c + 1].bits : 0;
                    to[c * kWidth + i] = bit_cast<float>(row(i)[2 * c].bits | high << 16);
                }
            }
        }
        return;
    }
    for (int r = 0; r < R; ++r) {
        for (int64_t first = 0; first < columns; first += kLanes) {
            // the last columns may come a second time
            const int64_t c = smaller(first, columns - kLanes);
            Vec tile[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                const T* const from = row(r * kLanes + i) + c * kPack;
                if constexpr (kPack == 1) {
                    tile[i] = load(from);
                } else {
                    __builtin_memcpy(&tile[i], from, sizeof tile[i]);
                }
            }
            transpose(tile);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) store(to + (c + i) * kWidth + r * kLanes, tile[i]);
        }
    }
}

// The way back, of what x(column, panel) gives: its first `count` rows, `stride` apart. x is asked
// for some columns a second time.
template <class T, int R, class X>
void store_transposed(const X& x, int64_t d, T* to, int64_t stride, int64_t count) {
    for (int r = 0; r < R; ++r) {
        const int64_t rows = smaller(kLanes, count - r * kLanes);
        T* const panel = to + r * kLanes * stride;
        if (d < kLanes) {
            for (int64_t c = 0; c < d; ++c) {
                const Vec column = x(c, r);
                for (int64_t i = 0; i < rows; ++i) panel[i * stride + c] = from_float<T>(column[i]);
            }
            continue;
        }
        for (int64_t first = 0; first < d; first += kLanes) {
            const int64_t c = smaller(first, d - kLanes);
            Vec tile[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) tile[i] = x(c + i, r);
            transpose(tile);
            T* const out = panel + c;
            if (rows == kLanes) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) store(out + i * stride, tile[i]);
            } else {
                for (int64_t i = 0; i < rows; ++i) store(out + i * stride, tile[i]);
            }
        }
    }
}

}  // namespace
}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
