// Memory, threads, and how the rows of a call are cut into blocks.
#pragma once

#include <stdlib.h>

#include "nasa_cpu.h"
#include "tile.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

// ----------------------------------------------------------------------------------------- memory

// Takes parts of one allocation, each on 64 bytes. Over no memory it counts the bytes.
struct Arena {
    char* memory;
    int64_t used = 0;

    template <class T>
    T* take(int64_t count) {
        T* const taken = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + used);
        used += divide_up(count * int64_t{sizeof(T)}, 64) * 64;
        return taken;
    }
};

inline char* allocate(int64_t bytes) {
    return static_cast<char*>(aligned_alloc(64, divide_up(larger(bytes, 1), 64) * 64));
}

// Memory on 64 bytes. What is not large stays with the calling thread for its next call: fresh
// pages cost a small call a third of its time.
enum class Use { kKeys, kScratch, kSums };
constexpr int64_t kMostKept = int64_t{8} << 20;

class Memory {
   public:
    char* const data;

    Memory(int64_t bytes, Use use)
        : data(bytes <= kMostKept ? kept(bytes, use) : allocate(bytes)), owns_(bytes > kMostKept) {}
    Memory(const Memory&) = delete;
    ~Memory() {
        if (owns_) free(data);
    }

   private:
    const bool owns_;

    struct Kept {
        char* data = nullptr;
        int64_t bytes = 0;
        ~Kept() { free(data); }
    };
    static char* kept(int64_t bytes, Use use) {
        static thread_local Kept all[3];
        Kept& x = all[static_cast<int>(use)];
        if (x.data == nullptr || x.bytes < bytes) {
            free(x.data);
            x.data = allocate(bytes);
            x.bytes = x.data != nullptr ? bytes : 0;
        }
        return x.data;
    }
};

// ---------------------------------------------------------------------------------------- threads

// f(i, worker) for every i of [0, count), by the threads as they come free: one that is held up
// holds up nobody. worker < threads.count.
template <class F>
void for_each(const Threads& threads, int64_t count, const F& f) {
    struct Context {
        const F* f;
        int64_t count, next;
    } context{&f, count, 0};
    threads.parallel_for(
        0, smaller(threads.count, count), 1,
        [](int64_t worker, int64_t, void* pointer) {
            auto* const context = static_cast<Context*>(pointer);
            for (;;) {
                const int64_t i = __atomic_fetch_add(&context->next, 1, __ATOMIC_RELAXED);
                if (i >= context->count) break;
                (*context->f)(i, worker);
            }
        },
        &context);
}

// ----------------------------------------------------------------------------------------- blocks

// A result that rows of a section go to, by which rule, and where they lie in it
struct Target {
    Rule rule;
    void* data;  // [b, rows, h, d]
    int64_t rows, first;
};

// Rows with the same rule: the image's, the positive text's, the negative text's. `uses`: the
// segments that their results depend on.
struct Section {
    int64_t first, rows, first_block;
    int targets;
    Target target[2];
    bool uses[kSegments];
};

// Rows [first, first + count), of up to kPanels panels of kLanes rows
struct Block {
    const Section* section;
    int64_t first, count, panels;
};

// All rows of a head, in blocks of kPanels panels or one fewer: one panel alone has too few
// accumulators to be fast.
struct Blocks {
    Section section[3];
    int64_t count = 0;
    bool uses[kSegments] = {};

    Blocks(const Call& p, const Result& to) {
        const bool is_pair = to.z_pos != nullptr || to.z_neg != nullptr;
        const int64_t image = p.l - p.text_pos - p.text_neg;
        const int64_t first_neg = image + p.text_pos;
        const Target z_pos{Rule::kPositive, to.z_pos, first_neg, 0};
        const Target z_neg{Rule::kNegative, to.z_neg, image + p.text_neg, 0};
        if (is_pair) {
            section[0] = {0, image, 0, 2, {z_pos, z_neg}, {}};
            section[1] = {image, p.text_pos, 0, 1, {{z_pos.rule, to.z_pos, z_pos.rows, image}}, {}};
            section[2] = {first_neg, p.text_neg, 0, 1,
                          {{z_neg.rule, to.z_neg, z_neg.rows, image}}, {}};
        } else {
            section[0] = {0, image, 0, 1, {{p.rule, to.o, p.l, 0}}, {}};
            section[1] = {image, p.text_pos, 0, 1, {{Rule::kPositive, to.o, p.l, image}}, {}};
            section[2] = {first_neg, p.text_neg, 0, 1, {{Rule::kNegative, to.o, p.l, first_neg}}, {}};
        }
        const bool has_alpha = p.alpha_map != nullptr || p.alpha != 0;
        Rule& rule = section[0].target[0].rule;
        if (!has_alpha && (rule == Rule::kProjected || rule == Rule::kNag)) rule = Rule::kPositive;
        for (Section& x : section) {
            x.first_block = count;
            count += divide_up(divide_up(x.rows, kLanes), kPanels);
            for (int i = 0; i < x.targets; ++i) {
                const Rule rule = x.target[i].rule;
                x.uses[kShared] = true;
                x.uses[kPos] |= rule != Rule::kNegative;
                x.uses[kNeg] |= rule == Rule::kVsf || rule == Rule::kNegative ||
                                (rule != Rule::kPositive && has_alpha);
            }
            for (int i = 0; i < kSegments; ++i) uses[i] |= x.rows > 0 && x.uses[i];
        }
    }

    Block at(int64_t i) const {
        int s = 2;
        while (i < section[s].first_block) --s;
        const Section& x = section[s];
        const int64_t panels = divide_up(x.rows, kLanes), blocks = divide_up(panels, kPanels);
        i -= x.first_block;
        const int64_t begin = i * panels / blocks, end = (i + 1) * panels / blocks;
        const int64_t first = x.first + begin * kLanes;
        return {&x, first, smaller((end - begin) * kLanes, x.first + x.rows - first), end - begin};
    }
};

// ----------------------------------------------------------------------------- rows of the tensors

template <class T>
const T* row(const Rows& x, int64_t b, int64_t i, int64_t h) {
    return static_cast<const T*>(x.data) + b * x.stride_b + i * x.stride_n + h * x.stride_h;
}

// of a contiguous [b, rows, h, d]
template <class T>
T* row_of(void* x, int64_t rows, const Call& p, int64_t b, int64_t i, int64_t h) {
    return static_cast<T*>(x) + ((b * rows + i) * p.h + h) * p.d;
}

// -1 times alpha of the rows of a block, 0 behind the last one and for rules without alpha
template <int R>
void negative_alpha(const Call& p, const Block& block, int64_t b, int64_t h, Vec (&weight)[R]) {
    const Rule rule = block.section->target[0].rule;
    const int64_t first = block.first;
    const int64_t count = rule == Rule::kPositive || rule == Rule::kNegative ? 0 : block.count;
    float alpha[R * kLanes];
    for (int64_t i = 0; i < R * kLanes; ++i) {
        alpha[i] = i >= count ? 0.f : -p.alpha;
        if (p.alpha_map == nullptr || i >= count) continue;
        alpha[i] = -p.alpha_map[b * p.alpha_stride_b + (first + i) * p.alpha_stride_l +
                                h * p.alpha_stride_h];
    }
    for (int r = 0; r < R; ++r) weight[r] = load(alpha + r * kLanes);
}

// Cache lines that will be wanted, fetched a few at a time: rows of a few hundred bytes that lie
// kilobytes apart are too short for what the hardware fetches ahead by itself.
class Ahead {
   public:
    // Rows of a matrix: how far apart, how many, how long, in bytes
    void add(const void* data, int64_t stride, int64_t rows, int64_t bytes, bool is_written) {
        if (rows <= 0) return;
        matrices_[count_++] = {static_cast<const char*>(data), stride, rows, bytes, is_written};
    }
    // To be fetched in so many calls of `fetch`
    void spread(int64_t calls) {
        int64_t lines = 0;
        for (int i = 0; i < count_; ++i) lines += matrices_[i].rows * (matrices_[i].bytes / 64 + 1);
        lines_ = divide_up(lines, larger(calls, 1));
    }
    void fetch() {
        for (int64_t i = 0; i < lines_ && current_ < count_; ++i) {
            const Matrix& x = matrices_[current_];
            const char* const line = x.data + row_ * x.stride + column_;
            if (x.is_written) {
                __builtin_prefetch(line, 1);
            } else {
                __builtin_prefetch(line, 0);
            }
            column_ += 64;
            if (column_ < x.bytes) continue;
            column_ = 0;
            if (++row_ == x.rows) row_ = 0, ++current_;
        }
    }

   private:
    struct Matrix {
        const char* data;
        int64_t stride, rows, bytes;
        bool is_written;
    } matrices_[3];
    int count_ = 0, current_ = 0;
    int64_t row_ = 0, column_ = 0, lines_ = 0;
};

}  // namespace
}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
