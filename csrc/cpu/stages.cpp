// The CPU's table of stages.
#include "stages_cpu.h"

namespace mra {

const Stages& cpu_stages() {
  static const Stages stages = {
      cpu::pool,
      cpu::pool_inputs,
      cpu::plan,
      cpu::transpose,
      cpu::coarse,
      cpu::coarse_backward,
      cpu::fine,
      cpu::fine_backward,
      cpu::delta,
      cpu::block_rows,
      cpu::delta_and_block_rows,
      cpu::order1,
      cpu::order1_backward,
      /*forward_head=*/nullptr,
      /*prepare=*/nullptr,
      cpu::weigh_keys,
      cpu::centre,
      cpu::centred_term,
      cpu::centred_delta,
      cpu::centred_grads,
  };
  return stages;
}

}  // namespace mra
