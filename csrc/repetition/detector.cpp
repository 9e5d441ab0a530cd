#include "repetition/detector.h"

#include <algorithm>

namespace megatron_rl::repetition {
namespace {

constexpr std::size_t kRoom = 2048;  // tokens between two moves of the recent ones to the front

// Of a hash: eight chains for each token looked back at, so that few tokens share one.
uint32_t hash_bits(std::size_t num_lanes) {
    uint32_t bits = 1;
    while (bits < 31 && (std::size_t{1} << bits) < 8 * num_lanes) ++bits;
    return bits;
}

// Plain loops that compilers turn into vector code: SSE2 or NEON everywhere; where the compiler can keep two versions and the
// loader pick one, AVX2 as well.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define MRL_VECTOR_CODE __attribute__((target_clones("avx2", "default")))
#else
#define MRL_VECTOR_CODE
#endif

MRL_VECTOR_CODE
void begin(const int32_t* __restrict past, int32_t token, int32_t* __restrict runs, std::size_t num_lanes) {
    for (std::size_t i = 0; i < num_lanes; ++i) runs[i] = past[i] == token;
}

MRL_VECTOR_CODE
void extend(const int32_t* __restrict past, int32_t token, int32_t* __restrict runs, std::size_t num_lanes) {
    for (std::size_t i = 0; i < num_lanes; ++i) runs[i] = (runs[i] + 1) & -static_cast<int32_t>(past[i] == token);
}

// Whether any run is as long as needed; and the longest.
MRL_VECTOR_CODE
bool reaches(const int32_t* __restrict runs, const int32_t* __restrict needed, std::size_t num_lanes, int32_t& longest) {
    int32_t fires = 0, most = 0;
    for (std::size_t i = 0; i < num_lanes; ++i) {
        fires |= -static_cast<int32_t>(runs[i] >= needed[i]);
        most = std::max(most, runs[i]);
    }
    longest = most;
    return fires != 0;
}

}  // namespace

Detector::Detector(int32_t max_period, int32_t min_repeats, int32_t min_tokens)
    : num_lanes_(static_cast<std::size_t>(max_period)),
      needed_(num_lanes_),
      runs_(num_lanes_, 0),
      recent_(num_lanes_ + kRoom, 0),
      next_(num_lanes_),
      older_(num_lanes_ + kRoom, 0),
      chains_(std::size_t{1} << hash_bits(num_lanes_)),
      hash_shift_(32 - hash_bits(num_lanes_)) {
    for (std::size_t lane = 0; lane < num_lanes_; ++lane) {
        const auto period = static_cast<int64_t>(num_lanes_ - lane);
        const int64_t repeats = std::max<int64_t>(min_repeats, (min_tokens + period - 1) / period);
        needed_[lane] = static_cast<int32_t>(period * (repeats - 1));
        window_ = std::max(window_, period * repeats);
    }
    least_needed_ = *std::min_element(needed_.begin(), needed_.end());
}

bool Detector::push(int32_t token) {
    if (next_ == recent_.size()) make_room();
    Chain& chain = chain_of(token);
    bool fires = false;
    if (chain.length > kFew) fires = extend_all(token);
    else if (chain.length > 0) fires = extend_few(token, chain);
    else forget_runs();
    recent_[next_] = token;
    older_[next_] = chain.newest;
    chain.newest = place_++;
    ++chain.length;
    if (num_known_ < num_lanes_) ++num_known_;
    else --chain_of(recent_[next_ - num_lanes_]).length;  // too long ago from here on
    ++next_;
    return fires;
}

bool Detector::extend_few(int32_t token, const Chain& chain) {
    Running found[kFew];
    std::size_t num_found = 0, before = 0;
    int32_t longest = 0;
    bool fires = false;
    for (uint32_t i = 0, place = chain.newest; i < chain.length; ++i) {
        const uint32_t period = place_ - place;
        place = older_[next_ - period];
        if (recent_[next_ - period] != token) continue;
        const std::size_t lane = num_lanes_ - period;
        int32_t run = 1;
        if (all_running_) {
            run += runs_[lane];
        } else {  // both go from the shortest period to the longest
            while (before < num_running_ && running_[before].lane > lane) ++before;
            if (before < num_running_ && running_[before].lane == lane) run += running_[before].run;
        }
        found[num_found++] = {lane, run};
        longest = std::max(longest, run);
        fires |= run >= needed_[lane];
    }
    std::copy_n(found, num_found, running_);
    num_running_ = num_found;
    all_running_ = false;
    longest_ = longest;
    return fires;
}

bool Detector::extend_all(int32_t token) {
    const std::size_t unknown = num_lanes_ - num_known_;  // these lanes would look before the first token
    const int32_t* past = recent_.data() + next_ - num_known_;
    if (all_running_) {
        extend(past, token, runs_.data() + unknown, num_known_);
    } else {
        begin(past, token, runs_.data() + unknown, num_known_);
        for (std::size_t i = 0; i < num_running_; ++i) {
            const auto [lane, run] = running_[i];
            if (runs_[lane]) runs_[lane] = run + 1;
        }
    }
    all_running_ = true;
    if (++longest_ < least_needed_) return false;
    int32_t longest = 0;
    const bool fires = reaches(runs_.data() + unknown, needed_.data() + unknown, num_known_, longest);
    longest_ = longest;
    return fires;
}

std::optional<std::size_t> Detector::push_many(const int32_t* tokens, std::size_t num_tokens) {
    for (std::size_t i = 0; i < num_tokens;) {
        i += push_unseen(tokens + i, num_tokens - i);
        if (i < num_tokens && push(tokens[i++])) return i - 1;
    }
    return std::nullopt;
}

std::size_t Detector::push_unseen(const int32_t* tokens, std::size_t num_tokens) {
    if (num_known_ < num_lanes_) return 0;
    // What the loop changes is held here: through `this` every store into a table would make it load them again.
    Chain* const chains = chains_.data();
    int32_t* const recent = recent_.data();
    uint32_t* const older = older_.data();
    const uint32_t shift = hash_shift_;
    const std::size_t first = next_, lanes = num_lanes_, end = next_ + std::min(num_tokens, recent_.size() - next_);
    std::size_t next = first;
    for (uint32_t place = place_; next < end; ++next, ++place) {
        const int32_t token = tokens[next - first];
        Chain& chain = chains[hash(token, shift)];
        if (chain.length > 0) break;
        recent[next] = token;
        older[next] = chain.newest;
        chain = {place, 1};
        --chains[hash(recent[next - lanes], shift)].length;
    }
    if (next > first) forget_runs();
    next_ = next;
    place_ += static_cast<uint32_t>(next - first);
    return next - first;
}

void Detector::make_room() {
    std::copy(recent_.end() - static_cast<std::ptrdiff_t>(num_lanes_), recent_.end(), recent_.begin());
    std::copy(older_.end() - static_cast<std::ptrdiff_t>(num_lanes_), older_.end(), older_.begin());
    next_ = num_lanes_;
    // A run longer than needed says nothing more than one just long enough, and this one cannot overflow.
    for (std::size_t lane = 0; lane < num_lanes_; ++lane) runs_[lane] = std::min(runs_[lane], needed_[lane]);
    for (std::size_t i = 0; i < num_running_; ++i) running_[i].run = std::min(running_[i].run, needed_[running_[i].lane]);
}

}  // namespace megatron_rl::repetition
