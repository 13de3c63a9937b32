// Backward over the queries: dQ, dalpha, and what backward_keys.cu needs of each row (sm_80 and
// up).
//
//     u+- = rowsum(P+- * (dO V+-^T)),  dS+- = w+- P+- * (dO V+-^T - u+-),  w+ = 1, w- = -alpha
//     dQ = scale * (dS+ K+ + dS- K-),  dalpha = -u-
//
// Nothing but the inputs comes from the forward pass. A block owns 64 query rows of one head, 16
// per warp. Per prompt it walks over the keys once for the softmax and u together, both online, and
// once more for dS. The last block of keys is still on chip then: a prompt of up to 80 keys, which
// is one block, is read once and its scores are made once. The columns of a head_dim above 128 are
// shared by two blocks or four.
//
// A joint attention runs it twice, because its weights stand between the two walks: first for lse
// and u, those of the shared keys from the O_s that the forward pass kept, then for dQ.
#include "launch.h"
#include "rules.cuh"

namespace nasa {
namespace {

template <int kD>
struct QueriesLayout {
    static constexpr int kColumns = backward_columns(kD);
    static constexpr int kShares = kD / kColumns;
    // Q, dO [64, kD]; K, V [80, kD]; bias [80] in fp32
    static constexpr int kGrad = tile_bytes(kBackwardRows, kD);
    static constexpr int kK = 2 * kGrad;
    static constexpr int kV = kK + tile_bytes(kBackwardKeys, kD);
    static constexpr int kBias = kV + tile_bytes(kBackwardKeys, kD);
    static constexpr int kBytes = kBias + kBackwardKeys * static_cast<int>(sizeof(float));
    static_assert(kBytes == queries_shared_bytes(kD), "bindings refuse a head_dim by this size");
    static_assert(kBackwardRows == kWarps * kWarpRows, "a warp owns 16 rows");
};

template <typename T, int kD>
__global__ void __launch_bounds__(kThreads, 1)
    backward_queries_kernel(const __grid_constant__ BackwardParams p) {
    using Layout = QueriesLayout<kD>;
    constexpr int kTiles = kBackwardKeys / 8;
    constexpr int kColumns = Layout::kColumns;
    const ForwardParams& call = p.call;
    extern __shared__ __align__(16) unsigned char smem[];
    unsigned char* k_tile = smem + Layout::kK;
    unsigned char* v_tile = smem + Layout::kV;
    float* bias = reinterpret_cast<float*>(smem + Layout::kBias);

    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int row_tiles = (call.l + kBackwardRows - 1) / kBackwardRows;
    int index = blockIdx.x;
    const int h = index % call.h;
    index /= call.h;
    const int column = index % Layout::kShares * kColumns;
    index /= Layout::kShares;
    const int first_row = index % row_tiles * kBackwardRows;
    const int b = index / row_tiles;
    const auto load_rows = [&](unsigned char* tile, const Matrix& x) {
        load_tile<kD, kBackwardRows, kThreads>(
            tile, rows_of(x, b, h, call),
            first_row, 0, threadIdx.x, [&](int row) { return row < call.l; });
    };
    load_rows(smem, call.q);
    load_rows(smem + Layout::kGrad, p.grad_o);
    ptx::cp_async_commit();

    unsigned char* q_rows = smem + warp * kWarpRows * Tile<kD>::kPitch;
    const uint32_t q = ptx::shared_address(q_rows);
    const uint32_t grad = q + Layout::kGrad;
    const uint32_t k = ptx::shared_address(k_tile);
    const uint32_t v = ptx::shared_address(v_tile);
    // this lane's rows
    const int rows[2] = {first_row + warp * kWarpRows + lane / 4,
                         first_row + warp * kWarpRows + lane / 4 + 8};

    const auto statistic = [&](int side, int row) {
        const int64_t head = static_cast<int64_t>(b) * call.h + h;
        return (side * static_cast<int64_t>(call.b) * call.h + head) * call.l + row;
    };

    // [16, 80] of this warp: scores or weights, and dP = dO V^T; [16, kColumns]: dQ
    float s[kTiles][4], dp[kTiles][4], dq[kColumns / 8][4];
    clear(dq);
    const bool weighed = p.weight != nullptr;
    const bool joint = is_joint(call);
    for (int side = weighed ? kShared : kPos; side <= kNeg; ++side) {
        const Prompt& prompt = side == kShared ? p.image : call.prompt[side];
        const bool seen = side == kShared || attends(call, side, first_row, kBackwardRows);
        const int blocks = seen ? (prompt.n + kBackwardKeys - 1) / kBackwardKeys : 0;
        const auto make_scores = [&](int block) {
            const int first = block * kBackwardKeys;
            __syncthreads();  // no warp reads the block before any more
            if (threadIdx.x < kBackwardKeys) {
                bias[threadIdx.x] = key_bias(prompt.mask, b, first + threadIdx.x, prompt.n);
            }
            __syncthreads();
            // the rows of an absent key may hold NaN, and 0 * NaN is not 0
            const auto present = [&](int key) { return bias[key - first] != -INFINITY; };
            load_tile<kD, kBackwardKeys, kThreads>(
                k_tile,
                key_rows_of(prompt.k, b, h, call),
                first, 0, threadIdx.x, present);
            load_tile<kD, kBackwardKeys, kThreads>(
                v_tile,
                key_rows_of(prompt.v, b, h, call),
                first, 0, threadIdx.x, present);
            ptx::cp_async_commit();
            ptx::cp_async_wait<0>();
            __syncthreads();
            clear(s);
            clear(dp);
            multiply_transposed<T, kD>(s, q, k);
            multiply_transposed<T, kD>(dp, grad, v);
            return finish_any_scores(s, prompt, call.scale, bias, first);
        };

        // dS = P * (weight * dP + shift)
        float inverse[2], lse[2], weight[2], shift[2];
        if (weighed) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const bool exists = rows[r] < call.l;
                const int64_t i = statistic(side, rows[r]);
                lse[r] = exists ? p.lse[i] : INFINITY;
                weight[r] = exists ? p.weight[i] : 0.f;
                shift[r] = exists ? p.shift[i] : 0.f;
            }
        } else {
            OnlineSoftmax softmax;
            float u[2] = {0.f, 0.f};
            for (int block = 0; block < blocks; ++block) {
                const float left = make_scores(block);
                float rescale[2];
                softmax.push(s, left, rescale);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float partial = 0.f;
#pragma unroll
                    for (int j = 0; j < kTiles; ++j) {
                        partial = fmaf(s[j][2 * r], dp[j][2 * r], partial);
                        partial = fmaf(s[j][2 * r + 1], dp[j][2 * r + 1], partial);
                    }
                    u[r] = u[r] * rescale[r] + partial;
                }
            }

#pragma unroll
            for (int r = 0; r < 2; ++r) {
                inverse[r] = softmax.inverse_sum(r);
                u[r] = quad_sum(u[r]) * inverse[r];
                // the rules want -inf where no key is, the walks +inf
                lse[r] = inverse[r] == 0.f && !joint ? INFINITY : softmax.lse(r, inverse[r]);
                weight[r] = side == kPos ? 1.f : 0.f;
                shift[r] = 0.f;
                if (rows[r] >= call.l) continue;
                if (side == kNeg) weight[r] = -alpha_of(call, b, rows[r], h);
                shift[r] = -weight[r] * u[r];
                if (lane % 4 == 0 && column == 0) {
                    const int64_t i = statistic(side, rows[r]);
                    p.lse[i] = lse[r];
                    p.u[i] = u[r];
                    if (side == kNeg && p.dalpha != nullptr) {
                        p.dalpha[(static_cast<int64_t>(b) * call.l + rows[r]) * call.h + h] = -u[r];
                    }
                }
            }
        }
        if (p.dq == nullptr) continue;

        // dQ += dS K, from normalised weights in s
        const auto add_to_dq = [&] {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    s[j][i] *= fmaf(weight[i / 2], dp[j][i], shift[i / 2]);
                }
            }
            uint32_t ds[kTiles / 2][4];
            pack_fragments<T>(ds, s);
            multiply<T, Tile<kD>::kPitch>(dq, ds, k + 2 * column);
        };
        // the block on chip first: its weights already refer to the final maximum
        for (int block = blocks - 1; block >= 0; --block) {
            if (block == blocks - 1 && !weighed) {
#pragma unroll
                for (int j = 0; j < kTiles; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) s[j][i] *= inverse[i / 2];
                }
            } else {
                const float left = make_scores(block);
#pragma unroll
                for (int j = 0; j < kTiles; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        s[j][i] = ptx::exp2(fmaf(s[j][i], left, -lse[i / 2]));
                    }
                }
            }
            add_to_dq();
        }
    }
    ptx::cp_async_wait<0>();
    if (p.dq == nullptr) {
        if (!joint || column != 0) return;
        // u of the shared keys, rowsum(dO * O_s): a quad takes its two rows
        __syncthreads();  // there may have been no key
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float u = 0.f;
            if (rows[r] < call.l) {
                const T* grad_row = reinterpret_cast<const T*>(
                    q_rows + Layout::kGrad + (lane / 4 + 8 * r) * Tile<kD>::kPitch);
                const Matrix& o = call.shared.o;
                const T* o_row = static_cast<const T*>(o.data) + b * o.stride_b +
                                 rows[r] * o.stride_row + h * o.stride_h;
                for (int c = lane % 4; c < call.d; c += 4) {
                    u = fmaf(static_cast<float>(grad_row[c]), static_cast<float>(o_row[c]), u);
                }
            }
            u = quad_sum(u);
            if (lane % 4 == 0 && rows[r] < call.l) p.u[statistic(kShared, rows[r])] = u;
        }
        return;
    }

    // the softmax scale itself: the kernels carry it times log2(e)
    const float scale = call.scale / kLog2E;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dq[j][i] *= scale;
    }
    // this warp's rows of Q are used up: they take dQ
    __syncwarp();
    stage<T, Tile<kColumns>::kPitch>(q_rows, 0, dq);
    __syncwarp();
    const int row = first_row + warp * kWarpRows;
    uint16_t* target = static_cast<uint16_t*>(p.dq) +
                       ((static_cast<int64_t>(b) * call.l + row) * call.h + h) * call.d + column;
    store_rows<kColumns>(target, static_cast<int64_t>(call.h) * call.d, q_rows, call.l - row,
                         call.d - column, call.aligned);
}

template <typename T, int kD>
cudaError_t launch_queries(const BackwardParams& p, const Device& device, cudaStream_t stream) {
    const int64_t blocks =
        p.call.b * ceil_div(p.call.l, kBackwardRows) * QueriesLayout<kD>::kShares * p.call.h;
    return launch<backward_queries_kernel<T, kD>>(device, blocks, kThreads,
                                                  QueriesLayout<kD>::kBytes, stream, p);
}

}  // namespace

cudaError_t backward_queries(const BackwardParams& p, const Device& device, cudaStream_t stream) {
    return dispatch(p.call.type, p.call.d, [&](auto type, auto head_dim) {
        return launch_queries<typename decltype(type)::type, head_dim>(p, device, stream);
    });
}

}  // namespace nasa
