#include "bindings/state.h"
#include "kv/allocator.h"

namespace py = pybind11;

namespace megatron_rl {

void bind_allocator(py::module_& m) {
    py::class_<kv::BlockAllocator>(m, "BlockAllocator")
        .def(py::init<int64_t>(), py::arg("num_blocks"))
        .def_property_readonly("num_blocks", &kv::BlockAllocator::num_blocks);
}

}  // namespace megatron_rl
