// The rules: what becomes of Z+ and Z- in a row of O, and of the segments of a joint attention.
//
//     O = c_s O_s + c_p O_p - alpha c_n O_n
//
// O_s, O_p, O_n are the softmaxes over the shared keys, the positive and the negative prompt, each
// normalised on its own, and s, p, n their log-sum-exps. With L+ = lse(s, p), L- = lse(s, n) and
// L = lse(s, p, n):
//
//     rule          c_s                              c_p           c_n
//     nasa          e^(s - L+) - alpha e^(s - L-)    e^(p - L+)    e^(n - L-)
//     nasa-text     e^(s - L+)                       e^(p - L+)    e^(n - L-)
//     nasa-cross    e^(s - L+)                       e^(p - L+)    1
//     vsf           e^(s - L)                        e^(p - L)     e^(n - L)
//     sum           1                                1             1
//
// and, of the softmaxes Z+ over [shared; positive] and Z- over [shared; negative], with or without
// shared keys,
//
//     projected     O = r (Z+ - alpha D)             D = Z- - t Z+         t = <Z-, Z+> / <Z+, Z+>
//                   r = |Z+| / |Z+ - alpha D|        sums over d, of each head and row
//
// The texts' own queries attend to the shared keys and to their own prompt, and to nothing else.
// A segment without keys has -inf and weighs 0, and what weighs 0 may hold NaN. Alpha 0 leaves the
// negative prompt out but for the denominator of vsf. Without shared keys all rules but vsf and
// projected are softmax.cuh's subtract, bit for bit. `finish` is the one place where a row's segments
// meet.
#pragma once

#include "softmax.cuh"

namespace nasa {

struct Weights {
    float shared, pos, neg;
    float alpha;
    float shared_neg = 0.f;  // of O_s in Z-, where the two are projected
    bool projects = false;
};

// 2^x / (2^x + 2^y + 2^z)
__device__ __forceinline__ float share(float x, float y, float z = -INFINITY) {
    if (x == -INFINITY) return 0.f;
    const float top = fmaxf(x, fmaxf(y, z));
    const float weight = ptx::exp2(x - top);
    return weight / (weight + ptx::exp2(y - top) + ptx::exp2(z - top));
}

// What a segment weighs under a softmax of its own
__device__ __forceinline__ float whole(float lse) { return lse == -INFINITY ? 0.f : 1.f; }

// The weights of query row l, from the log-sum-exps of its prompts in base 2.
__device__ __forceinline__ Weights weigh(const ForwardParams& p, int b, int l, int h, float alpha,
                                         float pos, float neg) {
    const Shared& shared = p.shared;
    const float s =
        kLog2E *
        shared.lse[b * shared.lse_stride_b + h * shared.lse_stride_h + l * shared.lse_stride_l];
    if (l >= shared.first_text_neg) return {share(s, neg), 0.f, share(neg, s), -1.f};
    if (l >= shared.first_text_pos) return {share(s, pos), share(pos, s), 0.f, 0.f};
    if (p.rule == Rule::kVsf) {
        return {share(s, pos, neg), share(pos, s, neg), share(neg, s, pos), alpha};
    }
    const bool sum = p.rule == Rule::kSum;
    Weights w{sum ? whole(s) : share(s, pos), sum ? whole(pos) : share(pos, s), 0.f, alpha};
    if (alpha == 0.f) return w;
    w.neg = sum || p.rule == Rule::kNasaCross ? whole(neg) : share(neg, s);
    if (p.rule == Rule::kNasa) w.shared = fmaf(-alpha, share(s, neg), w.shared);
    if (p.rule == Rule::kProjected) {
        w.shared_neg = share(s, neg);
        w.projects = true;
    }
    return w;
}

__device__ __forceinline__ float weighted(float weight, float x) {
    return weight == 0.f ? 0.f : __fmul_rn(weight, x);
}

// The same into z_pos; fetch(j, c) is what O_s holds where z_pos[j] belongs
template <bool kBoth, int kTiles, typename Fetch>
__device__ __forceinline__ void merge(float (&z_pos)[kTiles][4], const float (&inverse_pos)[2],
                                      const float (&z_neg)[kTiles][4],
                                      const float (&inverse_neg)[2], const Weights (&w)[2],
                                      Fetch fetch) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        float shared[4];
        fetch(j, shared);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = i / 2;
            z_pos[j][i] = weighted(w[r].pos, __fmul_rn(z_pos[j][i], inverse_pos[r]));
            if constexpr (kBoth) {
                const float neg = weighted(w[r].neg, __fmul_rn(z_neg[j][i], inverse_neg[r]));
                z_pos[j][i] = fmaf(-w[r].alpha, neg, z_pos[j][i]);
            }
            if (w[r].shared != 0.f) z_pos[j][i] = fmaf(w[r].shared, shared[i], z_pos[j][i]);
        }
    }
}

// Z+ into z_pos and Z- into z_neg, where they are to be projected
template <int kTiles, typename Fetch>
__device__ __forceinline__ void merge_sides(float (&z_pos)[kTiles][4],
                                            const float (&inverse_pos)[2],
                                            float (&z_neg)[kTiles][4],
                                            const float (&inverse_neg)[2], const Weights (&w)[2],
                                            Fetch fetch) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        float shared[4];
        fetch(j, shared);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = i / 2;
            z_pos[j][i] = weighted(w[r].pos, __fmul_rn(z_pos[j][i], inverse_pos[r]));
            z_neg[j][i] = weighted(w[r].neg, __fmul_rn(z_neg[j][i], inverse_neg[r]));
            if (w[r].shared != 0.f) z_pos[j][i] = fmaf(w[r].shared, shared[i], z_pos[j][i]);
            if (w[r].shared_neg != 0.f) z_neg[j][i] = fmaf(w[r].shared_neg, shared[i], z_neg[j][i]);
        }
    }
}

// <Z+, Z+>, <Z-, Z+> and <Z-, Z-> of the columns that a lane has, by row. Equal prompts have equal
// sums, bit for bit: the three are added up alike.
struct RowSums {
    float pos[2] = {0.f, 0.f}, mixed[2] = {0.f, 0.f}, neg[2] = {0.f, 0.f};

    // where warps share the columns of a row each adds up its own kGroup first; so does one warp
    template <int kTiles, int kGroup = long_columns(8 * kTiles) / 8>
    __device__ __forceinline__ static RowSums of(const float (&z_pos)[kTiles][4],
                                                 const float (&z_neg)[kTiles][4]) {
        RowSums all;
#pragma unroll
        for (int first = 0; first < kTiles; first += kGroup) {
            RowSums sums;
#pragma unroll
            for (int j = first; j < first + kGroup; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int r = i / 2;
                    sums.pos[r] = fmaf(z_pos[j][i], z_pos[j][i], sums.pos[r]);
                    sums.mixed[r] = fmaf(z_neg[j][i], z_pos[j][i], sums.mixed[r]);
                    sums.neg[r] = fmaf(z_neg[j][i], z_neg[j][i], sums.neg[r]);
                }
            }
            if (first == 0) {
                all = sums;
            } else {
                all.add(sums);
            }
        }
        return all;
    }

    __device__ __forceinline__ void add(const RowSums& other) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            pos[r] += other.pos[r];
            mixed[r] += other.mixed[r];
            neg[r] += other.neg[r];
        }
    }
};

// a / b, given 1 / b but for its last bits; exactly 1 where a is b
__device__ __forceinline__ float quotient(float a, float b, float inverse) {
    const float near = __fmul_rn(a, inverse);
    return fmaf(fmaf(-near, b, a), inverse, near);
}

// O = pos z+ - neg z- of a row
struct Mix {
    float pos, neg;
};

// The projection of a row whose Z+ is inverse_pos z+, and Z- inverse_neg z-, from the sums of z+ and
// z- over all columns. Where D is 0, alpha is, or Z+ is, O is Z+.
__device__ __forceinline__ Mix project(float pos, float mixed, float neg, float inverse_pos,
                                       float inverse_neg, float alpha) {
    constexpr float kSmallest = 1.17549435e-38f;  // that has an inverse
    const float inverse = ptx::reciprocal(pos);
    const float t = quotient(mixed, pos, inverse);
    const float rest = fmaf(-t, t, quotient(neg, pos, inverse));  // <D, D> / <Z+, Z+>
    const float a = alpha * inverse_neg;
    // |z+| / |Z+ - alpha D|
    const float length =
        ptx::in_register(ptx::inverse_root(fmaf(a * a, rest, inverse_pos * inverse_pos)));
    const float r = inverse_pos * length;
    if (alpha == 0.f || pos < kSmallest || rest <= 0.f) return {inverse_pos, 0.f};
    return {r * fmaf(a, t, inverse_pos), r * a};
}

// O into z_pos. join(sums) adds what other warps have of the same rows.
template <int kTiles, typename Join>
__device__ __forceinline__ void project_rows(float (&z_pos)[kTiles][4],
                                             const float (&inverse_pos)[2],
                                             const float (&z_neg)[kTiles][4],
                                             const float (&inverse_neg)[2],
                                             const float (&alpha)[2], const bool (&projects)[2],
                                             Join join) {
    RowSums sums = RowSums::of(z_pos, z_neg);
    join(sums);
    // the even lanes of a quad see to row r, the odd ones to row r + 8
    const bool odd = threadIdx.x % 2 != 0;
    const auto mine = [&](const auto (&x)[2]) { return odd ? x[1] : x[0]; };
    const auto sum = [&](const float (&x)[2]) {
        const float pair = mine(x) + __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
        return pair + __shfl_xor_sync(~0u, pair, 2);
    };
    Mix own = project(sum(sums.pos), sum(sums.mixed), sum(sums.neg), mine(inverse_pos),
                      mine(inverse_neg), mine(alpha));
    if (!mine(projects)) own = {1.f, mine(alpha)};
    const Mix other{__shfl_xor_sync(~0u, own.pos, 1), __shfl_xor_sync(~0u, own.neg, 1)};
    const Mix mix[2] = {odd ? other : own, odd ? own : other};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = i / 2;
            z_pos[j][i] = __fmul_rn(mix[r].pos, z_pos[j][i]);
            // what does not count may be NaN
            if (mix[r].neg != 0.f) z_pos[j][i] = fmaf(-mix[r].neg, z_neg[j][i], z_pos[j][i]);
        }
    }
}

// How a lane's two rows, r and r + 8 of a tile, end: what their sums and weights are.
struct Ending {
    bool joint, projected;
    float inverse[2][2];  // of kPos and kNeg, by row
    float alpha[2];
    Weights weights[2];  // beside shared keys
};

// The two prompts' softmaxes of rows l and l + 8 have seen all keys. Two statistics of a prompt each
// are what a rule knows of a row.
__device__ __forceinline__ Ending end_rows(const ForwardParams& p, int b, int l, int h,
                                           const OnlineSoftmax& pos, const OnlineSoftmax& neg,
                                           const float (&inverse_pos)[2],
                                           const float (&inverse_neg)[2]) {
    Ending end{is_joint(p), p.rule == Rule::kProjected, {}, {}, {}};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        end.inverse[kPos][r] = inverse_pos[r];
        end.inverse[kNeg][r] = inverse_neg[r];
        const int row = l + 8 * r;
        if (row >= p.l) continue;
        end.alpha[r] = alpha_of(p, b, row, h);
        if (end.joint) {
            end.weights[r] = weigh(p, b, row, h, end.alpha[r], pos.lse(r, inverse_pos[r]),
                                   neg.lse(r, inverse_neg[r]));
        }
    }
    return end;
}

// Where one warp has all columns of its rows, or a rule that asks for no sum over them
struct NothingToJoin {
    __device__ __forceinline__ void operator()(RowSums&) const {}
};

// O into z_pos, from column tiles of Z+ and Z- and what fetch(j, c) brings of O_s. Every forward
// kernel ends here; without kBoth there is no negative prompt, and with kSome it is given a few of a
// row's columns, which no sum over d is made of.
template <bool kBoth, bool kSome = false, int kTiles, typename Fetch, typename Join = NothingToJoin>
__device__ __forceinline__ void finish(float (&z_pos)[kTiles][4], float (&z_neg)[kTiles][4],
                                       const Ending& end, Fetch fetch, Join join = {}) {
    if constexpr (kBoth && !kSome) {
        if (end.projected) {
            if (!end.joint) {
                project_rows(z_pos, end.inverse[kPos], z_neg, end.inverse[kNeg], end.alpha,
                             {true, true}, join);
            } else {
                const Weights(&w)[2] = end.weights;
                merge_sides(z_pos, end.inverse[kPos], z_neg, end.inverse[kNeg], w, fetch);
                project_rows(z_pos, {1.f, 1.f}, z_neg, {1.f, 1.f}, {w[0].alpha, w[1].alpha},
                             {w[0].projects, w[1].projects}, join);
            }
            return;
        }
    }
    if (end.joint) {
        merge<kBoth>(z_pos, end.inverse[kPos], z_neg, end.inverse[kNeg], end.weights, fetch);
    } else if constexpr (kBoth) {
        subtract(z_pos, end.inverse[kPos], z_neg, end.inverse[kNeg], end.alpha);
    } else {
        normalise(z_pos, end.inverse[kPos]);
    }
}

// Whether any of the rows [first, first + count) attends to prompt `side`
__device__ __forceinline__ bool attends(const ForwardParams& p, int side, int first, int count) {
    if (!is_joint(p)) return true;
    if (side == kPos) return first < p.shared.first_text_neg;
    return first < p.shared.first_text_pos || min(first + count, p.l) > p.shared.first_text_neg;
}

}  // namespace nasa
