// The rules, lane by lane: coefficients of O_shared, O_pos, O_neg, their sum, and the gradients of
// the coefficients. nasa_kernels/_joint/rules.py has the same in PyTorch, joint_attention.py the
// table.
#pragma once

#include "softmax.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

// What one panel of rows found in a segment: a sum of weights relative to 2^power. No key: 0.
struct Found {
    Vec power, sum;
};

template <int R>
NASA_INLINE Found found(const Statistics<R>& rows, const Scaling& how, int r) {
    return {rows.largest[r] * how.base, rows.sum[r]};
}

// e^(x - L) of each x, L the log-sum-exp of all N; 0 where all are -inf
template <int N>
struct Shares {
    Vec of[N];
};
template <int N>
NASA_INLINE Shares<N> shares(const Found (&x)[N]) {
    const Exact exponential(1.f);
    Vec highest = x[0].power;
    for (int i = 1; i < N; ++i) highest = max(highest, x[i].power);
    Shares<N> w;
    Vec total = {};
    for (int i = 0; i < N; ++i) {
        w.of[i] = x[i].sum * exponential(x[i].power, highest);
        total += w.of[i];
    }
    total = total == 0 ? broadcast(1.f) : total;
    for (int i = 0; i < N; ++i) w.of[i] /= total;
    return w;
}

// By segment
struct Three {
    Vec of[kSegments];
};

// `minus_alpha` is -1 times alpha.
NASA_INLINE Three coefficients(Rule rule, const Found (&x)[kSegments], Vec minus_alpha) {
    const Vec zero = {}, one = broadcast(1.f);
    if (rule == Rule::kSum) return {{one, one, minus_alpha}};
    if (rule == Rule::kVsf) {
        const Shares<3> w = shares(x);
        return {{w.of[0], w.of[1], minus_alpha * w.of[2]}};
    }
    const Shares<2> a = shares({x[kShared], x[kPos]}), b = shares({x[kShared], x[kNeg]});
    switch (rule) {
        case Rule::kNasa:
            return {{a.of[0] + minus_alpha * b.of[0], a.of[1], minus_alpha * b.of[1]}};
        case Rule::kNasaText: return {{a.of[0], a.of[1], minus_alpha * b.of[1]}};
        case Rule::kNasaCross: return {{a.of[0], a.of[1], minus_alpha}};
        case Rule::kNegative: return {{b.of[0], zero, b.of[1]}};
        default: return {{a.of[0], a.of[1], zero}};
    }
}

// What a block of rows found in all segments. A segment without a key: null.
template <int R>
struct Attended {
    const Keys* keys[kSegments] = {};
    float* z[kSegments];  // [d, rows], not yet over the row sums
    Found rows[kSegments][R];
};

// The results of the segments with their factors, and their sum. Products, then sums: equal
// prompts cancel to 0 at alpha 1.
template <int R>
struct Combination {
    int count = 0;
    const float* z[kSegments];
    Vec factor[kSegments][R];

    // of those segments that a rule has a coefficient for
    Combination(Rule rule, const Attended<R>& x, const Vec (&minus_alpha)[R]) {
        Three c[R];
        for (int r = 0; r < R; ++r) {
            c[r] = coefficients(rule, {x.rows[0][r], x.rows[1][r], x.rows[2][r]}, minus_alpha[r]);
        }
        for (int i = 0; i < kSegments; ++i) {
            if (x.keys[i] == nullptr || (rule == Rule::kPositive && i == kNeg) ||
                (rule == Rule::kNegative && i == kPos)) {
                continue;
            }
            z[count] = x.z[i];
            for (int r = 0; r < R; ++r) factor[count][r] = c[r].of[i] / x.rows[i][r].sum;
            ++count;
        }
    }
    NASA_INLINE Vec operator()(int64_t column, int r) const {
        const int64_t at = column * (R * kLanes) + r * kLanes;
        Vec o = {};
        if (count > 0) o = load(z[0] + at) * factor[0][r];
        if (count > 1) o += load(z[1] + at) * factor[1][r];
        if (count > 2) o += load(z[2] + at) * factor[2][r];
        return o;
    }
};

struct RuleGradients {
    Vec of_lse[kSegments], of_alpha;
};

// From u, the gradients of the coefficients. Of a softmax of two, a_s + a_p = 1, the derivative is
// d a_s / d s = a_s a_p = -d a_s / d p.
NASA_INLINE RuleGradients gradients(Rule rule, const Found (&x)[kSegments], Vec minus_alpha,
                                    const Three& u) {
    const Vec u_s = u.of[kShared], u_p = u.of[kPos], u_n = u.of[kNeg], zero = {};
    if (rule == Rule::kSum) return {{zero, zero, zero}, -u_n};
    if (rule == Rule::kVsf) {
        const Shares<3> w = shares(x);
        const Vec mean = w.of[0] * u_s + w.of[1] * u_p + minus_alpha * w.of[2] * u_n;
        return {{w.of[0] * (u_s - mean), w.of[1] * (u_p - mean),
                 w.of[2] * (minus_alpha * u_n - mean)},
                -(w.of[2] * u_n)};
    }
    const Shares<2> a = shares({x[kShared], x[kPos]}), b = shares({x[kShared], x[kNeg]});
    // derivatives of O by a_s, by b_s, by alpha
    Vec by_a = u_s - u_p, by_b = zero, by_alpha = zero;
    switch (rule) {
        case Rule::kNasa:
            by_b = minus_alpha * (u_s - u_n);
            by_alpha = -(b.of[0] * u_s + b.of[1] * u_n);
            break;
        case Rule::kNasaText:
            by_b = -(minus_alpha * u_n);
            by_alpha = -(b.of[1] * u_n);
            break;
        case Rule::kNasaCross: by_alpha = -u_n; break;
        case Rule::kNegative: by_a = zero, by_b = u_s - u_n; break;
        default: break;
    }
    const Vec pos = a.of[0] * a.of[1] * by_a, neg = b.of[0] * b.of[1] * by_b;
    return {{pos + neg, -pos, -neg}, by_alpha};
}

}  // namespace
}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
