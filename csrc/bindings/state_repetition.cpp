#include <pybind11/stl.h>

#include "bindings/state.h"
#include "core/check.h"
#include "repetition/detector.h"

namespace py = pybind11;

namespace megatron_rl {

void bind_repetition(py::module_& m) {
    using repetition::Detector;
    py::class_<Detector>(m, "RepetitionDetector")
        .def(py::init<int32_t, int32_t, int32_t>(), py::arg("max_period"), py::arg("min_repeats"), py::arg("min_tokens"))
        .def("push", &Detector::push, py::arg("token"))
        .def(
            "push_many",
            [](Detector& detector, const py::array& tokens) {
                if (!py::isinstance<py::array_t<int32_t, py::array::c_style>>(tokens) || tokens.ndim() != 1)
                    refuse("RepetitionDetector.push_many", "token_ids", "a contiguous int32 array of one dimension",
                           std::string(py::str(tokens.dtype())) + " of " + std::to_string(tokens.ndim()) + " dimensions");
                const auto* data = static_cast<const int32_t*>(tokens.data());
                return detector.push_many(data, static_cast<std::size_t>(tokens.size()));
            },
            py::arg("token_ids"))
        .def_property_readonly("window", &Detector::window);
}

}  // namespace megatron_rl
