// What both bindings.cpp take alike from their arguments: masks and maps of alpha.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

namespace nasa {

// What a tensor is, asked for once: every question to PyTorch is a call into its library, and the
// checks of one operator would ask two hundred. The tensor must live as long.
namespace {  // torch::stable::Tensor is hidden, and so is what has one
class View {
public:
    View(const torch::stable::Tensor& x) {  // NOLINT: where a view is wanted, a tensor is one
        int64_t *sizes = nullptr, *strides = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(x.get(), &dim_));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x.get(), &sizes));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x.get(), &strides));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype_));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_));
        TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(x.get(), &data_));
        tensor_ = &x;
        sizes_ = sizes;
        strides_ = strides;
    }

    const torch::stable::Tensor& tensor() const { return *tensor_; }
    int64_t dim() const { return dim_; }
    int64_t size(int64_t i) const { return sizes_[i]; }
    int64_t stride(int64_t i) const { return strides_[i]; }
    int64_t numel() const {
        int64_t product = 1;
        for (int64_t i = 0; i < dim_; ++i) product *= sizes_[i];
        return product;
    }
    int32_t dtype() const { return dtype_; }  // of PyTorch's C interface
    torch::headeronly::ScalarType scalar_type() const { return tensor_->scalar_type(); }
    int32_t get_device_index() const { return device_; }
    const void* const_data_ptr() const { return data_; }

private:
    const torch::stable::Tensor* tensor_;
    const int64_t *sizes_, *strides_;
    const void* data_ = nullptr;
    int64_t dim_ = 0;
    int32_t dtype_ = 0, device_ = 0;
};
}  // namespace

// One for all is a dimension of size 1, which is read again and again.
inline bool is_one_or(int64_t size, int64_t whole) { return size == whole || size == 1; }
template <class X>
int64_t stride_of(const X& x, int64_t dim) {
    return x.size(dim) == 1 ? 0 : x.stride(dim);
}

// The Mask of nasa.h or of cpu/nasa_cpu.h; k and q are tensors or views of them
template <class Mask, class X>
Mask mask_of(const std::optional<torch::stable::Tensor>& mask, const X& k, const X& q) {
    using Type = decltype(Mask::type);
    using torch::headeronly::ScalarType;
    if (!mask.has_value()) return {nullptr, 0, 0, Type::kNone};
    STD_TORCH_CHECK(mask->dim() == 2 && is_one_or(mask->size(0), q.size(0)) &&
                        mask->size(1) == k.size(1) &&
                        mask->get_device_index() == q.get_device_index(),
                    "nasa_kernels: a mask must be [b or 1, n], on the device of q");
    const auto type = [&] {
        switch (mask->scalar_type()) {
            case ScalarType::Bool: return Type::kBool;
            case ScalarType::Float: return Type::kFloat;
            case ScalarType::Half: return Type::kHalf;
            case ScalarType::BFloat16: return Type::kBfloat16;
            default:
                STD_TORCH_CHECK(false, "nasa_kernels: a mask must be bool, fp32, fp16 or bf16");
        }
        return Type::kNone;
    }();
    return {mask->const_data_ptr(), stride_of(*mask, 0), mask->stride(1), type};
}

// The map, of anything that broadcasts to [b, rows, heads], or the number
template <class Params>
void set_alpha(Params& p, const std::optional<torch::stable::Tensor>& map, double number,
               int64_t rows, int64_t heads) {
    p.alpha_map = nullptr;
    p.alpha = static_cast<float>(number);
    int64_t strides[3] = {0, 0, 0};
    if (map.has_value()) {
        const int64_t sizes[3] = {p.b, rows, heads}, absent = 3 - map->dim();
        bool fits = absent >= 0 && map->scalar_type() == torch::headeronly::ScalarType::Float;
        for (int64_t i = 0; fits && i < map->dim(); ++i) {
            fits = is_one_or(map->size(i), sizes[absent + i]);
            strides[absent + i] = stride_of(*map, i);
        }
        STD_TORCH_CHECK(fits, "nasa_kernels: alpha_map must be fp32 and broadcast to [", p.b, ", ",
                        rows, ", ", heads, "]");
        p.alpha_map = static_cast<const float*>(map->const_data_ptr());
    }
    p.alpha_stride_b = strides[0];
    p.alpha_stride_l = strides[1];
    p.alpha_stride_h = strides[2];
}

}  // namespace nasa
