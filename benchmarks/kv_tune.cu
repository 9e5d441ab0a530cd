// Finds how a copy of KV pages is best cut up on this GPU: every CopyPlan of csrc/kv/pages_cuda.cu, gather and scatter, at
// Qwen3-8B's cache (72 regions of 160000 tokens of 2 KiB), 32k tokens in random pages of 1, 16 and 64 tokens, 33 GB.
//
// All plans are timed a few times at pages of 1 and 16. The best of each direction, and what ships, are then checked to the bit
// and timed at all page sizes, four launches a sample, in turn with cudaMemcpyAsync (what torch copies with) and with a plain
// copy kernel; then the best of those with fewer threads on a multiprocessor, and with warps that loop. Ratios are medians, of
// cudaMemcpyAsync's rate; a list is sorted by the worst of its page sizes, and its names are the lines to put into pages_cuda.cu.
//
//   nvcc -std=c++17 -O3 -Icsrc -gencode=arch=compute_90a,code=sm_90a -o kv_tune benchmarks/kv_tune.cu && ./kv_tune [seconds=50]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kv/pages_cuda.cu"

namespace megatron_rl::kv {
namespace {

constexpr int num_regions = 72, token_bytes = 2048, pool_tokens = 160000, num_tokens = 32768;
constexpr int64_t region_bytes = int64_t{pool_tokens} * token_bytes, slab_size = int64_t{num_tokens} * num_regions * token_bytes;
constexpr int page_sizes[] = {1, 16, 64};
constexpr int launches = 4;  // of a final sample
constexpr std::size_t num_finalists = 14, num_thinned = 3;

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    std::printf("%s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
}

using Kernel = void (*)(PagedPool, Work);
struct Variant {
    std::string plan;
    Kernel kernel;
    int threads, flight;
    int shared_bytes = 0;  // asked for only so that fewer blocks share a multiprocessor
    int max_blocks = 0;    // 0: a tile a warp
    std::map<int, double> ratio;  // by page size, of cudaMemcpyAsync
    std::map<int, double> of_kernel;  // of the plain copy kernel
    double worst() const {
        double least = ratio.empty() ? 0 : 1e9;
        for (const auto& [page_size, value] : ratio) least = std::min(least, value);
        return least;
    }
};

template <class Plan>
std::string name_of(int threads) {
    const char* marks[] = {"none", "streaming", "bypass"};
    return "CopyPlan<" + std::to_string(threads) + ", " + std::to_string(Plan::flight) + ", Mark::" +
           marks[static_cast<int>(Plan::load)] + ", Mark::" + marks[static_cast<int>(Plan::store)] + ", Order::" +
           (Plan::order == Order::by_slot ? "by_slot" : "by_region") + ", " + (Plan::early ? "true" : "false") + ">";
}

// The number of threads is no part of the code (most_threads): one kernel serves them all.
template <Direction direction, std::size_t i>
void add_plan(std::vector<Variant>& variants) {
    using Plan = CopyPlan<most_threads, 1 << i % 4, static_cast<Mark>(i / 4 % 3), static_cast<Mark>(i / 12 % 3),
                          static_cast<Order>(i / 36 % 2), (i >= 72)>;
    for (int threads : {128, 256, most_threads})
        variants.push_back({name_of<Plan>(threads), copy_pages<uint4, direction, Plan>, threads, Plan::flight});
}
template <Direction direction, std::size_t... i>
std::vector<Variant> all_plans(std::index_sequence<i...>) {
    std::vector<Variant> variants;
    (add_plan<direction, i>(variants), ...);
    return variants;
}

__global__ void randomise(uint32_t* words, int64_t count, uint32_t seed) {
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
        uint64_t x = (uint64_t{seed} << 40) + i;
        x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
        x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
        words[i] = static_cast<uint32_t>(x ^ x >> 33);
    }
}

__global__ void count_differing(const __grid_constant__ PagedPool pool, const int64_t* pages, const uint32_t* slab,
                                int64_t num_words, unsigned long long* total) {
    const int64_t page_words = pool.page_bytes() / 4;
    unsigned long long found = 0;
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < num_words; i += gridDim.x * 256ll) {
        const int64_t row = i / page_words, slot = row / pool.num_regions;
        const auto* region = reinterpret_cast<const uint32_t*>(pool.base[row % pool.num_regions]);
        found += slab[i] != region[pages[slot] * page_words + i % page_words];
    }
    if (found) atomicAdd(total, found);
}

// The plain copy kernel: as a gather, without pages.
__global__ void __launch_bounds__(512) copy_contiguous(const uint4* from, uint4* to) {
    const int64_t at = static_cast<int64_t>(first_warp()) * 128 + threadIdx.x % warp_size;
    uint4 held[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) held[i] = from[at + i * warp_size];
#pragma unroll
    for (int i = 0; i < 4; ++i) to[at + i * warp_size] = held[i];
}

class Tuner {
public:
    explicit Tuner(double limit_s) : limit_s_(limit_s) {
        check(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, 0), "multiprocessors");
        check(cudaDeviceGetAttribute(&shared_bytes_, cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0), "shared memory");
        for (int r = 0; r < num_regions; ++r) check(cudaMalloc(&pool_.base[r], region_bytes), "a region");
        check(cudaMalloc(&slab_, slab_size), "the slab");
        check(cudaMalloc(&other_, slab_size), "the other slab");
        check(cudaMalloc(&pages_, sizeof(int64_t) * num_tokens), "the page numbers");
        check(cudaMallocManaged(&counter_, sizeof *counter_), "a counter");
        check(cudaEventCreate(&begin_), "an event");
        check(cudaEventCreate(&end_), "an event");
        pool_.num_regions = num_regions;
        pool_.row_elements = 128;
        pool_.element_bytes = 2;
        pool_.element = Element::bfloat16;
        fill_pool();
        randomise<<<processors_ * 8, 256>>>(reinterpret_cast<uint32_t*>(other_), slab_size / 4, 99);
    }

    double spent() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count(); }
    bool has_time() const { return spent() < limit_s_; }

    void tune(Direction direction, const char* name, std::vector<Variant> variants, const std::string& shipped, double share) {
        screen(direction, variants, share * limit_s_);
        keep_best(variants, shipped, num_finalists);
        finals(direction, variants, 8);
        report(name, variants);
        const auto best = std::vector<Variant>(variants.begin(), variants.begin() + std::min(num_thinned, variants.size()));
        auto thinned = thin(best);
        finals(direction, thinned, 5);
        report((std::string(name) + ", fewer threads on a multiprocessor, or warps that loop").c_str(), thinned);
    }

private:
    void fill_pool() {
        for (int r = 0; r < num_regions; ++r)
            randomise<<<processors_ * 8, 256>>>(reinterpret_cast<uint32_t*>(pool_.base[r]), region_bytes / 4, r + 1);
        check(cudaDeviceSynchronize(), "fill the pool");
    }

    void set_page_size(int page_size) {
        page_size_ = page_size;
        pool_.rows_per_page = page_size * token_bytes / (pool_.row_elements * pool_.element_bytes);
        pool_.page_stride = pool_.page_bytes();
        pool_.num_pages = pool_tokens / page_size;
        num_slots_ = num_tokens / page_size;
        std::vector<int64_t> ids(pool_.num_pages);
        std::iota(ids.begin(), ids.end(), 0);
        std::shuffle(ids.begin(), ids.end(), std::mt19937_64(page_size));
        check(cudaMemcpy(pages_, ids.data(), sizeof(int64_t) * num_slots_, cudaMemcpyHostToDevice), "the page numbers");
    }

    void launch(const Variant& v, Direction direction) {
        uint8_t* slab = direction == Direction::gather ? slab_ : other_;
        Work work = work_on(pages_, nullptr, slab, {reinterpret_cast<int64_t*>(counter_), 0, nullptr});
        const int64_t tile_bytes = int64_t{512} * v.flight;
        if (!count_tiles(pool_, num_slots_, (pool_.page_bytes() + tile_bytes - 1) / tile_bytes, work)) std::exit(1);
        const int64_t needed = (int64_t{work.num_tiles} * warp_size + v.threads - 1) / v.threads;
        const auto blocks = static_cast<unsigned>(v.max_blocks ? std::min<int64_t>(v.max_blocks, needed) : needed);
        if (v.shared_bytes)
            check(cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared_bytes), "shared memory");
        v.kernel<<<blocks, v.threads, v.shared_bytes>>>(pool_, work);
        check(cudaGetLastError(), v.plan.c_str());
    }

    // GB/s, read and written.
    double rate(const std::function<void()>& call, int calls) {
        check(cudaEventRecord(begin_), "an event");
        for (int i = 0; i < calls; ++i) call();
        check(cudaEventRecord(end_), "an event");
        check(cudaEventSynchronize(end_), "a sample");
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin_, end_), "a sample");
        return 2e-6 * slab_size * calls / ms;
    }
    double copy_rate(int calls) {
        return rate([&] { check(cudaMemcpyAsync(slab_, other_, slab_size, cudaMemcpyDeviceToDevice), "a copy"); }, calls);
    }
    double kernel_rate(int calls) {
        const auto* from = reinterpret_cast<const uint4*>(other_);
        auto* to = reinterpret_cast<uint4*>(slab_);
        return rate([&] { copy_contiguous<<<slab_size / 16 / 4 / 512, 512>>>(from, to); }, calls);
    }

    static double median(std::vector<double> values) {
        std::sort(values.begin(), values.end());
        return values.empty() ? 0 : values[values.size() / 2];
    }

    void screen(Direction direction, std::vector<Variant>& variants, double until_s) {
        for (int page_size : {16, 1}) {
            set_page_size(page_size);
            const double started = spent(), stop = page_size == 16 ? (started + until_s) / 2 : until_s;
            std::map<std::size_t, std::vector<double>> rates;
            std::vector<double> copies;
            for (int round = 0; round < 3 && (round == 0 || spent() < stop); ++round) {
                for (std::size_t i = 0; i < variants.size(); ++i) {
                    if (i % 32 == 0) copies.push_back(copy_rate(1));
                    rates[i].push_back(rate([&] { launch(variants[i], direction); }, 1));
                }
            }
            for (auto& [i, samples] : rates) variants[i].ratio[page_size] = median(samples) / median(copies);
            std::printf("[%.1f s] %zu plans screened at pages of %d, %zu samples each, copy %.0f GB/s\n", spent(), variants.size(),
                        page_size, rates.empty() ? 0 : rates[0].size(), median(copies));
            std::fflush(stdout);
        }
    }

    static void keep_best(std::vector<Variant>& variants, const std::string& shipped, std::size_t count) {
        std::stable_sort(variants.begin(), variants.end(), [](const auto& a, const auto& b) { return a.worst() > b.worst(); });
        std::vector<Variant> kept;
        for (const Variant& v : variants)
            if (kept.size() < count || v.plan == shipped) kept.push_back(v);
        for (Variant& v : kept) {
            if (v.plan == shipped) v.plan += " (ships)";
            v.ratio.clear();
        }
        variants = kept;
    }

    // To the bit, on other content than before. A scatter fills the pool's pages from the random slab `other`.
    bool is_right(const Variant& v, Direction direction) {
        const bool gathers = direction == Direction::gather;
        if (gathers) check(cudaMemset(slab_, 0xA5, slab_size), "poison");
        for (int r = 0; !gathers && r < num_regions; ++r) check(cudaMemset(pool_.base[r], 0xA5, region_bytes), "poison");
        launch(v, direction);
        *counter_ = 0;
        check(cudaDeviceSynchronize(), v.plan.c_str());
        const auto* slab = reinterpret_cast<const uint32_t*>(gathers ? slab_ : other_);
        count_differing<<<processors_ * 8, 256>>>(pool_, pages_, slab, slab_size / 4, counter_);
        check(cudaDeviceSynchronize(), "compare");
        if (*counter_) std::printf("WRONG %s, pages of %d: %llu words differ\n", v.plan.c_str(), page_size_, *counter_);
        return *counter_ == 0;
    }

    void finals(Direction direction, std::vector<Variant>& variants, int rounds) {
        for (int page_size : page_sizes) {
            if (!has_time()) return;
            set_page_size(page_size);
            const auto is_wrong = [&](const Variant& v) { return !is_right(v, direction); };
            variants.erase(std::remove_if(variants.begin(), variants.end(), is_wrong), variants.end());
            if (direction == Direction::scatter) fill_pool();
            std::vector<std::vector<double>> rates(variants.size());
            std::vector<double> copies, kernels;
            for (int round = 0; round < rounds && has_time(); ++round) {
                copies.push_back(copy_rate(launches));
                kernels.push_back(kernel_rate(launches));
                for (std::size_t i = 0; i < variants.size(); ++i)
                    rates[i].push_back(rate([&] { launch(variants[i], direction); }, launches));
            }
            for (std::size_t i = 0; i < variants.size(); ++i) {
                variants[i].ratio[page_size] = median(rates[i]) / median(copies);
                variants[i].of_kernel[page_size] = median(rates[i]) / median(kernels);
            }
            std::printf("[%.1f s] pages of %d: cudaMemcpyAsync %.0f GB/s, plain kernel %.0f GB/s\n", spent(), page_size,
                        median(copies), median(kernels));
        }
    }

    // Half and a quarter of 2048 threads on a multiprocessor; and as many blocks as are resident at once, which loop.
    std::vector<Variant> thin(const std::vector<Variant>& best) const {
        std::vector<Variant> found;
        for (const Variant& v : best) {
            for (int resident : {1024, 512}) {
                if (resident < v.threads) continue;
                Variant fewer = v;
                fewer.shared_bytes = std::min(shared_bytes_ / (resident / v.threads), 227 * 1024) / 1024 * 1024 - 1024;
                fewer.plan += ", " + std::to_string(resident) + " threads a multiprocessor";
                found.push_back(fewer);
            }
            for (int resident : {2048, 1024}) {
                Variant looping = v;
                looping.max_blocks = processors_ * resident / v.threads;
                looping.plan += ", max_blocks " + std::to_string(looping.max_blocks);
                found.push_back(looping);
            }
        }
        for (Variant& v : found) v.ratio.clear(), v.of_kernel.clear();
        return found;
    }

    void report(const char* name, std::vector<Variant>& variants) const {
        std::stable_sort(variants.begin(), variants.end(), [](const auto& a, const auto& b) { return a.worst() > b.worst(); });
        std::printf("\n%s: worst; pages of 1, 16, 64; of the plain kernel at 1, 16, 64\n", name);
        for (const Variant& v : variants) {
            std::printf("%.4f;", v.worst());
            for (const auto& [page_size, ratio] : v.ratio) std::printf(" %.4f", ratio);
            std::printf(";");
            for (const auto& [page_size, ratio] : v.of_kernel) std::printf(" %.4f", ratio);
            std::printf("  %s\n", v.plan.c_str());
        }
        std::printf("\n");
        std::fflush(stdout);
    }

    const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
    double limit_s_;
    int processors_ = 0, shared_bytes_ = 0, page_size_ = 0;
    int64_t num_slots_ = 0;
    PagedPool pool_{};
    uint8_t *slab_ = nullptr, *other_ = nullptr;
    int64_t* pages_ = nullptr;
    unsigned long long* counter_ = nullptr;
    cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

void run(double limit_s) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0), "a GPU");
    Tuner tuner(limit_s);
    std::printf("[%.1f s] %s\n", tuner.spent(), properties.name);
    // Screening may last until these shares of the time; scatter first, since its plans are more.
    auto scatters = all_plans<Direction::scatter>(std::make_index_sequence<144>());
    tuner.tune(Direction::scatter, "scatter", scatters, name_of<ScatterPlan>(ScatterPlan::threads), 0.45);
    auto gathers = all_plans<Direction::gather>(std::make_index_sequence<72>());
    tuner.tune(Direction::gather, "gather", gathers, name_of<GatherPlan>(GatherPlan::threads), 0.8);
    std::printf("%.1f s\n", tuner.spent());
}

}  // namespace
}  // namespace megatron_rl::kv

int main(int argc, char** argv) {
    megatron_rl::kv::run(argc > 1 ? std::atof(argv[1]) : 50);
    return 0;
}
