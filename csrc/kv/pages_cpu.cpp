// The CPU side of pages.h: memcpy a page, or a row at a time through float32.
#include "kv/pages.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Half.h>

namespace megatron_rl::kv {
namespace {

template <class T>
T load(const uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

uint8_t encode(float value, Scheme scheme) {
    if (scheme == Scheme::fp8) return c10::Float8_e4m3fn(value).x;
    if (!(std::fabs(value) <= 127.0f)) value = std::isnan(value) ? 0.0f : std::copysign(127.0f, value);
    return static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(value)));
}

float decode(uint8_t code, Scheme scheme) {
    if (scheme == Scheme::int8) return static_cast<int8_t>(code);
    return static_cast<float>(c10::Float8_e4m3fn(code, c10::Float8_e4m3fn::from_bits()));
}

// NaN where the row is not finite, so that it comes back as NaN and not as numbers. Never subnormal: dividing by it stays exact.
float scale_of(float largest, bool finite, Scheme scheme) {
    return finite ? std::max(largest / largest_of(scheme), FLT_MIN) : std::numeric_limits<float>::quiet_NaN();
}

template <class T>
void compress_row(const uint8_t* row, int32_t elements, Scheme scheme, uint8_t* codes, uint8_t* scale_at) {
    float largest = 0;
    bool finite = true;
    for (int32_t i = 0; i < elements; ++i) {
        const float value = std::fabs(static_cast<float>(load<T>(row + i * sizeof(T))));
        finite = finite && std::isfinite(value);
        largest = std::max(largest, value);
    }
    const float scale = scale_of(largest, finite, scheme);
    for (int32_t i = 0; i < elements; ++i) {
        codes[i] = finite ? encode(static_cast<float>(load<T>(row + i * sizeof(T))) / scale, scheme) : 0;
    }
    std::memcpy(scale_at, &scale, sizeof scale);
}

template <class T>
void restore_row(const uint8_t* codes, const uint8_t* scale_at, int32_t elements, Scheme scheme, uint8_t* row) {
    const auto scale = load<float>(scale_at);
    for (int32_t i = 0; i < elements; ++i) {
        const T value(decode(codes[i], scheme) * scale);
        std::memcpy(row + i * sizeof(T), &value, sizeof value);
    }
}

template <class T>
void gather_page(const PagedPool& pool, Scheme scheme, const uint8_t* page, uint8_t* codes, uint8_t* scales) {
    for (int32_t row = 0; row < pool.rows_per_page; ++row) {
        const int64_t first = int64_t{row} * pool.row_elements;
        compress_row<T>(page + first * sizeof(T), pool.row_elements, scheme, codes + first, scales + 4 * row);
    }
}

template <class T>
void scatter_page(const PagedPool& pool, Scheme scheme, const uint8_t* codes, const uint8_t* scales, uint8_t* page) {
    for (int32_t row = 0; row < pool.rows_per_page; ++row) {
        const int64_t first = int64_t{row} * pool.row_elements;
        restore_row<T>(codes + first, scales + 4 * row, pool.row_elements, scheme, page + first * sizeof(T));
    }
}

}  // namespace

void gather_cpu(const PagedPool& pool, Scheme scheme, const int64_t* pages, int64_t begin, int64_t end, uint8_t* slab) {
    for (int64_t i = begin; i < end; ++i) {
        uint8_t* slot = slab + i * slot_bytes(pool, scheme);
        for (int64_t region = 0; region < pool.num_regions; ++region) {
            const uint8_t* page = pool.base[region] + pages[i] * pool.page_stride;
            uint8_t* payload = slot + payload_offset(pool, scheme, region);
            uint8_t* scales = slot + scale_offset(pool, region);
            if (scheme == Scheme::none) {
                std::memcpy(payload, page, static_cast<std::size_t>(pool.page_bytes()));
            } else if (pool.element == Element::float32) {
                gather_page<float>(pool, scheme, page, payload, scales);
            } else if (pool.element == Element::bfloat16) {
                gather_page<c10::BFloat16>(pool, scheme, page, payload, scales);
            } else {
                gather_page<c10::Half>(pool, scheme, page, payload, scales);
            }
        }
    }
}

void scatter_cpu(const PagedPool& pool, Scheme scheme, const int64_t* pages, int64_t begin, int64_t end, const uint8_t* slab) {
    for (int64_t i = begin; i < end; ++i) {
        const uint8_t* slot = slab + i * slot_bytes(pool, scheme);
        for (int64_t region = 0; region < pool.num_regions; ++region) {
            uint8_t* page = pool.base[region] + pages[i] * pool.page_stride;
            const uint8_t* payload = slot + payload_offset(pool, scheme, region);
            const uint8_t* scales = slot + scale_offset(pool, region);
            if (scheme == Scheme::none) {
                std::memcpy(page, payload, static_cast<std::size_t>(pool.page_bytes()));
            } else if (pool.element == Element::float32) {
                scatter_page<float>(pool, scheme, payload, scales, page);
            } else if (pool.element == Element::bfloat16) {
                scatter_page<c10::BFloat16>(pool, scheme, payload, scales, page);
            } else {
                scatter_page<c10::Half>(pool, scheme, payload, scales, page);
            }
        }
    }
}

void move_cpu(const PagedPool& pool, const int64_t* sources, const int64_t* targets, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        for (int64_t region = 0; region < pool.num_regions; ++region) {
            std::memcpy(pool.base[region] + targets[i] * pool.page_stride, pool.base[region] + sources[i] * pool.page_stride,
                        static_cast<std::size_t>(pool.page_bytes()));
        }
    }
}

}  // namespace megatron_rl::kv
