// What both bindings.cpp take alike from their arguments: masks and maps of alpha.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

namespace nasa {

// The Mask of nasa.h or of cpu/nasa_cpu.h
template <class Mask>
Mask mask_of(const std::optional<torch::stable::Tensor>& mask, const torch::stable::Tensor& k) {
    using Type = decltype(Mask::type);
    using torch::headeronly::ScalarType;
    if (!mask.has_value()) return {nullptr, 0, 0, Type::kNone};
    STD_TORCH_CHECK(mask->dim() == 2 && mask->size(0) == k.size(0) && mask->size(1) == k.size(1),
                    "nasa_kernels: a mask must be [b, n]");
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
    return {mask->const_data_ptr(), mask->stride(0), mask->stride(1), type};
}

// The map of `rows` queries and `heads` heads, or the number
template <class Params>
void set_alpha(Params& p, const std::optional<torch::stable::Tensor>& map, double number,
               int64_t rows, int64_t heads) {
    p.alpha_map = nullptr;
    p.alpha_stride_b = p.alpha_stride_l = p.alpha_stride_h = 0;
    p.alpha = static_cast<float>(number);
    if (!map.has_value()) return;
    STD_TORCH_CHECK(map->dim() == 3 && map->size(0) == p.b && map->size(1) == rows &&
                        map->size(2) == heads &&
                        map->scalar_type() == torch::headeronly::ScalarType::Float,
                    "nasa_kernels: alpha_map must be fp32 [", p.b, ", ", rows, ", ", heads, "]");
    p.alpha_map = static_cast<const float*>(map->const_data_ptr());
    p.alpha_stride_b = map->stride(0);
    p.alpha_stride_l = map->stride(1);
    p.alpha_stride_h = heads == 1 ? 0 : map->stride(2);
}

}  // namespace nasa
