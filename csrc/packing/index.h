// Where every token of a micro-batch lies: the tree of prompts and responses as flat arrays, whole and cut for context-parallel
// ranks. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace megatron_rl::packing {

// One response with its facts. Its rows end before its last loss-bearing token, because that one predicts nothing more.
struct Response {
    const int32_t* token_ids;  // [length]
    const uint8_t* loss_mask;  // [length], 0 or 1; at least one is 1
    const float* log_probs;    // [length]
    const int32_t* versions;   // [length]
    std::size_t length;
};

// A prompt, written once, and the responses that attend to it.
struct Family {
    const int32_t* prompt_ids;  // [prompt_length]
    std::size_t prompt_length;
    std::vector<Response> responses;
};

// What has to be allocated.
struct Sizes {
    std::size_t tokens;  // rows of the pack, padding included
    std::size_t padding;
    std::size_t runs;  // of rows that follow each other: prompts, responses that have rows, the padding
    std::size_t loss_tokens;
};

// The arrays to write; the caller has allocated them.
struct Index {
    int64_t* token_ids;     // [tokens]
    int64_t* positions;     // [tokens]
    int32_t* segment_ids;   // [tokens] the run of each row
    int32_t* cu_seqlens;    // [runs + 1] the first row of each run, and the end
    int32_t* parents;       // [runs] the run of its prompt; a prompt, or padding, is its own
    int64_t* loss_rows;     // [loss_tokens] the row that predicts the token
    int64_t* targets;       // [loss_tokens]
    int64_t* sequence_ids;  // [loss_tokens] counted over all families
    float* log_probs;       // [loss_tokens]
    int32_t* versions;      // [loss_tokens]
};

// A pack without a row gets `multiple` rows of padding.
Sizes measure(const std::vector<Family>& families, std::size_t multiple);

void write(const std::vector<Family>& families, const Sizes& sizes, const Index& index);

// The rows of one context-parallel rank: equal and consecutive shares of a pack, because attention trades tokens for heads.
struct Rows {
    int64_t first, end;
    bool holds(int64_t row) const { return row >= first && row < end; }
};

// Loss tokens of a whole pack, to read.
struct LossTokens {
    const int64_t* loss_rows;  // [count]
    const int64_t* targets;
    const int64_t* sequence_ids;
    const float* log_probs;
    const int32_t* versions;
    std::size_t count;
};

// Those that a rank's rows predict, in the pack's order, to write.
struct LossSlice {
    int64_t* loss_tokens;  // [chosen] which of the pack's
    int64_t* loss_rows;    // [chosen] counted from the rank's first row
    int64_t* targets;
    int64_t* sequence_ids;
    float* log_probs;
    int32_t* versions;
};

std::size_t num_predicted(const LossTokens& all, Rows rows);

void cut(const LossTokens& all, Rows rows, const LossSlice& slice);

}  // namespace megatron_rl::packing
