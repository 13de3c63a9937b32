// The only file here that includes Torch: tensors in, params structs out. Stable ABI, so that one
// binary loads under every torch from 2.10 on; the schemas are defined in nasa_kernels/ops.py.
//
// Threads are torch's own: torch_parallel_for is in its stable C interface, so this library links
// no OpenMP runtime and brings no second one, and within a parallel region it runs serially.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <optional>
#include <tuple>
#include <vector>

#include "../abi.h"
#include "../arguments.h"
#include "nasa_cpu.h"

namespace nasa {
namespace cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// ------------------------------------------------------------------------------------- parameters

void check_rows(const Tensor& x, const char* name, const Tensor& q, int64_t heads) {
    STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == q.scalar_type(), "nasa_kernels: ", name,
                    " must have 4 dimensions and the dtype of q");
    STD_TORCH_CHECK(x.size(0) == q.size(0) && x.size(2) == heads && x.size(3) == q.size(3),
                    "nasa_kernels: ", name, " must be expanded to the b and d of q, and to ", heads,
                    " heads, got ", x.size(2));
    STD_TORCH_CHECK(x.numel() == 0 || x.size(3) == 1 || x.stride(3) == 1,
                    "nasa_kernels: the last dimension of ", name, " must be contiguous");
}

Rows rows_of(const Tensor& x, const char* name, const Tensor& q, int64_t heads) {
    check_rows(x, name, q, heads);
    return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Segment segment_of(const Tensor& k, const Tensor& v, const Optional& mask, const Tensor& q,
                   int64_t heads) {
    STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4 && k.size(1) == v.size(1),
                    "nasa_kernels: k and v must have 4 dimensions and the same number of keys");
    return {rows_of(k, "k", q, heads), rows_of(v, "v", q, heads), mask_of<Mask>(mask, k, q),
            k.size(1)};
}

Type type_of(const Tensor& q) {
    switch (q.scalar_type()) {
        case ScalarType::Float: return Type::kFloat;
        case ScalarType::Half: return Type::kHalf;
        case ScalarType::BFloat16: return Type::kBfloat16;
        default: STD_TORCH_CHECK(false, "nasa_kernels: the CPU kernels take fp32, fp16 and bf16");
    }
    return Type::kFloat;
}

// Both prompts without shared keys; alpha and the rule are set by others
Call call_of(const Tensor& q, const Tensor& k_pos, const Tensor& v_pos, const Tensor& k_neg,
             const Tensor& v_neg, const Optional& mask_pos, const Optional& mask_neg,
             double scale) {
    STD_TORCH_CHECK(q.dim() == 4 && q.size(3) >= 1 && q.size(3) <= kMaxHeadDim,
                    "nasa_kernels: q must be [b, l, h, d] with d from 1 to ", kMaxHeadDim);
    Call p{};
    p.h_kv = k_pos.dim() == 4 ? k_pos.size(2) : 0;
    STD_TORCH_CHECK(p.h_kv == q.size(2) || (p.h_kv > 0 && q.size(2) % p.h_kv == 0),
                    "nasa_kernels: the heads of k must be a divisor of the ", q.size(2),
                    " heads of q, got ", p.h_kv);
    p.q = rows_of(q, "q", q, q.size(2));
    p.segment[kPos] = segment_of(k_pos, v_pos, mask_pos, q, p.h_kv);
    p.segment[kNeg] = segment_of(k_neg, v_neg, mask_neg, q, p.h_kv);
    p.b = q.size(0);
    p.l = q.size(1);
    p.h = q.size(2);
    p.d = q.size(3);
    p.scale = static_cast<float>(scale);
    p.type = type_of(q);
    return p;
}

// By the number of a rule of cross-attention, without shared keys
Rule cross_rule(int64_t rule) {
    if (rule == static_cast<int>(Rule::kProjected)) return Rule::kProjected;
    STD_TORCH_CHECK(rule == static_cast<int>(Rule::kNasa),
                    "nasa_kernels: rule must be 0 or 5, got ", rule);
    return Rule::kSum;
}

Rule joint_rule(int64_t rule) {
    STD_TORCH_CHECK(rule >= 0 && rule <= static_cast<int>(Rule::kProjected),
                    "nasa_kernels: rule must be 0 to 5, got ", rule);
    return static_cast<Rule>(rule);
}

void set_joint(Call& p, const Tensor& q, const Tensor& k, const Tensor& v, int64_t text_pos,
               int64_t text_neg) {
    STD_TORCH_CHECK(text_pos >= 0 && text_neg >= 0 && text_pos + text_neg <= p.l,
                    "nasa_kernels: text_pos and text_neg must be numbers of the ", p.l,
                    " rows of q, got ", text_pos, " and ", text_neg);
    p.segment[kShared] = segment_of(k, v, std::nullopt, q, p.h_kv);
    p.text_pos = text_pos;
    p.text_neg = text_neg;
}

// ------------------------------------------------------------------------------------------- calls

// The best instruction set, or the one that the tests ask for
const Kernels& chosen() {
    static const char* const name = std::getenv("NASA_CPU_ISA");
    static const Kernels* const found = kernels(name);
    STD_TORCH_CHECK(found != nullptr, "nasa_kernels: NASA_CPU_ISA must name an instruction set ",
                    "that was compiled and that this CPU has, at best ", kernels(nullptr)->name,
                    ", got ", name);
    return *found;
}

Threads threads() {
    return {torch_parallel_for, static_cast<int64_t>(torch::stable::get_num_threads())};
}

Tensor empty(const Tensor& q, const Sizes& sizes, ScalarType type) {
    return torch::stable::new_empty(q, sizes, std::make_optional(type));
}

// A tensor of the dtype of q. Its memory often comes from the system, page by page, also where glibc
// gave back what the call before had: in large pages that costs a tenth.
Tensor result(const Tensor& q, const Sizes& sizes) {
    const Tensor x = empty(q, sizes, q.scalar_type());
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = uintptr_t{2} << 20;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
    const uintptr_t bytes = x.numel() * (q.scalar_type() == ScalarType::Float ? 4 : 2);
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
    const uintptr_t end = (begin + bytes) / kPage * kPage;
    if (bytes >= 2 * kPage) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
    return x;
}

void run(bool is_done) { STD_TORCH_CHECK(is_done, "nasa_kernels: no memory for the scratch"); }

Tensor forward_of(const Call& p, const Tensor& q) {
    Tensor o = result(q, {p.b, p.l, p.h, p.d});
    if (o.numel() > 0) run(chosen().forward(p, {o.mutable_data_ptr(), nullptr, nullptr}, threads()));
    return o;
}

// The gradients that `needs` asks for, the others empty: of `tensors`, which are q and then k and v
// of the segments from `first` on, and of alpha.
std::vector<Tensor> backward_of(const Call& p, const Tensor& grad_o,
                                const std::vector<Tensor>& tensors, int first,
                                const std::vector<bool>& needs) {
    STD_TORCH_CHECK(needs.size() == tensors.size() + 1, "nasa_kernels: needs must be ",
                    tensors.size() + 1, " flags, got ", needs.size());
    const Tensor& q = tensors[0];
    // the gradient of a sum is one number with strides of 0
    const bool is_contiguous = grad_o.numel() == 0 || grad_o.size(3) == 1 || grad_o.stride(3) == 1;
    const Tensor grad = is_contiguous ? grad_o : torch::stable::contiguous(grad_o);
    STD_TORCH_CHECK(grad.size(1) == q.size(1), "nasa_kernels: grad_o must have the shape of q");
    Gradients to{};
    to.grad_o = rows_of(grad, "grad_o", q, p.h);
    std::vector<Tensor> found;
    for (size_t i = 0; i < tensors.size(); ++i) {
        const Tensor& x = tensors[i];
        if (!needs[i]) {
            found.push_back(empty(q, {0}, q.scalar_type()));
            continue;
        }
        found.push_back(result(q, {x.size(0), x.size(1), x.size(2), x.size(3)}));
        void* const data = found.back().mutable_data_ptr();
        const size_t segment = first + (i + 1) / 2 - 1;
        (i == 0 ? to.dq : i % 2 == 1 ? to.dk[segment] : to.dv[segment]) = data;
    }
    found.push_back(empty(q, needs.back() ? Sizes{p.b, p.l, p.h} : Sizes{0}, ScalarType::Float));
    if (needs.back()) to.dalpha = static_cast<float*>(found.back().mutable_data_ptr());
    run(chosen().backward(p, to, threads()));
    return found;
}

// What the composition of PyTorch's parts keeps for its backward pass, and these kernels do not
Tensor nothing(const Tensor& q, ScalarType type, size_t dimensions) {
    return empty(q, Sizes(dimensions, 0), type);
}

// -------------------------------------------------------------------------------- cross-attention

Tensor forward_cpu(const Tensor q, const Tensor k_pos, const Tensor v_pos, const Tensor k_neg,
                   const Tensor v_neg, const Optional mask_pos, const Optional mask_neg,
                   const Optional alpha_map, double alpha, double scale, int64_t rule) {
    Call p = call_of(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, scale);
    p.rule = cross_rule(rule);
    set_alpha(p, alpha_map, alpha, p.l, p.h);
    return forward_of(p, q);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_cpu(
    const Tensor q, const Tensor k_pos, const Tensor v_pos, const Tensor k_neg, const Tensor v_neg,
    const Optional mask_pos, const Optional mask_neg, const Optional alpha_map, double alpha,
    double scale, int64_t rule) {
    const Tensor o = forward_cpu(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map,
                                 alpha, scale, rule);
    const auto z = [&] { return nothing(q, q.scalar_type(), 4); };
    const auto lse = [&] { return nothing(q, ScalarType::Float, 3); };
    return {o, z(), lse(), z(), lse()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cpu(
    const Tensor grad_o, const Tensor, const Tensor, const Tensor, const Tensor, const Tensor q,
    const Tensor k_pos, const Tensor v_pos, const Tensor k_neg, const Tensor v_neg,
    const Optional mask_pos, const Optional mask_neg, const Optional alpha_map, double alpha,
    double scale, int64_t rule, const std::vector<bool> needs) {
    Call p = call_of(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, scale);
    p.rule = cross_rule(rule);
    set_alpha(p, alpha_map, alpha, p.l, p.h);
    const auto g = backward_of(p, grad_o, {q, k_pos, v_pos, k_neg, v_neg}, kPos, needs);
    return {g[0], g[1], g[2], g[3], g[4], g[5]};
}

// -------------------------------------------------------------------------------- joint attention

Tensor joint_forward_cpu(const Tensor q, const Tensor k, const Tensor v, const Tensor k_pos,
                         const Tensor v_pos, const Tensor k_neg, const Tensor v_neg,
                         const Optional mask_pos, const Optional mask_neg,
                         const Optional alpha_map, double alpha, double scale, int64_t rule,
                         int64_t text_pos, int64_t text_neg) {
    Call p = call_of(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, scale);
    set_joint(p, q, k, v, text_pos, text_neg);
    p.rule = joint_rule(rule);
    set_alpha(p, alpha_map, alpha, p.l, p.h);
    return forward_of(p, q);
}

std::tuple<Tensor, Tensor, Tensor> joint_attention_cpu(
    const Tensor q, const Tensor k, const Tensor v, const Tensor k_pos, const Tensor v_pos,
    const Tensor k_neg, const Tensor v_neg, const Optional mask_pos, const Optional mask_neg,
    const Optional alpha_map, double alpha, double scale, int64_t rule, int64_t text_pos,
    int64_t text_neg) {
    const Tensor o = joint_forward_cpu(q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg,
                                       alpha_map, alpha, scale, rule, text_pos, text_neg);
    return {o, nothing(q, ScalarType::Float, 4), nothing(q, ScalarType::Float, 3)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> joint_backward_cpu(
    const Tensor grad_o, const Tensor, const Tensor, const Tensor q, const Tensor k, const Tensor v,
    const Tensor k_pos, const Tensor v_pos, const Tensor k_neg, const Tensor v_neg,
    const Optional mask_pos, const Optional mask_neg, const Optional alpha_map, double alpha,
    double scale, int64_t rule, int64_t text_pos, int64_t text_neg,
    const std::vector<bool> needs) {
    Call p = call_of(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, scale);
    set_joint(p, q, k, v, text_pos, text_neg);
    p.rule = joint_rule(rule);
    set_alpha(p, alpha_map, alpha, p.l, p.h);
    const auto g = backward_of(p, grad_o, {q, k, v, k_pos, v_pos, k_neg, v_neg}, kShared, needs);
    return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]};
}

// Z+ and Z-, each without the queries of the other text
std::tuple<Tensor, Tensor> joint_pair_cpu(const Tensor q, const Tensor k, const Tensor v,
                                          const Tensor k_pos, const Tensor v_pos,
                                          const Tensor k_neg, const Tensor v_neg,
                                          const Optional mask_pos, const Optional mask_neg,
                                          double scale, int64_t text_pos, int64_t text_neg) {
    Call p = call_of(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, scale);
    set_joint(p, q, k, v, text_pos, text_neg);
    p.alpha = 1;
    const Tensor z_pos = result(q, {p.b, p.l - text_neg, p.h, p.d});
    const Tensor z_neg = result(q, {p.b, p.l - text_pos, p.h, p.d});
    if (q.numel() > 0) {
        run(chosen().forward(p, {nullptr, z_pos.mutable_data_ptr(), z_neg.mutable_data_ptr()},
                             threads()));
    }
    return {z_pos, z_neg};
}

// Normalised attention guidance of a call without a rule. alpha_map [b, image queries, 1]
Tensor nag_of(Call& p, const Tensor& q, const Optional& alpha_map, double alpha, double nag_scale,
              double nag_tau, int64_t nag_norm) {
    STD_TORCH_CHECK(nag_norm == 1 || nag_norm == 2, "nasa_kernels: nag_norm must be 1 or 2, got ",
                    nag_norm);
    set_alpha(p, alpha_map, alpha, p.l - p.text_pos - p.text_neg, 1);
    p.rule = Rule::kNag;
    p.nag = {static_cast<float>(nag_scale), static_cast<float>(nag_tau),
             static_cast<int>(nag_norm)};
    return forward_of(p, q);
}

Tensor nag_cpu(const Tensor q, const Tensor k_pos, const Tensor v_pos, const Tensor k_neg,
               const Tensor v_neg, const Optional mask_pos, const Optional mask_neg,
               const Optional alpha_map, double alpha, double scale, double nag_scale,
               double nag_tau, int64_t nag_norm) {
    Call p = call_of(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, scale);
    return nag_of(p, q, alpha_map, alpha, nag_scale, nag_tau, nag_norm);
}

Tensor joint_nag_cpu(const Tensor q, const Tensor k, const Tensor v, const Tensor k_pos,
                     const Tensor v_pos, const Tensor k_neg, const Tensor v_neg,
                     const Optional mask_pos, const Optional mask_neg, const Optional alpha_map,
                     double alpha, double scale, double nag_scale, double nag_tau, int64_t nag_norm,
                     int64_t text_pos, int64_t text_neg) {
    Call p = call_of(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, scale);
    set_joint(p, q, k, v, text_pos, text_neg);
    return nag_of(p, q, alpha_map, alpha, nag_scale, nag_tau, nag_norm);
}

}  // namespace
}  // namespace cpu
}  // namespace nasa

STABLE_TORCH_LIBRARY_IMPL(nasa_kernels, CPU, m) {
    m.impl("forward_cpu", TORCH_BOX(&nasa::cpu::forward_cpu));
    m.impl("attention_cpu", TORCH_BOX(&nasa::cpu::attention_cpu));
    m.impl("backward_cpu", TORCH_BOX(&nasa::cpu::backward_cpu));
    m.impl("joint_forward_cpu", TORCH_BOX(&nasa::cpu::joint_forward_cpu));
    m.impl("joint_attention_cpu", TORCH_BOX(&nasa::cpu::joint_attention_cpu));
    m.impl("joint_backward_cpu", TORCH_BOX(&nasa::cpu::joint_backward_cpu));
    m.impl("joint_pair_cpu", TORCH_BOX(&nasa::cpu::joint_pair_cpu));
    m.impl("nag_cpu", TORCH_BOX(&nasa::cpu::nag_cpu));
    m.impl("joint_nag_cpu", TORCH_BOX(&nasa::cpu::joint_nag_cpu));
}

// For nasa_kernels/_cpu/library.py: the instruction set that the calls take; empty where
// NASA_CPU_ISA names none.
extern "C" __attribute__((visibility("default"))) const char* nasa_cpu_isa() {
    const nasa::cpu::Kernels* const found = nasa::cpu::kernels(std::getenv("NASA_CPU_ISA"));
    return found == nullptr ? "" : found->name;
}

// For bench/roofline.py: work that needs no memory, on every thread. Returns how much it was.
extern "C" __attribute__((visibility("default"))) int64_t nasa_cpu_work(int work, int type,
                                                                       int64_t rounds) {
    using namespace nasa::cpu;
    struct Context {
        Work work;
        Type type;
        int64_t rounds, done;
    } context{static_cast<Work>(work), static_cast<Type>(type), rounds, 0};
    const Threads all = threads();
    all.parallel_for(
        0, all.count, 1,
        [](int64_t begin, int64_t end, void* pointer) {
            auto* const x = static_cast<Context*>(pointer);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t done = chosen().work(x->work, x->type, x->rounds);
                __atomic_fetch_add(&x->done, done, __ATOMIC_RELAXED);
            }
        },
        &context);
    return context.done;
}
