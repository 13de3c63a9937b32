// How the tiles of all heads are spread over a grid that fits the GPU: each block takes one range of
// (head, tile), in the order of the heads, and no block takes more than one tile more than another.
// What a tile's rows are does not depend on who computes them.
#pragma once

#include <cstdint>

#include "share.h"

namespace nasa {

// What a block takes of one head; `next` leads to the head after it.
struct Span {
    int h, b;
    int first, end;  // tiles of this head
    int left;        // tiles of the block from `end` on, in the heads that follow

    __device__ __forceinline__ explicit Span(const Share& share) {
        const int block = blockIdx.x;
        const int64_t begin = static_cast<int64_t>(block) * share.each + min(block, share.longer);
        const int head = static_cast<int>(begin / share.tiles);
        h = head % share.heads;
        b = head / share.heads;
        first = static_cast<int>(begin % share.tiles);
        left = share.each + (block < share.longer);
        cut(share);
    }

    __device__ __forceinline__ bool any() const { return first < end; }
    __device__ __forceinline__ void next(const Share& share) {
        if (++h == share.heads) {
            h = 0;
            ++b;
        }
        first = 0;
        cut(share);
    }

private:
    __device__ __forceinline__ void cut(const Share& share) {
        end = min(share.tiles, first + left);
        left -= end - first;
    }
};

// The tile that one of kStep walkers takes kStep tiles on, or where the next heads begin: its Span,
// with `tile` for `first`. Without any there is none.
template <int kStep>
__device__ __forceinline__ void advance(Span& span, int mine, const Share& share) {
    span.first += kStep;
    while (span.first >= span.end && span.left > 0) {
        span.next(share);
        span.first = mine;
    }
}

}  // namespace nasa
