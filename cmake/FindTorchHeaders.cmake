# The headers and libtorch_cpu of an installed torch, without importing it and without torch's own
# CMake package, which for a CUDA torch insists on cuBLAS, nvRTC and more in the toolkit.
#
# Looked for in this order: CLAA_TORCH_DIR; the torch that the build's interpreter sees; the
# environment of that interpreter (pip's isolated build hides its packages but shares its prefix).
# The libraries use the LibTorch stable ABI only, so the headers need not match the torch that the
# libraries will run on.

set(CLAA_TORCH_DIR "$ENV{CLAA_TORCH_DIR}" CACHE PATH "an installed torch package (.../torch)")
set(CLAA_TORCH_TARGET 0x020b000000000000)  # TORCH_TARGET_VERSION: the oldest torch to run on
set(CLAA_TORCH_MINIMUM 2.11)

if(NOT CLAA_TORCH_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "
import importlib.util, pathlib, sysconfig
spec = importlib.util.find_spec('torch')
found = list(spec.submodule_search_locations) if spec else []
found += [f'{sysconfig.get_path(kind)}/torch' for kind in ('platlib', 'purelib')]
header = 'include/torch/csrc/stable/library.h'
print(next((f for f in found if (pathlib.Path(f) / header).is_file()), ''))
"
    OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(CLAA_TORCH_DIR "${found}" CACHE PATH "" FORCE)
endif()
if(NOT EXISTS "${CLAA_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR
    "claa_ops: found no torch with stable-ABI headers (looked at '${CLAA_TORCH_DIR}'). "
    "Install torch >= ${CLAA_TORCH_MINIMUM} first and build without isolation:\n"
    "    pip install torch scikit-build-core pybind11 cmake ninja\n"
    "    pip install --no-build-isolation .\n"
    "or set CLAA_TORCH_DIR to the installed package.")
endif()

file(STRINGS "${CLAA_TORCH_DIR}/include/torch/headeronly/version.h" version
     REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*PATCH ([0-9]+).*" "\\1.\\2.\\3"
       CLAA_TORCH_HEADERS "${version}")
if(CLAA_TORCH_HEADERS VERSION_LESS CLAA_TORCH_MINIMUM)
  message(FATAL_ERROR "claa_ops: torch must be at least ${CLAA_TORCH_MINIMUM}, "
                      "got the headers of ${CLAA_TORCH_HEADERS}")
endif()
message(STATUS "claa_ops: torch headers ${CLAA_TORCH_HEADERS} from ${CLAA_TORCH_DIR}")

add_library(claa_torch INTERFACE)
target_include_directories(claa_torch SYSTEM INTERFACE "${CLAA_TORCH_DIR}/include")
target_compile_definitions(claa_torch INTERFACE TORCH_TARGET_VERSION=${CLAA_TORCH_TARGET})
target_link_libraries(claa_torch INTERFACE "${CLAA_TORCH_DIR}/lib/libtorch_cpu.so")
