// The only file that includes Torch: tensors in, params structs out. Stable ABI, so that one binary
// loads under every torch from 2.10 on; the schemas are defined in Python (nasa_kernels/ops.py).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "abi.h"
#include "arguments.h"
#include "device.h"
#include "layouts.h"
#include "nasa.h"

// In libtorch_cuda.so. Weak: null under a torch without CUDA, where this library still loads.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace nasa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Positions and counts of rows are int in the kernels, with room for one step beyond the end.
constexpr int64_t kMaxRows = int64_t{1} << 30;

bool starts_on_16_bytes(const View& x) {
    if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 != 0) return false;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) {
        if (x.size(i) > 1 && x.stride(i) % 8 != 0) return false;
    }
    return true;
}

// [b, rows, heads, d] as q has them, or one of a batch or of the heads
void check_sizes(const View& x, const char* name, const View& q, int64_t heads) {
    STD_TORCH_CHECK(x.dim() == 4, "nasa_kernels: ", name, " must have 4 dimensions, got ", x.dim());
    STD_TORCH_CHECK(x.dtype() == q.dtype() && x.get_device_index() == q.get_device_index(),
                    "nasa_kernels: ", name, " must have the dtype and the device of q");
    STD_TORCH_CHECK(is_one_or(x.size(0), q.size(0)) && is_one_or(x.size(2), heads) &&
                        x.size(3) == q.size(3),
                    "nasa_kernels: ", name, " must have the b and d of q, or 1 for b, and ", heads,
                    " heads or 1, got ", x.size(2));
    STD_TORCH_CHECK(x.size(1) <= kMaxRows, "nasa_kernels: ", name,
                    " has too many rows: ", x.size(1));
    STD_TORCH_CHECK(x.numel() == 0 || x.size(3) == 1 || x.stride(3) == 1,
                    "nasa_kernels: the last dimension of ", name, " must be contiguous");
}

// The same without such a one
void check_rows(const View& x, const char* name, const View& q, int64_t heads) {
    check_sizes(x, name, q, heads);
    STD_TORCH_CHECK(x.size(0) == q.size(0) && x.size(2) == heads, "nasa_kernels: ", name,
                    " must be expanded to the b and h of q");
}
void check_rows(const View& x, const char* name, const View& q) {
    check_rows(x, name, q, q.size(2));
}

// How many heads K and V have. `heads`: how many they had so far, 0 where each had one.
int64_t heads_of_keys(const View& x, const char* name, const View& q, int64_t heads) {
    STD_TORCH_CHECK(x.dim() == 4, "nasa_kernels: ", name, " must have 4 dimensions, got ", x.dim());
    const int64_t own = x.size(2);
    if (own == heads || own == 1) return heads;
    STD_TORCH_CHECK(heads == 0, "nasa_kernels: ", name, " must have ", heads,
                    " heads, as the keys before it, or 1, got ", own);
    const int64_t all = q.size(2);
    STD_TORCH_CHECK(own == all || (own > 0 && all % own == 0 && all < 32768), "nasa_kernels: ", name,
                    " must have 1 head or a divisor of the ", all, " heads of q, got ", own);
    return own;
}

Type type_of(const View& q) {
    switch (q.scalar_type()) {
        case ScalarType::Half: return Type::kHalf;
        case ScalarType::BFloat16: return Type::kBfloat16;
        default: STD_TORCH_CHECK(false, "nasa_kernels: the CUDA kernels take fp16 and bf16");
    }
    return Type::kHalf;
}

Matrix matrix_of(const View& x) {
    return {x.const_data_ptr(), stride_of(x, 0), x.stride(1), stride_of(x, 2)};
}

Prompt prompt_of(const View& k, const View& v, const std::optional<Tensor>& mask, const View& q) {
    STD_TORCH_CHECK(k.size(1) == v.size(1), "nasa_kernels: k has ", k.size(1), " tokens but v has ",
                    v.size(1));
    return {matrix_of(k), matrix_of(v), mask_of<Mask>(mask, k, q), static_cast<int>(k.size(1))};
}

// What every call has
struct Inputs {
    View q, k_pos, v_pos, k_neg, v_neg;
    const std::optional<Tensor>&mask_pos, &mask_neg;
    const View *k = nullptr, *v = nullptr;  // the image's, where a launch attends to them
};

// Everything of a call but O. `aligned` so far covers q and the positive prompt only.
ForwardParams params_of(const Inputs& x, const std::optional<Tensor>& alpha_map, double alpha,
                        double scale) {
    const View& q = x.q;
    check_sizes(q, "q", q, q.dim() == 4 ? q.size(2) : 0);
    int64_t heads = 0;
    const auto check_keys = [&](const View& keys, const char* name) {
        heads = heads_of_keys(keys, name, q, heads);
        check_sizes(keys, name, q, heads);
    };
    if (x.k != nullptr) {
        check_keys(*x.k, "k");
        check_keys(*x.v, "v");
    }
    check_keys(x.k_pos, "k_pos");
    check_keys(x.v_pos, "v_pos");
    check_keys(x.k_neg, "k_neg");
    check_keys(x.v_neg, "v_neg");
    STD_TORCH_CHECK(q.size(3) <= kMaxHeadDim, "nasa_kernels: head_dim must be at most ",
                    kMaxHeadDim, ", got ", q.size(3));
    ForwardParams p;
    p.q = matrix_of(q);
    p.o = nullptr;
    p.prompt[kPos] = prompt_of(x.k_pos, x.v_pos, x.mask_pos, q);
    p.prompt[kNeg] = prompt_of(x.k_neg, x.v_neg, x.mask_neg, q);
    p.b = static_cast<int>(q.size(0));
    p.l = static_cast<int>(q.size(1));
    p.h = static_cast<int>(q.size(2));
    p.d = static_cast<int>(q.size(3));
    p.key_step = heads == 0 || heads == p.h ? kWholeStep : step_of(p.h / static_cast<int>(heads));
    set_alpha(p, alpha_map, alpha, p.l, p.h);
    p.rule = Rule::kNasa;
    p.shared = {};
    p.scale = static_cast<float>(scale) * kLog2E;
    p.type = type_of(q);
    p.aligned = p.d % 8 == 0 && starts_on_16_bytes(q) && starts_on_16_bytes(x.k_pos) &&
                starts_on_16_bytes(x.v_pos);
    return p;
}

// Whether TMA can read the rows of K or V: the test of choose.cpp, for one tensor
bool suits_tma(const View& x) {
    return starts_on_16_bytes(x) && (x.size(1) <= 1 || x.stride(1) != 0);
}

// The negative prompt does not choose the kernel: where TMA can read the other tensors, a negative
// prompt that it cannot read is copied. The copies must live until the launch.
std::vector<Tensor> settle_negative(ForwardParams& p, const Inputs& x) {
    if (!p.aligned || (suits_tma(x.k_neg) && suits_tma(x.v_neg))) return {};
    const auto readable = [](const View& keys) {
        return suits_tma(keys) ? keys.tensor() : torch::stable::clone(keys.tensor());
    };
    const std::vector<Tensor> copies{readable(x.k_neg), readable(x.v_neg)};
    p.prompt[kNeg] = prompt_of(copies[0], copies[1], x.mask_neg, x.q);
    return copies;
}

cudaStream_t current_stream(const View& q) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "nasa_kernels: this torch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error, const View& q) {
    STD_TORCH_CHECK(error == cudaSuccess, "nasa_kernels: ", cudaGetErrorString(error),
                    " (head_dim ", q.size(3), ", device ", q.get_device_index(), ")");
}

// A contiguous tensor on the device of q. Straight from the C interface: through the dispatcher it
// would cost half a microsecond more, as much as all else here.
template <int kDim>
Tensor new_contiguous(const View& q, const int64_t (&sizes)[kDim], int32_t dtype) {
    int64_t strides[kDim];
    int64_t step = 1;
    for (int i = kDim - 1; i >= 0; --i) {
        strides[i] = step;
        step *= sizes[i];
    }
    int32_t device_type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(q.tensor().get(), &device_type));
    AtenTensorHandle found = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kDim, sizes, strides, dtype, device_type,
                                                    q.get_device_index(), &found));
    return Tensor(found);
}

// [b, l, h, d] like q
Tensor contiguous_like(const View& q) {
    return new_contiguous(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, q.dtype());
}

ForwardParams& call_of(ForwardParams& p) { return p; }
ForwardParams& call_of(ImageParams& p) { return p.call; }

// O of a checked call, into a new tensor
template <class Params>
Tensor launch_forward(Params& p, const View& q) {
    Tensor o = contiguous_like(q);
    if (o.numel() == 0) return o;
    call_of(p).o = o.mutable_data_ptr();
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    check(forward(p, current_stream(q)), q);
    return o;
}

// At the number 0 nothing is projected: Z+ alone is kNasa's
void drop_projection(ForwardParams& p) {
    if (p.rule == Rule::kProjected && p.alpha_map == nullptr && p.alpha == 0.f) {
        p.rule = Rule::kNasa;
    }
}

Tensor forward_cuda(const Tensor q, const Tensor k_pos, const Tensor v_pos, const Tensor k_neg,
                    const Tensor v_neg, const std::optional<Tensor> mask_pos,
                    const std::optional<Tensor> mask_neg, const std::optional<Tensor> alpha_map,
                    double alpha, double scale, int64_t rule) {
    STD_TORCH_CHECK(rule == static_cast<int>(Rule::kNasa) ||
                        rule == static_cast<int>(Rule::kProjected),
                    "nasa_kernels: without shared keys rule must be ",
                    static_cast<int>(Rule::kNasa), " or ", static_cast<int>(Rule::kProjected),
                    ", got ", rule);
    const Inputs x{q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg};
    ForwardParams p = params_of(x, alpha_map, alpha, scale);
    p.rule = static_cast<Rule>(rule);
    drop_projection(p);
    // exactly the attention over the positive prompt: the negative one is not read
    if (p.alpha_map == nullptr && p.alpha == 0.f) {
        p.prompt[kNeg].n = 0;
        return launch_forward(p, x.q);
    }
    const auto copies = settle_negative(p, x);
    return launch_forward(p, x.q);
}

// O_s, the attention over the shared keys, which another kernel computed
void set_shared(ForwardParams& p, const View& q, const View& o_shared) {
    check_rows(o_shared, "o_shared", q);
    STD_TORCH_CHECK(o_shared.size(1) == q.size(1),
                    "nasa_kernels: o_shared must have the shape of q, got ", o_shared.size(1),
                    " rows for ", q.size(1));
    p.shared.o = matrix_of(o_shared);
}

// The last rows of q are the texts' own queries: text_pos of the positive one, then text_neg.
void set_text_rows(ForwardParams& p, int64_t text_pos, int64_t text_neg) {
    STD_TORCH_CHECK(text_pos >= 0 && text_neg >= 0 && text_pos + text_neg <= p.l,
                    "nasa_kernels: text_pos and text_neg must be numbers of the ", p.l,
                    " rows of q, got ", text_pos, " and ", text_neg);
    p.shared.first_text_neg = p.l - static_cast<int>(text_neg);
    p.shared.first_text_pos = p.shared.first_text_neg - static_cast<int>(text_pos);
}

// All of the shared segment, and whose the rows are
void set_shared_rows(ForwardParams& p, const View& q, const View& o_shared,
                     const View& lse_shared, int64_t text_pos, int64_t text_neg) {
    set_shared(p, q, o_shared);
    STD_TORCH_CHECK(lse_shared.dim() == 3 && lse_shared.size(0) == p.b &&
                        lse_shared.size(1) == p.h && lse_shared.size(2) == p.l &&
                        lse_shared.scalar_type() == ScalarType::Float &&
                        lse_shared.get_device_index() == q.get_device_index(),
                    "nasa_kernels: lse_shared must be fp32 [b, h, l] on the device of q");
    set_text_rows(p, text_pos, text_neg);
    Shared& shared = p.shared;
    shared.lse = static_cast<const float*>(lse_shared.const_data_ptr());
    shared.lse_stride_b = lse_shared.stride(0);
    shared.lse_stride_h = lse_shared.stride(1);
    shared.lse_stride_l = lse_shared.stride(2);
    p.aligned = p.aligned && starts_on_16_bytes(o_shared);
}

// Takes the rule of a joint attention whose rows are known; returns whether one asks for the negative
// prompt.
bool settle_rule(ForwardParams& p, int64_t rule, int64_t text_neg) {
    STD_TORCH_CHECK(rule >= 0 && rule < kRules, "nasa_kernels: rule must be 0 to ", kRules - 1,
                    ", got ", rule);
    p.rule = static_cast<Rule>(rule);
    drop_projection(p);
    if (p.alpha_map != nullptr || p.alpha != 0.f || text_neg != 0 || p.rule == Rule::kVsf) {
        return true;
    }
    p.prompt[kNeg].n = 0;
    return false;
}

// The same beside the keys that both prompts share.
Tensor forward_joint_cuda(const Tensor q, const Tensor k_pos, const Tensor v_pos,
                          const Tensor k_neg, const Tensor v_neg,
                          const std::optional<Tensor> mask_pos,
                          const std::optional<Tensor> mask_neg,
                          const std::optional<Tensor> alpha_map, double alpha, double scale,
                          const Tensor o_shared, const Tensor lse_shared, int64_t rule,
                          int64_t text_pos, int64_t text_neg) {
    const Inputs x{q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg};
    ForwardParams p = params_of(x, alpha_map, alpha, scale);
    set_shared_rows(p, x.q, o_shared, lse_shared, text_pos, text_neg);
    if (!settle_rule(p, rule, text_neg)) return launch_forward(p, x.q);
    const auto copies = settle_negative(p, x);
    return launch_forward(p, x.q);
}

// A call that attends to the image's keys as well, in the launch for the prompts. O_s goes to `o` and
// its log-sum-exp to `lse`, [b, h, l]. `aligned` so far covers q, the positive prompt and the image.
ImageParams image_params_of(const Inputs& x, const std::optional<Tensor>& alpha_map, double alpha,
                            double scale, int64_t text_pos, int64_t text_neg, void* o, void* lse) {
    ImageParams p{params_of(x, alpha_map, alpha, scale), {}};
    p.image = {prompt_of(*x.k, *x.v, {}, x.q), o, static_cast<float*>(lse)};
    ForwardParams& call = p.call;
    set_text_rows(call, text_pos, text_neg);
    const int64_t l = call.l, h = call.h, d = call.d;
    call.shared.o = {o, l * h * d, h * d, d};
    call.shared.lse = p.image.lse;
    call.shared.lse_stride_b = h * l;
    call.shared.lse_stride_h = l;
    call.shared.lse_stride_l = 1;
    call.aligned = call.aligned && starts_on_16_bytes(*x.k) && starts_on_16_bytes(*x.v);
    return p;
}

Tensor launch_image(ImageParams& p, const Inputs& x, int64_t rule, int64_t text_neg) {
    if (settle_rule(p.call, rule, text_neg)) {
        // whole rows or single elements, the bits are the same
        p.call.aligned = p.call.aligned && starts_on_16_bytes(x.k_neg) && starts_on_16_bytes(x.v_neg);
    }
    return launch_forward(p, x.q);
}

// Memory that nobody sees but the launches of one call: for O_s, for its log-sum-exp, and for Z- where
// that is asked for. One tensor, because each costs the host as much as a launch.
struct Scratch {
    Tensor memory;
    void *o, *z_neg, *lse;

    explicit Scratch(const View& q, bool has_z_neg = false) {
        const int64_t rows = q.dim() == 4 ? q.size(0) * q.size(1) * q.size(2) : 0;
        // in floats of two elements; where rows start on 16 bytes in O_s, those of Z- do
        const int64_t each = (q.numel() + 1) / 2, all = has_z_neg ? 2 * each : each;
        memory = new_contiguous(q, {all + rows}, aoti_torch_dtype_float32());
        float* const first = static_cast<float*>(memory.mutable_data_ptr());
        o = first;
        z_neg = has_z_neg ? first + each : nullptr;
        lse = first + all;
    }
};

Tensor forward_image_cuda(const Tensor q, const Tensor k, const Tensor v, const Tensor k_pos,
                          const Tensor v_pos, const Tensor k_neg, const Tensor v_neg,
                          const std::optional<Tensor> mask_pos,
                          const std::optional<Tensor> mask_neg,
                          const std::optional<Tensor> alpha_map, double alpha, double scale,
                          int64_t rule, int64_t text_pos, int64_t text_neg) {
    const View image_k(k), image_v(v);
    const Inputs x{q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, &image_k, &image_v};
    const Scratch scratch(x.q);
    ImageParams p =
        image_params_of(x, alpha_map, alpha, scale, text_pos, text_neg, scratch.o, scratch.lse);
    return launch_image(p, x, rule, text_neg);
}

// The same, with what the backward pass starts from
std::tuple<Tensor, Tensor, Tensor> attention_image_cuda(
    const Tensor q, const Tensor k, const Tensor v, const Tensor k_pos, const Tensor v_pos,
    const Tensor k_neg, const Tensor v_neg, const std::optional<Tensor> mask_pos,
    const std::optional<Tensor> mask_neg, const std::optional<Tensor> alpha_map, double alpha,
    double scale, int64_t rule, int64_t text_pos, int64_t text_neg) {
    const View image_k(k), image_v(v);
    const Inputs x{q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, &image_k, &image_v};
    check_sizes(x.q, "q", x.q, x.q.dim() == 4 ? x.q.size(2) : 0);
    const Tensor o_shared = contiguous_like(x.q);
    const Tensor lse_shared =
        new_contiguous(x.q, {x.q.size(0), x.q.size(2), x.q.size(1)}, aoti_torch_dtype_float32());
    ImageParams p = image_params_of(x, alpha_map, alpha, scale, text_pos, text_neg,
                                    o_shared.mutable_data_ptr(), lse_shared.mutable_data_ptr());
    return {launch_image(p, x, rule, text_neg), o_shared, lse_shared};
}

struct NagSettings {
    double scale, tau;
    int64_t norm;
};

// Normalised attention guidance: Z+ and Z- are a launch each, of the kernels for one prompt, and a third
// makes O of them, where Z+ was. `given` has both prompts, and the shared segment if there is one; of an
// image's keys the launch of Z+ makes it. Z- goes to `place`, or without one into a new tensor.
template <class Params>
Tensor launch_nag(Params& given, const NagSettings& how, const Inputs& x, bool shared_aligned,
                  const std::optional<Tensor>& alpha_map, double alpha, int64_t text_pos,
                  int64_t text_neg, void* place = nullptr) {
    ForwardParams& p = call_of(given);
    const View& q = x.q;
    STD_TORCH_CHECK(how.norm == 1 || how.norm == 2, "nasa_kernels: nag_norm must be 1 or 2, got ",
                    how.norm);
    set_alpha(p, alpha_map, alpha, p.l - text_pos - text_neg, 1);
    NagParams nag{};
    nag.alpha_map = p.alpha_map;
    nag.alpha_stride_b = p.alpha_stride_b;
    nag.alpha_stride_l = p.alpha_stride_l;
    nag.rows = int64_t{p.b} * p.l;
    STD_TORCH_CHECK(nag.rows <= kMaxRows, "nasa_kernels: NAG takes at most ", kMaxRows,
                    " queries of all images, got ", nag.rows, "; split the batch");
    nag.l = p.l;
    nag.channels = p.h * p.d;
    nag.first_text_neg = p.l - static_cast<int>(text_neg);
    nag.first_text_pos = nag.first_text_neg - static_cast<int>(text_pos);
    nag.alpha = p.alpha;
    nag.scale = static_cast<float>(how.scale);
    nag.tau = static_cast<float>(how.tau);
    nag.norm = static_cast<int>(how.norm);
    nag.type = p.type;
    p.alpha_map = nullptr;
    p.alpha = 0.f;

    const Tensor o = contiguous_like(q);
    if (o.numel() == 0) return o;
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    const cudaStream_t stream = current_stream(q);
    const Prompt neg = p.prompt[kNeg];
    p.prompt[kNeg].n = 0;
    p.o = nag.o = o.mutable_data_ptr();
    check(forward(given, stream), q);
    if (nag.alpha_map == nullptr && nag.alpha == 0.f && text_neg == 0) return o;
    Tensor z_neg;
    if (place == nullptr) {
        z_neg = contiguous_like(q);
        place = z_neg.mutable_data_ptr();
    }
    p.prompt[kPos] = neg;
    // the negative text's queries attend as the positive one's do to theirs
    p.shared.first_text_pos = p.shared.first_text_neg = p.l;
    p.aligned = p.d % 8 == 0 && starts_on_16_bytes(q) && starts_on_16_bytes(x.k_neg) &&
                starts_on_16_bytes(x.v_neg) && shared_aligned;
    p.o = place;
    nag.z_neg = place;
    // equal prompts have equal bits: both halves are sums of one order
    constexpr bool kImage = std::is_same_v<Params, ImageParams>;
    check(kImage ? forward_beside_image(p, stream) : forward(p, stream), q);
    check(nag_blend(nag, stream), q);
    return o;
}

Tensor nag_cuda(const Tensor q, const Tensor k_pos, const Tensor v_pos, const Tensor k_neg,
                const Tensor v_neg, const std::optional<Tensor> mask_pos,
                const std::optional<Tensor> mask_neg, const std::optional<Tensor> alpha_map,
                double alpha, double scale, double nag_scale, double nag_tau, int64_t nag_norm) {
    const Inputs x{q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg};
    ForwardParams p = params_of(x, {}, 0., scale);
    return launch_nag(p, {nag_scale, nag_tau, nag_norm}, x, true, alpha_map, alpha, 0, 0);
}

// The same beside the keys that both prompts share.
Tensor nag_joint_cuda(const Tensor q, const Tensor k_pos, const Tensor v_pos, const Tensor k_neg,
                      const Tensor v_neg, const std::optional<Tensor> mask_pos,
                      const std::optional<Tensor> mask_neg, const std::optional<Tensor> alpha_map,
                      double alpha, double scale, const Tensor o_shared, const Tensor lse_shared,
                      double nag_scale, double nag_tau, int64_t nag_norm, int64_t text_pos,
                      int64_t text_neg) {
    const Inputs x{q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg};
    ForwardParams p = params_of(x, {}, 0., scale);
    set_shared_rows(p, x.q, o_shared, lse_shared, text_pos, text_neg);
    return launch_nag(p, {nag_scale, nag_tau, nag_norm}, x, starts_on_16_bytes(o_shared), alpha_map,
                      alpha, text_pos, text_neg);
}

Tensor nag_image_cuda(const Tensor q, const Tensor k, const Tensor v, const Tensor k_pos,
                      const Tensor v_pos, const Tensor k_neg, const Tensor v_neg,
                      const std::optional<Tensor> mask_pos, const std::optional<Tensor> mask_neg,
                      const std::optional<Tensor> alpha_map, double alpha, double scale,
                      double nag_scale, double nag_tau, int64_t nag_norm, int64_t text_pos,
                      int64_t text_neg) {
    const View image_k(k), image_v(v);
    const Inputs x{q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, &image_k, &image_v};
    const Scratch scratch(x.q, true);
    ImageParams p = image_params_of(x, {}, 0., scale, text_pos, text_neg, scratch.o, scratch.lse);
    return launch_nag(p, {nag_scale, nag_tau, nag_norm}, x, true, alpha_map, alpha, text_pos,
                      text_neg, scratch.z_neg);
}

// dO of a backward call, contiguous in d: the gradient of a sum is one number with strides of 0. The
// returned tensor must live until the launch.
Tensor set_grad(BackwardParams& p, const Tensor& grad_o, const Tensor& q) {
    const bool contiguous = grad_o.numel() == 0 || grad_o.size(3) == 1 || grad_o.stride(3) == 1;
    const Tensor grad = contiguous ? grad_o : torch::stable::contiguous(grad_o);
    check_rows(grad, "grad_o", q);
    STD_TORCH_CHECK(grad.size(1) == q.size(1), "nasa_kernels: grad_o must have the shape of q");
    p.grad_o = matrix_of(grad);
    p.call.aligned = p.call.aligned && starts_on_16_bytes(grad);
    return grad;
}

// Scratch of the blocks that share the query rows, and of the heads of a group; to keep until the launch
Tensor set_splits(BackwardParams& p, const Tensor& q) {
    p.splits = 1;
    check(backward_splits(p, p.splits), q);
    Tensor partial;
    if (p.splits > 1 || p.call.key_step != kWholeStep) {
        partial = torch::stable::new_empty(q, std::vector<int64_t>{p.splits, partial_elements(p)},
                                           std::make_optional(ScalarType::Float));
        p.partial = static_cast<float*>(partial.mutable_data_ptr());
    }
    return partial;
}

// The gradients that `needs` asks for, of q, k_pos, v_pos, k_neg, v_neg, alpha; the others are
// empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Tensor grad_o, const Tensor q, const Tensor k_pos, const Tensor v_pos, const Tensor k_neg,
    const Tensor v_neg, const std::optional<Tensor> mask_pos, const std::optional<Tensor> mask_neg,
    const std::optional<Tensor> alpha_map, double alpha, double scale,
    const std::vector<bool> needs) {
    STD_TORCH_CHECK(needs.size() == 6, "nasa_kernels: needs must be 6 flags, got ", needs.size());
    BackwardParams p{};
    p.call = params_of({q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg}, alpha_map, alpha, scale);
    // every row has a gradient of its own
    const int heads = key_heads(p.call);
    check_rows(k_pos, "k_pos", q, heads);
    check_rows(v_pos, "v_pos", q, heads);
    check_rows(k_neg, "k_neg", q, heads);
    check_rows(v_neg, "v_neg", q, heads);
    p.call.aligned = p.call.aligned && starts_on_16_bytes(k_neg) && starts_on_16_bytes(v_neg);
    const Tensor grad = set_grad(p, grad_o, q);

    const auto empty = [&](std::vector<int64_t> sizes, ScalarType type) {
        return torch::stable::new_empty(q, sizes, std::make_optional(type));
    };
    const auto gradient = [&](size_t i, const Tensor& like) {
        if (!needs[i]) return empty({0}, like.scalar_type());
        return empty({like.size(0), like.size(1), like.size(2), like.size(3)}, like.scalar_type());
    };
    const auto pointer = [&](size_t i, const Tensor& x) -> void* {
        return needs[i] && x.numel() > 0 ? x.mutable_data_ptr() : nullptr;
    };
    const Tensor dq = gradient(0, q);
    const Tensor dk_pos = gradient(1, k_pos), dv_pos = gradient(2, v_pos);
    const Tensor dk_neg = gradient(3, k_neg), dv_neg = gradient(4, v_neg);
    const Tensor dalpha = needs[5] ? empty({q.size(0), q.size(1), q.size(2)}, ScalarType::Float)
                                   : empty({0}, ScalarType::Float);
    p.dq = pointer(0, dq);
    p.dk[kPos] = pointer(1, dk_pos);
    p.dv[kPos] = pointer(2, dv_pos);
    p.dk[kNeg] = pointer(3, dk_neg);
    p.dv[kNeg] = pointer(4, dv_neg);
    p.dalpha = static_cast<float*>(pointer(5, dalpha));

    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    const Tensor rows = empty({2, 2, p.call.b, p.call.h, p.call.l}, ScalarType::Float);
    p.lse = static_cast<float*>(rows.mutable_data_ptr());
    p.u = p.lse + rows.numel() / 2;
    p.splits = 1;
    const Tensor partial = q.numel() > 0 ? set_splits(p, q) : Tensor();
    check(backward(p, current_stream(q)), q);
    return {dq, dk_pos, dv_pos, dk_neg, dv_neg, dalpha};
}

// The three launches of a joint attention's backward pass. Rows of numbers are fp32, one per head
// and query; of the three segments they are in the order shared, positive, negative.

const float* row_values(const Tensor& x, const char* name, const Tensor& q, bool segments) {
    const int64_t rows = q.size(0) * q.size(2) * q.size(1);
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() &&
                        x.get_device_index() == q.get_device_index() &&
                        x.numel() == (segments ? 3 * rows : rows),
                    "nasa_kernels: ", name, " must be fp32 ",
                    segments ? "[3, b, h, l]" : "[b, h, l]", ", contiguous, on the device of q");
    return static_cast<const float*>(x.const_data_ptr());
}

// lse in base 2 and u, [2, 3, b, h, l]; lse of the shared keys is left out
Tensor joint_statistics_cuda(const Tensor grad_o, const Tensor o_shared, const Tensor q,
                             const Tensor k_pos, const Tensor v_pos, const Tensor k_neg,
                             const Tensor v_neg, const std::optional<Tensor> mask_pos,
                             const std::optional<Tensor> mask_neg, double scale, int64_t text_pos,
                             int64_t text_neg) {
    BackwardParams p{};
    p.call = params_of({q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg}, {}, 0., scale);
    p.call.aligned = p.call.aligned && starts_on_16_bytes(k_neg) && starts_on_16_bytes(v_neg);
    const Tensor grad = set_grad(p, grad_o, q);
    set_shared(p.call, q, o_shared);
    set_text_rows(p.call, text_pos, text_neg);
    const Tensor rows =
        torch::stable::new_empty(q, std::vector<int64_t>{2, 3, q.size(0), q.size(2), q.size(1)},
                                 std::make_optional(ScalarType::Float));
    if (q.numel() == 0) return rows;
    p.lse = static_cast<float*>(rows.mutable_data_ptr()) + rows.numel() / 6;
    p.u = p.lse + rows.numel() / 2;
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    check(backward(p, current_stream(q)), q);
    return rows;
}

Tensor joint_queries_cuda(const Tensor grad_o, const Tensor o_shared, const Tensor q,
                          const Tensor k, const Tensor v, const Tensor k_pos, const Tensor v_pos,
                          const Tensor k_neg, const Tensor v_neg,
                          const std::optional<Tensor> mask_pos,
                          const std::optional<Tensor> mask_neg, const Tensor lse,
                          const Tensor weight, const Tensor shift, double scale, int64_t text_pos,
                          int64_t text_neg) {
    BackwardParams p{};
    p.call = params_of({q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg}, {}, 0., scale);
    check_rows(k, "k", q, key_heads(p.call));
    check_rows(v, "v", q, key_heads(p.call));
    p.image = prompt_of(k, v, {}, q);
    for (const Tensor& x : {k, v, k_neg, v_neg}) {
        p.call.aligned = p.call.aligned && starts_on_16_bytes(x);
    }
    const Tensor grad = set_grad(p, grad_o, q);
    set_shared(p.call, q, o_shared);
    set_text_rows(p.call, text_pos, text_neg);
    const Tensor dq = torch::stable::new_empty(
        q, std::vector<int64_t>{q.size(0), q.size(1), q.size(2), q.size(3)});
    if (q.numel() == 0) return dq;
    const int64_t rows = lse.numel() / 3;
    p.lse = const_cast<float*>(row_values(lse, "lse", q, true)) + rows;
    p.weight = row_values(weight, "weight", q, true) + rows;
    p.shift = row_values(shift, "shift", q, true) + rows;
    p.dq = dq.mutable_data_ptr();
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    check(backward(p, current_stream(q)), q);
    return dq;
}

// dK and dV of one segment, where `needs` asks for them. Rows [first_hidden, end_hidden) of q do
// not see it: their weight and shift are 0, and tiles of nothing else are not read.
std::tuple<Tensor, Tensor> joint_keys_cuda(const Tensor grad_o, const Tensor q, const Tensor k,
                                           const Tensor v, const std::optional<Tensor> mask,
                                           const Tensor lse, const Tensor weight,
                                           const Tensor shift, double scale, int64_t first_hidden,
                                           int64_t end_hidden, const std::vector<bool> needs) {
    STD_TORCH_CHECK(needs.size() == 2, "nasa_kernels: needs must be 2 flags, got ", needs.size());
    STD_TORCH_CHECK(0 <= first_hidden && first_hidden <= end_hidden && end_hidden <= q.size(1),
                    "nasa_kernels: hidden rows must be among the ", q.size(1), " rows of q, got ",
                    first_hidden, " to ", end_hidden);
    BackwardParams p{};
    p.call = params_of({q, k, v, k, v, mask, {}}, {}, 0., scale);
    check_rows(k, "k", q, key_heads(p.call));
    check_rows(v, "v", q, key_heads(p.call));
    p.call.prompt[kNeg].n = 0;
    const Tensor grad = set_grad(p, grad_o, q);
    const int tiles = (p.call.l + kBackwardRows - 1) / kBackwardRows;
    // a last tile that is not full has no more rows to see
    const int end = end_hidden == p.call.l ? tiles : static_cast<int>(end_hidden / kBackwardRows);
    p.first_hidden = static_cast<int>((first_hidden + kBackwardRows - 1) / kBackwardRows);
    p.hidden = std::max(0, end - p.first_hidden);
    const bool empty =
        q.numel() == 0 || k.numel() == 0 || p.hidden == tiles || !(needs[0] || needs[1]);
    const auto gradient = [&](bool needed) {
        const std::vector<int64_t> sizes =
            needed ? std::vector<int64_t>{k.size(0), k.size(1), k.size(2), k.size(3)}
                   : std::vector<int64_t>{0};
        return empty ? torch::stable::new_zeros(q, sizes) : torch::stable::new_empty(q, sizes);
    };
    const Tensor dk = gradient(needs[0]), dv = gradient(needs[1]);
    if (empty) return {dk, dv};
    p.dk[kPos] = needs[0] ? dk.mutable_data_ptr() : nullptr;
    p.dv[kPos] = needs[1] ? dv.mutable_data_ptr() : nullptr;
    p.lse = const_cast<float*>(row_values(lse, "lse", q, false));
    p.weight = row_values(weight, "weight", q, false);
    p.shift = row_values(shift, "shift", q, false);
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    const Tensor partial = set_splits(p, q);
    Device device;
    check(current_device(device), q);
    check(backward_keys(p, device, current_stream(q)), q);
    return {dk, dv};
}

}  // namespace
}  // namespace nasa

// The host's side is timed on CPU tensors, with a CUDA runtime that launches nothing.
#ifndef NASA_DEVICE
#define NASA_DEVICE CUDA
#endif
// Hugging Face's kernel-builder names the namespace of each build and loads it as a Python module. The
// macros are of its registration.h, which integrations/hf-kernels/aot/torch_binding.cpp includes.
#ifdef TORCH_EXTENSION_NAME
REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
#define NASA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, NASA_DEVICE, m)
#else
#define NASA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(nasa_kernels, NASA_DEVICE, m)
#endif
NASA_LIBRARY(m) {
    m.impl("forward_cuda", TORCH_BOX(&nasa::forward_cuda));
    m.impl("forward_joint_cuda", TORCH_BOX(&nasa::forward_joint_cuda));
    m.impl("nag_cuda", TORCH_BOX(&nasa::nag_cuda));
    m.impl("nag_joint_cuda", TORCH_BOX(&nasa::nag_joint_cuda));
    m.impl("forward_image_cuda", TORCH_BOX(&nasa::forward_image_cuda));
    m.impl("attention_image_cuda", TORCH_BOX(&nasa::attention_image_cuda));
    m.impl("nag_image_cuda", TORCH_BOX(&nasa::nag_image_cuda));
    m.impl("backward_cuda", TORCH_BOX(&nasa::backward_cuda));
    m.impl("joint_statistics_cuda", TORCH_BOX(&nasa::joint_statistics_cuda));
    m.impl("joint_queries_cuda", TORCH_BOX(&nasa::joint_queries_cuda));
    m.impl("joint_keys_cuda", TORCH_BOX(&nasa::joint_keys_cuda));
}

// For nasa_kernels/_cuda/extension.py
extern "C" __attribute__((visibility("default"))) void nasa_kernels_overlap_launches(bool on) {
    nasa::overlap_launches(on);
}

// For nasa_kernels/_cuda/extension.py, once per device: the CUDA version of the runtime in this
// file, the newest that the driver serves (0 without a driver), both as 1000 major + 10 minor, and
// what there is code for, as in cmake/cuda.cmake, with commas.
extern "C" __attribute__((visibility("default"))) int nasa_kernels_cuda_version() {
    return CUDART_VERSION;
}

extern "C" __attribute__((visibility("default"))) int nasa_kernels_driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

extern "C" __attribute__((visibility("default"))) const char* nasa_kernels_architectures() {
    return NASA_CUDA_ARCHS;
}

// For nasa_kernels/_cuda/extension.py, before a call: the least shared memory of a head_dim.
extern "C" __attribute__((visibility("default"))) int nasa_kernels_shared_bytes(int head_dim,
                                                                                bool backward) {
    const int d = nasa::padded_head_dim(head_dim);
    return backward ? nasa::backward_shared_bytes(d) : nasa::long_shared_bytes(d);
}
