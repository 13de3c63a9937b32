// Every line of assembly: one function per instruction, and nothing else.
//
// A shared-memory address is the 32-bit address in the shared window, as the instructions take it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace nasa::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- copies from global to shared memory (sm_80) ---------------------------------------------

// Copy 16 bytes, or write 16 zeros without reading `source` when it is not valid.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(source),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most kPending of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- fragments and products of a warp (sm_80) ------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8]
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                            uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers ---------------------------------------------------------------------------------

// Round two floats to T; `low` is the first in memory.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- barriers in shared memory, and copies that arrive at them (sm_90) -----------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

// Make initialised mbarriers visible to the async proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrive, and let the phase wait for `bytes` of copies, too.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// True once the phase of this parity is complete; the hardware may let the thread sleep a while.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, int parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

// Copy a box of a 4-d tensor map to shared memory; zeros outside of the tensor.
__device__ __forceinline__ void tma_load_4d(uint32_t shared, const void* map, uint32_t barrier,
                                            int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// Copy a box from shared memory; nothing is written outside of the tensor.
__device__ __forceinline__ void tma_store_4d(const void* map, uint32_t shared, int c0, int c1,
                                             int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], "
        "[%1];" ::"l"(map),
        "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

__device__ __forceinline__ void bulk_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Wait until this thread's bulk stores have read their shared memory.
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Order this thread's shared-memory accesses before those of TMA and wgmma that follow.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Barrier `id` of `threads` threads; 0 is __syncthreads'.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- products of a warpgroup (sm_90a) --------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until at most kPending committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// One instruction per width n and type, c [64, n] (+)= a [64, 16] b [16, n]:
//     wgmma          a and b in shared memory by descriptor, both with contiguous k
//     wgmma_values   a in registers, b by descriptor with contiguous n
// c[j] are the accumulators of column tile j, as in mma_m16n8k16; they start at 0 unless `add`.
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma(float (&c)[kTiles][4], uint64_t a, uint64_t b, bool add);
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma_values(float (&c)[kTiles][4], const uint32_t (&a)[4],
                                             uint64_t b, bool add);

// Register lists: one, five and eight column tiles
#define NASA_C1(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define NASA_C5(j) NASA_C1(j), NASA_C1(j + 1), NASA_C1(j + 2), NASA_C1(j + 3), NASA_C1(j + 4)
#define NASA_C8(j) NASA_C5(j), NASA_C1(j + 5), NASA_C1(j + 6), NASA_C1(j + 7)

// clang-format off
#define NASA_WGMMA_N80(T, type)                                                                   \
    template <>                                                                                   \
    __device__ __forceinline__ void wgmma<T, 10>(                                                 \
        float (&c)[10][4], uint64_t a, uint64_t b, bool add) {                                    \
        asm volatile(                                                                             \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %42, 0;\n"                                      \
            "wgmma.mma_async.sync.aligned.m64n80k16.f32." type "." type " {"                      \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "                   \
            "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "         \
            "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39"                                    \
            "}, %40, %41, add, 1, 1, 0, 0;\n}"                                                    \
            : NASA_C5(0), NASA_C5(5)                                                              \
            : "l"(a), "l"(b), "r"(int(add)));                                                     \
    }
NASA_WGMMA_N80(__half, "f16")
NASA_WGMMA_N80(__nv_bfloat16, "bf16")
#undef NASA_WGMMA_N80

#define NASA_WGMMA_N128(T, type)                                                                  \
    template <>                                                                                   \
    __device__ __forceinline__ void wgmma<T, 16>(                                                 \
        float (&c)[16][4], uint64_t a, uint64_t b, bool add) {                                    \
        asm volatile(                                                                             \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                      \
            "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"                     \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "                   \
            "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "         \
            "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, "         \
            "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "         \
            "%60, %61, %62, %63"                                                                  \
            "}, %64, %65, add, 1, 1, 0, 0;\n}"                                                    \
            : NASA_C8(0), NASA_C8(8)                                                              \
            : "l"(a), "l"(b), "r"(int(add)));                                                     \
    }
NASA_WGMMA_N128(__half, "f16")
NASA_WGMMA_N128(__nv_bfloat16, "bf16")
#undef NASA_WGMMA_N128

#define NASA_WGMMA_VALUES_N40(T, type)                                                            \
    template <>                                                                                   \
    __device__ __forceinline__ void wgmma_values<T, 5>(                                           \
        float (&c)[5][4], const uint32_t (&a)[4], uint64_t b, bool add) {                         \
        asm volatile(                                                                             \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %25, 0;\n"                                      \
            "wgmma.mma_async.sync.aligned.m64n40k16.f32." type "." type " {"                      \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "                   \
            "%15, %16, %17, %18, %19"                                                             \
            "}, {%20, %21, %22, %23}, %24, add, 1, 1, 1;\n}"                                      \
            : NASA_C5(0)                                                                          \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                 \
    }
NASA_WGMMA_VALUES_N40(__half, "f16")
NASA_WGMMA_VALUES_N40(__nv_bfloat16, "bf16")
#undef NASA_WGMMA_VALUES_N40

#define NASA_WGMMA_VALUES_N64(T, type)                                                            \
    template <>                                                                                   \
    __device__ __forceinline__ void wgmma_values<T, 8>(                                           \
        float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool add) {                         \
        asm volatile(                                                                             \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                      \
            "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {"                      \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "                   \
            "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "         \
            "%30, %31"                                                                            \
            "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}"                                      \
            : NASA_C8(0)                                                                          \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                 \
    }
NASA_WGMMA_VALUES_N64(__half, "f16")
NASA_WGMMA_VALUES_N64(__nv_bfloat16, "bf16")
#undef NASA_WGMMA_VALUES_N64

#define NASA_WGMMA_VALUES_N72(T, type)                                                            \
    template <>                                                                                   \
    __device__ __forceinline__ void wgmma_values<T, 9>(                                           \
        float (&c)[9][4], const uint32_t (&a)[4], uint64_t b, bool add) {                         \
        asm volatile(                                                                             \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %41, 0;\n"                                      \
            "wgmma.mma_async.sync.aligned.m64n72k16.f32." type "." type " {"                      \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "                   \
            "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "         \
            "%30, %31, %32, %33, %34, %35"                                                        \
            "}, {%36, %37, %38, %39}, %40, add, 1, 1, 1;\n}"                                      \
            : NASA_C8(0), NASA_C1(8)                                                              \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                 \
    }
NASA_WGMMA_VALUES_N72(__half, "f16")
NASA_WGMMA_VALUES_N72(__nv_bfloat16, "bf16")
#undef NASA_WGMMA_VALUES_N72

#define NASA_WGMMA_VALUES_N80(T, type)                                                            \
    template <>                                                                                   \
    __device__ __forceinline__ void wgmma_values<T, 10>(                                          \
        float (&c)[10][4], const uint32_t (&a)[4], uint64_t b, bool add) {                        \
        asm volatile(                                                                             \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %45, 0;\n"                                      \
            "wgmma.mma_async.sync.aligned.m64n80k16.f32." type "." type " {"                      \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "                   \
            "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "         \
            "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39"                                    \
            "}, {%40, %41, %42, %43}, %44, add, 1, 1, 1;\n}"                                      \
            : NASA_C5(0), NASA_C5(5)                                                              \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                 \
    }
NASA_WGMMA_VALUES_N80(__half, "f16")
NASA_WGMMA_VALUES_N80(__nv_bfloat16, "bf16")
#undef NASA_WGMMA_VALUES_N80

#define NASA_WGMMA_VALUES_N128(T, type)                                                           \
    template <>                                                                                   \
    __device__ __forceinline__ void wgmma_values<T, 16>(                                          \
        float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool add) {                        \
        asm volatile(                                                                             \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"                                      \
            "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"                     \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "                   \
            "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "         \
            "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, "         \
            "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "         \
            "%60, %61, %62, %63"                                                                  \
            "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;\n}"                                      \
            : NASA_C8(0), NASA_C8(8)                                                              \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                 \
    }
NASA_WGMMA_VALUES_N128(__half, "f16")
NASA_WGMMA_VALUES_N128(__nv_bfloat16, "bf16")
#undef NASA_WGMMA_VALUES_N128

#define NASA_WGMMA_VALUES_N160(T, type)                                                           \
    template <>                                                                                   \
    __device__ __forceinline__ void wgmma_values<T, 20>(                                          \
        float (&c)[20][4], const uint32_t (&a)[4], uint64_t b, bool add) {                        \
        asm volatile(                                                                             \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %85, 0;\n"                                      \
            "wgmma.mma_async.sync.aligned.m64n160k16.f32." type "." type " {"                     \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "                   \
            "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "         \
            "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, "         \
            "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "         \
            "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, "         \
            "%75, %76, %77, %78, %79"                                                             \
            "}, {%80, %81, %82, %83}, %84, add, 1, 1, 1;\n}"                                      \
            : NASA_C5(0), NASA_C5(5), NASA_C5(10), NASA_C5(15)                                    \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                 \
    }
NASA_WGMMA_VALUES_N160(__half, "f16")
NASA_WGMMA_VALUES_N160(__nv_bfloat16, "bf16")
#undef NASA_WGMMA_VALUES_N160
// clang-format on

#undef NASA_C8
#undef NASA_C5
#undef NASA_C1

}  // namespace nasa::ptx
