#include "packing/partition.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <queue>

namespace megatron_rl::packing {
namespace {

constexpr int32_t kNone = -1;

// Items chained by `next`; the chain of a part runs from head to tail.
struct Part {
    double cost;
    int32_t head, tail;
};

// A partial solution: its parts that are not empty, heaviest first.
struct State {
    std::vector<Part> parts;
    double spread;

    double heaviest() const { return parts.front().cost; }
};

class Differencing {
public:
    Differencing(const std::vector<double>& costs, std::size_t num_parts)
        : num_parts_(num_parts), next_(costs.size(), kNone), states_(costs.size()) {
        for (std::size_t i = 0; i < costs.size(); ++i) {
            const auto item = static_cast<int32_t>(i);
            states_[i].parts = {{costs[i], item, item}};
            states_[i].spread = spread(states_[i].parts);
        }
    }

    // Combines the two states of largest spread, heavy parts of one with light parts of the other, until one is left.
    Parts solve() {
        const auto later = [this](int32_t a, int32_t b) {  // on top of the heap: the largest spread, the heavier, the first
            const State &x = states_[a], &y = states_[b];
            if (x.spread != y.spread) return x.spread < y.spread;
            if (x.heaviest() != y.heaviest()) return x.heaviest() < y.heaviest();
            return a > b;
        };
        std::vector<int32_t> order(states_.size());
        std::iota(order.begin(), order.end(), 0);
        std::priority_queue heap(later, std::move(order));
        while (heap.size() > 1) {
            const int32_t first = heap.top();
            heap.pop();
            const int32_t second = heap.top();
            heap.pop();
            combine(states_[first], states_[second]);
            heap.push(first);
        }
        return heap.empty() ? Parts(num_parts_) : listed(states_[heap.top()]);
    }

private:
    double spread(const std::vector<Part>& parts) const {
        return parts.front().cost - (parts.size() == num_parts_ ? parts.back().cost : 0.0);
    }

    Part joined(const Part& a, const Part& b) {
        next_[a.tail] = b.head;
        return {a.cost + b.cost, a.head, b.tail};
    }

    // Part i of a meets part num_parts - 1 - i of b. Empty parts are not stored: only the last `shared` of a meet any of b.
    void combine(State& a, State& b) {
        const auto heavier = [](const Part& x, const Part& y) { return x.cost > y.cost; };
        const std::size_t total = a.parts.size() + b.parts.size();
        const std::size_t shared = total > num_parts_ ? total - num_parts_ : 0;
        const std::size_t alone_a = a.parts.size() - shared, alone_b = b.parts.size() - shared;
        merged_.assign(a.parts.begin(), a.parts.begin() + alone_a);
        merged_.insert(merged_.end(), b.parts.begin(), b.parts.begin() + alone_b);
        for (std::size_t i = 0; i < shared; ++i) merged_.push_back(joined(a.parts[alone_a + i], b.parts[b.parts.size() - 1 - i]));
        const auto middle = merged_.begin() + static_cast<std::ptrdiff_t>(alone_a + alone_b);
        std::stable_sort(middle, merged_.end(), heavier);
        std::inplace_merge(merged_.begin(), merged_.begin() + static_cast<std::ptrdiff_t>(alone_a), middle, heavier);
        std::inplace_merge(merged_.begin(), middle, merged_.end(), heavier);
        a.parts = merged_;
        a.spread = spread(a.parts);
        b.parts = {};
    }

    Parts listed(const State& state) const {
        Parts parts(num_parts_);
        for (std::size_t p = 0; p < state.parts.size(); ++p)
            for (int32_t item = state.parts[p].head; item != kNone; item = next_[item]) parts[p].push_back(item);
        return parts;
    }

    std::size_t num_parts_;
    std::vector<int32_t> next_;
    std::vector<State> states_;
    std::vector<Part> merged_;
};

// Takes weight off the heaviest part, by moving one item to a lighter part or exchanging two, as long as something helps.
// No move makes a part heavier than the heaviest was, or larger than the capacity.
class Improvement {
public:
    Improvement(Parts& parts, const std::vector<double>& costs, const std::vector<int64_t>& sizes, int64_t capacity)
        : parts_(parts), costs_(costs), sizes_(sizes), capacity_(capacity), cost_(parts.size()), size_(parts.size()) {
        for (std::size_t p = 0; p < parts.size(); ++p) weigh(p);
    }

    void run() {
        std::vector<std::size_t> order(parts_.size());
        std::iota(order.begin(), order.end(), 0);
        // Every step lowers the sum of squared costs, so this ends; the bound keeps its time near that of differencing.
        for (std::size_t steps = 0; steps < costs_.size(); ++steps) {
            std::sort(order.begin(), order.end(),
                      [this](std::size_t a, std::size_t b) { return cost_[a] != cost_[b] ? cost_[a] < cost_[b] : a < b; });
            const auto helps = [&](std::size_t lighter) { return relieve(order.back(), lighter); };
            if (std::none_of(order.begin(), order.end() - 1, helps)) return;
        }
    }

private:
    void weigh(std::size_t p) {
        cost_[p] = 0;
        size_[p] = 0;
        for (const int32_t item : parts_[p]) {
            cost_[p] += costs_[item];
            size_[p] += sizes_[item];
        }
    }

    // The exchange that brings the two closest; an exchange with nothing is a move.
    bool relieve(std::size_t heavy, std::size_t light) {
        const double gap = cost_[heavy] - cost_[light];
        const double rounding = gap * 1e-9 + cost_[heavy] * 1e-12;
        double closest = gap - rounding;  // of the new difference; what is not closer does not help
        int32_t out = kNone, back = kNone;
        const auto consider = [&](int32_t mine, int32_t other) {
            const double shift = costs_[mine] - (other == kNone ? 0.0 : costs_[other]);
            const double difference = std::abs(gap - 2 * shift);
            if (difference >= closest) return;
            const int64_t grows = sizes_[mine] - (other == kNone ? 0 : sizes_[other]);
            if (size_[light] + grows > capacity_ || size_[heavy] - grows > capacity_) return;
            closest = difference;
            out = mine;
            back = other;
        };
        for (const int32_t mine : parts_[heavy]) {
            consider(mine, kNone);
            for (const int32_t other : parts_[light]) consider(mine, other);
        }
        if (out == kNone) return false;
        give(heavy, light, out);
        if (back != kNone) give(light, heavy, back);
        weigh(heavy);
        weigh(light);
        return true;
    }

    void give(std::size_t from, std::size_t to, int32_t item) {
        parts_[from].erase(std::find(parts_[from].begin(), parts_[from].end(), item));
        parts_[to].push_back(item);
    }

    Parts& parts_;
    const std::vector<double>& costs_;
    const std::vector<int64_t>& sizes_;
    int64_t capacity_;
    std::vector<double> cost_;
    std::vector<int64_t> size_;
};

// Heaviest part first, items ascending; equal parts by their first item, empty ones last.
Parts ordered(Parts parts, const std::vector<double>& costs) {
    std::vector<std::pair<double, std::size_t>> keys;
    for (std::size_t p = 0; p < parts.size(); ++p) {
        std::sort(parts[p].begin(), parts[p].end());
        double cost = 0;
        for (const int32_t item : parts[p]) cost += costs[item];
        keys.emplace_back(cost, p);
    }
    std::sort(keys.begin(), keys.end(), [&](const auto& x, const auto& y) {
        if (x.first != y.first) return x.first > y.first;
        const auto &a = parts[x.second], &b = parts[y.second];
        return a.empty() || b.empty() ? a.size() > b.size() : a.front() < b.front();
    });
    Parts result;
    for (const auto& key : keys) result.push_back(std::move(parts[key.second]));
    return result;
}

bool fits(const Parts& parts, const std::vector<int64_t>& sizes, int64_t capacity) {
    return std::all_of(parts.begin(), parts.end(), [&](const std::vector<int32_t>& part) {
        int64_t size = 0;
        for (const int32_t item : part) size += sizes[item];
        return part.size() <= 1 || size <= capacity;
    });
}

// Each item, largest first, into the fullest part it fits in.
Parts best_fit(const std::vector<int64_t>& sizes, int64_t capacity) {
    std::vector<int32_t> order(sizes.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return sizes[a] > sizes[b]; });
    Parts parts;
    std::vector<int64_t> room;
    for (const int32_t item : order) {
        std::size_t best = parts.size();
        for (std::size_t p = 0; p < parts.size(); ++p)
            if (room[p] >= sizes[item] && (best == parts.size() || room[p] < room[best])) best = p;
        if (best == parts.size()) {
            parts.emplace_back();
            room.push_back(capacity);
        }
        parts[best].push_back(item);
        room[best] -= sizes[item];
    }
    return parts;
}

// Some parts within the capacity, as few as differencing by size and best fit find, empty ones filling up to the multiple.
Parts tight(const std::vector<int64_t>& sizes, int64_t capacity, std::size_t multiple) {
    const auto rounded = [multiple](std::size_t n) { return std::max<std::size_t>(1, (n + multiple - 1) / multiple) * multiple; };
    Parts fitting = best_fit(sizes, capacity);
    int64_t ordinary = 0;
    std::size_t oversized = 0;
    for (const int64_t size : sizes) size > capacity ? ++oversized : ordinary += size;
    const std::vector<double> weights(sizes.begin(), sizes.end());
    const std::size_t most = rounded(fitting.size());
    const std::size_t least = oversized + static_cast<std::size_t>((ordinary + capacity - 1) / capacity);
    for (std::size_t n = rounded(least); n < most; n += multiple) {
        Parts even = Differencing(weights, n).solve();
        if (fits(even, sizes, capacity)) return even;
    }
    fitting.resize(most);
    return fitting;
}

}  // namespace

Parts balanced(const std::vector<double>& costs, std::size_t num_parts) {
    Parts parts = Differencing(costs, num_parts).solve();
    Improvement(parts, costs, std::vector<int64_t>(costs.size(), 0), 0).run();
    return ordered(std::move(parts), costs);
}

Parts with_capacity(const std::vector<int64_t>& sizes, const std::vector<double>& costs, int64_t capacity,
                    std::size_t multiple) {
    Parts parts = tight(sizes, capacity, multiple);
    Parts even = Differencing(costs, parts.size()).solve();
    if (fits(even, sizes, capacity)) parts = std::move(even);
    Improvement(parts, costs, sizes, capacity).run();
    return ordered(std::move(parts), costs);
}

}  // namespace megatron_rl::packing
