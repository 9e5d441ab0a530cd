// KV pages between a paged pool and a packed slab: what is copied (this file), on a CPU (pages_cpu.cpp), on a GPU (pages_cuda.cu).
// Torch-free: raw pointers and streams. Layouts: README.md here. Arguments are checked by the caller (bindings/ops_kv.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define MRL_HOST_DEVICE __host__ __device__
#else
#define MRL_HOST_DEVICE
#endif

namespace megatron_rl::kv {

enum class Scheme : int32_t { none, int8, fp8 };
enum class Element : int32_t { opaque, float32, bfloat16, float16 };  // opaque: bytes, which only Scheme::none can carry

constexpr int max_regions = 448;      // 224 layers; the pool travels as one kernel parameter of less than 4 KiB
constexpr int max_row_elements = 512;  // of a compressed row: what a warp holds in registers

// Region r (a layer's keys or values) holds page p at base[r] + p * page_stride: rows_per_page rows of row_elements elements.
// A row is one token and head, so a scale per row is a scale per token and head in either order of tokens and heads.
struct PagedPool {
    uint8_t* base[max_regions];
    int64_t page_stride;  // bytes
    int64_t num_pages;
    int32_t num_regions;
    int32_t rows_per_page;
    int32_t row_elements;
    int32_t element_bytes;
    Element element;

    MRL_HOST_DEVICE int64_t page_elements() const { return int64_t{rows_per_page} * row_elements; }
    MRL_HOST_DEVICE int64_t page_bytes() const { return page_elements() * element_bytes; }
};
static_assert(sizeof(PagedPool) <= 3840, "leaves room for the other parameters of a kernel");

// A slot of the slab is one page of every region, region after region. Compressed, it is one byte an element, then a float32
// scale a row, in the same order.
MRL_HOST_DEVICE inline int64_t slot_bytes(const PagedPool& pool, Scheme scheme) {
    if (scheme == Scheme::none) return pool.num_regions * pool.page_bytes();
    return pool.num_regions * (pool.page_elements() + int64_t{4} * pool.rows_per_page);
}

// Where in its slot region r's bytes begin, and (compressed) its scales.
MRL_HOST_DEVICE inline int64_t payload_offset(const PagedPool& pool, Scheme scheme, int64_t region) {
    return region * (scheme == Scheme::none ? pool.page_bytes() : pool.page_elements());
}
MRL_HOST_DEVICE inline int64_t scale_offset(const PagedPool& pool, int64_t region) {
    return pool.num_regions * pool.page_elements() + int64_t{4} * region * pool.rows_per_page;
}

MRL_HOST_DEVICE constexpr float largest_of(Scheme scheme) { return scheme == Scheme::int8 ? 127.0f : 448.0f; }

// Pages [begin, end) of the list: slots of the slab, in that order. Every page lies inside the pool.
void gather_cpu(const PagedPool& pool, Scheme scheme, const int64_t* pages, int64_t begin, int64_t end, uint8_t* slab);
void scatter_cpu(const PagedPool& pool, Scheme scheme, const int64_t* pages, int64_t begin, int64_t end, const uint8_t* slab);
void move_cpu(const PagedPool& pool, const int64_t* sources, const int64_t* targets, int64_t begin, int64_t end);

}  // namespace megatron_rl::kv
