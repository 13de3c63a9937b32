// The softmax of a warp's scores: 16 query rows against 8 * kTiles keys.
//
// Scores lie as mma.m16n8k16 leaves them. With r = lane / 4 and c = 2 * (lane % 4):
//     s[j][0], s[j][1]   row r,     keys 8j + c, 8j + c + 1
//     s[j][2], s[j][3]   row r + 8, the same keys
// A row belongs to the four lanes of a quad. Index 0 or 1 of a pair below is row r or r + 8.
#pragma once

#include "tile.cuh"

namespace nasa {

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// The bias of one key in base 2: 0 without a mask, -inf for a key that is absent.
__device__ __forceinline__ float key_bias(const Mask& mask, int b, int key, int n) {
    if (key >= n) return -INFINITY;
    const int64_t i = b * mask.stride_b + key * mask.stride_n;
    switch (mask.type) {
        case MaskType::kNone: return 0.f;
        case MaskType::kBool: return static_cast<const uint8_t*>(mask.data)[i] ? 0.f : -INFINITY;
        case MaskType::kFloat: return static_cast<const float*>(mask.data)[i] * kLog2E;
        case MaskType::kHalf:
            return __half2float(static_cast<const __half*>(mask.data)[i]) * kLog2E;
        case MaskType::kBfloat16:
            return __bfloat162float(static_cast<const __nv_bfloat16*>(mask.data)[i]) * kLog2E;
    }
    return 0.f;
}

// Keys from `valid` on are absent: their scores become -inf. All but the last column tile are full
// where a prompt fills the tile of keys that it is given.
template <int kTiles>
__device__ __forceinline__ void cut_off(float (&s)[kTiles][4], int valid) {
    const int left = valid - threadIdx.x % 4 * 2;
    const auto cut = [&](int j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] = 8 * j + i % 2 < left ? s[j][i] : -INFINITY;
    };
    if (valid < 8 * (kTiles - 1)) {
#pragma unroll
        for (int j = 0; j < kTiles - 1; ++j) cut(j);
    }
    cut(kTiles - 1);
}

// Apply scale and bias; a key whose bias is -inf is absent.
template <int kTiles>
__device__ __forceinline__ void add_bias(float (&s)[kTiles][4], float scale, const float* bias) {
    const int c = threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        const float2 key = *reinterpret_cast<const float2*>(bias + 8 * j + c);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float add = i % 2 == 0 ? key.x : key.y;
            // an absent key may hold NaN
            const float sum = ptx::in_register(fmaf(s[j][i], scale, add));
            s[j][i] = add == -INFINITY ? -INFINITY : sum;
        }
    }
}

// Make scores ready for the softmax. Returns the scale that is left to apply. Where kPlain does not
// speak for the whole call, the numbers of a plain prompt are the same, by way of the biases.
template <bool kPlain, int kTiles>
__device__ __forceinline__ float finish_scores(float (&s)[kTiles][4], const Prompt& prompt,
                                               float scale, const float* bias, int first) {
    if constexpr (kPlain) {
        cut_off(s, prompt.n - first);
        return scale;
    } else {
        const bool plain = is_plain(prompt, scale);
        add_bias(s, plain ? 1.f : scale, bias);
        return plain ? scale : 1.f;
    }
}

// The same where that is cheaper to decide for each tile of keys
template <int kTiles>
__device__ __forceinline__ float finish_any_scores(float (&s)[kTiles][4], const Prompt& prompt,
                                                   float scale, const float* bias, int first) {
    if (!is_plain(prompt, scale)) {
        add_bias(s, scale, bias);
        return 1.f;
    }
    if (prompt.n - first < 8 * kTiles) cut_off(s, prompt.n - first);
    return scale;
}

struct OnlineSoftmax {
    float max[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.f, 0.f};  // of this lane's keys only

    // Replace scores by weights exp2(scale * s - max) and set `rescale` to what the weights of
    // earlier scores shrink by. For the first scores that is 0, and nothing came before.
    template <int kTiles>
    __device__ __forceinline__ void push(float (&s)[kTiles][4], float scale, float (&rescale)[2]) {
        weigh<false>(s, scale, rescale);
    }

    // All scores there are, in one go: the same numbers with nothing to shrink
    template <int kTiles>
    __device__ __forceinline__ void push_all(float (&s)[kTiles][4], float scale) {
        float nothing[2];
        weigh<true>(s, scale, nothing);
    }

    // 1 / sum over all keys; 0 when there is none, so that a prompt without keys contributes 0
    __device__ __forceinline__ float inverse_sum(int r) const {
        const float total = quad_sum(sum[r]);
        return total > 0.f ? ptx::reciprocal(total) : total * 0.f;
    }

    // log2 of the sum of exp2(scores) over all keys, given inverse_sum(r); -inf without keys
    __device__ __forceinline__ float lse(int r, float inverse) const {
        return inverse == 0.f ? -INFINITY : max[r] - ptx::log2(inverse);
    }

private:
    template <bool kAll, int kTiles>
    __device__ __forceinline__ void weigh(float (&s)[kTiles][4], float scale,
                                          float (&rescale)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = -INFINITY;
#pragma unroll
            for (int j = 0; j < kTiles; ++j) top = fmaxf(top, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
            top = quad_max(top) * scale;
            if (!kAll) top = fmaxf(max[r], top);
            // no key yet: any finite maximum keeps exp2(-inf - max) at 0
            const float shift = top == -INFINITY ? 0.f : top;
            if (!kAll) rescale[r] = ptx::exp2(max[r] - shift);
            max[r] = top;
            float partial = 0.f;
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
                s[j][2 * r] = ptx::exp2(fmaf(s[j][2 * r], scale, -shift));
                s[j][2 * r + 1] = ptx::exp2(fmaf(s[j][2 * r + 1], scale, -shift));
                partial += s[j][2 * r] + s[j][2 * r + 1];
            }
            sum[r] = kAll ? partial : sum[r] * rescale[r] + partial;
        }
    }
};

// O = Z+ - alpha * Z-, into z_pos. Each side is normalised and rounded alike before they meet, so
// equal prompts at alpha 1 leave exactly 0.
template <int kTiles>
__device__ __forceinline__ void subtract(float (&z_pos)[kTiles][4], const float (&inverse_pos)[2],
                                         const float (&z_neg)[kTiles][4],
                                         const float (&inverse_neg)[2], const float (&alpha)[2]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float pos = __fmul_rn(z_pos[j][i], inverse_pos[i / 2]);
            const float neg = __fmul_rn(z_neg[j][i], inverse_neg[i / 2]);
            z_pos[j][i] = fmaf(-alpha[i / 2], neg, pos);
        }
    }
}

// O = Z+, where there is no negative prompt
template <int kTiles>
__device__ __forceinline__ void normalise(float (&z)[kTiles][4], const float (&inverse)[2]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) z[j][i] = __fmul_rn(z[j][i], inverse[i / 2]);
    }
}

// alpha of one query row
__device__ __forceinline__ float alpha_of(const ForwardParams& p, int b, int l, int h) {
    if (p.alpha_map == nullptr) return p.alpha;
    return p.alpha_map[b * p.alpha_stride_b + l * p.alpha_stride_l + h * p.alpha_stride_h];
}

}  // namespace nasa
