// The tensor maps by which TMA reads and writes a call's tensors: the host's side (sm_90a).
#pragma once

#include <cuda.h>

#include <atomic>

#include "layouts.h"

namespace nasa::sm90 {

constexpr int kGroupRows = 64;  // the m of wgmma
constexpr int kAtomColumns = 64;

// A tensor map, and what a step in h (head_at of layouts.h) and b adds to its coordinates: 0 where one
// head, or one batch element, is read for all.
struct Mapped {
    CUtensorMap map;  // [b, h, rows, d], boxes of [1, 1, rows of a tile, 64]
    uint32_t step_h;
    int step_b;
    int first_row;  // 0, or past the last row for a prompt without keys: TMA then brings zeros
};

struct Params {
    Mapped q, o, o_shared;
    Mapped k[2], v[2];  // kPos, kNeg
    ForwardParams call;
};

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: nothing links libcuda.
inline cudaError_t find_encode(Encode& encode) {
    static std::atomic<void*> found{nullptr};
    void* function = found.load(std::memory_order_relaxed);
    if (function == nullptr) {
        cudaDriverEntryPointQueryResult result;
        if (const cudaError_t error = cudaGetDriverEntryPointByVersion(
                "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result)) {
            return error;
        }
        if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
        found.store(function, std::memory_order_relaxed);
    }
    encode = reinterpret_cast<Encode>(function);
    return cudaSuccess;
}

// A map of [b, rows, h, d] in memory, as [b, h, rows, d]; `step` of a head of Q, over the heads that x
// has. A dimension that does not move (one element, or stride 0) is one element long, and its
// coordinate stays 0.
inline cudaError_t map_tensor(Mapped& t, const ForwardParams& p, const Matrix& x, uint32_t step,
                              int rows, int box_rows) {
    Encode encode;
    if (const cudaError_t error = find_encode(encode)) return error;
    const int heads = p.h == 0 ? 0 : head_at(step, p.h - 1) + 1;
    t.step_h = heads > 1 && x.stride_h != 0 ? step : 0;
    t.step_b = p.b > 1 && x.stride_b != 0;
    t.first_row = 0;
    constexpr cuuint64_t kAnyStride = 16;
    const bool rows_move = rows > 1;
    const cuuint64_t sizes[4] = {cuuint64_t(p.d), cuuint64_t(rows), t.step_h ? cuuint64_t(heads) : 1,
                                 t.step_b ? cuuint64_t(p.b) : 1};
    const cuuint64_t strides[3] = {rows_move ? cuuint64_t(x.stride_row) * 2 : kAnyStride,
                                   t.step_h ? cuuint64_t(x.stride_h) * 2 : kAnyStride,
                                   t.step_b ? cuuint64_t(x.stride_b) * 2 : kAnyStride};
    const cuuint32_t box[4] = {kAtomColumns, cuuint32_t(box_rows), 1, 1};
    const cuuint32_t elements[4] = {1, 1, 1, 1};
    const CUresult result = encode(
        &t.map,
        p.type == Type::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        4, const_cast<void*>(x.data), sizes, strides, box, elements, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Everything of a call; K and V come in tiles of `keys` rows.
inline cudaError_t map_call(Params& params, const ForwardParams& p, int keys) {
    params.call = p;
    const int64_t o_stride = static_cast<int64_t>(p.h) * p.d;
    const Matrix o{p.o, p.l * o_stride, o_stride, p.d};
    if (const cudaError_t error = map_tensor(params.q, p, p.q, kWholeStep, p.l, kGroupRows)) return error;
    if (const cudaError_t error = map_tensor(params.o, p, o, kWholeStep, p.l, kGroupRows)) return error;
    if (is_joint(p)) {
        if (const cudaError_t error =
                map_tensor(params.o_shared, p, p.shared.o, kWholeStep, p.l, kGroupRows)) {
            return error;
        }
    }
    for (int side : {kPos, kNeg}) {
        const Prompt& prompt = p.prompt[side];
        if (prompt.n == 0) {
            // past the last row of any tensor there are zeros
            const Matrix any{p.q.data, 0, p.q.stride_row, 0};
            if (const cudaError_t error = map_tensor(params.k[side], p, any, kWholeStep, p.l, keys)) {
                return error;
            }
            params.k[side].first_row = p.l;
            params.v[side] = params.k[side];
            continue;
        }
        if (const cudaError_t error = map_tensor(params.k[side], p, prompt.k, p.key_step, prompt.n, keys)) {
            return error;
        }
        if (const cudaError_t error = map_tensor(params.v[side], p, prompt.v, p.key_step, prompt.n, keys)) {
            return error;
        }
    }
    return cudaSuccess;
}

}  // namespace nasa::sm90
