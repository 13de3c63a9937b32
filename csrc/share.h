// How a grid that fits the GPU shares the tiles of all heads: what schedule.cuh gives each block.
#pragma once

namespace nasa {

struct Share {
    int each;    // tiles that every block takes
    int longer;  // the first so many blocks take one more
    int tiles;   // of a head
    int heads;   // of a batch element
};

}  // namespace nasa
