// Z of a block of rows over one segment of up to kBlockKeys keys: all of its scores at hand.
//
//     S = K Q^T    m = rowmax(S)    P = exp2(S - m)    Z = V^T P    (not yet over rowsum(P))
#pragma once

#include "softmax.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

// z [d, rows] = V^T P, or where some keys went before, z * rescale + V^T P
template <bool kIsFirst, class Math, int R>
void values(const float* p, const float* v, int64_t keys, int64_t d, const Vec (&rescale)[R],
            float* z, Ahead& ahead) {
    constexpr int kWidth = R * kLanes;
    for_tiles<kTile>(d, [&](auto tile, int64_t column) __attribute__((always_inline)) {
        constexpr int kT = decltype(tile)::value;
        ahead.fetch();
        Vec c[kT][R] = {};
        product<Math>(c, divide_up(keys, Math::kPack), v + column, 1, d, p, kWidth);
        float* const to = z + column * kWidth;
#pragma GCC unroll 8
        for (int t = 0; t < kT; ++t) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                float* const at = to + t * kWidth + r * kLanes;
                store(at, kIsFirst ? c[t][r] : fma(load(at), rescale[r], c[t][r]));
            }
        }
    });
}

template <class Math, int R>
void attend_short(const float* qt, const Keys& x, int64_t d, const Scaling& how, float* s,
                  Statistics<R>& rows, float* z, Ahead& ahead) {
    scores<Math, R>(qt, x, 0, x.n, d, how, s, rows.largest, ahead);
    weights<Math, typename Math::Exponential>(s, x.n, how, rows.largest, rows.sum);
    values<true, Math, R>(s, x.v_along_n, x.n, d, rows.sum, z, ahead);
}

}  // namespace
}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
