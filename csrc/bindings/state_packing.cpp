#include <pybind11/stl.h>

#include "bindings/state.h"
#include "core/check.h"
#include "packing/index.h"
#include "packing/partition.h"

namespace py = pybind11;

namespace megatron_rl {
namespace {

// The data of a contiguous array [length] of T.
template <class T>
const T* data(const char* name, const py::handle& object, std::size_t length, const char* function = "packed_index") {
    const auto array = py::cast<py::array>(object);
    if (!py::isinstance<py::array_t<T, py::array::c_style>>(array) || array.ndim() != 1)
        refuse(function, name, "a contiguous array of one dimension of " + std::string(py::str(py::dtype::of<T>())),
               std::string(py::str(array.dtype())) + " of " + std::to_string(array.ndim()) + " dimensions");
    if (static_cast<std::size_t>(array.size()) != length)
        refuse(function, name, std::to_string(length) + " elements", array.size());
    return static_cast<const T*>(array.data());
}

packing::Family family(const py::sequence& members) {
    if (members.empty()) refuse("packed_index", "families", "members in every family", "none");
    const py::object prompt = members[0].attr("prompt_ids");
    packing::Family result{data<int32_t>("prompt_ids", prompt, py::len(prompt)), py::len(prompt), {}};
    if (!result.prompt_length) refuse("packed_index", "prompt_ids", "at least one token", "none");
    for (const py::handle member : members) {
        const py::object tokens = member.attr("response_ids");
        const std::size_t length = py::len(tokens);
        result.responses.push_back({data<int32_t>("response_ids", tokens, length),
                                    reinterpret_cast<const uint8_t*>(data<bool>("loss_mask", member.attr("loss_mask"), length)),
                                    data<float>("behaviour_log_probs", member.attr("behaviour_log_probs"), length),
                                    data<int32_t>("weight_versions", member.attr("weight_versions"), length), length});
    }
    return result;
}

// The arrays stay alive in `sequences` while their data is read.
py::tuple packed_index(const py::sequence& sequences, std::size_t multiple) {
    if (multiple < 1) refuse("packed_index", "multiple", "at least 1", multiple);
    std::vector<packing::Family> families;
    for (const py::handle members : sequences) families.push_back(family(py::cast<py::sequence>(members)));
    const packing::Sizes sizes = packing::measure(families, multiple);
    if (sizes.tokens > INT32_MAX) refuse("packed_index", "families", "fewer than 2**31 rows", sizes.tokens);
    py::array_t<int64_t> token_ids(sizes.tokens), positions(sizes.tokens);
    py::array_t<int32_t> segment_ids(sizes.tokens), cu_seqlens(sizes.runs + 1), parents(sizes.runs);
    py::array_t<int64_t> loss_rows(sizes.loss_tokens), targets(sizes.loss_tokens), sequence_ids(sizes.loss_tokens);
    py::array_t<float> log_probs(sizes.loss_tokens);
    py::array_t<int32_t> versions(sizes.loss_tokens);
    packing::write(families, sizes,
                   {token_ids.mutable_data(), positions.mutable_data(), segment_ids.mutable_data(), cu_seqlens.mutable_data(),
                    parents.mutable_data(), loss_rows.mutable_data(), targets.mutable_data(), sequence_ids.mutable_data(),
                    log_probs.mutable_data(), versions.mutable_data()});
    return py::make_tuple(token_ids, positions, segment_ids, cu_seqlens, parents, sizes.padding, loss_rows, targets,
                          sequence_ids, log_probs, versions);
}

// index: a PackedIndex. Rank `rank` of `size` has the rank-th of equal shares of its rows.
py::tuple context_slice(const py::object& index, int64_t rank, int64_t size) {
    const auto num_rows = static_cast<int64_t>(py::len(index.attr("token_ids")));
    if (size < 1 || num_rows % size) refuse("context_slice", "size", "a divisor of " + std::to_string(num_rows) + " rows", size);
    if (rank < 0 || rank >= size) refuse("context_slice", "rank", "0 .. " + std::to_string(size - 1), rank);
    const packing::Rows rows{rank * (num_rows / size), (rank + 1) * (num_rows / size)};
    const std::size_t count = py::len(index.attr("loss_rows"));
    const auto read = [&](const char* name, auto* of_type) {
        return data<std::remove_pointer_t<decltype(of_type)>>(name, index.attr(name), count, "context_slice");
    };
    int64_t* const wide = nullptr;
    const packing::LossTokens all{read("loss_rows", wide),
                                  read("targets", wide),
                                  read("sequence_ids", wide),
                                  read("behaviour_log_probs", static_cast<float*>(nullptr)),
                                  read("weight_versions", static_cast<int32_t*>(nullptr)),
                                  count};
    const std::size_t chosen = packing::num_predicted(all, rows);
    py::array_t<int64_t> loss_tokens(chosen), loss_rows(chosen), targets(chosen), sequence_ids(chosen);
    py::array_t<float> log_probs(chosen);
    py::array_t<int32_t> versions(chosen);
    packing::cut(all, rows,
                 {loss_tokens.mutable_data(), loss_rows.mutable_data(), targets.mutable_data(), sequence_ids.mutable_data(),
                  log_probs.mutable_data(), versions.mutable_data()});
    return py::make_tuple(rows.first, rows.end, loss_tokens, loss_rows, targets, sequence_ids, log_probs, versions);
}

}  // namespace

void bind_packing(py::module_& m) {
    m.def("balanced", &packing::balanced, py::arg("costs"), py::arg("num_parts"));
    m.def("with_capacity", &packing::with_capacity, py::arg("sizes"), py::arg("costs"), py::arg("capacity"), py::arg("multiple"));
    m.def("packed_index", &packed_index, py::arg("families"), py::arg("multiple"));
    m.def("context_slice", &context_slice, py::arg("index"), py::arg("rank"), py::arg("size"));
}

}  // namespace megatron_rl
