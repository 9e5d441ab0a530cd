#include "packing/index.h"

#include <algorithm>
#include <numeric>

namespace megatron_rl::packing {
namespace {

// Rows of a response: one for each token before its last loss-bearing one.
std::size_t num_rows(const Response& response) {
    std::size_t end = response.length;
    while (end > 0 && !response.loss_mask[end - 1]) --end;
    return end - std::min<std::size_t>(end, 1);
}

// Rows and loss tokens only grow.
class Writer {
public:
    explicit Writer(const Index& index) : index_(index) { index_.cu_seqlens[0] = 0; }

    // Appends rows whose positions count from `first_position`; null tokens are zeros. Returns the run.
    int32_t append(const int32_t* token_ids, std::size_t count, std::size_t first_position) {
        if (token_ids) std::copy_n(token_ids, count, index_.token_ids + row_);
        else std::fill_n(index_.token_ids + row_, count, 0);
        std::iota(index_.positions + row_, index_.positions + row_ + count, static_cast<int64_t>(first_position));
        std::fill_n(index_.segment_ids + row_, count, run_);
        row_ += count;
        index_.parents[run_] = run_;
        index_.cu_seqlens[run_ + 1] = static_cast<int32_t>(row_);
        return run_++;
    }

    void append(const Family& family) {
        const int32_t prompt = append(family.prompt_ids, family.prompt_length, 0);
        const auto last_prompt_row = static_cast<int64_t>(row_) - 1;
        for (const Response& response : family.responses) {
            append_loss(response, last_prompt_row);
            const std::size_t rows = num_rows(response);
            if (rows) index_.parents[append(response.token_ids, rows, family.prompt_length)] = prompt;
        }
    }

private:
    // The token before predicts; the first one is predicted by the prompt's last row, which the responses share.
    void append_loss(const Response& response, int64_t last_prompt_row) {
        const auto start = static_cast<int64_t>(row_);
        const Index to = index_;  // local, as `at` is: a write to an array cannot change them, and compilers see it
        std::size_t at = loss_;
        for (std::size_t i = 0; i < response.length; ++i) {
            if (!response.loss_mask[i]) continue;
            to.loss_rows[at] = i ? start + static_cast<int64_t>(i) - 1 : last_prompt_row;
            to.targets[at] = response.token_ids[i];
            to.sequence_ids[at] = sequence_;
            to.log_probs[at] = response.log_probs[i];
            to.versions[at++] = response.versions[i];
        }
        loss_ = at;
        ++sequence_;
    }

    Index index_;
    std::size_t row_ = 0, loss_ = 0;
    int32_t run_ = 0;
    int64_t sequence_ = 0;
};

}  // namespace

Sizes measure(const std::vector<Family>& families, std::size_t multiple) {
    Sizes sizes{0, 0, 0, 0};
    for (const Family& family : families) {
        sizes.tokens += family.prompt_length;
        ++sizes.runs;
        for (const Response& response : family.responses) {
            const std::size_t rows = num_rows(response);
            sizes.tokens += rows;
            sizes.runs += rows > 0;
            for (std::size_t i = 0; i < response.length; ++i) sizes.loss_tokens += response.loss_mask[i];
        }
    }
    sizes.padding = sizes.tokens ? (multiple - sizes.tokens % multiple) % multiple : multiple;
    sizes.tokens += sizes.padding;
    sizes.runs += sizes.padding > 0;
    return sizes;
}

void write(const std::vector<Family>& families, const Sizes& sizes, const Index& index) {
    Writer writer(index);
    for (const Family& family : families) writer.append(family);
    if (sizes.padding) writer.append(nullptr, sizes.padding, 0);
}

std::size_t num_predicted(const LossTokens& all, Rows rows) {
    return static_cast<std::size_t>(
        std::count_if(all.loss_rows, all.loss_rows + all.count, [rows](int64_t row) { return rows.holds(row); }));
}

void cut(const LossTokens& all, Rows rows, const LossSlice& slice) {
    const LossSlice to = slice;  // local, as in append_loss
    std::size_t at = 0;
    for (std::size_t i = 0; i < all.count; ++i) {
        if (!rows.holds(all.loss_rows[i])) continue;
        to.loss_tokens[at] = static_cast<int64_t>(i);
        to.loss_rows[at] = all.loss_rows[i] - rows.first;
        to.targets[at] = all.targets[i];
        to.sequence_ids[at] = all.sequence_ids[i];
        to.log_probs[at] = all.log_probs[i];
        to.versions[at++] = all.versions[i];
    }
}

}  // namespace megatron_rl::packing
