// Warps take tiles of a page in turn, grid after grid: one launch moves all pages of all regions. Copies move 32 accesses a tile
// for each in flight a thread, as wide as alignment allows (16 bytes for every page of usual shape). Compression takes up to four
// rows a warp; a row lives in registers between its maximum and its codes.
#include "kv/pages_cuda.h"

#include <cfloat>
#include <climits>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <type_traits>

namespace megatron_rl::kv {
namespace {

enum class Mark { none, streaming, bypass };  // of an access: as any other, first to leave the caches, not kept in L1
enum class Order { by_slot, by_region };      // of the tiles: all regions of a slot, or all slots of a region

// How a copy is cut up. benchmarks/kv_tune.cu times the alternatives on a GPU and prints the lines to put here.
constexpr int most_threads = 512;  // what registers are shared out for, so that a plan is the same code at any number below
template <int threads_, int flight_, Mark load_, Mark store_, Order order_, bool early_>
struct CopyPlan {
    static constexpr int threads = threads_;  // a block, at most most_threads
    static constexpr int flight = flight_;    // independent accesses of a thread
    static constexpr Mark load = load_, store = store_;
    static constexpr Order order = order_;
    static constexpr bool early = early_;  // scatter only: the slab is read before it is known where to
};
using GatherPlan = CopyPlan<128, 2, Mark::none, Mark::bypass, Order::by_slot, false>;
using ScatterPlan = CopyPlan<128, 2, Mark::none, Mark::bypass, Order::by_slot, true>;
using MovePlan = GatherPlan;
// Of a launch with max_blocks. Few blocks beside a matrix product are done soonest with much in flight each: 16 of 128 threads and
// two accesses pack no faster than the link sends, so they hold 16 multiprocessors all the time, and the product loses 7 %.
using BoundedGatherPlan = CopyPlan<most_threads, 4, Mark::none, Mark::bypass, Order::by_slot, false>;
using BoundedScatterPlan = CopyPlan<most_threads, 4, Mark::none, Mark::bypass, Order::by_slot, true>;

constexpr int warp_size = 32;
constexpr int row_threads = 512;    // a block, of compression
constexpr int quads_in_flight = 4;  // of elements a thread, of compression

enum class Direction { gather, scatter, move };

struct Work {
    const int64_t* pages;    // of the pool: read by gather and move, written by scatter
    const int64_t* targets;  // move only
    uint8_t* slab;           // written by gather, read by scatter
    unsigned long long* faults;
    uint32_t num_slots;
    uint32_t num_tiles;
    uint32_t tiles_per_page;
};

struct Tile {
    uint32_t slot;
    uint32_t region;
    uint32_t part;  // within the page
};

template <Order order = Order::by_slot>
__device__ Tile tile_at(uint32_t index, const Work& work, const PagedPool& pool) {
    const uint32_t page = index / work.tiles_per_page, part = index - page * work.tiles_per_page;
    if constexpr (order == Order::by_region) {
        const uint32_t region = page / work.num_slots;
        return {page - region * work.num_slots, region, part};
    }
    const uint32_t slot = page / pool.num_regions;
    return {slot, page - slot * pool.num_regions, part};
}

__device__ bool is_inside(int64_t page, const Tile& tile, const Work& work, const PagedPool& pool) {
    const bool inside = page >= 0 && page < pool.num_pages;
    if (!inside && tile.region == 0 && tile.part == 0 && threadIdx.x % warp_size == 0) atomicAdd(work.faults, 1ull);
    return inside;
}

__device__ uint32_t first_warp() { return (blockIdx.x * blockDim.x + threadIdx.x) / warp_size; }
__device__ uint32_t num_warps() { return gridDim.x * blockDim.x / warp_size; }

template <Mark mark, class Access>
__device__ Access read(const Access* from) {
    if constexpr (mark == Mark::streaming) return __ldcs(from);
    if constexpr (mark == Mark::bypass) return __ldcg(from);
    return *from;
}

template <Mark mark, class Access>
__device__ void put(Access* to, Access value) {
    if constexpr (mark == Mark::streaming) __stcs(to, value);
    else if constexpr (mark == Mark::bypass) __stcg(to, value);
    else *to = value;
}

// One tile of a page: `at` is this thread's first access of `end`.
template <class Plan, class Access>
struct Held {
    Access held[Plan::flight];

    __device__ void load(const uint8_t* page, uint32_t at, uint32_t end) {
#pragma unroll
        for (int i = 0; i < Plan::flight; ++i) {
            if (at + i * warp_size < end) held[i] = read<Plan::load>(reinterpret_cast<const Access*>(page) + at + i * warp_size);
        }
    }
    __device__ void store(uint8_t* page, uint32_t at, uint32_t end) const {
#pragma unroll
        for (int i = 0; i < Plan::flight; ++i) {
            if (at + i * warp_size < end) put<Plan::store>(reinterpret_cast<Access*>(page) + at + i * warp_size, held[i]);
        }
    }
};

template <class Access, Direction direction, class Plan>
__global__ void __launch_bounds__(most_threads) copy_pages(const __grid_constant__ PagedPool pool, const Work work) {
    const auto end = static_cast<uint32_t>(pool.page_bytes() / sizeof(Access));
    for (uint32_t index = first_warp(); index < work.num_tiles; index += num_warps()) {
        const Tile tile = tile_at<Plan::order>(index, work, pool);
        const uint32_t at = tile.part * (Plan::flight * warp_size) + threadIdx.x % warp_size;
        const int64_t page = __ldg(work.pages + tile.slot);
        uint8_t* in_slab = nullptr;
        if constexpr (direction != Direction::move)
            in_slab = work.slab + tile.slot * slot_bytes(pool, Scheme::none) + payload_offset(pool, Scheme::none, tile.region);
        Held<Plan, Access> held;
        if constexpr (Plan::early) held.load(in_slab, at, end);
        if (!is_inside(page, tile, work, pool)) continue;
        uint8_t* in_pool = pool.base[tile.region] + page * pool.page_stride;
        if constexpr (direction == Direction::scatter) {
            if constexpr (!Plan::early) held.load(in_slab, at, end);
            held.store(in_pool, at, end);
        } else if constexpr (direction == Direction::gather) {
            held.load(in_pool, at, end);
            held.store(in_slab, at, end);
        } else {
            const int64_t target = __ldg(work.targets + tile.slot);
            if (!is_inside(target, tile, work, pool)) continue;
            held.load(in_pool, at, end);
            held.store(pool.base[tile.region] + target * pool.page_stride, at, end);
        }
    }
}

// Four elements, the share of one thread in 128 of a row. Conversions are named: torch's builds switch the implicit ones off.
__device__ float4 widen(uint2 four, const __nv_bfloat16*) {
    const float2 a = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&four.x));
    const float2 b = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&four.y));
    return {a.x, a.y, b.x, b.y};
}
__device__ float4 widen(uint2 four, const __half*) {
    const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&four.x));
    const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&four.y));
    return {a.x, a.y, b.x, b.y};
}

template <class T>
__device__ float4 load_four(const uint8_t* from) {
    if constexpr (sizeof(T) == 4) {
        return __ldcs(reinterpret_cast<const float4*>(from));
    } else {
        return widen(__ldcs(reinterpret_cast<const uint2*>(from)), static_cast<const T*>(nullptr));
    }
}

template <class T>
__device__ T narrow_to(float value) {
    if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
    else return __float2bfloat16_rn(value);
}

template <class T>
__device__ void store_four(uint8_t* to, float4 four) {
    if constexpr (sizeof(T) == 4) {
        __stcs(reinterpret_cast<float4*>(to), four);
    } else {
        const T narrow[4] = {narrow_to<T>(four.x), narrow_to<T>(four.y), narrow_to<T>(four.z), narrow_to<T>(four.w)};
        uint2 bits;
        memcpy(&bits, narrow, sizeof bits);
        __stcs(reinterpret_cast<uint2*>(to), bits);
    }
}

template <Scheme scheme>
__device__ uint32_t encode(float value) {
    if constexpr (scheme == Scheme::fp8) return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
    return static_cast<uint8_t>(static_cast<int8_t>(fminf(fmaxf(rintf(value), -127.0f), 127.0f)));
}

template <Scheme scheme>
__device__ float decode(uint32_t code) {
    if constexpr (scheme == Scheme::fp8) {
        return __half2float(__half(__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(code & 0xffu), __NV_E4M3)));
    }
    return static_cast<int8_t>(code & 0xffu);
}

__device__ uint32_t magnitude(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// Magnitudes are compared as integers: there infinity and NaN are the largest, so a row that holds one is seen.
template <Scheme scheme>
__device__ float scale_of(uint32_t largest) {
    for (int offset = warp_size / 2; offset > 0; offset /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, offset));
    if (largest >= 0x7f800000u) return __uint_as_float(0x7fc00000u);
    return fmaxf(__uint_as_float(largest) / largest_of(scheme), FLT_MIN);
}

// groups: quadruples of a row a thread holds; rows: rows a warp has in flight. The whole warp takes the same rows.
template <class T, Scheme scheme, int groups, int rows>
__global__ void __launch_bounds__(row_threads) compress_pages(const __grid_constant__ PagedPool pool, const Work work) {
    const int lane = threadIdx.x % warp_size;
    for (uint32_t index = first_warp(); index < work.num_tiles; index += num_warps()) {
        const Tile tile = tile_at(index, work, pool);
        const int64_t page = __ldg(work.pages + tile.slot);
        if (!is_inside(page, tile, work, pool)) continue;
        const uint8_t* in_pool = pool.base[tile.region] + page * pool.page_stride;
        uint8_t* slot = work.slab + tile.slot * slot_bytes(pool, scheme);
        uint8_t* codes = slot + payload_offset(pool, scheme, tile.region);
        auto* scales = reinterpret_cast<float*>(slot + scale_offset(pool, tile.region));
        float4 held[rows][groups];
#pragma unroll
        for (int r = 0; r < rows; ++r) {
#pragma unroll
            for (int g = 0; g < groups; ++g) {
                const int row = tile.part * rows + r, element = (g * warp_size + lane) * 4;
                held[r][g] = {0, 0, 0, 0};
                if (row < pool.rows_per_page && element < pool.row_elements) {
                    held[r][g] = load_four<T>(in_pool + (int64_t{row} * pool.row_elements + element) * sizeof(T));
                }
            }
        }
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            const int row = tile.part * rows + r;
            if (row >= pool.rows_per_page) break;
            uint32_t largest = 0;
#pragma unroll
            for (int g = 0; g < groups; ++g) {
                const float4 v = held[r][g];
                largest = max(largest, max(max(magnitude(v.x), magnitude(v.y)), max(magnitude(v.z), magnitude(v.w))));
            }
            const float scale = scale_of<scheme>(largest);
            const bool finite = scale == scale;
#pragma unroll
            for (int g = 0; g < groups; ++g) {
                const int element = (g * warp_size + lane) * 4;
                if (element >= pool.row_elements) continue;
                const float4 v = held[r][g];
                const uint32_t four = encode<scheme>(v.x / scale) | encode<scheme>(v.y / scale) << 8 |
                                      encode<scheme>(v.z / scale) << 16 | encode<scheme>(v.w / scale) << 24;
                __stcs(reinterpret_cast<uint32_t*>(codes + int64_t{row} * pool.row_elements + element), finite ? four : 0u);
            }
            if (lane == 0) scales[row] = scale;
        }
    }
}

template <class T, Scheme scheme, int groups, int rows>
__global__ void __launch_bounds__(row_threads) restore_pages(const __grid_constant__ PagedPool pool, const Work work) {
    const int lane = threadIdx.x % warp_size;
    for (uint32_t index = first_warp(); index < work.num_tiles; index += num_warps()) {
        const Tile tile = tile_at(index, work, pool);
        const int64_t page = __ldg(work.pages + tile.slot);
        if (!is_inside(page, tile, work, pool)) continue;
        uint8_t* in_pool = pool.base[tile.region] + page * pool.page_stride;
        const uint8_t* slot = work.slab + tile.slot * slot_bytes(pool, scheme);
        const uint8_t* codes = slot + payload_offset(pool, scheme, tile.region);
        const auto* scales = reinterpret_cast<const float*>(slot + scale_offset(pool, tile.region));
        uint32_t held[rows][groups];
        float scale[rows];
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            const int row = tile.part * rows + r;
            if (row < pool.rows_per_page) scale[r] = __ldcs(scales + row);
#pragma unroll
            for (int g = 0; g < groups; ++g) {
                const int element = (g * warp_size + lane) * 4;
                if (row < pool.rows_per_page && element < pool.row_elements) {
                    held[r][g] = __ldcs(reinterpret_cast<const uint32_t*>(codes + int64_t{row} * pool.row_elements + element));
                }
            }
        }
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            const int row = tile.part * rows + r;
#pragma unroll
            for (int g = 0; g < groups; ++g) {
                const int element = (g * warp_size + lane) * 4;
                if (row >= pool.rows_per_page || element >= pool.row_elements) continue;
                const uint32_t four = held[r][g];
                store_four<T>(in_pool + (int64_t{row} * pool.row_elements + element) * sizeof(T),
                              {decode<scheme>(four) * scale[r], decode<scheme>(four >> 8) * scale[r],
                               decode<scheme>(four >> 16) * scale[r], decode<scheme>(four >> 24) * scale[r]});
            }
        }
    }
}

// A warp a tile where max_blocks is 0: the device's own scheduler feeds the memory better than warps that loop, by 1 to 2 % of a
// device copy. Else at most max_blocks, whose warps take tiles in turn.
template <class Kernel>
cudaError_t start(Kernel kernel, int threads, const PagedPool& pool, const Work& work, const Launch& launch) {
    const int64_t needed = (int64_t{work.num_tiles} * warp_size + threads - 1) / threads;
    const int64_t blocks = launch.max_blocks > 0 && launch.max_blocks < needed ? launch.max_blocks : needed;
    kernel<<<static_cast<unsigned>(blocks), threads, 0, launch.stream>>>(pool, work);
    return cudaGetLastError();
}

// False where the tiles cannot be counted in 31 bits: 4 TiB in 16-byte accesses.
bool count_tiles(const PagedPool& pool, int64_t num_slots, int64_t tiles_per_page, Work& work) {
    const int64_t tiles = num_slots * pool.num_regions * tiles_per_page;
    work.num_slots = static_cast<uint32_t>(num_slots);
    work.num_tiles = static_cast<uint32_t>(tiles);
    work.tiles_per_page = static_cast<uint32_t>(tiles_per_page);
    return tiles <= INT_MAX;
}

uintptr_t alignment_bits(const PagedPool& pool, const uint8_t* slab) {
    uintptr_t bits = reinterpret_cast<uintptr_t>(slab) | static_cast<uintptr_t>(pool.page_bytes() | pool.page_stride);
    for (int32_t region = 0; region < pool.num_regions; ++region) bits |= reinterpret_cast<uintptr_t>(pool.base[region]);
    return bits;
}

template <Direction direction, class Plan, class Access>
cudaError_t copy_as(const PagedPool& pool, int64_t num_slots, Work work, const Launch& launch) {
    static_assert(Plan::threads <= most_threads && Plan::threads % warp_size == 0, "whole warps, within the bound");
    static_assert(direction == Direction::scatter || !Plan::early, "only a slab can be read before the page is known");
    constexpr int64_t tile_bytes = sizeof(Access) * Plan::flight * warp_size;
    if (!count_tiles(pool, num_slots, (pool.page_bytes() + tile_bytes - 1) / tile_bytes, work)) return cudaErrorInvalidValue;
    return start(copy_pages<Access, direction, Plan>, Plan::threads, pool, work, launch);
}

template <Direction direction, class Plan>
cudaError_t copy(const PagedPool& pool, int64_t num_slots, const Work& work, const Launch& launch) {
    const uintptr_t bits = alignment_bits(pool, work.slab);
    if (bits % 16 == 0) return copy_as<direction, Plan, uint4>(pool, num_slots, work, launch);
    if (bits % 8 == 0) return copy_as<direction, Plan, uint2>(pool, num_slots, work, launch);
    if (bits % 4 == 0) return copy_as<direction, Plan, unsigned int>(pool, num_slots, work, launch);
    if (bits % 2 == 0) return copy_as<direction, Plan, unsigned short>(pool, num_slots, work, launch);
    return copy_as<direction, Plan, unsigned char>(pool, num_slots, work, launch);
}

template <Direction direction, class T, Scheme scheme, int groups>
cudaError_t convert_rows(const PagedPool& pool, int64_t num_slots, Work work, const Launch& launch) {
    constexpr int rows = quads_in_flight / groups;
    if (!count_tiles(pool, num_slots, (pool.rows_per_page + rows - 1) / rows, work)) return cudaErrorInvalidValue;
    if constexpr (direction == Direction::gather)
        return start(compress_pages<T, scheme, groups, rows>, row_threads, pool, work, launch);
    return start(restore_pages<T, scheme, groups, rows>, row_threads, pool, work, launch);
}

template <Direction direction, class T, Scheme scheme>
cudaError_t convert(const PagedPool& pool, int64_t num_slots, const Work& work, const Launch& launch) {
    const bool aligned = alignment_bits(pool, nullptr) % (4 * sizeof(T)) == 0 && reinterpret_cast<uintptr_t>(work.slab) % 4 == 0;
    if (!aligned) return cudaErrorMisalignedAddress;
    if (pool.row_elements <= 128) return convert_rows<direction, T, scheme, 1>(pool, num_slots, work, launch);
    if (pool.row_elements <= 256) return convert_rows<direction, T, scheme, 2>(pool, num_slots, work, launch);
    return convert_rows<direction, T, scheme, 4>(pool, num_slots, work, launch);
}

template <Direction direction, Scheme scheme>
cudaError_t convert_elements(const PagedPool& pool, int64_t num_slots, const Work& work, const Launch& launch) {
    if (pool.element == Element::float32) return convert<direction, float, scheme>(pool, num_slots, work, launch);
    if (pool.element == Element::bfloat16) return convert<direction, __nv_bfloat16, scheme>(pool, num_slots, work, launch);
    return convert<direction, __half, scheme>(pool, num_slots, work, launch);
}

template <Direction direction, class Plan, class BoundedPlan>
cudaError_t transfer(const PagedPool& pool, Scheme scheme, int64_t num_slots, const Work& work, const Launch& launch) {
    if (num_slots == 0) return cudaSuccess;
    if (scheme == Scheme::none && launch.max_blocks > 0) return copy<direction, BoundedPlan>(pool, num_slots, work, launch);
    if (scheme == Scheme::none) return copy<direction, Plan>(pool, num_slots, work, launch);
    if (scheme == Scheme::int8) return convert_elements<direction, Scheme::int8>(pool, num_slots, work, launch);
    return convert_elements<direction, Scheme::fp8>(pool, num_slots, work, launch);
}

Work work_on(const int64_t* pages, const int64_t* targets, const uint8_t* slab, const Launch& launch) {
    return {pages, targets, const_cast<uint8_t*>(slab), reinterpret_cast<unsigned long long*>(launch.faults), 0, 0, 0};
}

}  // namespace

cudaError_t gather_cuda(const PagedPool& pool, Scheme scheme, const int64_t* pages, int64_t num_slots, uint8_t* slab,
                        const Launch& launch) {
    const Work work = work_on(pages, nullptr, slab, launch);
    return transfer<Direction::gather, GatherPlan, BoundedGatherPlan>(pool, scheme, num_slots, work, launch);
}

cudaError_t scatter_cuda(const PagedPool& pool, Scheme scheme, const int64_t* pages, int64_t num_slots, const uint8_t* slab,
                         const Launch& launch) {
    const Work work = work_on(pages, nullptr, slab, launch);
    return transfer<Direction::scatter, ScatterPlan, BoundedScatterPlan>(pool, scheme, num_slots, work, launch);
}

cudaError_t move_cuda(const PagedPool& pool, const int64_t* sources, const int64_t* targets, int64_t num_moves,
                      const Launch& launch) {
    if (num_moves == 0) return cudaSuccess;
    return copy<Direction::move, MovePlan>(pool, num_moves, work_on(sources, targets, nullptr, launch), launch);
}

}  // namespace megatron_rl::kv
