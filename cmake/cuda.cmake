# The CUDA C++ kernels.
enable_language(CUDA)

# TORCH_CUDA_ARCH_LIST syntax. 8.0 runs on 8.x, 10.0 on 10.x; 9.0a runs on 9.0 alone and is what
# wgmma needs; the PTX of 12.0 is for GPUs to come.
set(NASA_CUDA_ARCHS "8.0;9.0a;10.0;12.0+PTX" CACHE STRING "architectures to compile for")
# Sources of kernels for every architecture, and of those for 9.0a alone.
set(NASA_KERNELS
  csrc/forward_short.cu csrc/forward_long.cu csrc/backward_queries.cu csrc/backward_keys.cu
  csrc/nag_blend.cu)
set(NASA_KERNELS_SM90 csrc/forward_sm90_short.cu csrc/forward_sm90_long.cu)
set(NASA_FLAGS -O3 -Xptxas=-warn-spills)

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

# "8.0" "12.0+PTX" -> -gencode flags
function(nasa_gencode out)
  set(flags)
  foreach(arch ${ARGN})
    if(NOT arch MATCHES "^([0-9]+)\\.([0-9][a-z]?)(\\+PTX)?$")
      message(FATAL_ERROR "NASA_CUDA_ARCHS: '${arch}' is not like 8.0, 9.0a or 12.0+PTX")
    endif()
    set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    list(APPEND flags "-gencode=arch=compute_${number},code=sm_${number}")
    if(CMAKE_MATCH_3)
      list(APPEND flags "-gencode=arch=compute_${number},code=compute_${number}")
    endif()
  endforeach()
  set(${out} "${flags}" PARENT_SCOPE)
endfunction()

string(REPLACE " " ";" archs "${NASA_CUDA_ARCHS}")
nasa_gencode(gencode ${archs})
set_source_files_properties(${NASA_KERNELS} PROPERTIES COMPILE_OPTIONS "${gencode}")
if("9.0a" IN_LIST archs)
  nasa_gencode(gencode_sm90 9.0a)
  set_source_files_properties(${NASA_KERNELS_SM90} PROPERTIES COMPILE_OPTIONS "${gencode_sm90}")
  list(APPEND NASA_KERNELS ${NASA_KERNELS_SM90})
  add_compile_definitions(NASA_WITH_SM90)
endif()

nasa_module(_C csrc/bindings.cpp csrc/choose.cpp ${NASA_KERNELS})
set_target_properties(_C PROPERTIES CUDA_RUNTIME_LIBRARY Static)
if(NASA_OLD_GLIBC)
  nasa_for_old_glibc(_C libpthread.so.0 libdl.so.2 librt.so.1)
endif()
# a semicolon would end the definition
string(REPLACE ";" "," listed "${archs}")
target_compile_definitions(_C PRIVATE "NASA_CUDA_ARCHS=\"${listed}\"")
target_compile_options(_C PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${NASA_FLAGS}>")
target_include_directories(_C SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})

# The PTX of the same sources with the same flags, before ptxas: one file per source, for the tests.
set(ptx_files)
function(nasa_ptx source arch)
  get_filename_component(name ${source} NAME_WE)
  set(out ${CMAKE_BINARY_DIR}/ptx/${name}.ptx)
  add_custom_command(
    OUTPUT ${out}
    COMMAND ${CMAKE_CUDA_COMPILER} -std=c++17 ${NASA_FLAGS} -arch=compute_${arch} -ptx
            ${CMAKE_SOURCE_DIR}/${source} -o ${out} -MD -MF ${out}.d
    DEPENDS ${source} DEPFILE ${out}.d VERBATIM)
  set(ptx_files ${ptx_files} ${out} PARENT_SCOPE)
endfunction()
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/ptx)
foreach(source ${NASA_KERNELS})
  if(source IN_LIST NASA_KERNELS_SM90)
    nasa_ptx(${source} 90a)
  else()
    nasa_ptx(${source} 80)
  endif()
endforeach()
add_custom_target(ptx DEPENDS ${ptx_files})

# The launchers with tests/support/fake_cuda.cpp in place of the CUDA runtime, for
# tests/cuda/test_cuda_launch.py. Its kernels never run: PTX that nobody optimises is the quickest to make.
if(NOT EXISTS ${CMAKE_SOURCE_DIR}/tests/support/fake_cuda.cpp)
  return()
endif()
set(recorder ${CMAKE_BINARY_DIR}/recorder.so)
set(recorder_sources csrc/choose.cpp ${NASA_KERNELS} tests/support/fake_cuda.cpp)
set(recorder_headers
  bench/launch_syntax.h bench/one_device.h csrc/device.h csrc/launch.h csrc/layouts.h csrc/nasa.h
  csrc/ptx.cuh csrc/rules.cuh csrc/schedule.cuh csrc/share.h csrc/sm90.cuh csrc/softmax.cuh
  csrc/tensor_maps.h csrc/tile.cuh)
list(TRANSFORM recorder_sources PREPEND ${CMAKE_SOURCE_DIR}/)
add_custom_command(
  OUTPUT ${recorder}
  COMMAND ${CMAKE_CUDA_COMPILER} -std=c++17 -O1 -Xcicc -O0 -DNASA_WITH_SM90
          -gencode=arch=compute_90a,code=compute_90a -Xcompiler -fPIC -shared -cudart=none
          ${recorder_sources} -o ${recorder}
  DEPENDS ${recorder_sources} ${recorder_headers} VERBATIM)
add_custom_target(recorder DEPENDS ${recorder})

# The bindings and launchers with bench/host_runtime.cpp in place of the CUDA runtime, for CPU tensors:
# `python -m bench host` times what is left of a call.
add_library(host_bindings OBJECT csrc/bindings.cpp)
target_compile_definitions(host_bindings PRIVATE
  TORCH_TARGET_VERSION=0x020a000000000000 NASA_DEVICE=CPU "NASA_CUDA_ARCHS=\"9.0a\"")
target_include_directories(host_bindings SYSTEM PRIVATE
  ${NASA_TORCH_DIR}/include ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
set_target_properties(host_bindings PROPERTIES EXCLUDE_FROM_ALL ON)
set(host ${CMAKE_BINARY_DIR}/host.so)
set(host_sources csrc/choose.cpp ${NASA_KERNELS} bench/host_runtime.cpp)
list(TRANSFORM host_sources PREPEND ${CMAKE_SOURCE_DIR}/)
add_custom_command(
  OUTPUT ${host}
  COMMAND ${CMAKE_CUDA_COMPILER} -std=c++17 -O2 -Xcicc -O0 -DNASA_WITH_SM90
          -gencode=arch=compute_90a,code=compute_90a -Xcompiler -fPIC -shared -cudart=none
          ${host_sources} $<TARGET_OBJECTS:host_bindings> -o ${host} -Xlinker -Bsymbolic
          -L${NASA_TORCH_DIR}/lib -ltorch -ltorch_cpu -lc10
  DEPENDS ${host_sources} ${recorder_headers} host_bindings $<TARGET_OBJECTS:host_bindings>
  COMMAND_EXPAND_LISTS VERBATIM)
add_custom_target(host DEPENDS ${host})

# The bindings on CPU tensors, to be loaded after the recorder, whose launchers they call:
# tests/cuda/test_cuda_calls.py.
add_library(fake_torch OBJECT tests/support/fake_torch.cpp)
target_include_directories(fake_torch SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
set_target_properties(fake_torch PROPERTIES EXCLUDE_FROM_ALL ON)
set(calls ${CMAKE_BINARY_DIR}/calls.so)
add_custom_command(
  OUTPUT ${calls}
  COMMAND ${CMAKE_CXX_COMPILER} -shared $<TARGET_OBJECTS:fake_torch>
          $<TARGET_OBJECTS:host_bindings> -o ${calls} -Wl,-Bsymbolic
          -L${NASA_TORCH_DIR}/lib -ltorch -ltorch_cpu -lc10
  DEPENDS fake_torch host_bindings $<TARGET_OBJECTS:fake_torch> $<TARGET_OBJECTS:host_bindings>
  COMMAND_EXPAND_LISTS VERBATIM)
add_custom_target(calls DEPENDS ${calls} ${recorder})
