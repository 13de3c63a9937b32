// What the CPU kernels take and give. No Torch here: bindings.cpp and the kernels meet in this file.
//
//     O = c_s O_s + c_p O_p + c_n O_n        O_i = softmax(Q K_i^T * scale + bias_i) V_i
//
// over up to three segments of keys: shared by both prompts (joint attention), positive, negative.
// A rule makes the coefficients, per query, of alpha and of the log-sum-exps of the segments. Two
// rules make O of Z+ over [shared; positive] and of Z- over [shared; negative]: projected.h, nag.h.
//
// Names: b batch, h heads, l queries, n keys, d head_dim. Strides are in elements, and d is
// contiguous; a stride of 0 reads one row for many. K and V may have fewer heads than Q, h_kv: of the
// h / h_kv heads of a group all look at the same.
#pragma once

#include <cstdint>

namespace nasa {
namespace cpu {

constexpr int kMaxHeadDim = 256;

enum class Type { kFloat, kHalf, kBfloat16 };
enum class MaskType { kNone, kBool, kFloat, kHalf, kBfloat16 };

// [b, l, h, d] or [b, n, h_kv, d]
struct Rows {
    const void* data;
    int64_t stride_b, stride_n, stride_h;
};

// Per key: bool (true = attend) or an additive bias. A key whose bias is -inf counts as absent.
struct Mask {
    const void* data;  // [b, n]
    int64_t stride_b, stride_n;
    MaskType type;
};

struct Segment {
    Rows k, v;
    Mask mask;
    int64_t n;
};
enum { kShared, kPos, kNeg, kSegments };

// In the order of RULES in nasa_kernels/reference.py; joint_attention.py has the table. Without
// shared keys kSum is NASA in cross-attention. Then normalised attention guidance, forward only,
// and what queries of the texts get, whatever the rule: attention over [shared; positive], over
// [shared; negative].
enum class Rule { kNasa, kNasaText, kNasaCross, kVsf, kSum, kProjected, kNag, kPositive, kNegative };

// Settings of kNag: nasa_kernels/nag.py has their names and the formula.
struct Nag {
    float scale, tau;
    int norm;  // 1: the sum of magnitudes, 2: the root of the sum of squares
};

struct Call {
    Rows q;
    Segment segment[kSegments];
    const float* alpha_map;  // [b, l, h], or null: then the number `alpha`
    int64_t alpha_stride_b, alpha_stride_l, alpha_stride_h;
    int64_t b, l, h, d;
    int64_t h_kv;                // a divisor of h
    int64_t text_pos, text_neg;  // the last queries, which are the texts' own
    float alpha;
    float scale;
    Rule rule;
    Nag nag;
    Type type;
};

// Contiguous. O [b, l, h, d], or instead of it Z+ [b, l - text_neg, h, d] over [shared; positive]
// and Z- [b, l - text_pos, h, d] over [shared; negative], each without the other text's queries.
struct Result {
    void* o;
    void *z_pos, *z_neg;
};

// The gradients of O. With P_i the softmax of a segment, per query:
//
//     u_i = rowsum(P_i * (dO V_i^T)) = dO . O_i, the gradient of c_i
//     dS_i = P_i * (c_i (dO V_i^T - u_i) + dlse_i)       dlse_i from the rule, u and alpha
//     dQ = scale * sum of dS_i K_i       dK_i = scale * dS_i^T Q       dV_i = (c_i P_i)^T dO
//
// Under kProjected each of Z+ and Z- has a dO of its own, dZ+ and dZ- (projected.h).
//
// A null pointer is a gradient that nobody asked for. All are contiguous.
struct Gradients {
    Rows grad_o;
    void* dq;             // [b, l, h, d]
    void* dk[kSegments];  // [b, n, h_kv, d]
    void* dv[kSegments];  // [b, n, h_kv, d]
    float* dalpha;        // [b, l, h]
};

// torch_parallel_for, or another function that runs body on all of [begin, end) in parts
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                void (*body)(int64_t begin, int64_t end, void* context),
                                void* context);

struct Threads {
    ParallelFor parallel_for;
    int64_t count;
};

// What the time of a call is made of
enum class Work { kProducts, kExponentials };

// What one instruction set offers. False: there is no memory for the scratch.
struct Kernels {
    const char* name;
    bool (*forward)(const Call& call, const Result& result, const Threads& threads);
    bool (*backward)(const Call& call, const Gradients& gradients, const Threads& threads);
    // does nothing but such work, on one thread; returns how many FLOP or exponentials it was
    int64_t (*work)(Work work, Type type, int64_t rounds);
};

// The best of those compiled in that this CPU has, or at most the one named; null where that name
// is not one of them or this CPU does not have it.
const Kernels* kernels(const char* name);

}  // namespace cpu
}  // namespace nasa
