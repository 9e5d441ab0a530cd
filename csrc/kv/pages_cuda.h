// The GPU side of pages.h. Everything runs on the caller's stream; nothing here waits for it or allocates.
#pragma once

#include <cuda_runtime_api.h>

#include "kv/pages.h"

namespace megatron_rl::kv {

// A page outside the pool is skipped, neither read nor written, and counted in `faults`, which the caller reads when it wishes.
// `max_blocks` bounds the grid, so that a copy beside other work takes few multiprocessors; 0 fills the device.
struct Launch {
    int64_t* faults;
    int32_t max_blocks;
    cudaStream_t stream;
};

cudaError_t gather_cuda(const PagedPool& pool, Scheme scheme, const int64_t* pages, int64_t num_slots, uint8_t* slab,
                        const Launch& launch);
cudaError_t scatter_cuda(const PagedPool& pool, Scheme scheme, const int64_t* pages, int64_t num_slots, const uint8_t* slab,
                         const Launch& launch);
// No page may be both source and target, none a target twice.
cudaError_t move_cuda(const PagedPool& pool, const int64_t* sources, const int64_t* targets, int64_t num_moves,
                      const Launch& launch);

}  // namespace megatron_rl::kv
