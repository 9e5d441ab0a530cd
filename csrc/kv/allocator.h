// Paged blocks with reference counts: who holds which KV block, since when, computed with which weights. Torch-free.
#pragma once

#include <cstdint>
#include <vector>

namespace megatron_rl::kv {

class BlockAllocator {
public:
    explicit BlockAllocator(int64_t num_blocks);
    int64_t num_blocks() const { return static_cast<int64_t>(holders_.size()); }

private:
    std::vector<int32_t> holders_;
};

}  // namespace megatron_rl::kv
