// The rules of a joint attention: what each of its segments weighs in a row of O.
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
// The texts' own queries attend to the shared keys and to their own prompt, and to nothing else.
// A segment without keys has -inf and weighs 0, and what weighs 0 may hold NaN. Alpha 0 leaves the
// negative prompt out but for the denominator of vsf. Without shared keys all rules but vsf are
// softmax.cuh's subtract, bit for bit. `finish` is the one place where a row's segments meet.
#pragma once

#include "softmax.cuh"

namespace nasa {

struct Weights {
    float shared, pos, neg;
    float alpha;
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
    if (shared.rule == Rule::kVsf) {
        return {share(s, pos, neg), share(pos, s, neg), share(neg, s, pos), alpha};
    }
    const bool sum = shared.rule == Rule::kSum;
    Weights w{sum ? whole(s) : share(s, pos), sum ? whole(pos) : share(pos, s), 0.f, alpha};
    if (alpha == 0.f) return w;
    w.neg = sum || shared.rule == Rule::kNasaCross ? whole(neg) : share(neg, s);
    if (shared.rule == Rule::kNasa) w.shared = fmaf(-alpha, share(s, neg), w.shared);
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

// How a lane's two rows, r and r + 8 of a tile, end: what their sums and weights are.
struct Ending {
    bool joint;
    float inverse[2][2];  // of kPos and kNeg, by row
    float alpha[2];       // without shared keys
    Weights weights[2];   // beside them
};

// The two prompts' softmaxes of rows l and l + 8 have seen all keys. Two statistics of a prompt each
// are what a rule knows of a row.
__device__ __forceinline__ Ending end_rows(const ForwardParams& p, int b, int l, int h,
                                           const OnlineSoftmax& pos, const OnlineSoftmax& neg,
                                           const float (&inverse_pos)[2],
                                           const float (&inverse_neg)[2]) {
    Ending end{p.shared.o != nullptr, {}, {}, {}};
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

// O into z_pos, from column tiles of Z+ and Z- and what fetch(j, c) brings of O_s. Every forward
// kernel ends here; without kBoth there is no negative prompt.
template <bool kBoth, int kTiles, typename Fetch>
__device__ __forceinline__ void finish(float (&z_pos)[kTiles][4], const float (&z_neg)[kTiles][4],
                                       const Ending& end, Fetch fetch) {
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
    if (p.shared.o == nullptr) return true;
    if (side == kPos) return first < p.shared.first_text_neg;
    return first < p.shared.first_text_pos || min(first + count, p.l) > p.shared.first_text_neg;
}

}  // namespace nasa
