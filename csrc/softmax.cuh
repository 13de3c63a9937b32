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

// Scores are plain when only keys past n are absent and the scale is positive: then the scale stays
// out of the scores until the exponential takes it for nothing.
__device__ __forceinline__ bool is_plain(const Prompt& prompt, float scale) {
    return prompt.mask.type == MaskType::kNone && scale > 0.f;
}

// Apply scale and bias, or only cut off the keys from `valid` on. Returns the scale that is left.
template <int kTiles>
__device__ __forceinline__ float finish_scores(float (&s)[kTiles][4], bool plain, float scale,
                                               const float* bias, int valid) {
    const int c = threadIdx.x % 4 * 2;
    if (plain) {
        if (valid >= 8 * kTiles) return scale;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[j][i] = 8 * j + i % 2 < valid - c ? s[j][i] : -INFINITY;
            }
        }
        return scale;
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        const float2 key = *reinterpret_cast<const float2*>(bias + 8 * j + c);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float add = i % 2 == 0 ? key.x : key.y;
            // an absent key may hold NaN
            s[j][i] = add == -INFINITY ? -INFINITY : fmaf(s[j][i], scale, add);
        }
    }
    return 1.f;
}

struct OnlineSoftmax {
    float max[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.f, 0.f};  // of this lane's keys only

    // Replace scores by weights exp2(scale * s - max) and set `rescale` to what the weights of
    // earlier scores shrink by. For the first scores that is 0, and nothing came before.
    template <int kTiles>
    __device__ __forceinline__ void push(float (&s)[kTiles][4], float scale, float (&rescale)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = -INFINITY;
#pragma unroll
            for (int j = 0; j < kTiles; ++j) top = fmaxf(top, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
            top = fmaxf(max[r], quad_max(top) * scale);
            // no key yet: any finite maximum keeps exp2(-inf - max) at 0
            const float shift = top == -INFINITY ? 0.f : top;
            rescale[r] = ptx::exp2(max[r] - shift);
            max[r] = top;
            float partial = 0.f;
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
                s[j][2 * r] = ptx::exp2(fmaf(s[j][2 * r], scale, -shift));
                s[j][2 * r + 1] = ptx::exp2(fmaf(s[j][2 * r + 1], scale, -shift));
                partial += s[j][2 * r] + s[j][2 * r + 1];
            }
            sum[r] = sum[r] * rescale[r] + partial;
        }
    }

    // 1 / sum over all keys; 0 when there is none, so that a prompt without keys contributes 0
    __device__ __forceinline__ float inverse_sum(int r) const {
        const float total = quad_sum(sum[r]);
        return total > 0.f ? 1.f / total : total * 0.f;
    }

    // log2 of the sum of exp2(scores) over all keys, given inverse_sum(r); -inf without keys
    __device__ __forceinline__ float lse(int r, float inverse) const {
        return inverse == 0.f ? -INFINITY : max[r] - ptx::log2(inverse);
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

// alpha of one query row
__device__ __forceinline__ float alpha_of(const ForwardParams& p, int b, int l, int h) {
    if (p.alpha_map == nullptr) return p.alpha;
    return p.alpha_map[b * p.alpha_stride_b + l * p.alpha_stride_l + h * p.alpha_stride_h];
}

}  // namespace nasa
