# Makes the libraries load wherever manylinux_2_28 wheels do (glibc 2.28, the libstdc++ of GCC 8),
# whichever glibc and GCC build them. tests/test_abi.py checks it.
#
# libstdc++ and libgcc stay shared, which torch loads anyway: a refused argument is a C++ exception
# that torch catches, and must be thrown by the runtime that catches it. (Thrown by a static libgcc it
# ends the process; by a static libstdc++ it leaves std::uncaught_exceptions() at -1.)

add_library(claa_old_glibc INTERFACE)
target_sources(claa_old_glibc INTERFACE "${CMAKE_SOURCE_DIR}/src/claa_ops/old_systems.cpp")

# Stubs of the system's libraries, with the old versions of functions that have newer ones. At link
# time they come before the libraries themselves (and after what calls them), so that the functions
# are bound to those versions, which every newer system still has.
function(claa_stub_library library)
  set(code "")
  set(map "")
  foreach(word ${ARGN})  # a version, the functions of that version, the next version
    if(word MATCHES "^GLIBC")
      string(REGEX REPLACE "(.+)" "\\1};\n" map "${map}")
      string(APPEND map "${word} { ")
    else()
      string(APPEND code "void ${word}(void) {}\n")
      string(APPEND map "${word}; ")
    endif()
  endforeach()
  set(stub "${CMAKE_CURRENT_BINARY_DIR}/stubs/${library}")
  file(CONFIGURE OUTPUT "${stub}.c" CONTENT "${code}")
  file(CONFIGURE OUTPUT "${stub}.map" CONTENT "${map}};\n")
  add_library(claa_stub_${library} SHARED "${stub}.c")
  set_target_properties(claa_stub_${library} PROPERTIES
    OUTPUT_NAME ${library} PREFIX "" SUFFIX "" C_VISIBILITY_PRESET default
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stubs"
    LINK_OPTIONS "-Wl,--version-script=${stub}.map" LINK_DEPENDS "${stub}.map")
  target_link_libraries(claa_old_glibc INTERFACE claa_stub_${library})
endfunction()

# Since glibc 2.34 these are in libc; before that they were in three other libraries. CUDA's static runtime calls them.
claa_stub_library(libpthread.so.0 GLIBC_2.2.5
  pthread_condattr_setpshared pthread_create pthread_detach pthread_getcpuclockid pthread_getspecific
  pthread_join
  pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock
  pthread_mutexattr_destroy pthread_mutexattr_init pthread_mutexattr_setpshared
  pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
  pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock
  pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock pthread_rwlock_wrlock
  pthread_rwlockattr_destroy pthread_rwlockattr_init pthread_rwlockattr_setpshared
  pthread_setspecific pthread_spin_destroy pthread_spin_init pthread_spin_lock
  pthread_spin_trylock pthread_spin_unlock
  sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait)
claa_stub_library(libdl.so.2 GLIBC_2.2.5 dlclose dlerror dlopen dlsym dlvsym GLIBC_2.3.4 dlmopen)
claa_stub_library(librt.so.1 GLIBC_2.2.5 shm_open shm_unlink)
