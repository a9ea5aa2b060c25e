# libclaa_ops_cuda.so: torch loads it beside libclaa_ops.so where torch has CUDA.
#
# Sets CLAA_CUDA_VERSION, CLAA_CUDA_BUILT (the architectures) and CLAA_CUTLASS_VERSION, "none" where
# the library is not built.

set(CLAA_CUDA_VERSION none)
set(CLAA_CUDA_BUILT none)
set(CLAA_CUTLASS_VERSION none)
if(CLAA_CUDA STREQUAL "OFF")
  return()
endif()

include(CheckLanguage)
if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX} AND EXISTS /usr/local/cuda/bin/nvcc)
  set(CMAKE_CUDA_COMPILER /usr/local/cuda/bin/nvcc)
endif()
set(CMAKE_CUDA_ARCHITECTURES "${CLAA_CUDA_ARCHITECTURES}")
check_language(CUDA)
include(cmake/FindCutlassHeaders.cmake)

set(missing "")
if(NOT CMAKE_CUDA_COMPILER)
  set(missing "no nvcc (put it on PATH or set CUDACXX)")
elseif(CLAA_CUTLASS_VERSION STREQUAL "none")
  set(missing "no CUTLASS headers (pip install --no-deps nvidia-cutlass, or set CLAA_CUTLASS_DIR)")
endif()
if(missing)
  if(CLAA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "claa_ops: CLAA_CUDA=ON, but found ${missing}")
  endif()
  set(CLAA_CUTLASS_VERSION none)
  message(STATUS "claa_ops: ${missing}; building the CPU library only")
  return()
endif()

enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")  # without NDEBUG: an index out of range is a device assertion
set(CLAA_CUDA_VERSION ${CUDAToolkit_VERSION})
set(CLAA_CUDA_BUILT "${CLAA_CUDA_ARCHITECTURES}")
list(JOIN CLAA_CUDA_BUILT " " CLAA_CUDA_BUILT)
message(STATUS "claa_ops: CUDA ${CLAA_CUDA_VERSION} for ${CLAA_CUDA_BUILT}, "
               "CUTLASS ${CLAA_CUTLASS_VERSION}")

list(TRANSFORM CLAA_OPS REPLACE "(.+)" "csrc/cuda/\\1.cu" OUTPUT_VARIABLE cuda_sources)
add_library(claa_cuda OBJECT ${cuda_sources} csrc/cuda/softmax.cu csrc/cuda/window_attention.cu)
set(cuda_objects claa_cuda)

# Kernels of Hopper's own instructions: for that architecture alone.
if("90a-real" IN_LIST CLAA_CUDA_ARCHITECTURES)
  add_library(claa_hopper OBJECT csrc/cuda/hopper/hop_links.cu csrc/cuda/hopper/peak.cu
                                 csrc/cuda/hopper/scores.cu
                                 csrc/cuda/hopper/scores_narrow.cu csrc/cuda/hopper/scores_wide.cu
                                 csrc/cuda/hopper/softmax.cu)
  set_target_properties(claa_hopper PROPERTIES CUDA_ARCHITECTURES 90a-real)
  target_compile_definitions(claa_cuda PRIVATE CLAA_HOPPER)
  target_compile_definitions(claa_hopper PRIVATE CLAA_HOPPER)
  list(APPEND cuda_objects claa_hopper)
endif()

foreach(objects ${cuda_objects})
  target_include_directories(${objects} PRIVATE "${CMAKE_SOURCE_DIR}")
  target_include_directories(${objects} SYSTEM PRIVATE "${CLAA_CUTLASS_DIR}/include")
  target_compile_definitions(${objects} PRIVATE CLAA_CUDA)
  target_compile_options(${objects} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr
    -Xcompiler=-fno-gnu-unique --compress-mode=size>)
  if(CLAA_WERROR)
    target_compile_options(${objects} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings>)
  endif()
endforeach()

# Stands in for libtorch_cuda.so at link time, so that a machine with a CPU torch builds the same
# library, and any other symbol of libtorch_cuda is a link error.
file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub.c"
     "void aoti_torch_get_current_cuda_stream(void) {}\n")
add_library(torch_cuda_stub SHARED "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub.c")
set_target_properties(torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda C_VISIBILITY_PRESET default
                      LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stubs")

list(TRANSFORM cuda_objects REPLACE "(.+)" "$<TARGET_OBJECTS:\\1>" OUTPUT_VARIABLE cuda_objects)
add_library(claa_ops_cuda SHARED src/claa_ops/library.cpp ${border_sources} ${cuda_objects})
target_include_directories(claa_ops_cuda PRIVATE "${CMAKE_SOURCE_DIR}")
target_compile_definitions(claa_ops_cuda PRIVATE CLAA_CUDA USE_CUDA)
# cudart is linked statically, so the library does not care which CUDA torch was built with.
target_link_libraries(claa_ops_cuda PRIVATE claa_torch torch_cuda_stub CUDA::cudart_static
                                            claa_old_glibc)
target_link_options(claa_ops_cuda PRIVATE ${strict_link})
install(TARGETS claa_ops_cuda LIBRARY DESTINATION claa_ops/lib)
