// Z of a block of rows over one segment of any number of keys, which pass by in blocks:
//
//     m' = max(m, rowmax(S))    Z = Z exp2(m - m') + V^T exp2(S - m')    (not yet over the sum)
#pragma once

#include "forward_short.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

template <class Math, int R>
void attend_long(const float* qt, const Keys& x, int64_t d, const Scaling& how, float* s,
                 Statistics<R>& rows, float* z, Ahead& ahead) {
    const Exact exponential(how.base);
    for (int64_t first = 0; first < x.n; first += kBlockKeys) {
        const int64_t keys = smaller(kBlockKeys, x.n - first);
        Vec before[R], rescale[R], sum[R] = {};
        for (int r = 0; r < R; ++r) before[r] = rows.largest[r];
        scores<Math, R>(qt, x, first, keys, d, how, s, rows.largest, ahead);
        weights<Math, typename Math::Exponential>(s, keys, how, rows.largest, sum);
        for (int r = 0; r < R; ++r) {
            rescale[r] = exponential(before[r], rows.largest[r]);
            rows.sum[r] = fma(rows.sum[r], rescale[r], sum[r]);
        }
        const float* const v = x.v_along_n + first / Math::kPack * d;
        if (first == 0) {
            values<true, Math, R>(s, v, keys, d, rescale, z, ahead);
        } else {
            values<false, Math, R>(s, v, keys, d, rescale, z, ahead);
        }
    }
}

}  // namespace
}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
