// Scores and their weights: S = K Q^T * scale + bias, its maximum in each row, exp2.
#pragma once

#include "keys.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

// A segment of up to so many keys is one block with its exact maximum, a longer one goes in such
// blocks: 256 are no faster, and their longer sums are less exact than those of eager PyTorch.
constexpr int64_t kBlockKeys = 128;
constexpr float kLowest = -3.402823466e38f;

// Scores are q k, and their weights exp2(q k * base), where the scale is positive and there is no
// bias; otherwise scores are q k * scale + bias first.
struct Scaling {
    bool is_first;
    float scale, base;

    Scaling(const Keys& x, float scale)
        : is_first(x.bias != nullptr || !(scale > 0)),
          scale(scale),
          base(is_first ? kLog2E : kLog2E * scale) {}

   private:
    static constexpr float kLog2E = 1.4426950408889634f;
};

// Of each row so far: the largest score, and the sum of the weights relative to it
template <int R>
struct Statistics {
    Vec largest[R], sum[R];

    Statistics() {
        for (int r = 0; r < R; ++r) {
            // not -inf: from that nothing can be subtracted
            largest[r] = broadcast(kLowest);
            sum[r] = Vec{};
        }
    }
};

// s [keys, rows], and the maximum of each row over it and `largest`
template <class Math, int R>
void scores(const float* qt, const Keys& x, int64_t first, int64_t keys, int64_t d,
            const Scaling& how, float* s, Vec (&largest)[R], Ahead& ahead) {
    constexpr int kWidth = R * kLanes;
    const int64_t steps = divide_up(d, Math::kPack);
    for_tiles<kTile>(keys, [&](auto tile, int64_t j) __attribute__((always_inline)) {
        constexpr int kT = decltype(tile)::value;
        ahead.fetch();
        Vec c[kT][R] = {};
        product_along_d<Math>(c, steps, x.k_along_d + (first + j) * steps, qt);
        if (how.is_first) {
#pragma GCC unroll 8
            for (int t = 0; t < kT; ++t) {
                const Vec bias = broadcast(x.bias == nullptr ? 0.f : x.bias[first + j + t]);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) c[t][r] = fma(c[t][r], broadcast(how.scale), bias);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < kT; ++t) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                largest[r] = max(largest[r], c[t][r]);
                store(s + (j + t) * kWidth + r * kLanes, c[t][r]);
            }
        }
    });
}

// Scores [keys, rows] become weights [keys / kPack, rows] in their place. Their sums are added to
// `sum`, by way of sums of few keys, which keeps the rounding errors small.
template <class Math, int R, class Exponential>
void exponentials(float* s, int64_t keys, const Exponential& exponential, const Vec (&largest)[R],
                  Vec (&sum)[R]) {
    constexpr int kWidth = R * kLanes, kPack = Math::kPack;
    constexpr int64_t kPart = 8;
    for (int64_t first = 0; first < keys; first += kPart) {
        Vec part[R] = {};
        for (int64_t j = first; j < smaller(first + kPart, keys); j += kPack) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const float* const at = s + j * kWidth + r * kLanes;
                const Vec p = exponential(load(at), largest[r]);
                float* const to = s + j / kPack * kWidth + r * kLanes;
                if constexpr (kPack == 1) {
                    part[r] += p;
                    store(to, p);
                } else {
                    Vec next = {};
                    if (j + 1 < keys) next = exponential(load(at + kWidth), largest[r]);
                    part[r] += p + next;
                    store(to, Math::pack(p, next));
                }
            }
        }
        for (int r = 0; r < R; ++r) sum[r] += part[r];
    }
}

// The relaxed exponential wants scores that are finite, which one with a bias need not be.
template <class Math, class Exponential, int R>
NASA_INLINE void weights(float* s, int64_t keys, const Scaling& how, const Vec (&largest)[R],
                         Vec (&sum)[R]) {
    if (how.is_first) {
        exponentials<Math, R>(s, keys, Exact(how.base), largest, sum);
    } else {
        exponentials<Math, R>(s, keys, Exponential(how.base), largest, sum);
    }
}

}  // namespace
}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
