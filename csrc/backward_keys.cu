// Backward over the keys: dK+-, dV+- (sm_80 and up). Runs after backward_queries.cu.
//
//     dK = scale * dS^T Q,  dV = (w P)^T dO,  dS = P * (w dO V^T + shift),  shift = -w u
//
// For one segment of a joint attention it is launched alone: nasa.h has its shift.
//
// A block owns 80 keys of one prompt and head, or 64, 16 per warp, and walks over the query rows in
// tiles of 64. It works on transposed tiles, keys by rows: P^T and dS^T come out of one product as
// the A operand of the next, a few rows at a time, so that an SM has registers for two blocks. Where
// there are few keys, several blocks share the rows of one tile of keys; their partial sums are added
// in a fixed order by a second kernel, so no atomics, and the same bits every time.
#include "launch.h"
#include "softmax.cuh"

namespace nasa {
namespace {

template <int kD>
struct KeysLayout {
    static constexpr int kColumns = backward_columns(kD);
    static constexpr int kShares = kD / kColumns;
    static constexpr int kKeys = keys_tile(kD);
    static constexpr int kThreads = kKeys / kWarpRows * kWarpSize;
    static constexpr int kStep = keys_step(kD);
    static constexpr int kStages = keys_stages(kD);
    // K, V [kKeys, kD]; per stage Q, dO [64, kD] and lse, shift, w [64] in fp32
    static constexpr int kV = tile_bytes(kKeys, kD);
    static constexpr int kStage = 2 * kV;
    static constexpr int kGrad = tile_bytes(kBackwardRows, kD);
    static constexpr int kRowValues = 2 * kGrad;
    static constexpr int kStageBytes =
        kRowValues + 3 * kBackwardRows * static_cast<int>(sizeof(float));
    static constexpr int kBytes = kStage + kStages * kStageBytes;
    static_assert(kBytes == keys_shared_bytes(kD), "bindings refuse a head_dim by this size");
};

// Of K or V of a prompt, as every head of Q has them
__host__ __device__ __forceinline__ int64_t prompt_elements(const BackwardParams& p, int side) {
    return static_cast<int64_t>(p.call.b) * p.call.prompt[side].n * p.call.h * p.call.d;
}

// Write c [16, 8 * kTiles], rows = keys, columns from `column`: to `partial` in fp32 where blocks
// share the rows, else rounded to `target`. Both are [b, n, h, d] here.
template <typename T, int kPitch, int kTiles>
__device__ __forceinline__ void store_gradient(const BackwardParams& p, void* target,
                                               float* partial, unsigned char* warp_tile,
                                               const float (&c)[kTiles][4], int b, int first_key,
                                               int n, int h, int column) {
    const int d = p.call.d;
    const int64_t stride = static_cast<int64_t>(p.call.h) * d;
    const int64_t offset = ((static_cast<int64_t>(b) * n + first_key) * p.call.h + h) * d + column;
    if (partial == nullptr) {
        __syncwarp();
        stage<T, kPitch>(warp_tile, 0, c);
        __syncwarp();
        store_rows<8 * kTiles>(static_cast<uint16_t*>(target) + offset, stride, warp_tile,
                               n - first_key, d - column, p.call.aligned);
        return;
    }
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8;
            const int col = 8 * j + lane % 4 * 2 + i % 2;
            if (first_key + row < n && column + col < d) {
                partial[offset + row * stride + col] = c[j][i];
            }
        }
    }
}

template <typename T, int kD>
__global__ void __launch_bounds__(KeysLayout<kD>::kThreads, keys_resident(kD))
    backward_keys_kernel(const __grid_constant__ BackwardParams p) {
    using Layout = KeysLayout<kD>;
    constexpr int kColumns = Layout::kColumns;
    constexpr int kPitch = Tile<kD>::kPitch;
    constexpr int kKeys = Layout::kKeys, kThreads = Layout::kThreads, kStep = Layout::kStep;
    const ForwardParams& call = p.call;
    extern __shared__ __align__(16) unsigned char smem[];

    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int blocks_pos = (call.prompt[kPos].n + kKeys - 1) / kKeys;
    const int blocks = blocks_pos + (call.prompt[kNeg].n + kKeys - 1) / kKeys;
    int index = blockIdx.x;
    const int h = uniform(index % call.h);
    index /= call.h;
    const int column = index % Layout::kShares * kColumns;
    index /= Layout::kShares;
    const int block = index % blocks;
    index /= blocks;
    const int split = index % p.splits;
    const int b = uniform(index / p.splits);

    const int side = block < blocks_pos ? kPos : kNeg;
    if (p.dk[side] == nullptr && p.dv[side] == nullptr) return;
    const Prompt& prompt = call.prompt[side];
    const int first_key = (side == kPos ? block : block - blocks_pos) * kKeys;
    // The row of an absent key may hold NaN. Its weights are 0, and so must its products be.
    const auto present = [&](int key) {
        return key_bias(prompt.mask, b, key, prompt.n) != -INFINITY;
    };
    load_tile<kD, kKeys, kThreads>(
        smem,
        key_rows_of(prompt.k, b, h, call),
        first_key, 0, threadIdx.x, present);
    load_tile<kD, kKeys, kThreads>(
        smem + Layout::kV,
        key_rows_of(prompt.v, b, h, call),
        first_key, 0, threadIdx.x, present);

    const int64_t row_values = ((static_cast<int64_t>(side) * call.b + b) * call.h + h) * call.l;
    const auto load_rows = [&](int tile) {
        unsigned char* stage =
            smem + Layout::kStage + tile % Layout::kStages * Layout::kStageBytes;
        const int first = (tile < p.first_hidden ? tile : tile + p.hidden) * kBackwardRows;
        const auto exists = [&](int row) { return row < call.l; };
        load_tile<kD, kBackwardRows, kThreads>(
            stage,
            rows_of(call.q, b, h, call),
            first, 0, threadIdx.x, exists);
        load_tile<kD, kBackwardRows, kThreads>(
            stage + Layout::kGrad,
            rows_of(p.grad_o, b, h, call),
            first, 0, threadIdx.x, exists);
        ptx::cp_async_commit();
        if (threadIdx.x < kBackwardRows) {
            float* values = reinterpret_cast<float*>(stage + Layout::kRowValues) + threadIdx.x;
            const int row = first + threadIdx.x;
            const bool valid = row < call.l;
            // exp2(score - inf) is 0: rows that do not exist have no weights
            float lse = INFINITY, shift = 0.f, weight = 0.f;
            if (valid) {
                lse = p.lse[row_values + row];
                if (p.weight != nullptr) {
                    weight = p.weight[row_values + row];
                    shift = p.shift[row_values + row];
                } else {
                    weight = side == kPos ? 1.f : -alpha_of(call, b, row, h);
                    shift = -weight * p.u[row_values + row];
                }
            }
            values[0] = lse;
            values[kBackwardRows] = shift;
            values[2 * kBackwardRows] = weight;
        }
    };

    const int tiles = (call.l + kBackwardRows - 1) / kBackwardRows - p.hidden;
    const int per_split = (tiles + p.splits - 1) / p.splits;
    const int first_tile = split * per_split;
    const int last_tile = min(first_tile + per_split, tiles);
    if (first_tile < last_tile) load_rows(first_tile);

    unsigned char* warp_keys = smem + warp * kWarpRows * kPitch;
    const uint32_t k = ptx::shared_address(warp_keys);
    const int key = first_key + warp * kWarpRows + lane / 4;
    const float bias[2] = {key_bias(prompt.mask, b, key, prompt.n),
                           key_bias(prompt.mask, b, key + 8, prompt.n)};
    // [16, kColumns] of this warp
    float dk[kColumns / 8][4], dv[kColumns / 8][4];
    clear(dk);
    clear(dv);
    for (int tile = first_tile; tile < last_tile; ++tile) {
        if (Layout::kStages == 2 && tile + 1 < last_tile) {
            load_rows(tile + 1);
            ptx::cp_async_wait<1>();
        } else {
            ptx::cp_async_wait<0>();
        }
        __syncthreads();
        unsigned char* stage =
            smem + Layout::kStage + tile % Layout::kStages * Layout::kStageBytes;
        const uint32_t q = ptx::shared_address(stage);
        const uint32_t grad = q + Layout::kGrad;
        const float* values = reinterpret_cast<const float*>(stage + Layout::kRowValues);

#pragma unroll 1
        for (int row = 0; row < kBackwardRows; row += kStep) {
            const uint32_t q_rows = q + row * kPitch, grad_rows = grad + row * kPitch;
            // S^T and dP^T [16 keys, kStep rows]
            float s[kStep / 8][4], dp[kStep / 8][4];
            clear(s);
            clear(dp);
            multiply_transposed<T, kD>(s, k, q_rows);
            multiply_transposed<T, kD>(dp, k + Layout::kV, grad_rows);
#pragma unroll
            for (int j = 0; j < kStep / 8; ++j) {
                // of the two rows that this lane has of column tile j
                const auto two = [&](int which) {
                    return *reinterpret_cast<const float2*>(values + which * kBackwardRows + row +
                                                            8 * j + lane % 4 * 2);
                };
                const float2 lse = two(0), shift = two(1), weight = two(2);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const auto mine = [&](float2 x) { return i % 2 == 0 ? x.x : x.y; };
                    const float score = fmaf(s[j][i], call.scale, bias[i / 2]);
                    const float probability = ptx::exp2(score - mine(lse));
                    s[j][i] = probability * mine(weight);
                    dp[j][i] = probability * fmaf(mine(weight), dp[j][i], mine(shift));
                }
            }
            uint32_t weights[kStep / 16][4], ds[kStep / 16][4];
            pack_fragments<T>(weights, s);
            pack_fragments<T>(ds, dp);
            multiply<T, kPitch>(dv, weights, grad_rows + 2 * column);
            multiply<T, kPitch>(dk, ds, q_rows + 2 * column);
        }
        __syncthreads();  // no warp reads this stage any more
        if (Layout::kStages == 1 && tile + 1 < last_tile) load_rows(tile + 1);
    }
    ptx::cp_async_wait<0>();

    // the softmax scale itself: the kernels carry it times log2(e)
    const float scale = call.scale / kLog2E;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dk[j][i] *= scale;
    }
    float* partial = nullptr;
    if (p.partial != nullptr) {
        const int64_t pos = prompt_elements(p, kPos);
        // the split, divided out once more: no register keeps it that long
        const int64_t of_split = blockIdx.x / (call.h * Layout::kShares * blocks) % p.splits;
        partial = p.partial + of_split * 2 * (pos + prompt_elements(p, kNeg)) +
                  (side == kPos ? 0 : 2 * pos);
    }
    // this warp's rows of K are used up: they take dK, then dV
    constexpr int kOutPitch = Tile<kColumns>::kPitch;
    const int warp_key = first_key + warp * kWarpRows;
    if (p.dk[side] != nullptr) {
        store_gradient<T, kOutPitch>(p, p.dk[side], partial, warp_keys, dk, b, warp_key, prompt.n,
                                     h, column);
    }
    if (p.dv[side] != nullptr) {
        float* partial_dv = partial == nullptr ? nullptr : partial + prompt_elements(p, side);
        store_gradient<T, kOutPitch>(p, p.dv[side], partial_dv, warp_keys, dv, b, warp_key,
                                     prompt.n, h, column);
    }
}

// out [b, n, h_kv, d] = sum of the splits, and of the heads of a group, in their order, rounded once.
// blockIdx.y: dK+, dV+, dK-, dV-
template <typename T>
__global__ void __launch_bounds__(256) sum_splits_kernel(const __grid_constant__ BackwardParams p) {
    const int side = blockIdx.y / 2;
    T* out = static_cast<T*>(blockIdx.y % 2 == 0 ? p.dk[side] : p.dv[side]);
    if (out == nullptr) return;
    const int64_t pos = prompt_elements(p, kPos);
    const int64_t neg = prompt_elements(p, kNeg);
    const int64_t elements = side == kPos ? pos : neg;
    const float* partial = p.partial + (side == kPos ? 0 : 2 * pos) + blockIdx.y % 2 * elements;
    const int group = p.call.h / key_heads(p.call), d = p.call.d;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
         i < elements / group; i += step) {
        // of the first head of the group
        const float* first = partial + i + (group == 1 ? 0 : i / d * (group - 1) * d);
        float sum = 0.f;
        for (int split = 0; split < p.splits; ++split) {
            for (int j = 0; j < group; ++j) sum += first[split * 2 * (pos + neg) + j * d];
        }
        out[i] = static_cast<T>(sum);
    }
}

int64_t key_blocks(const BackwardParams& p) {
    const int keys = keys_tile(padded_head_dim(p.call.d));
    return ceil_div(p.call.prompt[kPos].n, keys) + ceil_div(p.call.prompt[kNeg].n, keys);
}

template <typename T, int kD>
cudaError_t launch_keys(const BackwardParams& p, const Device& device, cudaStream_t stream) {
    const int64_t blocks = static_cast<int64_t>(p.call.b) * p.splits * key_blocks(p) *
                           KeysLayout<kD>::kShares * p.call.h;
    if (const cudaError_t error = launch<backward_keys_kernel<T, kD>>(
            device, blocks, KeysLayout<kD>::kThreads, KeysLayout<kD>::kBytes, stream, p)) {
        return error;
    }
    if (p.partial == nullptr) return cudaSuccess;
    const int64_t elements = std::max(prompt_elements(p, kPos), prompt_elements(p, kNeg));
    const dim3 grid(
        static_cast<unsigned>(std::min<int64_t>(ceil_div(elements, 256), 4 * device.sms)), 4);
    sum_splits_kernel<T><<<grid, 256, 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace

int64_t partial_elements(const BackwardParams& p) {
    return 2 * (prompt_elements(p, kPos) + prompt_elements(p, kNeg));
}

cudaError_t backward_splits(const BackwardParams& p, int& splits) {
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    const int d = padded_head_dim(p.call.d);
    const int64_t blocks =
        std::max<int64_t>(1, p.call.b * p.call.h * key_blocks(p) * (d / backward_columns(d)));
    // two blocks per SM, and at least two tiles of rows for each
    const int64_t tiles = ceil_div(p.call.l, kBackwardRows) - p.hidden;
    splits = static_cast<int>(std::max<int64_t>(1, std::min(2 * device.sms / blocks, tiles / 2)));
    return cudaSuccess;
}

cudaError_t backward_keys(const BackwardParams& p, const Device& device, cudaStream_t stream) {
    return dispatch(p.call.type, p.call.d, [&](auto type, auto head_dim) {
        return launch_keys<typename decltype(type)::type, head_dim>(p, device, stream);
    });
}

}  // namespace nasa
