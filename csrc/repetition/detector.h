// Finds where a token stream has begun to repeat itself: one run length a period, all periods at once. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace megatron_rl::repetition {

// Fires where, for some p in 1..max_period and some r >= min_repeats with p * r >= min_tokens, the last p * r tokens are r
// copies of one block of length p. The last n tokens repeat with period p exactly where each of the last n - p equals the
// token p before it, so one run length a period decides it. Not thread-safe: one detector a trajectory.
//
// Only periods at which the newest token occurred before have a run. A table of chains says where it did among the last
// max_period tokens: nowhere costs nothing more, a few places a step each, many one pass of vector code over all periods. Runs are
// a short list after the one, an array after the other; whether the array holds a run long enough is looked at only where the
// longest may be.
class Detector {
public:
    // The caller has checked that max_period >= 1, min_repeats >= 2, min_tokens >= 1, and that no run needed overflows int32.
    Detector(int32_t max_period, int32_t min_repeats, int32_t min_tokens);

    // Whether the tokens pushed so far, this one included, end in a repetition.
    bool push(int32_t token);

    // Pushes until it fires; the index of that token. The tokens behind it are not pushed.
    std::optional<std::size_t> push_many(const int32_t* tokens, std::size_t num_tokens);

    // Tokens that decide whether it fires: a new detector given the last `window` ones goes on like this one.
    int64_t window() const { return window_; }

private:
    static constexpr uint32_t kFew = 6;  // places from which on the vector code is faster

    // Tokens of one hash share a chain, so each place on it is compared.
    struct Chain {
        uint32_t newest = 0;  // place of its last token in the stream, modulo 2**32; only differences below max_period count
        uint32_t length = 0;  // how many of the last num_lanes_ tokens are on it
    };

    static uint32_t hash(int32_t token, uint32_t shift) { return static_cast<uint32_t>(token) * 0x9e3779b1u >> shift; }
    Chain& chain_of(int32_t token) { return chains_[hash(token, hash_shift_)]; }

    // Pushes tokens up to the first that may have occurred among the last ones; how many.
    std::size_t push_unseen(const int32_t* tokens, std::size_t num_tokens);
    bool extend_few(int32_t token, const Chain& chain);
    bool extend_all(int32_t token);
    void forget_runs() { num_running_ = 0, all_running_ = false, longest_ = 0; }
    void make_room();

    // Lane i stands for period max_period - i, so that the tokens to compare with lie in the order of their lanes.
    std::size_t num_lanes_;
    int64_t window_ = 0;
    std::vector<int32_t> needed_;  // [lanes] run of equal tokens, a period apart, of the least repetition asked for
    int32_t least_needed_;
    std::vector<int32_t> runs_;    // [lanes] the run up to the newest token, where all_running_
    std::vector<int32_t> recent_;  // the last num_lanes_ tokens end at next_
    std::size_t next_;
    std::size_t num_known_ = 0;  // tokens in recent_, at most num_lanes_

    uint32_t place_ = 0;           // of the next token in the stream
    std::vector<uint32_t> older_;  // as recent_: the place before this one on its chain
    std::vector<Chain> chains_;
    uint32_t hash_shift_;
    struct Running {
        std::size_t lane;
        int32_t run;
    };
    Running running_[kFew];  // else: every lane with a run, the shortest period first
    std::size_t num_running_ = 0;
    bool all_running_ = false;
    int64_t longest_ = 0;  // no run is longer
};

}  // namespace megatron_rl::repetition
