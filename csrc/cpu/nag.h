// Normalised attention guidance, lane by lane. nasa_kernels/nag.py has the formula:
//
//     G = s Z+ - (s - 1) Z-     O = a G min(1, tau |Z+| / |G|) + (1 - a) Z+
//
// |.| is the norm of a row over all of its heads. A row where a is 0 gives Z+, whatever Z- holds.
#pragma once

#include "rules.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

// Z+ and G of a block of rows [h, d, rows], and the sums that their norms are made of
class GuidedRows {
    int64_t of_head_;
    float *z_, *g_, *sums_;

   public:
    GuidedRows(const Call& p, Arena& arena) : of_head_(p.d * kRows) {
        z_ = arena.take<float>(p.h * of_head_);
        g_ = arena.take<float>(p.h * of_head_);
        sums_ = arena.take<float>(p.h * 2 * kRows);
    }
    float* z(int64_t h) const { return z_ + h * of_head_; }
    float* g(int64_t h) const { return g_ + h * of_head_; }
    // [2, rows]: of Z+, of G
    float* sums(int64_t h) const { return sums_ + h * 2 * kRows; }
};

NASA_INLINE Vec term(int norm, Vec x) { return norm == 1 ? magnitude(x) : x * x; }

// Z+ and G of one head, in the place of what they are made of
template <int R>
void guide(const Call& p, const Attended<R>& x, int64_t h, const GuidedRows& rows) {
    const Vec none[R] = {}, scale = broadcast(p.nag.scale), rest = broadcast(1.f - p.nag.scale);
    const Combination<R> pos(Rule::kPositive, x, none), neg(Rule::kNegative, x, none);
    const int norm = p.nag.norm;
    Vec of_z[R] = {}, of_g[R] = {};
    for (int64_t c = 0; c < p.d; ++c) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const int64_t at = c * (R * kLanes) + r * kLanes;
            const Vec z = pos(c, r), g = scale * z + rest * neg(c, r);
            of_z[r] += term(norm, z);
            of_g[r] += term(norm, g);
            store(rows.z(h) + at, z);
            store(rows.g(h) + at, g);
        }
    }
    for (int r = 0; r < R; ++r) {
        store(rows.sums(h) + r * kLanes, of_z[r]);
        store(rows.sums(h) + kRows + r * kLanes, of_g[r]);
    }
}

// O of one head, whose rows begin at `to`
template <class T, int R>
void blend(const Call& p, const Vec (&minus_alpha)[R], int64_t h, const GuidedRows& rows, T* to,
           int64_t count) {
    Vec of_z[R] = {}, of_g[R] = {}, factor_z[R], factor_g[R];
    Int is_guided[R];
    for (int64_t i = 0; i < p.h; ++i) {
        for (int r = 0; r < R; ++r) {
            of_z[r] += load(rows.sums(i) + r * kLanes);
            of_g[r] += load(rows.sums(i) + kRows + r * kLanes);
        }
    }
    const Vec one = broadcast(1.f);
    for (int r = 0; r < R; ++r) {
        const Vec share = -minus_alpha[r];
        const Vec norm = p.nag.norm == 1 ? of_g[r] : sqrt(of_g[r]);
        const Vec limit = broadcast(p.nag.tau) * (p.nag.norm == 1 ? of_z[r] : sqrt(of_z[r]));
        is_guided[r] = share != 0;
        factor_g[r] = norm > limit ? share * (limit / norm) : share;
        factor_z[r] = one - share;
    }
    const float *const z = rows.z(h), *const g = rows.g(h);
    const auto o = [&](int64_t column, int r) __attribute__((always_inline)) {
        const int64_t at = column * (R * kLanes) + r * kLanes;
        const Vec guided = where(is_guided[r], load(g + at) * factor_g[r]);
        return fma(load(z + at), factor_z[r], guided);
    };
    store_transposed<T, R>(o, p.d, to, p.h * p.d, count);
}

}  // namespace
}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
