// Operators on KV pages: check, fill the params struct of kv/pages.h, choose CPU or CUDA. Faces: megatron_rl/kernels/kv_pages.py
#include <type_traits>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "core/check.h"
#include "kv/pages.h"
#ifdef MEGATRON_RL_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kv/pages_cuda.h"
#endif

namespace megatron_rl {
namespace {

using at::Tensor;
using at::TensorList;

// Only c10's own exceptions reach Python by their names from an operator. The text is whole before c10 sees it: TORCH_CHECK with
// several arguments would join them with a stream of ours (core/check.h).
template <class Error = c10::ValueError, class Expected, class Got>
[[noreturn]] void refuse_argument(const std::string& argument, const Expected& expected, const Got& got) {
    throw Error({__func__, __FILE__, __LINE__}, refusal("kv_pages", argument, expected, got));
}

std::string list_of(at::IntArrayRef numbers) {
    std::string text = "[";
    for (std::size_t i = 0; i < numbers.size(); ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
    return text + "]";
}

std::string describe(const Tensor& tensor) {
    return std::string(c10::toString(tensor.scalar_type())) + " " + list_of(tensor.sizes()) + ", strides " +
           list_of(tensor.strides()) + ", on " + tensor.device().str();
}

kv::Scheme scheme_named(c10::string_view name) {
    if (name == "none") return kv::Scheme::none;
    if (name == "int8") return kv::Scheme::int8;
    if (name == "fp8") return kv::Scheme::fp8;
    refuse_argument("scheme", "none, int8 or fp8", name);
}

kv::Element element_of(at::ScalarType type) {
    if (type == at::kFloat) return kv::Element::float32;
    if (type == at::kBFloat16) return kv::Element::bfloat16;
    if (type == at::kHalf) return kv::Element::float16;
    return kv::Element::opaque;
}

// regions: each [pages, a, b, row], its last three dimensions contiguous, all of one shape, stride, dtype and device.
kv::PagedPool pool_of(TensorList regions, kv::Scheme scheme) {
    if (regions.empty() || regions.size() > kv::max_regions)
        refuse_argument("regions", "1 to " + std::to_string(kv::max_regions), regions.size());
    const Tensor& first = regions[0];
    if (first.dim() != 4 || first.size(0) == 0 || !first[0].is_contiguous())
        refuse_argument("regions", "[pages, a, b, row] with contiguous pages, at least one", describe(first));
    kv::PagedPool pool{};
    for (std::size_t i = 0; i < regions.size(); ++i) {
        const Tensor& region = regions[i];
        if (region.sizes() != first.sizes() || region.strides() != first.strides() ||
            region.scalar_type() != first.scalar_type() || region.device() != first.device())
            refuse_argument("regions[" + std::to_string(i) + "]", "as the first, " + describe(first), describe(region));
        pool.base[i] = static_cast<uint8_t*>(region.data_ptr());
    }
    pool.num_pages = first.size(0);
    pool.page_stride = first.stride(0) * static_cast<int64_t>(first.element_size());
    pool.num_regions = static_cast<int32_t>(regions.size());
    pool.rows_per_page = static_cast<int32_t>(first.size(1) * first.size(2));
    pool.row_elements = static_cast<int32_t>(first.size(3));
    pool.element_bytes = static_cast<int32_t>(first.element_size());
    pool.element = element_of(first.scalar_type());
    const bool fits = pool.element != kv::Element::opaque && pool.row_elements % 4 == 0 && pool.row_elements <= kv::max_row_elements;
    if (scheme != kv::Scheme::none && !fits)
        refuse_argument("scheme", "a pool of float32, bfloat16 or float16 with rows of a multiple of 4, at most " +
                        std::to_string(kv::max_row_elements) + " elements", describe(first));
    return pool;
}

void check_pages(const char* name, const Tensor& pages, TensorList regions) {
    if (pages.dim() != 1 || pages.scalar_type() != at::kLong || !pages.is_contiguous() || pages.device() != regions[0].device())
        refuse_argument(name, "contiguous int64 [n] on " + regions[0].device().str(), describe(pages));
}

// On a CPU a bad page stops the call before anything is written.
void check_inside(const char* name, const Tensor& pages, const kv::PagedPool& pool) {
    const int64_t* ids = pages.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < pages.size(0); ++i) {
        if (ids[i] < 0 || ids[i] >= pool.num_pages)
            refuse_argument<c10::IndexError>(std::string(name) + "[" + std::to_string(i) + "]",
                                             "a page in 0 .. " + std::to_string(pool.num_pages - 1), ids[i]);
    }
}

kv::PagedPool pool_with_slab(TensorList regions, const Tensor& pages, const Tensor& slab, kv::Scheme scheme) {
    const auto pool = pool_of(regions, scheme);
    check_pages("pages", pages, regions);
    const int64_t bytes = kv::slot_bytes(pool, scheme);
    if (slab.dim() != 2 || slab.scalar_type() != at::kByte || !slab.is_contiguous() || slab.size(0) != pages.size(0) ||
        slab.size(1) != bytes || slab.device() != pages.device())
        refuse_argument("slab", "contiguous uint8 " + list_of({pages.size(0), bytes}) + " on " + pages.device().str(),
                        describe(slab));
    return pool;
}

kv::PagedPool pool_with_moves(TensorList regions, const Tensor& sources, const Tensor& targets) {
    const auto pool = pool_of(regions, kv::Scheme::none);
    check_pages("sources", sources, regions);
    check_pages("targets", targets, regions);
    if (sources.size(0) != targets.size(0))
        refuse_argument("targets", std::to_string(sources.size(0)) + " pages", targets.size(0));
    return pool;
}

// Byte is const where a kernel reads the slab (scatter), not where it writes it (gather).
template <class Byte>
Byte* bytes_of(const Tensor& slab) {
    if constexpr (std::is_const_v<Byte>) return slab.const_data_ptr<uint8_t>();
    else return slab.mutable_data_ptr<uint8_t>();
}

template <class Byte, void (*kernel)(const kv::PagedPool&, kv::Scheme, const int64_t*, int64_t, int64_t, Byte*)>
void transfer_cpu(TensorList regions, const Tensor& pages, const Tensor& slab, const Tensor&, c10::string_view name, int64_t) {
    const auto scheme = scheme_named(name);
    const auto pool = pool_with_slab(regions, pages, slab, scheme);
    check_inside("pages", pages, pool);
    at::parallel_for(0, pages.size(0), 1, [&](int64_t begin, int64_t end) {
        kernel(pool, scheme, pages.const_data_ptr<int64_t>(), begin, end, bytes_of<Byte>(slab));
    });
}

void move_cpu(TensorList regions, const Tensor& sources, const Tensor& targets, const Tensor&, int64_t) {
    const auto pool = pool_with_moves(regions, sources, targets);
    check_inside("sources", sources, pool);
    check_inside("targets", targets, pool);
    at::parallel_for(0, sources.size(0), 1, [&](int64_t begin, int64_t end) {
        kv::move_cpu(pool, sources.const_data_ptr<int64_t>(), targets.const_data_ptr<int64_t>(), begin, end);
    });
}

#ifdef MEGATRON_RL_CUDA
kv::Launch launch_with(const Tensor& faults, int64_t max_blocks) {
    return {faults.mutable_data_ptr<int64_t>(), static_cast<int32_t>(max_blocks), c10::cuda::getCurrentCUDAStream().stream()};
}

template <class Byte, cudaError_t (*kernel)(const kv::PagedPool&, kv::Scheme, const int64_t*, int64_t, Byte*, const kv::Launch&)>
void transfer_cuda(TensorList regions, const Tensor& pages, const Tensor& slab, const Tensor& faults, c10::string_view name,
                   int64_t max_blocks) {
    const c10::cuda::CUDAGuard guard(pages.device());
    const auto scheme = scheme_named(name);
    const auto pool = pool_with_slab(regions, pages, slab, scheme);
    C10_CUDA_CHECK(kernel(pool, scheme, pages.const_data_ptr<int64_t>(), pages.size(0), bytes_of<Byte>(slab),
                          launch_with(faults, max_blocks)));
}

void move_cuda(TensorList regions, const Tensor& sources, const Tensor& targets, const Tensor& faults, int64_t max_blocks) {
    const c10::cuda::CUDAGuard guard(sources.device());
    const auto pool = pool_with_moves(regions, sources, targets);
    C10_CUDA_CHECK(kv::move_cuda(pool, sources.const_data_ptr<int64_t>(), targets.const_data_ptr<int64_t>(), sources.size(0),
                                 launch_with(faults, max_blocks)));
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_rl, m) {
    m.def("kv_gather(Tensor[] regions, Tensor pages, Tensor(a!) out, Tensor(b!) faults, str scheme, int max_blocks) -> ()");
    m.def("kv_scatter(Tensor(a!)[] regions, Tensor pages, Tensor slab, Tensor(b!) faults, str scheme, int max_blocks) -> ()");
    m.def("kv_move(Tensor(a!)[] regions, Tensor sources, Tensor targets, Tensor(b!) faults, int max_blocks) -> ()");
}

TORCH_LIBRARY_IMPL(megatron_rl, CPU, m) {
    m.impl("kv_gather", transfer_cpu<uint8_t, kv::gather_cpu>);
    m.impl("kv_scatter", transfer_cpu<const uint8_t, kv::scatter_cpu>);
    m.impl("kv_move", move_cpu);
}

#ifdef MEGATRON_RL_CUDA
TORCH_LIBRARY_IMPL(megatron_rl, CUDA, m) {
    m.impl("kv_gather", transfer_cuda<uint8_t, kv::gather_cuda>);
    m.impl("kv_scatter", transfer_cuda<const uint8_t, kv::scatter_cuda>);
    m.impl("kv_move", move_cuda);
}
#endif

}  // namespace megatron_rl
