// K and V of every head, copied once: rows that lie together, masked keys left out, in the type
// that is multiplied.
#pragma once

#include "work.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

// The last one multiplies V with weights of keys as well, as a forward pass does.
enum class Pass { kForward, kBackward, kBackwardOfZ };

// The keys of one head: paired along d, [n, d / kPack], to meet Q or dO, and along n,
// [n / kPack, d], to meet weights of keys. With kPack 1 these are one. What a pass has no use for
// is null.
struct Keys {
    float *k_along_d, *k_along_n, *v_along_d, *v_along_n;
    float* bias;  // [n], or null where all are 0
    int64_t n;
};

inline float bias_at(const Mask& mask, int64_t b, int64_t j) {
    const int64_t at = b * mask.stride_b + j * mask.stride_n;
    switch (mask.type) {
        case MaskType::kNone: return 0.f;
        case MaskType::kBool:
            return static_cast<const uint8_t*>(mask.data)[at] ? 0.f : -__builtin_inff();
        case MaskType::kFloat: return static_cast<const float*>(mask.data)[at];
        case MaskType::kHalf: return to_float(static_cast<const Half*>(mask.data)[at]);
        case MaskType::kBfloat16: return to_float(static_cast<const Bfloat16*>(mask.data)[at]);
    }
    return 0.f;
}

template <class T>
void to_floats(const T* from, int64_t count, float* to) {
    if (count < kLanes) {
        for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
        return;
    }
    // the last vector may overlap the one before it
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t at = smaller(i, count - kLanes);
        store(to + at, load(from + at));
    }
}

// Row j of a matrix that is paired along d
template <class T, class Math>
void pack_along_d(const T* from, int64_t d, int64_t j, float* to) {
    if constexpr (Math::kPack == 1) {
        to_floats(from, d, to + j * d);
    } else {
        float* const pairs = to + j * divide_up(d, 2);
        __builtin_memcpy(pairs, from, d / 2 * 4);
        if (d % 2 == 1) pairs[d / 2] = bit_cast<float>(uint32_t{from[d - 1].bits});
    }
}

// Row j of a matrix that is paired with the row before it, or with zeros until the next one comes
template <class T, class Math>
void pack_along_n(const T* from, int64_t d, int64_t j, float* to) {
    if constexpr (Math::kPack == 1) {
        to_floats(from, d, to + j * d);
    } else {
        float* const pairs = to + j / 2 * d;
        if (j % 2 == 0) {
            for (int64_t c = 0; c < d; ++c) pairs[c] = bit_cast<float>(uint32_t{from[c].bits});
        } else {
            for (int64_t c = 0; c < d; ++c) {
                const uint32_t low = bit_cast<uint32_t>(pairs[c]);
                pairs[c] = bit_cast<float>(low | uint32_t{from[c].bits} << 16);
            }
        }
    }
}

// Places for n keys; without memory, how many bytes they take
template <class Math>
Keys places(Pass pass, int64_t n, int64_t d, Arena& arena) {
    const auto along_d = [&] { return arena.take<float>(n * divide_up(d, Math::kPack)); };
    const auto along_n = [&] { return arena.take<float>(divide_up(n, Math::kPack) * d); };
    Keys x{};
    x.k_along_d = along_d();
    if (pass == Pass::kForward) {
        x.v_along_n = along_n();
    } else {
        x.k_along_n = Math::kPack == 1 ? x.k_along_d : along_n();
        x.v_along_d = along_d();
        if (pass == Pass::kBackwardOfZ) x.v_along_n = Math::kPack == 1 ? x.v_along_d : along_n();
    }
    x.bias = arena.take<float>(n);
    return x;
}

template <class T, class Math>
Keys pack(Pass pass, const Segment& from, int64_t b, int64_t h, int64_t d, Arena& arena) {
    Keys x = places<Math>(pass, from.n, d, arena);
    bool has_bias = false;
    for (int64_t j = 0; j < from.n; ++j) {
        const float bias = bias_at(from.mask, b, j);
        if (bias == -__builtin_inff()) continue;
        const T* const k = row<T>(from.k, b, j, h);
        const T* const v = row<T>(from.v, b, j, h);
        pack_along_d<T, Math>(k, d, x.n, x.k_along_d);
        if (pass == Pass::kForward) {
            pack_along_n<T, Math>(v, d, x.n, x.v_along_n);
        } else {
            if (x.k_along_n != x.k_along_d) pack_along_n<T, Math>(k, d, x.n, x.k_along_n);
            pack_along_d<T, Math>(v, d, x.n, x.v_along_d);
            if (pass == Pass::kBackwardOfZ && x.v_along_n != x.v_along_d) {
                pack_along_n<T, Math>(v, d, x.n, x.v_along_n);
            }
        }
        has_bias |= bias != 0;
        x.bias[x.n++] = bias;
    }
    if (!has_bias) x.bias = nullptr;
    return x;
}

// Every segment of every head of K and V; one that the whole batch shares is there once.
class AllKeys {
   private:
    int64_t heads_, group_;  // group_ heads of Q look at each
    int64_t batches_[kSegments], first_[kSegments + 1], start_[kSegments], bytes_[kSegments];

   public:
    const Memory memory;

    template <class T, class Math>
    static AllKeys of(const Call& p, const bool (&uses)[kSegments], Pass pass,
                      const Threads& threads) {
        return AllKeys(p, uses, pass, threads, &places<Math>, &pack<T, Math>);
    }
    // of head h of Q
    const Keys& at(int segment, int64_t b, int64_t h) const {
        const int64_t head = group_ == 1 ? h : h / group_;
        return table_[first_[segment] + (batches_[segment] == 1 ? 0 : b) * heads_ + head];
    }

   private:
    using Places = Keys (*)(Pass, int64_t, int64_t, Arena&);
    using Pack = Keys (*)(Pass, const Segment&, int64_t, int64_t, int64_t, Arena&);

    Keys* const table_;

    AllKeys(const Call& p, const bool (&uses)[kSegments], Pass pass, const Threads& threads,
            Places places, Pack pack)
        : memory(layout(p, uses, pass, places), Use::kKeys),
          table_(reinterpret_cast<Keys*>(memory.data)) {
        if (memory.data == nullptr) return;
        for_each(threads, first_[kSegments], [&](int64_t i, int64_t) {
            int s = kSegments - 1;
            while (i < first_[s]) --s;
            const int64_t head = i - first_[s];
            table_[i] = {};
            if (!uses[s]) return;
            Arena arena{memory.data + start_[s] + head * bytes_[s]};
            table_[i] = pack(pass, p.segment[s], head / heads_, head % heads_, p.d, arena);
        });
    }

    // Where everything lies. Returns how many bytes that takes.
    int64_t layout(const Call& p, const bool (&uses)[kSegments], Pass pass, Places places) {
        heads_ = p.h_kv;
        group_ = p.h / larger(1, heads_);
        first_[0] = 0;
        for (int s = 0; s < kSegments; ++s) {
            batches_[s] = !uses[s] || is_shared(p.segment[s]) ? 1 : p.b;
            first_[s + 1] = first_[s] + batches_[s] * heads_;
        }
        int64_t bytes = divide_up(first_[kSegments] * int64_t{sizeof(Keys)}, 64) * 64;
        for (int s = 0; s < kSegments; ++s) {
            Arena count{nullptr};
            if (uses[s]) places(pass, p.segment[s].n, p.d, count);
            start_[s] = bytes;
            bytes_[s] = count.used;
            bytes += batches_[s] * heads_ * bytes_[s];
        }
        return bytes;
    }
    static bool is_shared(const Segment& x) {
        const bool is_mask_shared = x.mask.type == MaskType::kNone || x.mask.stride_b == 0;
        return x.n == 0 || (x.k.stride_b == 0 && x.v.stride_b == 0 && is_mask_shared);
    }
};

}  // namespace
}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
