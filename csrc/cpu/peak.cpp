// What a core can do at most with the vector layer, for the floors of the benchmarks: products and
// exponentials on numbers in registers.
#include "nasa_cpu.h"
#include "vec.h"

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

// independent chains of operations: more than the latency of one times how many start at once
constexpr int kChains = 12;

// Members and not an array, which the compiler would keep in memory.
template <int kCount>
struct Chains {
    Vec first;
    Chains<kCount - 1> others;

    NASA_INLINE explicit Chains(Vec start) : first(start), others(start) {}
    template <class F>
    NASA_INLINE void advance(const F& step) {
        keep(first = step(first));
        others.advance(step);
    }
    NASA_INLINE Vec sum() const { return first + others.sum(); }
};
template <>
struct Chains<0> {
    NASA_INLINE explicit Chains(Vec) {}
    template <class F>
    NASA_INLINE void advance(const F&) {}
    NASA_INLINE Vec sum() const { return Vec{}; }
};

template <class F>
void repeat(int64_t rounds, Vec start, const F& step) {
    Chains<kChains> x(start);
    for (int64_t i = 0; i < rounds; ++i) x.advance(step);
    // what nobody reads would not be computed
    const volatile float read = x.sum()[0];
    (void)read;
}

template <class T>
int64_t work_of(Work work, int64_t rounds) {
    using Math = typename MathOf<T>::type;
    if (work == Work::kProducts) {
        const Vec factor = broadcast(1e-9f);
        repeat(rounds, broadcast(1.f), [&](Vec x) __attribute__((always_inline)) {
            return Math::multiply_add(factor, factor, x);
        });
        return rounds * kChains * kLanes * Math::kPack * 2;
    }
    const typename Math::Exponential exponential(1.f);
    repeat(rounds, broadcast(0.5f), [&](Vec x) __attribute__((always_inline)) {
        return exponential(x, broadcast(1.f));
    });
    return rounds * kChains * kLanes;
}

}  // namespace

int64_t work(Work work, Type type, int64_t rounds) {
    switch (type) {
        case Type::kFloat: return work_of<float>(work, rounds);
        case Type::kHalf: return work_of<Half>(work, rounds);
        case Type::kBfloat16: return work_of<Bfloat16>(work, rounds);
    }
    return 0;
}

}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
