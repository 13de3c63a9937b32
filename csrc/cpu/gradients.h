// The products of the backward pass, and rows of Q and dO as they want them.
#pragma once

#include "forward_short.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

// x [count, d] with rows `stride` apart, as [R * kLanes / kPack, width]: columns padded with zeros.
// Behind the last row it is repeated.
template <class T, class Math, int R>
void load_rows(const T* x, int64_t stride, int64_t count, int64_t d, int64_t width, float* to) {
    for (int64_t i = 0; i < R * kLanes; i += Math::kPack) {
        const T* const from = x + smaller(i, count - 1) * stride;
        const T* const next = x + smaller(i + 1, count - 1) * stride;
        float* const out = to + i / Math::kPack * width;
        for (int64_t c = d / kLanes * kLanes; c < width; ++c) out[c] = 0.f;
        if (d < kLanes) {
            for (int64_t c = 0; c < d; ++c) {
                if constexpr (Math::kPack == 1) {
                    out[c] = to_float(from[c]);
                } else {
                    out[c] = bit_cast<float>(uint32_t{next[c].bits} << 16 | from[c].bits);
                }
            }
            continue;
        }
        for (int64_t first = 0; first < d; first += kLanes) {
            // the last vector may overlap the one before it
            const int64_t c = smaller(first, d - kLanes);
            if constexpr (Math::kPack == 1) {
                store(out + c, load(from + c));
            } else {
                store(out + c, Math::pack(from + c, next + c));
            }
        }
    }
}

// g [keys, rows] = V dO^T, and u += rowsum(e * g) with the weights e [keys, rows]
template <class Math, int R>
void weight_gradients(const float* got, const float* v, int64_t keys, int64_t d, const float* e,
                      float* g, Vec (&u)[R], Ahead& ahead) {
    constexpr int kWidth = R * kLanes;
    const int64_t steps = divide_up(d, Math::kPack);
    for_tiles<kTile>(keys, [&](auto tile, int64_t j) __attribute__((always_inline)) {
        constexpr int kT = decltype(tile)::value;
        ahead.fetch();
        Vec c[kT][R] = {}, part[R] = {};
        product_along_d<Math>(c, steps, v + j * steps, got);
#pragma GCC unroll 8
        for (int t = 0; t < kT; ++t) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const int64_t at = (j + t) * kWidth + r * kLanes;
                part[r] = fma(c[t][r], load(e + at), part[r]);
                store(g + at, c[t][r]);
            }
        }
        for (int r = 0; r < R; ++r) u[r] += part[r];
    });
}

// to [d, rows] += K^T dS^T, or = it; some keys at a time, which keeps the rounding errors small
template <class Math, int R>
void query_gradients(const float* k, int64_t keys, int64_t d, const float* ds, bool add,
                     float* to) {
    constexpr int kWidth = R * kLanes;
    const int64_t steps = divide_up(keys, Math::kPack);
    for (int64_t first = 0; first < steps; first += kBlockKeys, add = true) {
        const int64_t some = smaller(kBlockKeys, steps - first);
        for_tiles<kTile>(d, [&](auto tile, int64_t column) __attribute__((always_inline)) {
            constexpr int kT = decltype(tile)::value;
            Vec c[kT][R] = {};
            product<Math>(c, some, k + first * d + column, 1, d, ds + first * kWidth, kWidth);
#pragma GCC unroll 8
            for (int t = 0; t < kT; ++t) {
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    float* const at = to + (column + t) * kWidth + r * kLanes;
                    store(at, add ? load(at) + c[t][r] : c[t][r]);
                }
            }
        });
    }
}

// sum [n, width] += weights^T [n, steps] . rows [steps, width]. Here lanes are columns.
template <class Math>
void key_gradients(const float* weights, int64_t steps, const float* rows, int64_t n, int64_t width,
                   float* sum) {
    for (int64_t column = 0; column < width;) {
        // 4 vectors are better two and two than three and one
        const int64_t left = (width - column) / kLanes;
        const int64_t vectors = left == 4 && kPanels == 3 ? 2 : smaller(left, kPanels);
        with_tile<kPanels>(vectors, [&](auto panels) __attribute__((always_inline)) {
            constexpr int kR = decltype(panels)::value;
            for_tiles<kTile>(n, [&](auto tile, int64_t j) __attribute__((always_inline)) {
                constexpr int kT = decltype(tile)::value;
                float* const at = sum + j * width + column;
                Vec c[kT][kR] = {};
                product<Math>(c, steps, weights + j * steps, steps, 1, rows + column, width);
#pragma GCC unroll 8
                for (int t = 0; t < kT; ++t) {
#pragma GCC unroll 8
                    for (int r = 0; r < kR; ++r) {
                        float* const to = at + t * width + r * kLanes;
                        store(to, load(to) + c[t][r]);
                    }
                }
            });
        });
        column += vectors * kLanes;
    }
}

// z [d, rows] = z * rescale + V^T e with the weights e [keys, rows]; or, first, without z.
// `packed` has room for kBlockKeys keys.
template <class Math, int R>
void add_values(const float* e, const float* v, int64_t keys, int64_t d, bool is_first,
                Vec (&rescale)[R], float* packed, float* z, Ahead& ahead) {
    constexpr int kWidth = R * kLanes;
    for (int64_t first = 0; first < keys; first += kBlockKeys) {
        const int64_t some = smaller(kBlockKeys, keys - first);
        const float* p = e + first * kWidth;
        if constexpr (Math::kPack == 2) {
            for (int64_t j = 0; j < some; j += 2) {
                for (int r = 0; r < R; ++r) {
                    const float* const at = p + j * kWidth + r * kLanes;
                    const Vec next = j + 1 < some ? load(at + kWidth) : Vec{};
                    store(packed + j / 2 * kWidth + r * kLanes, Math::pack(load(at), next));
                }
            }
            p = packed;
        }
        const float* const of_v = v + first / Math::kPack * d;
        if (is_first && first == 0) {
            values<true, Math, R>(p, of_v, some, d, rescale, z, ahead);
        } else {
            values<false, Math, R>(p, of_v, some, d, rescale, z, ahead);
        }
        for (int r = 0; r < R; ++r) rescale[r] = broadcast(1.f);
    }
}

}  // namespace
}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
