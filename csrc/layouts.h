// Which kernels there are, and the sizes of their tiles in shared memory. The launchers choose by
// them, and the kernels assert that they are theirs.
#pragma once

#include "nasa.h"

namespace nasa {

// A head_dim is padded with zeros up to the next of these; 0 when it is larger than all of them.
// Each costs kernels: they are the head_dims of the models (40, 64, 72, 80, 128, 160) and enough
// others that no head_dim pays more than half.
constexpr int padded_head_dim(int d) {
    constexpr int kSizes[] = {32, 48, 64, 80, 96, 128, 160, 192, 256};
    for (int size : kSizes) {
        if (d <= size) return size;
    }
    return 0;
}

// Keys that a pass over K and V holds at once. A prompt up to here needs no online softmax.
constexpr int kBlockKeys = 128;
// 77 CLIP tokens, padded to the k of one mma
constexpr int kClipKeys = 80;

// Shared memory in bytes; rows of a tile are 16 bytes longer than d.
constexpr int tile_bytes(int rows, int d) { return rows * 2 * (d + 8); }

// forward_short: warps of a block, and the m16 fragments of query rows that one of them takes at
// once. What is read of K and V serves all fragments. The scores of two with masks would not fit the
// registers, nor their rows of 160 columns the shared memory of sm_80; with 128 keys those of 64
// columns would not fit that of sm_86 and sm_120, which one does.
constexpr int kShortWarps = 8;
constexpr int short_parts(int d, int keys, bool plain) {
    return plain && (keys == kClipKeys ? d <= 128 : d == 80) ? 2 : 1;
}
constexpr int short_rows(int d, int keys, bool plain) { return 16 * short_parts(d, keys, plain); }
// A operands of P+ that a warp parks in shared memory while two fragments of scores against 128 keys
// have the registers
constexpr int short_parked(int d, int keys, bool plain) {
    return keys == kBlockKeys && short_parts(d, keys, plain) == 2 ? 4 : 0;
}
constexpr int kOperandBytes = 32 * 16;
// K+-, V+- [keys, d]; for each warp a tile of rows and what is parked; the biases in fp32, where
// scores are not plain
constexpr int short_shared_bytes(int d, int keys, bool plain) {
    return 4 * tile_bytes(keys, d) + kShortWarps * (tile_bytes(short_rows(d, keys, plain), d) +
                                                    short_parked(d, keys, plain) * kOperandBytes) +
           (plain ? 0 : 2 * keys * 4);
}

// Kernels of forward_short that exist: 77 CLIP tokens for the models up to head_dim 160, and up to
// 128 keys for PixArt (72), SDXL and SD 2.1 (64) and Wan (128). Every other call is forward_long's.
constexpr bool has_short(int d, int keys) {
    return keys == kClipKeys ? d <= 160 : d == 64 || d == 80 || d == 128;
}

// Kernels for Hopper that exist: the head_dims of the models, exactly.
constexpr bool has_sm90(int d) {
    return d == 40 || d == 64 || d == 72 || d == 80 || d == 128 || d == 160;
}
// Those of forward_sm90_short; every other call is forward_sm90_long's.
constexpr bool has_sm90_short(int d, int keys) {
    return has_sm90(d) && (keys == kClipKeys || d == 64 || d == 72 || d == 128);
}
// Keys that a tile of forward_sm90_long holds: beside two accumulators of 160 columns, the scores
// of 128 keys would not fit the registers.
constexpr int sm90_stream_keys(int d) { return d <= 128 ? kBlockKeys : kClipKeys; }

// Whether forward_short's registers hold all columns of Z+ and Z-, of which a projection wants sums
constexpr bool short_projects(int d) { return d <= 128; }

// forward_long: columns of O that a warp makes. A head_dim above 128 is shared by two warps or four:
// two accumulators of all its columns would not fit the registers beside the scores.
constexpr int long_columns(int d) { return d <= 128 ? d : d <= 192 ? d / 2 : d / 4; }
// Warps of a block, the query rows that they make, and the tiles of K and V that are on chip
constexpr int kLongWarps = 8;
constexpr int long_rows(int d) { return 16 * kLongWarps / (d / long_columns(d)); }
constexpr int kLongStages = 3;
// K or V [64, d] of each stage, Q [rows, d]; the bias in fp32
constexpr int long_shared_bytes(int d) {
    return kLongStages * tile_bytes(kBlockKeys / 2, d) + tile_bytes(long_rows(d), d) +
           kBlockKeys * 4;
}

// Query rows of a tile of the backward kernels, and keys of one of backward_queries
constexpr int kBackwardRows = 64;
constexpr int kBackwardKeys = 80;
// Columns of dQ, or of dK and dV, that a block makes: the others are another block's.
constexpr int backward_columns(int d) { return d <= 128 ? d : d <= 192 ? d / 2 : d / 4; }

// backward_queries: Q, dO [64, d], K, V [80, d]; the bias in fp32
constexpr int queries_shared_bytes(int d) {
    return 2 * tile_bytes(kBackwardRows, d) + 2 * tile_bytes(kBackwardKeys, d) + kBackwardKeys * 4;
}

// backward_keys: keys of a block, 16 for each warp, and the blocks that an SM has registers for: two
// of five warps with 168, or, where gradients have more columns than these hold, two of four with 255.
constexpr int keys_tile(int d) { return d == 96 || d == 128 ? 64 : 80; }
constexpr int keys_resident(int d) { return d <= 128 ? 2 : 1; }
// Query rows whose scores a warp has in its registers at once
constexpr int keys_step(int d) { return d <= 80 ? 32 : 64; }
// K, V [keys_tile, d]; per stage Q, dO [64, d] and lse, shift, w [64] in fp32
constexpr int keys_stages(int d) { return d <= 80 ? 2 : 1; }
constexpr int keys_shared_bytes(int d) {
    return 2 * tile_bytes(keys_tile(d), d) +
           keys_stages(d) * (2 * tile_bytes(kBackwardRows, d) + 3 * kBackwardRows * 4);
}
constexpr int backward_shared_bytes(int d) {
    const int queries = queries_shared_bytes(d);
    const int keys = keys_shared_bytes(d);
    return queries > keys ? queries : keys;
}

// The head of K and V that head h of Q looks at is h / group, where each serves a group of heads. A
// division costs a dozen instructions, a product and a shift two: exact while h * group < 2^31.
constexpr int kStepBits = 31;
constexpr uint32_t kWholeStep = uint32_t{1} << kStepBits;
constexpr uint32_t step_of(int group) {
    return static_cast<uint32_t>((uint64_t{kWholeStep} + group - 1) / group);
}
__host__ __device__ constexpr int head_at(uint32_t step, int h) {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(h)) * step >> kStepBits);
}
__host__ __device__ constexpr int key_heads(const ForwardParams& p) {
    return p.h == 0 ? 0 : head_at(p.key_step, p.h - 1) + 1;
}

// Whether there are keys that both prompts share
__host__ __device__ constexpr bool is_joint(const ForwardParams& p) {
    return p.shared.o.data != nullptr;
}

constexpr int short_keys(const ForwardParams& p) {
    return p.prompt[kPos].n <= kClipKeys && p.prompt[kNeg].n <= kClipKeys ? kClipKeys : kBlockKeys;
}

// Scores are plain when only keys past n are absent and the scale is positive: then the scale stays
// out of the scores until the exponential takes it for nothing.
__host__ __device__ constexpr bool is_plain(const Prompt& prompt, float scale) {
    return scale > 0.f && (prompt.mask.type == MaskType::kNone || prompt.n == 0);
}
__host__ __device__ constexpr bool is_plain(const ForwardParams& call) {
    return is_plain(call.prompt[kPos], call.scale) && is_plain(call.prompt[kNeg], call.scale);
}

}  // namespace nasa
