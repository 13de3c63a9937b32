# For a wheel: libraries that load with glibc 2.28 and later, linked on a system that is newer.
#
# glibc 2.34 moved what was in libpthread, libdl and librt into libc and gave it new versions; the
# CUDA runtime in _C.so asks for these functions. Empty libraries of the old names, in front of the
# system's, make the linker write down the old versions, which every glibc has. At run time the
# system's are loaded. What libstdc++'s headers ask glibc 2.32 for is defined in single_threaded.cpp.
if(NOT CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
  message(FATAL_ERROR "NASA_OLD_GLIBC: the versions of other processors than x86_64 are not known")
endif()

set(OLD_libpthread.so.0 GLIBC_2.2.5
  pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join
  pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock
  pthread_mutexattr_destroy pthread_mutexattr_init pthread_mutexattr_setpshared
  pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
  pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock
  pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock pthread_rwlock_wrlock
  pthread_rwlockattr_destroy pthread_rwlockattr_init pthread_rwlockattr_setpshared
  pthread_setspecific pthread_spin_destroy pthread_spin_init pthread_spin_lock
  pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait
  sem_wait)
set(OLD_libdl.so.2 GLIBC_2.2.5 dlclose dlerror dlopen dlsym dlvsym GLIBC_2.3.4 dlmopen)
set(OLD_librt.so.1 GLIBC_2.2.5 shm_open shm_unlink)

# The list of versions, each followed by its symbols, as an empty library and its version script.
function(nasa_old_library name)
  set(source "")
  set(script "")
  foreach(item ${OLD_${name}})
    if(item MATCHES "^GLIBC_")
      string(APPEND script "${item} {\n")
    else()
      string(APPEND source ".globl ${item}\n.type ${item}, @function\n${item}:\n")
      string(APPEND script "  ${item};\n")
    endif()
  endforeach()
  # a version ends where the next one begins
  string(REGEX REPLACE "\nGLIBC_" "\n};\nGLIBC_" script "${script}")
  set(folder ${CMAKE_BINARY_DIR}/old_glibc)
  file(WRITE ${folder}/${name}.s "${source}.section .note.GNU-stack,\"\",@progbits\n")
  file(WRITE ${folder}/${name}.map "${script}};\n")
  execute_process(
    COMMAND ${CMAKE_CXX_COMPILER} -shared -nostdlib -Wl,-soname,${name}
            -Wl,--version-script=${folder}/${name}.map ${folder}/${name}.s -o ${folder}/${name}
    COMMAND_ERROR_IS_FATAL ANY)
endfunction()

# nasa_for_old_glibc(MODULE LIBRARIES...): ask old glibc for what MODULE needs of these libraries
function(nasa_for_old_glibc module)
  target_sources(${module} PRIVATE ${CMAKE_SOURCE_DIR}/cmake/single_threaded.cpp)
  foreach(library ${ARGN})
    nasa_old_library(${library})
    target_link_libraries(${module} PRIVATE ${CMAKE_BINARY_DIR}/old_glibc/${library})
  endforeach()
endfunction()
