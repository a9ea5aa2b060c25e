// Chooses the best build of the kernels that this processor can run.

#include "csrc/kernels.h"

namespace claa::cpu {

#define CLAA_DECLARE_BUILD(isa, Params) \
  namespace isa {                       \
  Schedule schedule(const Params&);     \
  void run(const Params&, Portion&);    \
  }
#define CLAA_DECLARE_BUILDS(Params)  \
  CLAA_DECLARE_BUILD(plain, Params)  \
  CLAA_DECLARE_BUILD(avx2, Params)   \
  CLAA_DECLARE_BUILD(avx512, Params) \
  CLAA_DECLARE_BUILD(avx512_bf16, Params)
CLAA_FOR_EACH_OP(CLAA_DECLARE_BUILDS)

namespace {

Isa best_isa() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  return __builtin_cpu_supports("x86-64-v3") ? Isa::avx2 : Isa::plain;
}

Isa isa = best_isa();

}  // namespace

Isa active_isa() { return isa; }
void limit_isa(Isa best) { isa = best < best_isa() ? best : best_isa(); }

#define CLAA_SWITCH(call)                            \
  switch (isa) {                                     \
    case Isa::avx512_bf16: return avx512_bf16::call; \
    case Isa::avx512: return avx512::call;           \
    case Isa::avx2: return avx2::call;               \
    case Isa::plain: break;                          \
  }                                                  \
  return plain::call;
#define CLAA_DISPATCH(Params)                                     \
  Schedule schedule(const Params& p) { CLAA_SWITCH(schedule(p)) } \
  void run(const Params& p, Portion& portion) { CLAA_SWITCH(run(p, portion)) }
CLAA_FOR_EACH_OP(CLAA_DISPATCH)

}  // namespace claa::cpu
