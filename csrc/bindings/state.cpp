// The module megatron_rl.kernels._state: stateful CPU classes and planners, without torch.
#include "bindings/state.h"

PYBIND11_MODULE(_state, m) {
    m.doc() = "CPU classes of csrc/; see megatron_rl/kernels";
    m.attr("built_with_torch") = MEGATRON_RL_TORCH;
    megatron_rl::bind_allocator(m);
    megatron_rl::bind_packing(m);
    megatron_rl::bind_repetition(m);
}
