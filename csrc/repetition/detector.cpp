#include "repetition/detector.h"

#include <algorithm>

namespace megatron_rl::repetition {
namespace {

constexpr std::size_t kRoom = 8192;  // tokens between two moves of the recent ones to the front

// One plain loop that compilers turn into vector code: SSE2 or NEON everywhere; where the compiler can keep two versions and
// the loader pick one, AVX2 as well.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
__attribute__((target_clones("avx2", "default")))
#endif
bool extend(const int32_t* __restrict past, int32_t token, const int32_t* __restrict needed, int32_t* __restrict runs,
            std::size_t num_lanes) {
    int32_t fires = 0;
    for (std::size_t i = 0; i < num_lanes; ++i) {
        const int32_t equal = -static_cast<int32_t>(past[i] == token);  // all bits, or none
        const int32_t run = (runs[i] + 1) & equal;
        runs[i] = run;
        fires |= -static_cast<int32_t>(run >= needed[i]);
    }
    return fires != 0;
}

}  // namespace

Detector::Detector(int32_t max_period, int32_t min_repeats, int32_t min_tokens)
    : num_lanes_(static_cast<std::size_t>(max_period)),
      needed_(num_lanes_),
      runs_(num_lanes_, 0),
      recent_(num_lanes_ + kRoom, 0),
      next_(num_lanes_) {
    for (std::size_t lane = 0; lane < num_lanes_; ++lane) {
        const auto period = static_cast<int64_t>(num_lanes_ - lane);
        const int64_t repeats = std::max<int64_t>(min_repeats, (min_tokens + period - 1) / period);
        needed_[lane] = static_cast<int32_t>(period * (repeats - 1));
        window_ = std::max(window_, period * repeats);
    }
}

bool Detector::push(int32_t token) {
    if (next_ == recent_.size()) make_room();
    const std::size_t unknown = num_lanes_ - num_known_;  // these lanes would look before the first token
    const bool fires = extend(recent_.data() + next_ - num_known_, token, needed_.data() + unknown, runs_.data() + unknown,
                              num_known_);
    recent_[next_++] = token;
    num_known_ = std::min(num_known_ + 1, num_lanes_);
    return fires;
}

std::optional<std::size_t> Detector::push_many(const int32_t* tokens, std::size_t num_tokens) {
    for (std::size_t i = 0; i < num_tokens; ++i)
        if (push(tokens[i])) return i;
    return std::nullopt;
}

void Detector::make_room() {
    std::copy(recent_.end() - static_cast<std::ptrdiff_t>(num_lanes_), recent_.end(), recent_.begin());
    next_ = num_lanes_;
    // A run longer than needed says nothing more than one just long enough, and this one cannot overflow.
    for (std::size_t lane = 0; lane < num_lanes_; ++lane) runs_[lane] = std::min(runs_[lane], needed_[lane]);
}

}  // namespace megatron_rl::repetition
