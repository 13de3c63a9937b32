// The projected rule, lane by lane. Of p = Z+ and n = Z-, rows of length d:
//
//     t = <n,p> / <p,p>     D = n - t p     s = <D,D> / <p,p>     r = 1 / sqrt(1 + alpha^2 s)
//     O = r (p - alpha D)
//
// D is what the negative prompt has that the positive one has not; r keeps the length of p. A row
// with alpha 0 gives p, whatever n holds, and so does one with p = 0. Equal prompts give t = 1, D = 0
// and p, bit for bit.
//
// With G = dO and <p,D> = 0, to which D is made:
//
//     dr = <G,p> - alpha <G,D>     ds = -dr alpha^2 r^3 / 2     dt = alpha r <G,p>
//     dZ+ = r (1 + alpha t) G + (dt - 2 t ds) / <p,p> D - (t dt + 2 s ds) / <p,p> p
//     dZ- = -alpha r G + 2 ds / <p,p> D + dt / <p,p> p
//     dalpha = -r <G,D> - dr alpha s r^3
#pragma once

#include "rules.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

// Z of one segment alone, as a Combination gives it
template <int R>
struct Alone {
    const float* z;
    Vec factor[R];

    Alone(const Attended<R>& x, int segment) : z(x.z[segment]) {
        for (int r = 0; r < R; ++r) factor[r] = broadcast(1.f) / x.rows[segment][r].sum;
    }
    NASA_INLINE Vec operator()(int64_t column, int r) const {
        return load(z + column * (R * kLanes) + r * kLanes) * factor[r];
    }
};

// f(column, which of two sums), for every column
template <class F>
NASA_INLINE void for_columns(int64_t d, const F& f) {
    int64_t c = 0;
    for (; c + 1 < d; c += 2) f(c, 0), f(c + 1, 1);
    if (c < d) f(c, 0);
}

// <n,p>/<p,p> of a block of rows
template <int R>
struct Projection {
    Int exists[R], is_active[R];  // p is not 0; nor is alpha
    Vec inverse_pp[R], t[R];

    template <class P, class N>
    NASA_INLINE Projection(const P& p, const N& n, int64_t d, const Vec (&minus_alpha)[R]) {
        Vec pp[R] = {}, np[R] = {};
        for (int64_t c = 0; c < d; ++c) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec of_p = p(c, r);
                pp[r] = fma(of_p, of_p, pp[r]);
                np[r] = fma(n(c, r), of_p, np[r]);
            }
        }
        for (int r = 0; r < R; ++r) {
            exists[r] = pp[r] != 0;
            is_active[r] = exists[r] & (minus_alpha[r] != 0);
            inverse_pp[r] = where(exists[r], broadcast(1.f) / pp[r]);
            t[r] = where(exists[r], np[r] / pp[r]);
        }
    }
};

// r from s
NASA_INLINE Vec shrink(Vec minus_alpha, Vec s) {
    const Vec one = broadcast(1.f);
    return one / sqrt(fma(minus_alpha * minus_alpha, s, one));
}

// Rows of O. `difference` [d, rows] may lie where n is made of.
template <class T, int R, class P, class N>
void store_projection(const P& p, const N& n, const Vec (&minus_alpha)[R], int64_t d,
                      float* difference, T* to, int64_t stride, int64_t count) {
    constexpr int kWidth = R * kLanes;
    const Projection<R> x(p, n, d, minus_alpha);
    Vec dd[2][R] = {}, length[R];
    for_columns(d, [&](int64_t c, int part) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec of_d = where(x.is_active[r], fma(-x.t[r], p(c, r), n(c, r)));
            dd[part][r] = fma(of_d, of_d, dd[part][r]);
            store(difference + c * kWidth + r * kLanes, of_d);
        }
    });
    for (int r = 0; r < R; ++r) {
        length[r] = shrink(minus_alpha[r], (dd[0][r] + dd[1][r]) * x.inverse_pp[r]);
    }
    const auto o = [&](int64_t c, int r) __attribute__((always_inline)) {
        const Vec of_d = load(difference + c * kWidth + r * kLanes);
        return length[r] * fma(minus_alpha[r], of_d, p(c, r));
    };
    store_transposed<T, R>(o, d, to, stride, count);
}

template <class T, int R>
void store_projected(const Attended<R>& x, const Vec (&minus_alpha)[R], int64_t d, T* to,
                     int64_t stride, int64_t count) {
    if (x.keys[kShared] == nullptr && x.keys[kPos] != nullptr && x.keys[kNeg] != nullptr) {
        const Alone<R> p(x, kPos), n(x, kNeg);
        store_projection<T, R>(p, n, minus_alpha, d, x.z[kNeg], to, stride, count);
    } else {
        const Combination<R> p(Rule::kPositive, x, minus_alpha);
        const Combination<R> n(Rule::kNegative, x, minus_alpha);
        store_projection<T, R>(p, n, minus_alpha, d, x.z[kNeg], to, stride, count);
    }
}

// dZ+ and dZ- [d, rows], and dalpha, from G [d, rows]
template <int R>
void projected_gradients(const Combination<R>& p, const Combination<R>& n, const float* g,
                         const Vec (&minus_alpha)[R], int64_t d, float* dz_pos, float* dz_neg,
                         Vec (&dalpha)[R]) {
    constexpr int kWidth = R * kLanes;
    const Projection<R> x(p, n, d, minus_alpha);
    Vec gp[R] = {}, gd[R] = {}, dd[2][R] = {};
    for_columns(d, [&](int64_t c, int part) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const int64_t at = c * kWidth + r * kLanes;
            const Vec of_g = load(g + at), of_p = p(c, r);
            const Vec of_d = where(x.exists[r], fma(-x.t[r], of_p, n(c, r)));
            dd[part][r] = fma(of_d, of_d, dd[part][r]);
            gp[r] = fma(of_g, of_p, gp[r]);
            gd[r] = fma(of_g, of_d, gd[r]);
            store(dz_neg + at, of_d);
        }
    });
    // factors of G, D and p
    struct Factors {
        Vec g, d, p;
    } pos[R], neg[R];
    for (int r = 0; r < R; ++r) {
        const Vec one = broadcast(1.f), alpha = -minus_alpha[r], t = x.t[r];
        const Vec s = (dd[0][r] + dd[1][r]) * x.inverse_pp[r], length = shrink(minus_alpha[r], s);
        const Vec cube = length * length * length;
        const Vec dr = gp[r] - alpha * gd[r], dt = alpha * length * gp[r];
        const Vec twice_ds = -(dr * alpha * alpha * cube);
        dalpha[r] = where(x.exists[r], -(length * gd[r]) - dr * alpha * s * cube);
        const auto active = [&](Vec y) { return where(x.is_active[r], y); };
        pos[r].g = active(length * fma(alpha, t, one)) + where(~x.is_active[r], one);
        pos[r].d = active((dt - t * twice_ds) * x.inverse_pp[r]);
        pos[r].p = active(-(t * dt + s * twice_ds) * x.inverse_pp[r]);
        neg[r].g = active(-(alpha * length));
        neg[r].d = active(twice_ds * x.inverse_pp[r]);
        neg[r].p = active(dt * x.inverse_pp[r]);
    }
    for (int64_t c = 0; c < d; ++c) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const int64_t at = c * kWidth + r * kLanes;
            const Vec of_g = load(g + at), of_p = p(c, r);
            const Vec of_d = where(x.is_active[r], load(dz_neg + at));
            const auto sum = [&](const Factors& f) __attribute__((always_inline)) {
                return fma(f.g, of_g, fma(f.d, of_d, f.p * of_p));
            };
            store(dz_pos + at, sum(pos[r]));
            store(dz_neg + at, sum(neg[r]));
        }
    }
}

}  // namespace
}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
