// The vector layer: everything that differs between instruction sets, and nothing else.
//
// A Vec holds kLanes floats. Arithmetic is written with operators, as GCC and Clang allow on their
// vector types; what has no operator, or must not be left to the compiler, is a function here.
//
// Nothing of the standard library that is inline appears in a file that is compiled once for each
// instruction set: the linker keeps one copy of such a function for all CPUs, and it could be the
// one with AVX-512 in it. For the same reason every function has internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define NASA_INLINE inline __attribute__((always_inline))

namespace nasa {
namespace cpu {
namespace NASA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // NEON, SSE2, and what else the compiler has
#endif

// A tile of accumulators is kTile scalars by kPanels vectors: as many as the registers hold beside
// kPanels operands and one scalar.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTile = 8, kPanels = 3;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kTile = 4, kPanels = 3;  // of 16
#else
constexpr int kTile = 4, kPanels = 2;  // of 16, where a product needs one until it is added
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));
using Unsigned = uint32_t __attribute__((vector_size(4 * kLanes)));
using Short = uint16_t __attribute__((vector_size(2 * kLanes)));

struct Half {
    uint16_t bits;
};
struct Bfloat16 {
    uint16_t bits;
};

template <class To, class From>
NASA_INLINE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

// ------------------------------------------------------------------------------------- arithmetic

NASA_INLINE Vec broadcast(float x) { return x - Vec{}; }

// a * b + c, rounded once where the instruction set can
NASA_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

// b where one of them is NaN
NASA_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

NASA_INLINE Vec sqrt(Vec x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#elif defined(__aarch64__)
    return vsqrtq_f32(x);
#else
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

NASA_INLINE Vec magnitude(Vec x) {
    return bit_cast<Vec>(bit_cast<Unsigned>(x) & 0x7fffffffu);
}

// x where `mask` (-1 or 0 in each lane, as comparisons give it) is set, else 0, also for NaN
NASA_INLINE Vec where(Int mask, Vec x) { return bit_cast<Vec>(bit_cast<Int>(x) & mask); }

// Keeps x in a register where the compiler would rather load it again for each use.
NASA_INLINE void keep(Vec& x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
}

// ----------------------------------------------------------------------------------- exponentials

// 2^r = 1 + r (c[0] + r (c[1] + ..)), of the least relative error on [-1/2, 1/2], by degree - 3:
// 1.0e-4, 2.8e-6, 9.2e-8 and 2.0e-9
constexpr float kExp2[4][6] = {
    {0.693282902f, 0.242210954f, 0.0550089329f},
    {0.693124175f, 0.240240991f, 0.0559064262f, 0.00958285294f},
    {0.693147004f, 0.240222424f, 0.0555073359f, 0.00967151299f, 0.00132647273f},
    {0.693147182f, 0.240226477f, 0.0555033237f, 0.00961843692f, 0.00133988739f, 0.000153533620f},
};

template <int kDegree>
NASA_INLINE Vec polynomial(Vec r) {
    constexpr const float(&c)[6] = kExp2[kDegree - 3];
    Vec p = broadcast(c[kDegree - 1]);
#pragma GCC unroll 8
    for (int i = kDegree - 2; i >= 0; --i) p = fma(p, r, broadcast(c[i]));
    return fma(p, r, broadcast(1.f));
}

// An integer near x, and p times 2 to its power, which is above -127 where there is no scalef
#if defined(__AVX512F__)
constexpr float kLeastPower = -200.f;
NASA_INLINE Vec nearest(Vec x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
NASA_INLINE Vec scale_by_power(Vec p, Vec whole) { return _mm512_scalef_ps(p, whole); }
#else
constexpr float kLeastPower = -126.f;
// adding 1.5 * 2^23 leaves the nearest integer in the low bits
NASA_INLINE Vec nearest(Vec x) { return x + 12582912.f - 12582912.f; }
NASA_INLINE Vec scale_by_power(Vec p, Vec whole) {
    const Unsigned power = bit_cast<Unsigned>(whole + 12582912.f) << 23;
    return bit_cast<Vec>(bit_cast<Unsigned>(p) + power);
}
#endif

// exp2((x - largest) * base) for x <= largest and base > 0, to 1.3 units of the last place and
// exactly 1 where they are equal. Where the power is below -126: 0 or less than 2^-125.
struct Exact {
    Vec least, base;

    explicit Exact(float base) : least(broadcast(kLeastPower / base)), base(broadcast(base)) {}
    NASA_INLINE Vec operator()(Vec x, Vec largest) const {
        // -inf becomes a number, NaN stays
        x = max(least, x - largest);
        const Vec whole = nearest(x * base);
        // the product is never rounded as a whole
        return scale_by_power(polynomial<6>(fma(x, base, -whole)), whole);
    }
};

// The same to a relative error of 2^-18 (degree 4) or 2^-13 (degree 3), for types that round to
// 2^-11 or 2^-8. NaN for -inf.
template <int kDegree>
struct Relaxed {
    Vec base;

    explicit Relaxed(float base) : base(broadcast(base)) {}
    NASA_INLINE Vec operator()(Vec x, Vec largest) const {
        Vec power = (x - largest) * base;
#if !defined(__AVX512F__)
        power = max(broadcast(kLeastPower), power);
#endif
        const Vec whole = nearest(power);
        return scale_by_power(polynomial<kDegree>(power - whole), whole);
    }
};

// -------------------------------------------------------------------- memory and the storage types

NASA_INLINE Vec load(const float* p) {
    Vec x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

NASA_INLINE Vec load(const Bfloat16* p) {
    Short x;
    __builtin_memcpy(&x, p, sizeof x);
    return bit_cast<Vec>(__builtin_convertvector(x, Unsigned) << 16);
}

NASA_INLINE Vec load(const Half* p) {
    Short x;
    __builtin_memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(bit_cast<__m256i>(x));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(bit_cast<__m128i>(x));
#elif defined(__aarch64__)
    return vcvt_f32_f16(bit_cast<float16x4_t>(x));
#else
    const Unsigned wide = __builtin_convertvector(x, Unsigned);
    const Unsigned magnitude = (wide & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
    Unsigned bits = magnitude + (112u << 23);
    // infinities and NaN; then numbers below 2^-14, whose leading bit is not implied
    bits = exponent == 0x0f800000 ? bits + (112u << 23) : bits;
    const Vec small = bit_cast<Vec>(bits + (1u << 23)) - bit_cast<Vec>(Unsigned{} + (113u << 23));
    bits = exponent == 0 ? bit_cast<Unsigned>(small) : bits;
    return bit_cast<Vec>(bits | (wide & 0x8000) << 16);
#endif
}

NASA_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }

NASA_INLINE void store(Bfloat16* p, Vec x) {
    const Unsigned bits = bit_cast<Unsigned>(x);
    // to nearest even
    const Unsigned rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Unsigned result = x == x ? rounded : (bits >> 16 | 0x40);
    const Short low = __builtin_convertvector(result, Short);
    __builtin_memcpy(p, &low, sizeof low);
}

NASA_INLINE void store(Half* p, Vec x) {
#if defined(__AVX512F__)
    const Short half = bit_cast<Short>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    const Short half = bit_cast<Short>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    const Short half = bit_cast<Short>(vcvt_f16_f32(x));
#else
    const Unsigned sign = bit_cast<Unsigned>(x) & 0x80000000u;
    const Unsigned bits = bit_cast<Unsigned>(x) ^ sign;
    // below 2^-14 an addition rounds to multiples of 2^-24
    const Vec small = bit_cast<Vec>(bits) + bit_cast<Vec>(Unsigned{} + (126u << 23));
    Unsigned result = bit_cast<Unsigned>(small) - (126u << 23);
    const Unsigned normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    result = bits < (113u << 23) ? result : normal;
    result = bits >= (143u << 23) ? Unsigned{} + 0x7c00 : result;
    result = bits > 0x7f800000u ? (bits >> 13 & 0x3ff) | 0x7e00 : result;
    const Short half = __builtin_convertvector(result | sign >> 16, Short);
#endif
    __builtin_memcpy(p, &half, sizeof half);
}

NASA_INLINE float to_float(float x) { return x; }
NASA_INLINE float to_float(Bfloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
NASA_INLINE float to_float(Half x) {
    Half many[kLanes] = {x};
    return load(many)[0];
}

template <class T>
NASA_INLINE T from_float(float x) {
    T many[kLanes];
    store(many, broadcast(x));
    return many[0];
}

// ------------------------------------------------------------------------------------ transposing

template <int... I>
struct Lanes {};
template <int N, int... I>
struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I>
struct UpTo<0, I...> {
    using type = Lanes<I...>;
};

// Lane i of the result is lane Source::at(i) of a, or from kLanes on, of b.
template <class Source, int... I>
NASA_INLINE Vec shuffle(Vec a, Vec b, Lanes<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Source::at(I)...);
#else
    return __builtin_shuffle(a, b, Int{Source::at(I)...});
#endif
}
template <class Source>
NASA_INLINE Vec shuffle(Vec a, Vec b) {
    return shuffle<Source>(a, b, typename UpTo<kLanes>::type());
}

// Within each group of 4 lanes: [a0 b0 a1 b1] and [a2 b2 a3 b3]; [a0 a1 b0 b1] and [a2 a3 b2 b3]
template <int kHigh>
struct Interleave {
    static constexpr int at(int i) { return i / 4 * 4 + 2 * kHigh + i % 4 / 2 + i % 2 * kLanes; }
};
template <int kHigh>
struct InterleavePairs {
    static constexpr int at(int i) {
        return i / 4 * 4 + 2 * kHigh + i % 2 + (i % 4 / 2) * kLanes;
    }
};
// Groups of 4 lanes: those of a with even numbers, or with odd ones, then the same of b
template <int kOdd>
struct EveryOtherGroup {
    static constexpr int at(int i) {
        const int group = i / 4 % (kLanes / 8), source = i / 4 / (kLanes / 8);
        return (2 * group + kOdd) * 4 + i % 4 + source * kLanes;
    }
};

// x[i][j] becomes x[j][i]
NASA_INLINE void transpose(Vec (&x)[kLanes]) {
#pragma GCC unroll 4
    for (int g = 0; g < kLanes; g += 4) {
        const Vec a = shuffle<Interleave<0>>(x[g], x[g + 1]);
        const Vec b = shuffle<Interleave<1>>(x[g], x[g + 1]);
        const Vec c = shuffle<Interleave<0>>(x[g + 2], x[g + 3]);
        const Vec d = shuffle<Interleave<1>>(x[g + 2], x[g + 3]);
        x[g] = shuffle<InterleavePairs<0>>(a, c);
        x[g + 1] = shuffle<InterleavePairs<1>>(a, c);
        x[g + 2] = shuffle<InterleavePairs<0>>(b, d);
        x[g + 3] = shuffle<InterleavePairs<1>>(b, d);
    }
#if defined(__AVX2__)
    // now the groups of 4 lanes are the elements of a smaller matrix
    constexpr int kGroups = kLanes / 4;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        if constexpr (kGroups == 2) {
            const Vec a = x[i], b = x[4 + i];
            x[i] = shuffle<EveryOtherGroup<0>>(a, b);
            x[4 + i] = shuffle<EveryOtherGroup<1>>(a, b);
        } else {
            const Vec a = shuffle<EveryOtherGroup<0>>(x[i], x[4 + i]);
            const Vec b = shuffle<EveryOtherGroup<1>>(x[i], x[4 + i]);
            const Vec c = shuffle<EveryOtherGroup<0>>(x[8 + i], x[12 + i]);
            const Vec d = shuffle<EveryOtherGroup<1>>(x[8 + i], x[12 + i]);
            x[i] = shuffle<EveryOtherGroup<0>>(a, c);
            x[8 + i] = shuffle<EveryOtherGroup<1>>(a, c);
            x[4 + i] = shuffle<EveryOtherGroup<0>>(b, d);
            x[12 + i] = shuffle<EveryOtherGroup<1>>(b, d);
        }
    }
#endif
}

// --------------------------------------------------------- how a storage type is multiplied and summed

// kPack: elements that 32 bits of a packed matrix hold.
struct Single {
    using Exponential = Exact;
    static constexpr int kPack = 1;
    static NASA_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

struct OfHalf : Single {
    using Exponential = Relaxed<4>;
};

#if defined(__AVX512BF16__)
// Products of pairs of bf16, summed in fp32: twice the rate of fp32
struct OfBfloat16 {
    using Exponential = Relaxed<3>;
    static constexpr int kPack = 2;
    static NASA_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
        return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
    }
    // lane i: (low[i], high[i])
    static NASA_INLINE Vec pack(Vec low, Vec high) {
        alignas(64) static constexpr uint16_t kZip[] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(kZip), both);
    }
    static NASA_INLINE Vec pack(const Bfloat16* low, const Bfloat16* high) {
        return bit_cast<Vec>(bit_cast<Unsigned>(load(high)) | bit_cast<Unsigned>(load(low)) >> 16);
    }
};
#else
struct OfBfloat16 : Single {
    using Exponential = Relaxed<4>;
};
#endif

template <class T>
struct MathOf;
template <>
struct MathOf<float> {
    using type = Single;
};
template <>
struct MathOf<Half> {
    using type = OfHalf;
};
template <>
struct MathOf<Bfloat16> {
    using type = OfBfloat16;
};

}  // namespace
}  // namespace NASA_ISA
}  // namespace cpu
}  // namespace nasa
