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

// clang-format off
#define NASA_MMA(T, type)                                                                         \
    template <>                                                                                   \
    __device__ __forceinline__ void mma_m16n8k16<T>(float (&c)[4], const uint32_t (&a)[4],        \
                                                    uint32_t b0, uint32_t b1) {                   \
        asm volatile(                                                                             \
            "mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                        \
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                               \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                      \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                      \
    }
NASA_MMA(__half, "f16")
NASA_MMA(__nv_bfloat16, "bf16")
#undef NASA_MMA
// clang-format on

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

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / sqrt(x)
__device__ __forceinline__ float inverse_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x, made here and once: not under a condition, nor anew for each of its uses
__device__ __forceinline__ float in_register(float x) {
    asm volatile("" : "+f"(x));
    return x;
}

__device__ __forceinline__ uint32_t in_register(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
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

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
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

// Registers per thread of this warpgroup from here on, less or more than the kernel started with.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Have a tensor map in the cache when the first copy asks for it.
__device__ __forceinline__ void prefetch_map(const void* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Wait until the grids that this one was launched to overlap with have finished, and their writes
// are visible.
__device__ __forceinline__ void wait_for_earlier_grids() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
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

// The accumulators are read from here on, and not before: no instruction, an order for the compiler,
// to which wgmma_wait alone says nothing of registers.
template <int kTiles>
__device__ __forceinline__ void arrived(float (&c)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        asm volatile("" : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])::"memory");
    }
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

// Accumulators of column tiles: one, five and eight as operands, 5 to 20 as a list of registers
#define NASA_C1(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define NASA_C5(j) NASA_C1(j), NASA_C1(j + 1), NASA_C1(j + 2), NASA_C1(j + 3), NASA_C1(j + 4)
#define NASA_C8(j) NASA_C5(j), NASA_C1(j + 5), NASA_C1(j + 6), NASA_C1(j + 7)

// clang-format off
#define NASA_D5                                                            \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
    ", %16, %17, %18, %19"
#define NASA_D8 NASA_D5                                            \
    ", %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NASA_D9 NASA_D8    \
    ", %32, %33, %34, %35"
#define NASA_D10 NASA_D9   \
    ", %36, %37, %38, %39"
#define NASA_D16 NASA_D10                                                              \
    ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55" \
    ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NASA_D20 NASA_D16                                                              \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
// the operands after the accumulators are numbered from 4 * tiles on
#define NASA_WGMMA(T, type, tiles, n, a_, b_, add_, ...)                                          \
    template <>                                                                                   \
    __device__ __forceinline__ void wgmma<T, tiles>(                                              \
        float (&c)[tiles][4], uint64_t a, uint64_t b, bool add) {                                 \
        asm volatile(                                                                             \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %" #add_ ", 0;\n"                               \
            "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" NASA_D##tiles    \
            "}, %" #a_ ", %" #b_ ", add, 1, 1, 0, 0;\n}"                                          \
            : __VA_ARGS__                                                                         \
            : "l"(a), "l"(b), "r"(int(add)));                                                     \
    }
#define NASA_WGMMA_VALUES(T, type, tiles, n, a0, a1, a2, a3, b_, add_, ...)                       \
    template <>                                                                                   \
    __device__ __forceinline__ void wgmma_values<T, tiles>(                                       \
        float (&c)[tiles][4], const uint32_t (&a)[4], uint64_t b, bool add) {                     \
        asm volatile(                                                                             \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %" #add_ ", 0;\n"                               \
            "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" NASA_D##tiles    \
            "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_ ", add, 1, 1, 1;\n}"             \
            : __VA_ARGS__                                                                         \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                 \
    }
#define NASA_WGMMAS(T, type)                                                                      \
    NASA_WGMMA(T, type, 10, 80, 40, 41, 42, NASA_C5(0), NASA_C5(5))                               \
    NASA_WGMMA(T, type, 16, 128, 64, 65, 66, NASA_C8(0), NASA_C8(8))                              \
    NASA_WGMMA_VALUES(T, type, 5, 40, 20, 21, 22, 23, 24, 25, NASA_C5(0))                         \
    NASA_WGMMA_VALUES(T, type, 8, 64, 32, 33, 34, 35, 36, 37, NASA_C8(0))                         \
    NASA_WGMMA_VALUES(T, type, 9, 72, 36, 37, 38, 39, 40, 41, NASA_C8(0), NASA_C1(8))             \
    NASA_WGMMA_VALUES(T, type, 10, 80, 40, 41, 42, 43, 44, 45, NASA_C5(0), NASA_C5(5))            \
    NASA_WGMMA_VALUES(T, type, 16, 128, 64, 65, 66, 67, 68, 69, NASA_C8(0), NASA_C8(8))           \
    NASA_WGMMA_VALUES(T, type, 20, 160, 80, 81, 82, 83, 84, 85, NASA_C5(0), NASA_C5(5),           \
                      NASA_C5(10), NASA_C5(15))
NASA_WGMMAS(__half, "f16")
NASA_WGMMAS(__nv_bfloat16, "bf16")
// clang-format on

#undef NASA_WGMMAS
#undef NASA_WGMMA_VALUES
#undef NASA_WGMMA
#undef NASA_D20
#undef NASA_D16
#undef NASA_D10
#undef NASA_D9
#undef NASA_D8
#undef NASA_D5
#undef NASA_C8
#undef NASA_C5
#undef NASA_C1

}  // namespace nasa::ptx
