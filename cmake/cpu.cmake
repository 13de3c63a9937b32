# The CPU kernels: the same sources compiled once for each instruction set, each in a namespace of
# its own; csrc/cpu/dispatch.cpp chooses at run time.
include(CheckCXXCompilerFlag)

nasa_module(_cpu_C csrc/cpu/bindings.cpp csrc/cpu/dispatch.cpp)
if(NASA_OLD_GLIBC)
  nasa_for_old_glibc(_cpu_C)
endif()

# -ffp-contract=off: what is fused is written so, and equal prompts cancel to an exact 0.
# GCC 12 warns about its own AVX-512 headers.
set(NASA_CPU_FLAGS -O3 -ffp-contract=off -fno-math-errno -fno-exceptions -Wall -Wextra
  -Wno-maybe-uninitialized -Wno-uninitialized CACHE STRING "of csrc/cpu's kernels")

# nasa_isa(NAME FLAGS...), where the compiler has these flags
function(nasa_isa name)
  string(TOUPPER NASA_WITH_${name} macro)
  if(ARGN)
    string(REPLACE ";" " " flags "${ARGN}")
    check_cxx_compiler_flag("${flags}" ${macro})
    if(NOT ${macro})
      return()
    endif()
  endif()
  add_library(cpu_${name} OBJECT csrc/cpu/forward.cpp csrc/cpu/backward.cpp
    csrc/cpu/peak.cpp)
  target_compile_definitions(cpu_${name} PRIVATE NASA_ISA=${name})
  target_compile_options(cpu_${name} PRIVATE ${NASA_CPU_FLAGS} ${ARGN})
  target_link_libraries(_cpu_C PRIVATE cpu_${name})
  target_compile_definitions(_cpu_C PRIVATE ${macro})
endfunction()

nasa_isa(generic)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(v3 -mavx2 -mfma -mf16c)
  set(v4 ${v3} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  nasa_isa(avx2 ${v3})
  nasa_isa(avx512 ${v4})
  nasa_isa(avx512bf16 ${v4} -mavx512bf16)
endif()

# The kernels without Torch, for tests/op/test_cpu_check.py: sanitizers, emulated CPUs, guarded pages
if(EXISTS ${CMAKE_SOURCE_DIR}/tests/support/cpu_check.cpp)
  add_executable(cpu_check EXCLUDE_FROM_ALL tests/support/cpu_check.cpp csrc/cpu/dispatch.cpp)
  target_include_directories(cpu_check PRIVATE csrc/cpu)
  foreach(isa generic avx2 avx512 avx512bf16)
    if(TARGET cpu_${isa})
      string(TOUPPER NASA_WITH_${isa} macro)
      target_link_libraries(cpu_check PRIVATE cpu_${isa})
      target_compile_definitions(cpu_check PRIVATE ${macro})
    endif()
  endforeach()
endif()
