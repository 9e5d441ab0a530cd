#include "kv/allocator.h"

#include <limits>
#include <string>

#include "core/check.h"

namespace megatron_rl::kv {

BlockAllocator::BlockAllocator(int64_t num_blocks, int64_t num_reserved) : num_reserved_(num_reserved) {
    if (num_reserved < 0) refuse("BlockAllocator", "num_reserved", "0 or more", num_reserved);
    if (num_blocks <= num_reserved) {
        refuse("BlockAllocator", "num_blocks", "more than the " + std::to_string(num_reserved) + " reserved", num_blocks);
    }
    const auto size = static_cast<std::size_t>(num_blocks);
    holders_.assign(size, 0);
    versions_.assign(size, 0);
    serials_.assign(size, 0);
    free_.reserve(size);
    for (int64_t block = num_blocks - 1; block >= num_reserved; --block) free_.push_back(block);
}

void BlockAllocator::take(int64_t count, int32_t version, int64_t* blocks) {
    if (count < 0 || count > num_free()) {
        refuse("BlockAllocator.take", "count", "0 to the " + std::to_string(num_free()) + " free blocks", count);
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t block = free_.back();
        free_.pop_back();
        const auto at = static_cast<std::size_t>(block);
        holders_[at] = 1;
        versions_[at] = version;
        serials_[at] = ++last_serial_;
        blocks[i] = block;
    }
}

template <class Index>
void BlockAllocator::hold(const Index* blocks, std::size_t count, int32_t more) {
    if (more < 1) refuse("BlockAllocator.fork", "k", "1 or more", more);
    constexpr int32_t most = std::numeric_limits<int32_t>::max();
    for (std::size_t i = 0; i < count; ++i) {
        const int64_t block = blocks[i];
        const bool held = is_held(block);
        if (held && holders_[static_cast<std::size_t>(block)] <= most - more) {
            holders_[static_cast<std::size_t>(block)] += more;
            continue;
        }
        for (std::size_t undo = 0; undo < i; ++undo) holders_[static_cast<std::size_t>(blocks[undo])] -= more;
        if (!held) refuse_block("BlockAllocator.hold", i, block);
        refuse("BlockAllocator.hold", "block " + std::to_string(block), "fewer than 2^31 holders", "more");
    }
}

template <class Index>
int64_t BlockAllocator::drop(const Index* blocks, std::size_t count) {
    const std::size_t before = free_.size();
    for (std::size_t i = 0; i < count; ++i) {
        const int64_t block = blocks[i];
        if (!is_held(block)) {
            for (std::size_t undo = 0; undo < i; ++undo) holders_[static_cast<std::size_t>(blocks[undo])] += 1;
            free_.resize(before);
            refuse_block("BlockAllocator.drop", i, block);
        }
        if (--holders_[static_cast<std::size_t>(block)] == 0) free_.push_back(block);
    }
    return static_cast<int64_t>(free_.size() - before);
}

int64_t BlockAllocator::copy_on_write(int64_t block) {
    if (!is_held(block)) refuse_block("BlockAllocator.copy_on_write", 0, block);
    const auto at = static_cast<std::size_t>(block);
    if (holders_[at] == 1) return block;
    int64_t copy = 0;
    take(1, versions_[at], &copy);
    holders_[at] -= 1;
    return copy;
}

template <class Index>
void BlockAllocator::renew(const Index* blocks, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
        if (!is_held(blocks[i])) refuse_block("BlockAllocator.renew", i, blocks[i]);
    }
    for (std::size_t i = 0; i < count; ++i) serials_[static_cast<std::size_t>(blocks[i])] = ++last_serial_;
}

template <class Index, class Value>
void BlockAllocator::read(const Index* blocks, std::size_t count, const std::vector<Value>& column, Value* values) const {
    for (std::size_t i = 0; i < count; ++i) {
        const auto block = static_cast<uint64_t>(static_cast<int64_t>(blocks[i]));
        if (block >= column.size()) refuse_block("BlockAllocator", i, blocks[i]);
        values[i] = column[block];
    }
}

void BlockAllocator::check_empty() const {
    int64_t count = 0;
    std::string first;
    for (std::size_t block = 0; block < holders_.size(); ++block) {
        if (holders_[block] == 0) continue;
        if (count++ < 4) {
            first += (first.empty() ? "" : ", ") + std::to_string(block) + " (" + std::to_string(holders_[block]) + " holders, version " +
                     std::to_string(versions_[block]) + ")";
        }
    }
    if (count > 0) refuse("BlockAllocator.check_empty", "blocks", "none held", std::to_string(count) + " leaked: " + first);
}

void BlockAllocator::refuse_block(const char* kernel, std::size_t at, int64_t block) const {
    const std::string argument = "blocks[" + std::to_string(at) + "]";
    if (block < 0 || block >= num_blocks()) {
        refuse(kernel, argument, "a block from 0 to " + std::to_string(num_blocks() - 1), block);
    }
    const char* what = block < num_reserved_ ? ", which is reserved and nobody's" : ", which is free: dropped more often than held?";
    refuse(kernel, argument, "a held block", std::to_string(block) + what);
}

#define MEGATRON_RL_INDEXED_BY(Index)                                                                          \
    template void BlockAllocator::hold<Index>(const Index*, std::size_t, int32_t);                             \
    template int64_t BlockAllocator::drop<Index>(const Index*, std::size_t);                                   \
    template void BlockAllocator::renew<Index>(const Index*, std::size_t);                                     \
    template void BlockAllocator::read<Index, int32_t>(const Index*, std::size_t, const std::vector<int32_t>&, \
                                                       int32_t*) const;                                        \
    template void BlockAllocator::read<Index, uint64_t>(const Index*, std::size_t, const std::vector<uint64_t>&, uint64_t*) const;

MEGATRON_RL_INDEXED_BY(int32_t)
MEGATRON_RL_INDEXED_BY(int64_t)
#undef MEGATRON_RL_INDEXED_BY

}  // namespace megatron_rl::kv
