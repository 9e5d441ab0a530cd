// Paged blocks with reference counts: who holds which KV block, since when, computed with which weights. Torch-free.
//
// A block is a number. It is free, or held by one or more holders. Every `take` is a birth: the block gets a version and a
// serial that no other birth ever had, so equal serials mean equal content as long as a block is only appended to; who is
// about to overwrite a block renews its serial. The first `num_reserved` blocks are nobody's and are never handed out.
// Not thread-safe: one thread owns an allocator. Each call does all it was asked or, where it throws, nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace megatron_rl::kv {

class BlockAllocator {
public:
    explicit BlockAllocator(int64_t num_blocks, int64_t num_reserved = 0);

    int64_t num_blocks() const { return static_cast<int64_t>(holders_.size()); }
    int64_t num_usable() const { return num_blocks() - num_reserved_; }
    int64_t num_free() const { return static_cast<int64_t>(free_.size()); }

    // `count` free blocks, each held once, written to `blocks`.
    void take(int64_t count, int32_t version, int64_t* blocks);

    // `more` further holders of each block.
    template <class Index>
    void hold(const Index* blocks, std::size_t count, int32_t more);

    // One holder less of each block, as often as it occurs; without holders it is free. Returns how many became free.
    template <class Index>
    int64_t drop(const Index* blocks, std::size_t count);

    // Before its holder writes to a shared block: gives that holder a block of its own, of the same version, whose content
    // the caller then copies. A block with one holder is returned as it is.
    int64_t copy_on_write(int64_t block);

    // New serials for held blocks whose content is about to be overwritten.
    template <class Index>
    void renew(const Index* blocks, std::size_t count);

    // Columns of the given blocks; free ones have 0 holders and keep their last version and serial.
    template <class Index, class Value>
    void read(const Index* blocks, std::size_t count, const std::vector<Value>& column, Value* values) const;

    const std::vector<int32_t>& holders() const { return holders_; }
    const std::vector<int32_t>& versions() const { return versions_; }
    const std::vector<uint64_t>& serials() const { return serials_; }

    // Throws, naming the first of them, where blocks are still held: what should be empty has leaked.
    void check_empty() const;

private:
    [[noreturn]] void refuse_block(const char* kernel, std::size_t at, int64_t block) const;

    // Whether `block` is one that is held now. A negative number becomes a large one.
    bool is_held(int64_t block) const {
        return static_cast<uint64_t>(block) < holders_.size() && holders_[static_cast<std::size_t>(block)] > 0;
    }

    int64_t num_reserved_;
    uint64_t last_serial_ = 0;  // 0 is no birth
    std::vector<int64_t> free_;  // the last one goes first
    std::vector<int32_t> holders_;
    std::vector<int32_t> versions_;
    std::vector<uint64_t> serials_;
};

}  // namespace megatron_rl::kv
