// Operators on KV pages: check, fill the params struct of kv/pages.h, choose CPU or CUDA. Faces: megatron_rl/kernels/kv_pages.py
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

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

kv::Scheme scheme_named(c10::string_view name) {
    if (name == "none") return kv::Scheme::none;
    if (name == "int8") return kv::Scheme::int8;
    TORCH_CHECK_VALUE(name == "fp8", "kv_pages: scheme: expected none, int8 or fp8, got ", name);
    return kv::Scheme::fp8;
}

kv::Element element_of(at::ScalarType type) {
    if (type == at::kFloat) return kv::Element::float32;
    if (type == at::kBFloat16) return kv::Element::bfloat16;
    if (type == at::kHalf) return kv::Element::float16;
    return kv::Element::opaque;
}

// regions: each [pages, a, b, row], its last three dimensions contiguous, all of one shape, stride, dtype and device.
kv::PagedPool pool_of(TensorList regions, kv::Scheme scheme) {
    TORCH_CHECK_VALUE(!regions.empty() && regions.size() <= kv::max_regions, "kv_pages: regions: expected 1 to ",
                      kv::max_regions, ", got ", regions.size());
    const Tensor& first = regions[0];
    TORCH_CHECK_VALUE(first.dim() == 4 && first[0].is_contiguous(), "kv_pages: regions: expected [pages, a, b, row] with "
                      "contiguous pages, got sizes ", first.sizes(), ", strides ", first.strides());
    kv::PagedPool pool{};
    for (std::size_t i = 0; i < regions.size(); ++i) {
        const Tensor& region = regions[i];
        TORCH_CHECK_VALUE(region.sizes() == first.sizes() && region.strides() == first.strides() &&
                          region.scalar_type() == first.scalar_type() && region.device() == first.device(),
                          "kv_pages: regions: number ", i, " differs from the first in shape, stride, dtype or device");
        pool.base[i] = static_cast<uint8_t*>(region.data_ptr());
    }
    pool.num_pages = first.size(0);
    pool.page_stride = first.stride(0) * static_cast<int64_t>(first.element_size());
    pool.num_regions = static_cast<int32_t>(regions.size());
    pool.rows_per_page = static_cast<int32_t>(first.size(1) * first.size(2));
    pool.row_elements = static_cast<int32_t>(first.size(3));
    pool.element_bytes = static_cast<int32_t>(first.element_size());
    pool.element = element_of(first.scalar_type());
    TORCH_CHECK_VALUE(scheme == kv::Scheme::none || (pool.element != kv::Element::opaque && pool.row_elements % 4 == 0 &&
                                                     pool.row_elements <= kv::max_row_elements),
                      "kv_pages: scheme: expected a pool of float32, bfloat16 or float16 with rows of a multiple of 4, at most ",
                      kv::max_row_elements, " elements, got ", first.scalar_type(), " and ", pool.row_elements);
    return pool;
}

void check_pages(const char* name, const Tensor& pages, TensorList regions) {
    TORCH_CHECK_VALUE(pages.dim() == 1 && pages.scalar_type() == at::kLong && pages.is_contiguous() &&
                      pages.device() == regions[0].device(),
                      "kv_pages: ", name, ": expected contiguous int64 [n] on ", regions[0].device(), ", got ",
                      pages.scalar_type(), " ", pages.sizes(), " on ", pages.device());
}

void check_slab(const Tensor& slab, const Tensor& pages, const kv::PagedPool& pool, kv::Scheme scheme) {
    const int64_t bytes = kv::slot_bytes(pool, scheme);
    TORCH_CHECK_VALUE(slab.dim() == 2 && slab.scalar_type() == at::kByte && slab.is_contiguous() && slab.size(0) == pages.size(0) &&
                      slab.size(1) == bytes && slab.device() == pages.device(),
                      "kv_pages: slab: expected contiguous uint8 [", pages.size(0), ", ", bytes, "] on ", pages.device(), ", got ",
                      slab.scalar_type(), " ", slab.sizes(), " on ", slab.device());
}

// On a CPU a bad page stops the call before anything is written.
void check_inside(const char* name, const Tensor& pages, const kv::PagedPool& pool) {
    const int64_t* ids = pages.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < pages.size(0); ++i) {
        TORCH_CHECK_INDEX(ids[i] >= 0 && ids[i] < pool.num_pages, "kv_pages: ", name, "[", i, "]: expected a page in 0 .. ",
                          pool.num_pages - 1, ", got ", ids[i]);
    }
}

void kv_gather_cpu(TensorList regions, const Tensor& pages, Tensor out, Tensor, c10::string_view scheme_name, int64_t) {
    const auto scheme = scheme_named(scheme_name);
    const auto pool = pool_of(regions, scheme);
    check_pages("pages", pages, regions);
    check_slab(out, pages, pool, scheme);
    check_inside("pages", pages, pool);
    at::parallel_for(0, pages.size(0), 1, [&](int64_t begin, int64_t end) {
        kv::gather_cpu(pool, scheme, pages.const_data_ptr<int64_t>(), begin, end, out.mutable_data_ptr<uint8_t>());
    });
}

void kv_scatter_cpu(TensorList regions, const Tensor& pages, const Tensor& slab, Tensor, c10::string_view scheme_name, int64_t) {
    const auto scheme = scheme_named(scheme_name);
    const auto pool = pool_of(regions, scheme);
    check_pages("pages", pages, regions);
    check_slab(slab, pages, pool, scheme);
    check_inside("pages", pages, pool);
    at::parallel_for(0, pages.size(0), 1, [&](int64_t begin, int64_t end) {
        kv::scatter_cpu(pool, scheme, pages.const_data_ptr<int64_t>(), begin, end, slab.const_data_ptr<uint8_t>());
    });
}

void kv_move_cpu(TensorList regions, const Tensor& sources, const Tensor& targets, Tensor, int64_t) {
    const auto pool = pool_of(regions, kv::Scheme::none);
    check_pages("sources", sources, regions);
    check_pages("targets", targets, regions);
    TORCH_CHECK_VALUE(sources.size(0) == targets.size(0), "kv_pages: targets: expected ", sources.size(0), " pages, got ", targets.size(0));
    check_inside("sources", sources, pool);
    check_inside("targets", targets, pool);
    at::parallel_for(0, sources.size(0), 1, [&](int64_t begin, int64_t end) {
        kv::move_cpu(pool, sources.const_data_ptr<int64_t>(), targets.const_data_ptr<int64_t>(), begin, end);
    });
}

#ifdef MEGATRON_RL_CUDA
kv::Launch launch_with(Tensor& faults, int64_t max_blocks) {
    return {faults.mutable_data_ptr<int64_t>(), static_cast<int32_t>(max_blocks), c10::cuda::getCurrentCUDAStream().stream()};
}

void kv_gather_cuda(TensorList regions, const Tensor& pages, Tensor out, Tensor faults, c10::string_view scheme_name,
                    int64_t max_blocks) {
    const c10::cuda::CUDAGuard guard(pages.device());
    const auto scheme = scheme_named(scheme_name);
    const auto pool = pool_of(regions, scheme);
    check_pages("pages", pages, regions);
    check_slab(out, pages, pool, scheme);
    C10_CUDA_CHECK(kv::gather_cuda(pool, scheme, pages.const_data_ptr<int64_t>(), pages.size(0), out.mutable_data_ptr<uint8_t>(),
                                   launch_with(faults, max_blocks)));
}

void kv_scatter_cuda(TensorList regions, const Tensor& pages, const Tensor& slab, Tensor faults, c10::string_view scheme_name,
                     int64_t max_blocks) {
    const c10::cuda::CUDAGuard guard(pages.device());
    const auto scheme = scheme_named(scheme_name);
    const auto pool = pool_of(regions, scheme);
    check_pages("pages", pages, regions);
    check_slab(slab, pages, pool, scheme);
    C10_CUDA_CHECK(kv::scatter_cuda(pool, scheme, pages.const_data_ptr<int64_t>(), pages.size(0), slab.const_data_ptr<uint8_t>(),
                                    launch_with(faults, max_blocks)));
}

void kv_move_cuda(TensorList regions, const Tensor& sources, const Tensor& targets, Tensor faults, int64_t max_blocks) {
    const c10::cuda::CUDAGuard guard(sources.device());
    const auto pool = pool_of(regions, kv::Scheme::none);
    check_pages("sources", sources, regions);
    check_pages("targets", targets, regions);
    TORCH_CHECK_VALUE(sources.size(0) == targets.size(0), "kv_pages: targets: expected ", sources.size(0), " pages, got ", targets.size(0));
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
    m.impl("kv_gather", kv_gather_cpu);
    m.impl("kv_scatter", kv_scatter_cpu);
    m.impl("kv_move", kv_move_cpu);
}

#ifdef MEGATRON_RL_CUDA
TORCH_LIBRARY_IMPL(megatron_rl, CUDA, m) {
    m.impl("kv_gather", kv_gather_cuda);
    m.impl("kv_scatter", kv_scatter_cuda);
    m.impl("kv_move", kv_move_cuda);
}
#endif

}  // namespace megatron_rl
