# The CUTLASS headers: CLAA_CUTLASS_DIR (a source tree), or the PyPI package nvidia-cutlass.

set(CLAA_CUTLASS_DIR "$ENV{CLAA_CUTLASS_DIR}" CACHE PATH "CUTLASS source tree (with include/)")
if(NOT CLAA_CUTLASS_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "
import importlib.util, pathlib, sysconfig
spec = importlib.util.find_spec('cutlass_library')
found = list(spec.submodule_search_locations) if spec else []
found += [f'{sysconfig.get_path(kind)}/cutlass_library' for kind in ('platlib', 'purelib')]
sources = [pathlib.Path(f) / 'source' for f in found]
print(next((s for s in sources if (s / 'include/cute/tensor.hpp').is_file()), ''))
"
    OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(CLAA_CUTLASS_DIR "${found}" CACHE PATH "" FORCE)
endif()

set(CLAA_CUTLASS_VERSION none)
if(EXISTS "${CLAA_CUTLASS_DIR}/include/cutlass/version.h")
  file(STRINGS "${CLAA_CUTLASS_DIR}/include/cutlass/version.h" version
       REGEX "define CUTLASS_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*PATCH ([0-9]+).*" "\\1.\\2.\\3"
         CLAA_CUTLASS_VERSION "${version}")
endif()
