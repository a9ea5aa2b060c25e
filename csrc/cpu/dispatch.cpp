// Chooses the build of the kernels that this processor runs best.

#include "csrc/kernels.h"

namespace claa::cpu {

#define CLAA_DECLARE_BUILDS(Params)               \
  namespace plain {                               \
  Schedule schedule(const Params&);               \
  void run(const Params&, int, int64_t, int64_t); \
  }                                               \
  namespace avx2 {                                \
  Schedule schedule(const Params&);               \
  void run(const Params&, int, int64_t, int64_t); \
  }                                               \
  namespace avx512 {                              \
  Schedule schedule(const Params&);               \
  void run(const Params&, int, int64_t, int64_t); \
  }
CLAA_FOR_EACH_OP(CLAA_DECLARE_BUILDS)

namespace {

Isa best_isa() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::avx2;
  return Isa::plain;
}

Isa isa = best_isa();

}  // namespace

Isa active_isa() { return isa; }
void limit_isa(Isa best) { isa = best < best_isa() ? best : best_isa(); }

#define CLAA_DISPATCH(Params)                                        \
  Schedule schedule(const Params& p) {                               \
    switch (isa) {                                                   \
      case Isa::avx512: return avx512::schedule(p);                  \
      case Isa::avx2: return avx2::schedule(p);                      \
      case Isa::plain: break;                                        \
    }                                                                \
    return plain::schedule(p);                                       \
  }                                                                  \
  void run(const Params& p, int phase, int64_t begin, int64_t end) { \
    switch (isa) {                                                   \
      case Isa::avx512: return avx512::run(p, phase, begin, end);    \
      case Isa::avx2: return avx2::run(p, phase, begin, end);        \
      case Isa::plain: break;                                        \
    }                                                                \
    return plain::run(p, phase, begin, end);                         \
  }
CLAA_FOR_EACH_OP(CLAA_DISPATCH)

}  // namespace claa::cpu
