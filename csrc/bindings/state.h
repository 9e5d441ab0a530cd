// One function a kernel folder adds its classes with.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace megatron_rl {

void bind_allocator(pybind11::module_& m);
void bind_packing(pybind11::module_& m);
void bind_repetition(pybind11::module_& m);

}  // namespace megatron_rl
