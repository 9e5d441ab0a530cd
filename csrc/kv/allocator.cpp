#include "kv/allocator.h"

#include <cstddef>

namespace megatron_rl::kv {

BlockAllocator::BlockAllocator(int64_t num_blocks) : holders_(static_cast<std::size_t>(num_blocks), 0) {}

}  // namespace megatron_rl::kv
