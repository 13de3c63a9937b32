// The forward pass, compiled once for each instruction set: cross-attention to two prompts, joint
// attention under any rule, and Z+ and Z- apart.
//
//     Z_i = the attention of each segment, not yet normalised       forward_short.h, forward_long.h
//     c_i = the rule's coefficients, over the row sums              rules.h
//     O   = sum of c_i Z_i, rounded once, to [b, l, h, d]
#include "forward_long.h"
#include "rules.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

// Rows of a task: enough to make fetching it cheap, few enough to share them fairly
constexpr int64_t kMostTaskBlocks = 8, kTasksOfThread = 16;

// Of one thread
struct Scratch {
    float *qt, *s, *z[kSegments];

    Scratch(const Call& p, const bool (&uses)[kSegments], Arena& arena) {
        qt = arena.take<float>(p.d * kRows);
        s = arena.take<float>(kBlockKeys * kRows);
        for (int i = 0; i < kSegments; ++i) z[i] = arena.take<float>(uses[i] ? p.d * kRows : 0);
    }
};

// The results of the segments with their factors, and their sum. Products, then sums: equal
// prompts cancel to 0 at alpha 1.
template <int R>
struct Combination {
    int count = 0;
    const float* z[kSegments];
    Vec factor[kSegments][R];

    NASA_INLINE Vec operator()(int64_t column, int r) const {
        const int64_t at = column * (R * kLanes) + r * kLanes;
        Vec o = {};
        if (count > 0) o = load(z[0] + at) * factor[0][r];
        if (count > 1) o += load(z[1] + at) * factor[1][r];
        if (count > 2) o += load(z[2] + at) * factor[2][r];
        return o;
    }
};

template <class T, int R>
void forward_block(const Call& p, const Block& block, const AllKeys& all, int64_t b, int64_t h,
                   const Scratch& x) {
    using Math = typename MathOf<T>::type;
    const Section& section = *block.section;
    const int64_t first = block.first, count = block.count;
    load_transposed<T, Math, R>(row<T>(p.q, b, first, h), p.q.stride_n, count, p.d, x.qt);

    // the segments in which a row finds a key
    const Keys* keys[kSegments] = {};
    int64_t tiles = 0;
    for (int i = 0; i < kSegments; ++i) {
        const Keys& found = all.at(i, b, h);
        if (!section.uses[i] || found.n == 0) continue;
        keys[i] = &found;
        tiles += divide_up(found.n, kTile) + divide_up(p.d, kTile) * divide_up(found.n, kBlockKeys);
    }
    // the rows that this block writes, and those that the next one reads
    Ahead ahead;
    const int64_t bytes = p.d * int64_t{sizeof(T)};
    for (int i = 0; i < section.targets; ++i) {
        const Target& to = section.target[i];
        const int64_t at = to.first + first - section.first;
        ahead.add(row_of<T>(to.data, to.rows, p, b, at, h), p.h * bytes, count, bytes, true);
    }
    const int64_t next = smaller(kRows, p.l - first - count);
    ahead.add(row<T>(p.q, b, first + count, h), p.q.stride_n * int64_t{sizeof(T)}, next, bytes,
              false);
    ahead.spread(tiles);

    Found rows[kSegments][R] = {};
    for (int i = 0; i < kSegments; ++i) {
        for (int r = 0; r < R; ++r) rows[i][r].power = broadcast(kLowest);
        if (keys[i] == nullptr) continue;
        const Scaling how(*keys[i], p.scale);
        Statistics<R> of_segment;
        if (keys[i]->n <= kBlockKeys) {
            attend_short<Math, R>(x.qt, *keys[i], p.d, how, x.s, of_segment, x.z[i], ahead);
        } else {
            attend_long<Math, R>(x.qt, *keys[i], p.d, how, x.s, of_segment, x.z[i], ahead);
        }
        for (int r = 0; r < R; ++r) rows[i][r] = found(of_segment, how, r);
    }

    Vec minus_alpha[R];
    negative_alpha<R>(p, b, h, first, count, minus_alpha);
    for (int t = 0; t < section.targets; ++t) {
        const Target& to = section.target[t];
        Three c[R];
        for (int r = 0; r < R; ++r) {
            c[r] = coefficients(to.rule, {rows[0][r], rows[1][r], rows[2][r]}, minus_alpha[r]);
        }
        Combination<R> o;
        for (int i = 0; i < kSegments; ++i) {
            if (keys[i] == nullptr) continue;
            if ((to.rule == Rule::kPositive && i == kNeg) ||
                (to.rule == Rule::kNegative && i == kPos)) {
                continue;
            }
            o.z[o.count] = x.z[i];
            for (int r = 0; r < R; ++r) o.factor[o.count][r] = c[r].of[i] / rows[i][r].sum;
            ++o.count;
        }
        const int64_t at = to.first + first - section.first;
        store_transposed<T, R>(o, p.d, row_of<T>(to.data, to.rows, p, b, at, h), p.h * p.d, count);
    }
}

template <class T>
bool forward_of(const Call& p, const Result& to, const Threads& threads) {
    const Blocks blocks(p, to);
    const AllKeys all =
        AllKeys::of<T, typename MathOf<T>::type>(p, blocks.uses, Pass::kForward, threads);
    Arena size{nullptr};
    Scratch(p, blocks.uses, size);
    const Memory memory(threads.count * size.used, Use::kScratch);
    if (all.memory.data == nullptr || memory.data == nullptr) return false;

    // no result depends on how the blocks are shared out
    const int64_t fair = p.b * p.h * blocks.count / (threads.count * kTasksOfThread);
    const int64_t of_task = larger(1, smaller(fair, kMostTaskBlocks));
    const int64_t parts = divide_up(blocks.count, of_task);
    for_each(threads, p.b * p.h * parts, [&](int64_t i, int64_t worker) {
        Arena arena{memory.data + worker * size.used};
        const Scratch scratch(p, blocks.uses, arena);
        const int64_t part = i % parts, h = i / parts % p.h, b = i / parts / p.h;
        const int64_t end = smaller((part + 1) * of_task, blocks.count);
        for (int64_t at = part * of_task; at < end; ++at) {
            const Block block = blocks.at(at);
            with_tile<kPanels>(block.panels, [&](auto panels) {
                forward_block<T, decltype(panels)::value>(p, block, all, b, h, scratch);
            });
        }
    });
    return true;
}

}  // namespace

bool forward(const Call& p, const Result& to, const Threads& threads) {
    switch (p.type) {
        case Type::kFloat: return forward_of<float>(p, to, threads);
        case Type::kHalf: return forward_of<Half>(p, to, threads);
        case Type::kBfloat16: return forward_of<Bfloat16>(p, to, threads);
    }
    return false;
}

}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
