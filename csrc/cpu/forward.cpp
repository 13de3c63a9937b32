// The forward pass, compiled once for each instruction set: cross-attention to two prompts, joint
// attention under any rule, and Z+ and Z- apart.
//
//     Z_i = the attention of each segment, not yet normalised       forward_short.h, forward_long.h
//     c_i = the rule's coefficients, over the row sums              rules.h
//     O   = sum of c_i Z_i, rounded once, to [b, l, h, d]           or projected.h, nag.h
#include "forward_long.h"
#include "nag.h"
#include "projected.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

// Rows of a task: enough to make fetching it cheap, few enough to share them fairly
constexpr int64_t kMostTaskBlocks = 8, kTasksOfThread = 16;
// Of a thread, where a task has all heads
constexpr int64_t kLeastTasks = 4;

// Of one thread
struct Scratch {
    float *qt, *s, *z[kSegments];

    Scratch(const Call& p, const bool (&uses)[kSegments], Arena& arena) {
        qt = arena.take<float>(p.d * kRows);
        s = arena.take<float>(kBlockKeys * kRows);
        for (int i = 0; i < kSegments; ++i) z[i] = arena.take<float>(uses[i] ? p.d * kRows : 0);
    }
};

// O_i and the statistics of a block of rows of one head, over all segments
template <class T, int R>
Attended<R> attend(const Call& p, const Block& block, const AllKeys& all, int64_t b, int64_t h,
                   const Scratch& x) {
    using Math = typename MathOf<T>::type;
    const Section& section = *block.section;
    const int64_t first = block.first, count = block.count;
    load_transposed<T, Math, R>(row<T>(p.q, b, first, h), p.q.stride_n, count, p.d, x.qt);

    Attended<R> result;
    int64_t tiles = 0;
    for (int i = 0; i < kSegments; ++i) {
        result.z[i] = x.z[i];
        const Keys& keys = all.at(i, b, h);
        if (!section.uses[i] || keys.n == 0) continue;
        result.keys[i] = &keys;
        tiles += divide_up(keys.n, kTile) + divide_up(p.d, kTile) * divide_up(keys.n, kBlockKeys);
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

    for (int i = 0; i < kSegments; ++i) {
        for (int r = 0; r < R; ++r) result.rows[i][r] = {broadcast(kLowest), Vec{}};
        if (result.keys[i] == nullptr) continue;
        const Keys& keys = *result.keys[i];
        const Scaling how(keys, p.scale);
        Statistics<R> rows;
        if (keys.n <= kBlockKeys) {
            attend_short<Math, R>(x.qt, keys, p.d, how, x.s, rows, x.z[i], ahead);
        } else {
            attend_long<Math, R>(x.qt, keys, p.d, how, x.s, rows, x.z[i], ahead);
        }
        for (int r = 0; r < R; ++r) result.rows[i][r] = found(rows, how, r);
    }
    return result;
}

template <class T, int R>
void forward_block(const Call& p, const Block& block, const AllKeys& all, int64_t b, int64_t h,
                   const Scratch& x) {
    const Section& section = *block.section;
    const Attended<R> found = attend<T, R>(p, block, all, b, h, x);
    Vec minus_alpha[R];
    negative_alpha<R>(p, block, b, h, minus_alpha);
    for (int t = 0; t < section.targets; ++t) {
        const Target& to = section.target[t];
        const int64_t at = to.first + block.first - section.first, stride = p.h * p.d;
        T* const out = row_of<T>(to.data, to.rows, p, b, at, h);
        if (to.rule == Rule::kProjected) {
            store_projected<T, R>(found, minus_alpha, p.d, out, stride, block.count);
        } else {
            const Combination<R> o(to.rule, found, minus_alpha);
            store_transposed<T, R>(o, p.d, out, stride, block.count);
        }
    }
}

// Blocks times heads, shared out among the threads. No result depends on how.
template <class T>
bool forward_heads(const Call& p, const Blocks& blocks, const AllKeys& all,
                   const Threads& threads) {
    Arena size{nullptr};
    Scratch(p, blocks.uses, size);
    const Memory memory(threads.count * size.used, Use::kScratch);
    if (memory.data == nullptr) return false;
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

// Under NAG a row needs the norms of all of its heads. A task is a block with every head, so that
// Z+ and G stay in the cache of a core until then. Where that would be too few tasks, heads are
// tasks of their own, and Z+ and G of all blocks wait in memory. The sums are the same.
template <class T>
bool forward_rows(const Call& p, const Blocks& blocks, const AllKeys& all, const Threads& threads) {
    const int64_t count = p.b * blocks.count;
    const bool is_split = count < kLeastTasks * threads.count;
    Arena size{nullptr}, rows_size{nullptr};
    Scratch(p, blocks.uses, size);
    GuidedRows(p, rows_size);
    const int64_t places = is_split ? count : threads.count;
    const Memory memory(threads.count * size.used, Use::kScratch);
    const Memory rows_memory(places * rows_size.used, Use::kSums);
    if (memory.data == nullptr || rows_memory.data == nullptr) return false;

    const auto attend_head = [&](int64_t i, int64_t h, int64_t worker, int64_t place) {
        Arena arena{memory.data + worker * size.used};
        Arena rows_arena{rows_memory.data + place * rows_size.used};
        Scratch scratch(p, blocks.uses, arena);
        const GuidedRows rows(p, rows_arena);
        const int64_t b = i / blocks.count;
        const Block block = blocks.at(i % blocks.count);
        with_tile<kPanels>(block.panels, [&](auto panels) {
            constexpr int kR = decltype(panels)::value;
            if (block.section->target[0].rule != Rule::kNag) {
                forward_block<T, kR>(p, block, all, b, h, scratch);
                return;
            }
            scratch.z[kPos] = rows.z(h);
            scratch.z[kNeg] = rows.g(h);
            const Attended<kR> found = attend<T, kR>(p, block, all, b, h, scratch);
            guide<kR>(p, found, h, rows);
        });
    };
    const auto blend_head = [&](int64_t i, int64_t h, int64_t place) {
        Arena rows_arena{rows_memory.data + place * rows_size.used};
        const GuidedRows rows(p, rows_arena);
        const int64_t b = i / blocks.count;
        const Block block = blocks.at(i % blocks.count);
        const Target& to = block.section->target[0];
        if (to.rule != Rule::kNag) return;
        T* const out = row_of<T>(to.data, to.rows, p, b, block.first, h);
        with_tile<kPanels>(block.panels, [&](auto panels) {
            constexpr int kR = decltype(panels)::value;
            Vec minus_alpha[kR];
            negative_alpha<kR>(p, block, b, h, minus_alpha);
            blend<T, kR>(p, minus_alpha, h, rows, out, block.count);
        });
    };
    if (is_split) {
        for_each(threads, count * p.h, [&](int64_t i, int64_t worker) {
            attend_head(i / p.h, i % p.h, worker, i / p.h);
        });
        for_each(threads, count * p.h,
                 [&](int64_t i, int64_t) { blend_head(i / p.h, i % p.h, i / p.h); });
        return true;
    }
    for_each(threads, count, [&](int64_t i, int64_t worker) {
        for (int64_t h = 0; h < p.h; ++h) attend_head(i, h, worker, worker);
        for (int64_t h = 0; h < p.h; ++h) blend_head(i, h, worker);
    });
    return true;
}

template <class T>
bool forward_of(const Call& p, const Result& to, const Threads& threads) {
    const Blocks blocks(p, to);
    const AllKeys all =
        AllKeys::of<T, typename MathOf<T>::type>(p, blocks.uses, Pass::kForward, threads);
    if (all.memory.data == nullptr) return false;
    const bool is_nag = blocks.section[0].rows > 0 && blocks.section[0].target[0].rule == Rule::kNag;
    return (is_nag ? forward_rows<T> : forward_heads<T>)(p, blocks, all, threads);
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
