// The backward pass, compiled once for each instruction set. Nothing was kept for it: for a block
// of rows S and dP of every segment are made again, and with them the rule's gradients.
//
//     P = exp2(S - m) / sum      dP = V dO^T      u = rowsum(P * dP)
//     dS = P * (c (dP - u) + dlse)
//     dQ^T [d, rows] = K^T [d, n] . dS^T [n, rows]
//     dV   [n, d]   += c P^T [n, rows] . dO [rows, d]          here lanes are columns
//     dK   [n, d]   += dS^T  [n, rows] . Q  [rows, d]
//
// c and dlse need u of all segments, and u needs all keys. S and dP of some thousand keys are held
// until then; of more they are made twice, so that the scratch has a bound. Under the projected rule
// Z+ and Z- are made as well, and of them a dO for each segment (projected.h).
#include "gradients.h"
#include "projected.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

// Keys of all segments whose S and dP are held, and keys that are dealt with at once
constexpr int64_t kHeldKeys = 8192, kChunkKeys = 1024;
// The rows of a head are split until there are so many tasks, of no fewer rows: each split costs
// sums of dK and dV of its own. Beyond the bound there is one sum per head.
constexpr int64_t kSplitTasks = 32, kSplitRows = 1024, kMostSums = int64_t{64} << 20;

int64_t keys_in_all(const Call& p, const Blocks& blocks) {
    int64_t n = 0;
    for (int i = 0; i < kSegments; ++i) n += blocks.uses[i] ? p.segment[i].n : 0;
    return n;
}

bool is_projected(const Blocks& blocks) {
    const Section& image = blocks.section[0];
    return image.rows > 0 && image.target[0].rule == Rule::kProjected;
}

// What the projected rule needs beside it: Z of each segment; G, dZ+ and dZ-; then dO of each
// segment, in both layouts
template <class Math>
struct ProjectedScratch {
    float *z[kSegments], *g, *dz_pos, *dz_neg;  // [d, rows]
    float* got[kSegments];                      // [d / kPack, rows]
    float* go[kSegments];                       // [rows / kPack, width]
    Bfloat16* pairs;                            // [rows, d], where kPack is 2

    ProjectedScratch(const Call& p, const Blocks& blocks, int64_t width, Arena& arena) {
        const bool is_used = is_projected(blocks);
        const int64_t size = is_used ? p.d * kRows : 0;
        g = arena.take<float>(size);
        dz_pos = arena.take<float>(size);
        dz_neg = arena.take<float>(size);
        pairs = arena.take<Bfloat16>(Math::kPack == 2 ? size : 0);
        for (int i = 0; i < kSegments; ++i) {
            const bool has_keys = blocks.uses[i] && p.segment[i].n > 0;
            z[i] = arena.take<float>(has_keys ? size : 0);
            got[i] = arena.take<float>(has_keys ? size : 0);
            go[i] = arena.take<float>(has_keys && is_used ? width * kRows / Math::kPack : 0);
        }
    }
};

// Of one thread
template <class Math>
struct Scratch {
    float *qt, *got;                // [d / kPack, rows]: Q and dO, transposed
    float *q, *go;                  // [rows / kPack, width]: Q and dO, to meet weights of rows
    float *s, *g;                   // [n, rows]: scores, then P; dP
    float* ds_along_n;              // [n / kPack, rows]: dS, to meet K
    float *p_along_l, *ds_along_l;  // [n, rows / kPack]: c P and dS, to meet dO and Q
    float* dqt;                     // [d, rows]
    ProjectedScratch<Math> projected;
    bool is_held;

    Scratch(const Call& p, const Blocks& blocks, int64_t width, Arena& arena)
        : projected(p, blocks, width, arena) {
        constexpr int kPack = Math::kPack;
        const int64_t n = keys_in_all(p, blocks);
        is_held = n <= kHeldKeys;
        const int64_t keys = is_held ? n : kChunkKeys, chunk = smaller(keys, kChunkKeys);
        qt = arena.take<float>(p.d * kRows);
        got = arena.take<float>(p.d * kRows);
        q = arena.take<float>(width * kRows / kPack);
        go = arena.take<float>(width * kRows / kPack);
        s = arena.take<float>(keys * kRows);
        g = arena.take<float>(keys * kRows);
        ds_along_n = p_along_l = ds_along_l = nullptr;  // with kPack 1 they lie in s and g
        if (kPack > 1) {
            ds_along_n = arena.take<float>(divide_up(chunk, kPack) * kRows);
            p_along_l = arena.take<float>(chunk * kRows / kPack);
            ds_along_l = arena.take<float>(chunk * kRows / kPack);
        }
        dqt = arena.take<float>(p.d * kRows);
    }
};

// A segment as a block of rows sees it. s and g: its own where they are held, else those that all
// chunks share.
template <int R>
struct Side {
    const Keys* keys = nullptr;
    float *s, *g;
    const float *got, *go;  // dO
    Statistics<R> rows;
    Vec u[R] = {};

    // Weights of some keys, and their sums over all keys so far. Returns in `rescale` what sums so
    // far are to be multiplied with.
    template <class Math>
    void weigh(const float* qt, const Scaling& how, int64_t d, int64_t first, int64_t count,
               Vec (&rescale)[R], Ahead& ahead) {
        Vec before[R], sum[R] = {};
        for (int r = 0; r < R; ++r) before[r] = rows.largest[r];
        scores<Math, R>(qt, *keys, first, count, d, how, s, rows.largest, ahead);
        weights<Single, typename Math::Exponential>(s, count, how, rows.largest, sum);
        const Exact exponential(how.base);
        for (int r = 0; r < R; ++r) {
            rescale[r] = exponential(before[r], rows.largest[r]);
            rows.sum[r] = fma(rows.sum[r], rescale[r], sum[r]);
        }
    }
    // dP of some keys, whose weights are there, and u
    template <class Math>
    void differentiate(int64_t d, int64_t first, int64_t count, const Vec (&rescale)[R],
                       Ahead& ahead) {
        Vec new_u[R] = {};
        const float* const v = keys->v_along_d + first * divide_up(d, Math::kPack);
        weight_gradients<Math, R>(got, v, count, d, s, g, new_u, ahead);
        for (int r = 0; r < R; ++r) u[r] = fma(u[r], rescale[r], new_u[r]);
    }
    template <class Math>
    void examine(const float* qt, const Scaling& how, int64_t d, int64_t first, int64_t count,
                 Ahead& ahead) {
        Vec rescale[R];
        weigh<Math>(qt, how, d, first, count, rescale, ahead);
        differentiate<Math>(d, first, count, rescale, ahead);
    }
};

// What dS is made of: P = e * inverse, dS = P * (c (dP - u) + dlse)
template <int R>
struct Factors {
    Vec inverse[R], c[R], u[R], dlse[R];
};

// e and dP of some keys become c P and dS, each as its products want it
template <class Math, int R>
void score_gradients(float* e, float* g, int64_t keys, const Factors<R>& f,
                     const Scratch<Math>& to) {
    constexpr int kWidth = R * kLanes, kPack = Math::kPack;
    for (int64_t j = 0; j < keys; j += kPack) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Vec ds[kPack] = {};
#pragma GCC unroll 2
            for (int i = 0; i < kPack; ++i) {
                if (j + i >= keys) break;
                const int64_t at = (j + i) * kWidth + r * kLanes;
                const Vec p = load(e + at) * f.inverse[r];
                ds[i] = p * fma(f.c[r], load(g + at) - f.u[r], f.dlse[r]);
                if constexpr (kPack == 1) {
                    store(e + at, p * f.c[r]);
                    store(g + at, ds[i]);
                } else {
                    store(reinterpret_cast<Bfloat16*>(to.p_along_l) + at, p * f.c[r]);
                    store(reinterpret_cast<Bfloat16*>(to.ds_along_l) + at, ds[i]);
                }
            }
            if constexpr (kPack == 2) {
                store(to.ds_along_n + j / 2 * kWidth + r * kLanes, Math::pack(ds[0], ds[1]));
            }
        }
    }
}

// Sums of dK and dV of one head, over some of its rows; null where nobody asked
struct KeySums {
    float *dk[kSegments], *dv[kSegments];  // [n, width]
};

// What a rule makes of the statistics of a block of rows
template <int R>
struct Outcome {
    Three c[R], dlse[R];
    Vec dalpha[R];
};

// dO of the image's queries for each segment, and what the rule makes of the segments' statistics,
// of which u is not needed. Weights are left where they are held.
template <class T, int R>
Outcome<R> project_block(const Call& p, const Gradients& to, const Block& block, int64_t b,
                          int64_t h, int64_t width, const Scratch<typename MathOf<T>::type>& x,
                          const Vec (&minus_alpha)[R], Side<R> (&sides)[kSegments], Ahead& ahead) {
    using Math = typename MathOf<T>::type;
    constexpr int kWidth = R * kLanes;
    const ProjectedScratch<Math>& own = x.projected;
    const T* const go = row<T>(to.grad_o, b, block.first, h);
    load_transposed<T, Single, R>(go, to.grad_o.stride_n, block.count, p.d, own.g);

    Attended<R> seen;
    for (int i = 0; i < kSegments; ++i) {
        Side<R>& side = sides[i];
        for (int r = 0; r < R; ++r) seen.rows[i][r] = {broadcast(kLowest), Vec{}};
        seen.keys[i] = side.keys;
        seen.z[i] = own.z[i];
        if (side.keys == nullptr) continue;
        const Scaling how(*side.keys, p.scale);
        const int64_t chunk = x.is_held ? side.keys->n : kChunkKeys;
        for (int64_t j = 0; j < side.keys->n; j += chunk) {
            const int64_t keys = smaller(chunk, side.keys->n - j);
            Vec rescale[R];
            side.template weigh<Math>(x.qt, how, p.d, j, keys, rescale, ahead);
            const float* const v = side.keys->v_along_n + j / Math::kPack * p.d;
            add_values<Math, R>(side.s, v, keys, p.d, j == 0, rescale, x.ds_along_n, own.z[i],
                                ahead);
        }
        for (int r = 0; r < R; ++r) seen.rows[i][r] = found(side.rows, how, r);
    }

    Outcome<R> result;
    const Combination<R> pos(Rule::kPositive, seen, minus_alpha);
    const Combination<R> neg(Rule::kNegative, seen, minus_alpha);
    projected_gradients<R>(pos, neg, own.g, minus_alpha, p.d, own.dz_pos, own.dz_neg,
                           result.dalpha);

    // shares of the segments in Z+ and in Z-
    Three a[R], c[R];
    for (int r = 0; r < R; ++r) {
        const Found rows[kSegments] = {seen.rows[0][r], seen.rows[1][r], seen.rows[2][r]};
        a[r] = coefficients(Rule::kPositive, rows, minus_alpha[r]);
        c[r] = coefficients(Rule::kNegative, rows, minus_alpha[r]);
        result.c[r] = {{broadcast(1.f), a[r].of[kPos], c[r].of[kNeg]}};
        result.dlse[r] = {};
    }
    if (sides[kShared].keys != nullptr) {
        // <dZ, O_shared> - <dZ, O_text>
        Vec of_pos[R] = {}, of_neg[R] = {}, inverse[kSegments][R];
        for (int i = 0; i < kSegments; ++i) {
            for (int r = 0; r < R; ++r) {
                const Vec sum = seen.rows[i][r].sum;
                inverse[i][r] = where(sum != 0, broadcast(1.f) / sum);
            }
        }
        for (int64_t column = 0; column < p.d; ++column) {
            for (int r = 0; r < R; ++r) {
                const int64_t at = column * kWidth + r * kLanes;
                const auto o = [&](int i) {
                    return seen.keys[i] == nullptr ? Vec{} : load(own.z[i] + at) * inverse[i][r];
                };
                const Vec shared = o(kShared);
                of_pos[r] = fma(load(own.dz_pos + at), shared - o(kPos), of_pos[r]);
                of_neg[r] = fma(load(own.dz_neg + at), shared - o(kNeg), of_neg[r]);
            }
        }
        for (int r = 0; r < R; ++r) {
            const Vec by_pos = a[r].of[kShared] * a[r].of[kPos] * of_pos[r];
            const Vec by_neg = c[r].of[kShared] * c[r].of[kNeg] * of_neg[r];
            result.dlse[r] = {{by_pos + by_neg, -by_pos, -by_neg}};
        }
    }

    for (int i = 0; i < kSegments; ++i) {
        Side<R>& side = sides[i];
        if (side.keys == nullptr) continue;
        const auto dz = [&](int64_t column, int r) __attribute__((always_inline)) {
            const int64_t at = column * kWidth + r * kLanes;
            if (i == kPos) return load(own.dz_pos + at);
            if (i == kNeg) return load(own.dz_neg + at);
            return a[r].of[kShared] * load(own.dz_pos + at) +
                   c[r].of[kShared] * load(own.dz_neg + at);
        };
        side.got = own.got[i];
        side.go = own.go[i];
        if constexpr (Math::kPack == 2) {
            store_transposed<Bfloat16, R>(dz, p.d, own.pairs, p.d, kWidth);
            load_transposed<Bfloat16, Math, R>(own.pairs, p.d, kWidth, p.d, own.got[i]);
            load_rows<Bfloat16, Math, R>(own.pairs, p.d, kWidth, p.d, width, own.go[i]);
        } else {
            for (int64_t column = 0; column < p.d; ++column) {
                for (int r = 0; r < R; ++r) {
                    store(own.got[i] + column * kWidth + r * kLanes, dz(column, r));
                }
            }
            store_transposed<float, R>(dz, p.d, own.go[i], width, kWidth);
            for (int64_t row = 0; row < kWidth; ++row) {
                for (int64_t at = p.d; at < width; ++at) own.go[i][row * width + at] = 0.f;
            }
        }
    }
    return result;
}

template <class T, int R>
void backward_block(const Call& p, const Gradients& to, const Block& block, const AllKeys& all,
                    int64_t b, int64_t h, int64_t width,
                    const Scratch<typename MathOf<T>::type>& x, const KeySums& sums) {
    using Math = typename MathOf<T>::type;
    constexpr int kWidth = R * kLanes, kPack = Math::kPack;
    const Section& section = *block.section;
    const int64_t first = block.first, count = block.count;
    const T* const q = row<T>(p.q, b, first, h);
    const T* const go = row<T>(to.grad_o, b, first, h);
    load_transposed<T, Math, R>(q, p.q.stride_n, count, p.d, x.qt);
    load_transposed<T, Math, R>(go, to.grad_o.stride_n, count, p.d, x.got);
    load_rows<T, Math, R>(q, p.q.stride_n, count, p.d, width, x.q);
    load_rows<T, Math, R>(go, to.grad_o.stride_n, count, p.d, width, x.go);

    Side<R> sides[kSegments];
    int64_t place = 0, tiles = 0;
    for (int i = 0; i < kSegments; ++i) {
        const Keys& keys = all.at(i, b, h);
        if (!section.uses[i] || keys.n == 0) continue;
        sides[i].keys = &keys;
        sides[i].s = x.s + place * kRows;
        sides[i].g = x.g + place * kRows;
        sides[i].got = x.got;
        sides[i].go = x.go;
        if (x.is_held) place += keys.n;
        tiles += 2 * divide_up(keys.n, kTile);
    }
    Ahead ahead;
    const int64_t bytes = p.d * int64_t{sizeof(T)}, next = smaller(kRows, p.l - first - count);
    if (to.dq != nullptr) {
        ahead.add(row_of<T>(to.dq, p.l, p, b, first, h), p.h * bytes, count, bytes, true);
    }
    const Rows read[] = {p.q, to.grad_o};
    for (const Rows& rows : read) {
        ahead.add(row<T>(rows, b, first + count, h), rows.stride_n * int64_t{sizeof(T)}, next,
                  bytes, false);
    }
    ahead.spread(tiles);

    Vec minus_alpha[R];
    negative_alpha<R>(p, block, b, h, minus_alpha);
    const Rule rule = section.target[0].rule;
    Outcome<R> made;
    if (rule == Rule::kProjected) {
        made = project_block<T, R>(p, to, block, b, h, width, x, minus_alpha, sides, ahead);
    }

    // weights, dP and their sums
    Found rows[kSegments][R] = {};
    Three u[R] = {};
    for (int i = 0; i < kSegments; ++i) {
        for (int r = 0; r < R; ++r) rows[i][r].power = broadcast(kLowest);
        Side<R>& side = sides[i];
        if (side.keys == nullptr) continue;
        const Scaling how(*side.keys, p.scale);
        const int64_t chunk = x.is_held ? side.keys->n : kChunkKeys;
        for (int64_t j = 0; j < side.keys->n; j += chunk) {
            const int64_t keys = smaller(chunk, side.keys->n - j);
            if (rule != Rule::kProjected) {
                side.template examine<Math>(x.qt, how, p.d, j, keys, ahead);
                continue;
            }
            // the sums are there, and where they are held the weights
            const Statistics<R> known = side.rows;
            Vec one[R];
            if (!x.is_held) side.template weigh<Math>(x.qt, how, p.d, j, keys, one, ahead);
            side.rows = known;
            for (int r = 0; r < R; ++r) one[r] = broadcast(1.f);
            side.template differentiate<Math>(p.d, j, keys, one, ahead);
        }
        for (int r = 0; r < R; ++r) {
            rows[i][r] = found(side.rows, how, r);
            side.u[r] *= broadcast(1.f) / side.rows.sum[r];
            u[r].of[i] = side.u[r];
        }
    }

    // the rule
    float dalpha[kWidth], exists[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) exists[i] = i < count ? 1.f : 0.f;
    for (int r = 0; r < R; ++r) {
        if (rule != Rule::kProjected) {
            const Found of_row[kSegments] = {rows[0][r], rows[1][r], rows[2][r]};
            made.c[r] = coefficients(rule, of_row, minus_alpha[r]);
            const RuleGradients g = gradients(rule, of_row, minus_alpha[r], u[r]);
            for (int i = 0; i < kSegments; ++i) made.dlse[r].of[i] = g.of_lse[i];
            made.dalpha[r] = g.of_alpha;
        }
        store(dalpha + r * kLanes, made.dalpha[r]);
    }
    if (to.dalpha != nullptr) {
        float* const out = to.dalpha + (b * p.l + first) * p.h + h;
        for (int64_t i = 0; i < count; ++i) out[i * p.h] = dalpha[i];
    }

    // dQ, dK and dV
    bool add = false;
    for (int i = 0; i < kSegments; ++i) {
        Side<R>& side = sides[i];
        if (side.keys == nullptr) continue;
        const Keys& keys = *side.keys;
        Factors<R> f;
        for (int r = 0; r < R; ++r) {
            // no weight behind the last row
            f.inverse[r] = load(exists + r * kLanes) / side.rows.sum[r];
            f.c[r] = made.c[r].of[i];
            f.u[r] = u[r].of[i];
            f.dlse[r] = made.dlse[r].of[i];
        }
        const Scaling how(keys, p.scale);
        for (int64_t j = 0; j < keys.n; j += kChunkKeys) {
            const int64_t some = smaller(kChunkKeys, keys.n - j);
            const int64_t at = x.is_held ? j * kWidth : 0;
            if (!x.is_held) side.template examine<Math>(x.qt, how, p.d, j, some, ahead);
            score_gradients<Math, R>(side.s + at, side.g + at, some, f, x);
            const float* const ds_along_n = kPack == 1 ? side.g + at : x.ds_along_n;
            const float* const p_along_l = kPack == 1 ? side.s + at : x.p_along_l;
            const float* const ds_along_l = kPack == 1 ? side.g + at : x.ds_along_l;
            constexpr int64_t kSteps = kWidth / kPack;
            if (to.dq != nullptr) {
                const float* const k = keys.k_along_n + j / kPack * p.d;
                query_gradients<Math, R>(k, some, p.d, ds_along_n, add, x.dqt);
                add = true;
            }
            if (sums.dv[i] != nullptr) {
                key_gradients<Math>(p_along_l, kSteps, side.go, some, width,
                                    sums.dv[i] + j * width);
            }
            if (sums.dk[i] != nullptr) {
                key_gradients<Math>(ds_along_l, kSteps, x.q, some, width, sums.dk[i] + j * width);
            }
        }
    }
    if (to.dq == nullptr) return;
    const auto dq = [&](int64_t column, int r) __attribute__((always_inline)) {
        if (!add) return Vec{};
        return load(x.dqt + column * kWidth + r * kLanes) * broadcast(p.scale);
    };
    store_transposed<T, R>(dq, p.d, row_of<T>(to.dq, p.l, p, b, first, h), p.h * p.d, count);
}

// The sums of all parts [parts, stride], in their order, as rows of the gradient of head h of K or V
template <class T>
void reduce(const Call& p, const Segment& segment, int64_t b, int64_t h, const float* sums,
            int64_t parts, int64_t stride, int64_t width, float scale, void* to) {
    int64_t j = 0;
    for (int64_t token = 0; token < segment.n; ++token) {
        T* const out = static_cast<T*>(to) + ((b * segment.n + token) * p.h_kv + h) * p.d;
        if (sums == nullptr || bias_at(segment.mask, b, token) == -__builtin_inff()) {
            for (int64_t c = 0; c < p.d; ++c) out[c] = T{};
            continue;
        }
        for (int64_t c = 0; c < width; c += kLanes) {
            Vec x = {};
            for (int64_t part = 0; part < parts; ++part) {
                x += load(sums + part * stride + j * width + c);
            }
            T many[kLanes];
            store(many, x * broadcast(scale));
            for (int64_t i = c; i < smaller(c + kLanes, p.d); ++i) out[i] = many[i - c];
        }
        ++j;
    }
}

template <class T>
bool backward_of(const Call& p, const Gradients& to, const Threads& threads) {
    using Math = typename MathOf<T>::type;
    const Blocks blocks(p, {});
    const Pass pass = is_projected(blocks) ? Pass::kBackwardOfZ : Pass::kBackward;
    const AllKeys all = AllKeys::of<T, Math>(p, blocks.uses, pass, threads);

    // where the sums of a part of a head lie. One width for dK and dV: whole vectors
    const int64_t width = divide_up(p.d, kLanes) * kLanes, heads = p.b * p.h;
    int64_t stride = 0, dk_at[kSegments], dv_at[kSegments];
    for (int i = 0; i < kSegments; ++i) {
        const int64_t size = blocks.uses[i] ? p.segment[i].n * width : 0;
        dk_at[i] = stride;
        stride += to.dk[i] != nullptr ? size : 0;
        dv_at[i] = stride;
        stride += to.dv[i] != nullptr ? size : 0;
    }
    // how the rows are split does not depend on the threads, and so no sum does
    const int64_t bound = kMostSums / larger(1, heads * stride * 4);
    const int64_t wanted = smaller(divide_up(kSplitTasks, larger(heads, 1)),
                                   smaller(divide_up(blocks.count * kRows, kSplitRows), bound));
    const int64_t of_part = larger(1, divide_up(blocks.count, larger(1, wanted)));
    const int64_t parts = larger(1, divide_up(blocks.count, of_part));

    Arena size{nullptr};
    Scratch<Math>(p, blocks, width, size);
    const Memory memory(threads.count * size.used, Use::kScratch);
    const Memory sum_memory(heads * parts * stride * 4, Use::kSums);
    if (all.memory.data == nullptr || memory.data == nullptr || sum_memory.data == nullptr) {
        return false;
    }
    float* const sums = reinterpret_cast<float*>(sum_memory.data);
    for_each(threads, heads * parts, [&](int64_t i, int64_t worker) {
        Arena arena{memory.data + worker * size.used};
        const Scratch<Math> scratch(p, blocks, width, arena);
        const int64_t part = i % parts, h = i / parts % p.h, b = i / parts / p.h;
        float* const own = sums + i * stride;
        __builtin_memset(own, 0, stride * 4);
        KeySums of{};
        for (int s = 0; s < kSegments; ++s) {
            if (!blocks.uses[s]) continue;
            of.dk[s] = to.dk[s] != nullptr ? own + dk_at[s] : nullptr;
            of.dv[s] = to.dv[s] != nullptr ? own + dv_at[s] : nullptr;
        }
        const int64_t end = smaller((part + 1) * of_part, blocks.count);
        for (int64_t at = part * of_part; at < end; ++at) {
            const Block block = blocks.at(at);
            with_tile<kPanels>(block.panels, [&](auto panels) {
                constexpr int kR = decltype(panels)::value;
                backward_block<T, kR>(p, to, block, all, b, h, width, scratch, of);
            });
        }
    });
    // the parts of all heads of a group lie in a row
    const int64_t parts_of_group = parts * (p.h / larger(1, p.h_kv));
    for_each(threads, p.b * p.h_kv * kSegments, [&](int64_t i, int64_t) {
        const int64_t s = i % kSegments, h = i / kSegments % p.h_kv, b = i / kSegments / p.h_kv;
        const float* const own =
            blocks.uses[s] ? sums + (b * p.h_kv + h) * parts_of_group * stride : nullptr;
        const float* const dk = own == nullptr ? nullptr : own + dk_at[s];
        const float* const dv = own == nullptr ? nullptr : own + dv_at[s];
        const Segment& x = p.segment[s];
        if (to.dk[s]) {
            reduce<T>(p, x, b, h, dk, parts_of_group, stride, width, p.scale, to.dk[s]);
        }
        if (to.dv[s]) reduce<T>(p, x, b, h, dv, parts_of_group, stride, width, 1.f, to.dv[s]);
    });
    return true;
}

}  // namespace

bool backward(const Call& p, const Gradients& to, const Threads& threads) {
    switch (p.type) {
        case Type::kFloat: return backward_of<float>(p, to, threads);
        case Type::kHalf: return backward_of<Half>(p, to, threads);
        case Type::kBfloat16: return backward_of<Bfloat16>(p, to, threads);
    }
    return false;
}

}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
