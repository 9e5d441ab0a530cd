// BlockAllocator for Python: blocks come in as int32 or int64 arrays (or lists of int), many to a call.
// The GIL is held for the whole of each call, so calls from several Python threads do not overlap.
#include <string>

#include "bindings/state.h"
#include "core/check.h"
#include "kv/allocator.h"

namespace py = pybind11;

namespace megatron_rl {
namespace {

using kv::BlockAllocator;

// Calls `work(pointer, count)` with the blocks as they are stored.
template <class Work>
auto with_blocks(const char* kernel, const py::object& blocks, Work work) {
    py::array array = py::array::ensure(blocks);
    if (!array) {
        PyErr_Clear();
        refuse(kernel, "blocks", "a one-dimensional int32 or int64 array", std::string(py::str(py::type::of(blocks))));
    }
    if (array.ndim() == 1 && array.size() == 0) return work(static_cast<const int64_t*>(nullptr), std::size_t{0});
    const auto size = array.itemsize();
    if (array.dtype().kind() != 'i' || (size != 4 && size != 8) || array.ndim() != 1) {
        const std::string got = std::string(py::str(array.dtype())) + " of " + std::to_string(array.ndim()) + " dimensions";
        refuse(kernel, "blocks", "a one-dimensional int32 or int64 array", got);
    }
    const auto count = static_cast<std::size_t>(array.size());
    if (size == 4) {
        const auto held = py::array_t<int32_t, py::array::c_style>::ensure(array);
        return work(held.data(), count);
    }
    const auto held = py::array_t<int64_t, py::array::c_style>::ensure(array);
    return work(held.data(), count);
}

template <class Value>
py::array_t<Value> column(const BlockAllocator& self, const std::vector<Value>& values, const py::object& blocks) {
    return with_blocks("BlockAllocator", blocks, [&](const auto* found, std::size_t count) {
        py::array_t<Value> out(static_cast<py::ssize_t>(count));
        self.read(found, count, values, out.mutable_data());
        return out;
    });
}

py::array_t<int64_t> take(BlockAllocator& self, int64_t count, int32_t version) {
    py::array_t<int64_t> out(count > 0 && count <= self.num_free() ? count : 0);
    self.take(count, version, out.mutable_data());
    return out;
}

void hold(BlockAllocator& self, const py::object& blocks, int32_t more) {
    with_blocks("BlockAllocator.hold", blocks, [&](const auto* found, std::size_t count) { self.hold(found, count, more); });
}

}  // namespace

void bind_allocator(py::module_& m) {
    py::class_<BlockAllocator>(m, "BlockAllocator")
        .def(py::init<int64_t, int64_t>(), py::arg("num_blocks"), py::arg("num_reserved") = 0)
        .def_property_readonly("num_blocks", &BlockAllocator::num_blocks)
        .def_property_readonly("num_usable", &BlockAllocator::num_usable)
        .def_property_readonly("num_free", &BlockAllocator::num_free)
        .def("take", &take, py::arg("count"), py::arg("version"))
        .def("hold", [](BlockAllocator& self, const py::object& blocks) { hold(self, blocks, 1); }, py::arg("blocks"))
        .def("fork", &hold, py::arg("blocks"), py::arg("k"))
        .def(
            "drop",
            [](BlockAllocator& self, const py::object& blocks) {
                return with_blocks("BlockAllocator.drop", blocks,
                                   [&](const auto* found, std::size_t count) { return self.drop(found, count); });
            },
            py::arg("blocks"))
        .def("copy_on_write", &BlockAllocator::copy_on_write, py::arg("block"))
        .def(
            "renew",
            [](BlockAllocator& self, const py::object& blocks) {
                with_blocks("BlockAllocator.renew", blocks,
                            [&](const auto* found, std::size_t count) { self.renew(found, count); });
            },
            py::arg("blocks"))
        .def(
            "holders", [](const BlockAllocator& self, const py::object& blocks) { return column(self, self.holders(), blocks); },
            py::arg("blocks"))
        .def(
            "versions",
            [](const BlockAllocator& self, const py::object& blocks) { return column(self, self.versions(), blocks); },
            py::arg("blocks"))
        .def(
            "serials", [](const BlockAllocator& self, const py::object& blocks) { return column(self, self.serials(), blocks); },
            py::arg("blocks"))
        .def("check_empty", &BlockAllocator::check_empty);
}

}  // namespace megatron_rl
