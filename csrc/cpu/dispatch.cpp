// Which of the compiled kernels a CPU runs. This file is compiled for the oldest CPU.
#include <cstring>

#include "nasa_cpu.h"

namespace nasa {
namespace cpu {

#define NASA_DECLARE(isa)                                         \
    namespace isa {                                               \
    bool forward(const Call&, const Result&, const Threads&);     \
    bool backward(const Call&, const Gradients&, const Threads&); \
    int64_t work(Work, Type, int64_t);                            \
    }
NASA_DECLARE(generic)
#if defined(NASA_WITH_AVX2)
NASA_DECLARE(avx2)
#endif
#if defined(NASA_WITH_AVX512)
NASA_DECLARE(avx512)
#endif
#if defined(NASA_WITH_AVX512BF16)
NASA_DECLARE(avx512bf16)
#endif

const Kernels* kernels(const char* name) {
    // the best last. __builtin_cpu_supports asks CPUID, and whether the system saves the registers
    static const Kernels all[] = {
        {"generic", generic::forward, generic::backward, generic::work},
#if defined(NASA_WITH_AVX2)
        {"avx2", avx2::forward, avx2::backward, avx2::work},
#endif
#if defined(NASA_WITH_AVX512)
        {"avx512", avx512::forward, avx512::backward, avx512::work},
#endif
#if defined(NASA_WITH_AVX512BF16)
        {"avx512bf16", avx512bf16::forward, avx512bf16::backward, avx512bf16::work},
#endif
    };
    const bool runs[] = {
        true,
#if defined(NASA_WITH_AVX2)
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
            __builtin_cpu_supports("f16c"),
#endif
#if defined(NASA_WITH_AVX512)
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
#endif
#if defined(NASA_WITH_AVX512BF16)
        __builtin_cpu_supports("avx512bf16") != 0,
#endif
    };
    const Kernels* best = nullptr;
    for (size_t i = 0; i < sizeof runs / sizeof *runs && runs[i]; ++i) {
        best = &all[i];
        if (name != nullptr && std::strcmp(name, best->name) == 0) return best;
    }
    return name == nullptr ? best : nullptr;
}

}  // namespace cpu
}  // namespace nasa
