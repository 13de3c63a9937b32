// What the kernels take and the functions that launch them. No Torch, no CUDA C++ here:
// bindings.cpp and the kernels meet in this file.
//
//     O = softmax(Q K+^T * scale + bias+) V+  -  alpha * softmax(Q K-^T * scale + bias-) V-
//
// or what another rule makes of the two (csrc/rules.cuh). Names: b batch, h heads, l queries, n text tokens, d head_dim. Strides are in elements, and d is
// contiguous; a stride of 0 reads one row for many. The kernels work in base 2: `scale` is the
// softmax scale times log2(e), and a bias is multiplied by log2(e) where it is read.
//
// K and V may have fewer heads than Q, h_kv: of the h / h_kv heads of a group all look at the same.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace nasa {

constexpr int kMaxHeadDim = 256;
constexpr float kLog2E = 1.4426950408889634f;

constexpr int kPos = 0;
constexpr int kNeg = 1;
constexpr int kShared = -1;  // before them in the backward pass of a joint attention

enum class Type { kHalf, kBfloat16 };
enum class MaskType { kNone, kBool, kFloat, kHalf, kBfloat16 };

// Per key: bool (true = attend) or an additive bias. A key whose bias is -inf counts as absent.
struct Mask {
    const void* data;  // [b, n]
    int64_t stride_b, stride_n;
    MaskType type;
};

// A tensor that the kernels read: [b, rows, h, d]
struct Matrix {
    const void* data;
    int64_t stride_b, stride_row, stride_h;
};

struct Prompt {
    Matrix k, v;  // [b, n, h_kv, d]
    Mask mask;
    int n;  // tokens, 0 included
};

// What becomes of Z+ and Z-, and of the segments of a joint attention: csrc/rules.cuh
enum class Rule { kNasa, kNasaText, kNasaCross, kVsf, kSum, kProjected };
constexpr int kRules = 6;

// The keys that both prompts share in a joint attention, those of the image itself: what another
// kernel made of them. The last rows of q may be the texts' own queries.
struct Shared {
    Matrix o;          // [b, l, h, d], normalised; null: no such segment
    const float* lse;  // [b, h, l], natural logarithm of rowsum(exp(scores)); -inf without keys
    int64_t lse_stride_b, lse_stride_h, lse_stride_l;
    int first_text_pos;  // rows [first_text_pos, first_text_neg) are queries of the positive text,
    int first_text_neg;  // rows [first_text_neg, l) of the negative one, the others of the image
};

struct ForwardParams {
    Matrix q;  // [b, l, h, d]
    void* o;   // [b, l, h, d], contiguous
    Prompt prompt[2];        // kPos, kNeg
    const float* alpha_map;  // [b, l, h], or null: then the number `alpha`
    int64_t alpha_stride_b, alpha_stride_l, alpha_stride_h;
    int b, l, h, d;
    uint32_t key_step;  // from the h of Q to that of K and V: head_at of csrc/layouts.h
    Rule rule;  // without shared keys kNasa or kProjected
    Shared shared;
    float alpha;
    float scale;
    bool aligned;  // every row of every tensor starts on 16 bytes, and d is a multiple of 8
    Type type;
};

// The keys of kShared, where the launch attends to them itself: forward_image. What it finds goes to
// memory that its call.shared reads.
struct Image {
    Prompt keys;  // without a mask
    void* o;      // [b, l, h, d], contiguous
    float* lse;   // [b, h, l], contiguous
};

struct ImageParams {
    ForwardParams call;  // its `aligned` covers `image` too
    Image image;
};

// The gradients of O, given dO. With P+- = softmax(..) and w+ = 1, w- = -alpha, per query row:
//     u+- = rowsum(P+- * (dO V+-^T))          dS+- = w+- P+- * (dO V+-^T - u+-)
//     dQ = scale * (dS+ K+ + dS- K-)          dalpha = -u-
//     dK+- = scale * dS+-^T Q                 dV+- = (w+- P+-)^T dO
// A null pointer: a gradient that is not computed. Of K and V that a group of heads looks at, each
// head makes a gradient of its own in `partial`, and their sum is rounded once.
//
// In a joint attention the weight w of a row is a function of its log-sum-exps, which then have
// gradients of their own, of all three segments of keys:
//     dS = P * (w (dO V^T - u) + dlse) = P * (w dO V^T + shift)          shift = dlse - w u
// Three launches: backward_queries without dq for lse and u, backward_queries with `weight` for
// dQ, both with O_s in `call.shared`, and backward_keys for each segment. lse, u, weight and shift
// are of kShared, kPos, kNeg then, and the pointers are those of kPos.
struct BackwardParams {
    ForwardParams call;  // its o is not used; `aligned` covers grad_o and `image` too
    Prompt image;        // the keys of kShared, where dQ is asked for
    Matrix grad_o;       // [b, l, h, d]
    void* dq;       // [b, l, h, d], contiguous
    float* dalpha;  // [b, l, h], contiguous
    void* dk[2];    // [b, n, h_kv, d], contiguous; kPos, kNeg
    void* dv[2];    // [b, n, h_kv, d], contiguous; kPos, kNeg
    float* lse;     // [2, b, h, l] scratch: log2 of rowsum(exp2(scores)), +inf where no key is
    float* u;       // [2, b, h, l] scratch
    const float* weight;  // [3, b, h, l], or null: w+ and w- of nasa_attention
    const float* shift;   // [3, b, h, l], null where `weight` is
    // [splits, dk+ dv+ dk- dv-] scratch, of all h heads; null where splits is 1 and no head of K and V
    // serves two of Q
    float* partial;
    int splits;           // of the query rows, among the blocks that make one tile of dK and dV
    // `hidden` tiles of query rows, from `first_hidden` on, do not see the keys of backward_keys
    int first_hidden, hidden;
};

// Normalised attention guidance, from the attentions Z+ and Z- over either prompt to O. The last rows
// may be the texts' own queries, as in Shared.
struct NagParams {
    void* o;                 // [b, l, h d], contiguous: Z+, and then O
    const void* z_neg;       // [b, l, h d], contiguous
    const float* alpha_map;  // [b, l], of the image's queries, or null: then the number `alpha`
    int64_t alpha_stride_b, alpha_stride_l;
    int64_t rows;  // b l, at most 2^30
    int l, channels;
    int first_text_pos, first_text_neg;
    float alpha, scale, tau;
    int norm;  // 1: sum of magnitudes, 2: root of the sum of squares
    Type type;
    int row_warps;  // that share a row; nag_blend sets it
};

struct Device;

// Whether a kernel for Hopper may start while the one before it in the stream ends (programmatic
// dependent launch). Off until it is measured.
void overlap_launches(bool on);
bool launches_overlap();

// Launch on `stream` of the current device; nothing waits for the GPU.
cudaError_t forward(const ForwardParams& p, cudaStream_t stream);
cudaError_t forward(const ImageParams& p, cudaStream_t stream);
// A call whose image such a launch has attended to, in sums of the same order
cudaError_t forward_beside_image(const ForwardParams& p, cudaStream_t stream);
cudaError_t forward_short(const ForwardParams& p, const Device& device, cudaStream_t stream);
cudaError_t forward_sm90_short(const ForwardParams& p, const Device& device, cudaStream_t stream);
cudaError_t forward_sm90_long(const ForwardParams& p, const Device& device, cudaStream_t stream);
cudaError_t forward_long(const ForwardParams& p, const Device& device, cudaStream_t stream);
cudaError_t forward_image(const ImageParams& p, const Device& device, cudaStream_t stream);
cudaError_t nag_blend(NagParams p, cudaStream_t stream);

// How many blocks should share the query rows: enough to fill the GPU when there are few keys.
cudaError_t backward_splits(const BackwardParams& p, int& splits);
// Elements of one split of `partial`
int64_t partial_elements(const BackwardParams& p);

cudaError_t backward(const BackwardParams& p, cudaStream_t stream);
cudaError_t backward_queries(const BackwardParams& p, const Device& device, cudaStream_t stream);
cudaError_t backward_keys(const BackwardParams& p, const Device& device, cudaStream_t stream);

}  // namespace nasa
