// Which items share a part so that the parts cost alike: Karmarkar and Karp's largest differencing. Pure functions, torch-free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace megatron_rl::packing {

// All parts, heaviest first; each lists its items in ascending order. A part may be empty.
using Parts = std::vector<std::vector<int32_t>>;

// Exactly num_parts parts, the spread (heaviest less lightest) small: largest differencing, then moves and swaps between the
// heaviest part and lighter ones until none helps. Deterministic: equal spreads are taken by the heavier part, then by the
// lower index. The caller has checked that num_parts >= 1 and that costs are finite and not negative.
Parts balanced(const std::vector<double>& costs, std::size_t num_parts);

// As few parts, a multiple of `multiple`, as differencing by size or best fit get into `capacity`; then their costs balanced
// under that limit. An item larger than the capacity has a part of its own. Sizes are positive.
Parts with_capacity(const std::vector<int64_t>& sizes, const std::vector<double>& costs, int64_t capacity,
                    std::size_t multiple);

}  // namespace megatron_rl::packing
