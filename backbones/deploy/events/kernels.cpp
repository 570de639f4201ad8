// Event-driven layers: weights of the inputs that fired are added up, and the sums compared, in integers.
//
// No dependency but the C++ library. The same kernels are compiled for vectors of 64 bytes (AVX-512), of 32 (AVX2) and,
// portably, of 16, which are SSE2 or NEON; all give the same bits. Signed sums wrap (-fwrapv), and floating point is not
// contracted (-ffp-contract=off), so that real values are those of separate multiplications and additions.
#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <unistd.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define EVENTS_X86 1
#include <immintrin.h>
#endif

namespace {

// What fired in one pixel of one group: a part of the lists.
struct Pixel {
    int64_t start;
    int32_t listed, active;
    bool complement;  // well more than half fired: the list has those that did not
};

// A layer, prepared for its kernels.
struct Layer {
    const EventConv *conv;
    const int8_t *weights;   // [group][block][kx][ky][input][64 * words]
    const int32_t *totals;   // [group][block][kx][ky][64 * words]: sums over all inputs
    const Pixel *pixels;     // [group][image][y][x]
    const uint32_t *lists;   // rows, as offsets in bytes within a tap
    int64_t words, blocks, taps, tap_bytes, parts;
    int64_t row_room;  // entries of the lists that a row of pixels may take
    bool depthwise, inside, far;  // inside: no window reaches over the border; far: the weights are large
};

// A worker's lists of the rows of one neuron.
struct Neuron {
    uint32_t *flat, *silent, *columns;
    int64_t *complements, *column;
    int32_t *wide;
    const uint32_t *rows;
    int64_t num_rows, num_silent, num_complements, num_active;
};

// A dense convolution, of 32 bits of the input at a time: pairs of int16 or quads of bytes.
struct Tiles {
    const uint8_t *weights;  // [ky][step][padded channels] of 32 bits
    int64_t kernel_h, steps, padded, out_channels, out_width;
    int64_t apart_x, apart_y;  // bytes from one neuron's window to the next, and from one row of a window to the next
};

// A stem, prepared for its kernels.
struct Stem {
    const EventStem *conv;
    Tiles tiles;
    int64_t row_length;  // int16 of a row of the quantised image
};

// The columns of a resized row: `out_width` of them, and more of the last one up to whole vectors.
struct Resize {
    int64_t width, out_width;
    const int32_t *left, *right;
    const float *weight;  // of the right one
};

// Boxes in the order of their scores, each list with room for a vector behind it.
struct Boxes {
    const float *x1, *y1, *x2, *y2, *area;
    const int32_t *label;
    int32_t *marked;
    int64_t number;
    float limit;
};

// What a layer takes, measured on a core of Zen 5: per neuron, per row added up, per 64 channels of it, and a dense
// layer's products. Only their ratios count.
struct Costs {
    double neuron_ns, row_ns, word_ns, products_per_ns;
};

// The kernels of one width.
struct Kernels {
    int width, max_words;
    void (*work)(const Layer &, int64_t, int64_t, Neuron &);
    void (*threshold)(const float *, int64_t, int64_t, int64_t, const float *, const float *, uint64_t *);
    int64_t (*place_of)(int64_t);
    int8_t (*stored)(int64_t, int8_t);
    int64_t (*count)(const uint64_t *, int64_t);
    void (*list_row)(const EventConv &, const Layer &, int64_t, int64_t, Pixel *, uint32_t *);
    void (*quantise_row)(const EventStem &, int64_t, int64_t, int16_t *);
    void (*stem_rows)(const Stem &, int64_t, const uint8_t *, int64_t, int64_t, int32_t *, float *);
    void (*expand_row)(const EventConv &, int64_t, uint8_t *);
    void (*dense_row)(const EventConv &, const Tiles &, const uint8_t *, int64_t, int32_t *);
    void (*resize_row)(const Resize &, const float *, const float *, float, float, float *);
    void (*mark_overlapping)(const Boxes &, int64_t, int64_t);
    void (*sum_row)(const EventSum &, int64_t, const float *, const int64_t *);
    void (*hoyer[2][3])(const HoyerLayer &, int64_t, int64_t, double *);  // of float, of bfloat16: see events_hoyer
    Costs costs;
};

inline int64_t words_of(int64_t channels) { return (channels + 63) / 64; }

constexpr int64_t kNearest = 48 << 10;   // bytes of weights that stay in the first cache
constexpr int64_t kNear = 500 << 10;     // in the second
constexpr double kBytesPerNs = 30;       // read from main memory
constexpr double kWorthwhileNs = 30000;  // of work, for which another thread is woken
constexpr int64_t kWorthwhileRows = 32;  // that are saved, for which those that did not fire are listed
constexpr int64_t kAhead = 24;           // rows between the request for one and its use

// Keeps what was loaded in a register: compilers would load it again for every use.
#ifdef EVENTS_X86
#define EVENTS_ONCE(vector) __asm__("" : "+v"(vector))
#else
#define EVENTS_ONCE(vector)
#endif

#define NAME portable
#define WIDTH 16
#define MAX_WORDS 1
#define COSTS {40, 0.6, 0.9, 6}
#include "kernels.inc"
#undef NAME
#undef WIDTH
#undef MAX_WORDS
#undef COSTS

#ifdef EVENTS_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,popcnt,lzcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt,lzcnt")
#endif
#define NAME avx2
#define WIDTH 32
#define MAX_WORDS 2
#define COSTS {30, 0.2, 0.35, 110}
#include "kernels.inc"
#undef NAME
#undef WIDTH
#undef MAX_WORDS
#undef COSTS
#ifdef __clang__
#pragma clang attribute pop
#define EVENTS_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt,lzcnt"
#pragma clang attribute push(__attribute__((target(EVENTS_AVX512))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
#endif
#define NAME avx512
#define WIDTH 64
#define MAX_WORDS 4
#define COSTS {30, 0.15, 0.22, 200}
#include "kernels.inc"
#undef NAME
#undef COSTS
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target(EVENTS_AVX512 ",avx512vnni"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
#endif
#define NAME avx512vnni
#define HAS_VNNI
#define COSTS {30, 0.15, 0.22, 380}
#include "kernels.inc"
#undef NAME
#undef HAS_VNNI
#undef WIDTH
#undef MAX_WORDS
#undef COSTS
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

const Kernels *find_kernels(int level) {
#ifdef EVENTS_X86
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                          __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq");
    if (has_avx512 && __builtin_cpu_supports("avx512vnni") && (level == 3 || level < 0)) return &avx512vnni::kernels;
    if (has_avx512 && (level == 2 || level < 0)) return &avx512::kernels;
    if (has_avx2 && (level == 1 || level < 0)) return &avx2::kernels;
#endif
    return level <= 0 ? &portable::kernels : nullptr;
}

std::atomic<const Kernels *> chosen{nullptr};

const Kernels &kernels() {
    const Kernels *found = chosen.load();
    if (!found) chosen.store(found = find_kernels(-1));
    return *found;
}

inline void pause() {
#ifdef EVENTS_X86
    _mm_pause();
#endif
}

// Threads that wait for work: `run` calls work(item, thread) for every item, in any order.
class Pool {
  public:
    template <typename Work> void run(int64_t items, int64_t threads, const Work &work) {
        std::unique_lock<std::mutex> own(busy_, std::try_to_lock);
        if (threads > items) threads = items;
        if (threads < 2 || !own.owns_lock()) {  // one is enough, or another thread of the program has the workers
            for (int64_t i = 0; i < items; ++i) work(i, 0);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while ((int64_t)workers_.size() < threads - 1) try {
                const int64_t number = (int64_t)workers_.size() + 1;
                workers_.emplace_back([this, number, seen = generation_.load()] { serve(number, seen); });
            } catch (const std::exception &) {  // the system has no more of them
                threads = (int64_t)workers_.size() + 1;
            }
            work_ = &work;
            call_ = [](const void *w, int64_t i, int64_t thread) { (*static_cast<const Work *>(w))(i, thread); };
            items_ = items;
            helpers_ = threads - 1;
            next_.store(0);
            working_.store(threads - 1);
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        for (int64_t i; (i = next_.fetch_add(1)) < items;) work(i, 0);
        for (int spin = 0; spin < kSpins && working_.load() > 0; ++spin) pause();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return working_.load() == 0; });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        for (std::thread &worker : workers_) worker.join();
    }

  private:
    static constexpr int kSpins = 20000;  // some hundred microseconds: layers follow each other closely

    void serve(int64_t number, int64_t seen) {
        while (true) {
            for (int spin = 0; spin < kSpins && generation_.load() == seen; ++spin) pause();
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
                seen = generation_.load();
                if (stop_) return;
                if (number > helpers_) continue;
            }
            for (int64_t i; (i = next_.fetch_add(1)) < items_;) call_(work_, i, number);
            if (working_.fetch_sub(1) == 1) {
                std::lock_guard<std::mutex> lock(mutex_);
                done_.notify_all();
            }
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    std::atomic<int64_t> next_{0}, working_{0}, generation_{0};
    int64_t items_ = 0, helpers_ = 0;
    const void *work_ = nullptr;
    void (*call_)(const void *, int64_t, int64_t) = nullptr;
    bool stop_ = false;
};

// The pool of this process: a forked one has none of its parent's threads, and begins with a new pool.
Pool &pool() {
    static std::mutex mutex;
    static Pool *found = nullptr;
    static long owner = 0;
#ifndef _WIN32
    const long process = (long)getpid();
#else
    const long process = 1;
#endif
    std::lock_guard<std::mutex> lock(mutex);
    if (!found || owner != process) {
        found = new Pool;
        owner = process;
    }
    return *found;
}

bool is_depthwise(const EventConv &c) { return c.groups > 1 && c.groups == c.channels && c.groups == c.out_channels; }

// Sizes of the packed weights: what `Layer` has, without pointers.
Layer layout_of(const EventConv &c) {
    Layer layer = {};
    layer.conv = &c;
    layer.taps = c.kernel_h * c.kernel_w;
    layer.depthwise = is_depthwise(c);
    const int64_t total = words_of(layer.depthwise ? c.out_channels : c.out_channels / c.groups);
    layer.words = 1;
    if (c.groups == 1)
        while (layer.words * 2 <= kernels().max_words && total % (layer.words * 2) == 0) layer.words *= 2;
    layer.blocks = total / layer.words;
    layer.far = layer.taps * c.channels * total * 64 > kNear;
    layer.inside = c.pad_h == 0 && c.pad_w == 0;
    layer.tap_bytes = layer.depthwise ? 64 : c.channels / c.groups * layer.words * 64;
    return layer;
}

int64_t weight_bytes(const EventConv &c, const Layer &layer) {
    return (layer.depthwise ? 1 : c.groups) * layer.blocks * layer.taps * layer.tap_bytes;
}

constexpr int64_t kRoom = 32;  // copies of lists go beyond their ends by up to two vectors

// The layer as a dense one: a row of bytes for each of bits.
Tiles dense_tiles(const EventConv &c) {
    Tiles t = {};
    t.weights = static_cast<const uint8_t *>(c.dense);
    t.kernel_h = c.kernel_h;
    t.steps = (c.kernel_w * c.channels + 3) / 4;
    t.padded = words_of(c.out_channels) * 64;
    t.out_channels = c.out_channels;
    t.out_width = c.out_width;
    t.apart_x = c.stride_w * c.channels;
    t.apart_y = c.dilation_h * ((c.width + 2 * c.pad_w) * c.channels + 64);
    return t;
}

bool can_be_dense(const EventConv &c) { return c.groups == 1 && c.dilation_w == 1; }

// Estimated nanoseconds of a layer, with so many neurons active among its inputs as there are.
struct Estimate {
    double events, dense;
};

Estimate estimate(const EventConv &c, const Layer &layer, const Kernels &used) {
    const Costs &costs = used.costs;
    const int64_t places = c.images * c.height * c.width, neurons = c.images * c.out_height * c.out_width;
    if (places == 0) return {0, 0};
    const int64_t active = used.count(c.input, places * words_of(c.channels));
    const double density = (double)active / ((double)places * (double)c.channels);
    const int64_t each = c.channels / c.groups;
    const bool complement = 2 * density * (double)each > (double)(each + kWorthwhileRows);
    const double rows = (complement ? 1 - density : density) * (double)(layer.taps * each);
    const double words = (double)(layer.words * layer.blocks * c.groups);
    const bool nearest = layer.taps * c.channels * c.out_channels <= kNearest;
    double events = rows * (costs.row_ns * (double)layer.blocks + (nearest ? 1 : 1.5) * costs.word_ns * words);
    if (complement) events += 20 * (double)layer.taps;  // complements: sums over all inputs are added
    else if (rows > (double)c.safe) events *= layer.words == 4 ? 1.2 : 1.8;  // sums of 32 bits
    events += costs.neuron_ns;
    const int64_t inputs = layer.taps * c.channels, computed = (c.out_channels + 31) / 32 * 32;
    double dense = (double)neurons * (double)(inputs * computed) / costs.products_per_ns;
    if (layer.far) dense += (double)(inputs * computed) / kBytesPerNs;  // reads all weights, whatever fires
    return {(double)neurons * events, dense};
}

// So many threads that each has work for longer than it takes to wake it.
int64_t threads_for(int64_t most, double nanoseconds) {
    return std::max<int64_t>(1, std::min(most, 1 + (int64_t)(nanoseconds / kWorthwhileNs)));
}

void convolve_dense(const EventConv &c, int64_t threads) {
    const Tiles tiles = dense_tiles(c);
    const Kernels &used = kernels();
    const int64_t row_bytes = (c.width + 2 * c.pad_w) * c.channels + 64, rows = c.height + 2 * c.pad_h;
    const int64_t room = c.out_width * tiles.padded;
    thread_local std::vector<uint8_t> bytes;
    thread_local std::vector<int32_t> sums;
    bytes.assign((size_t)(c.images * rows * row_bytes + 64), 0);
    if ((int64_t)sums.size() < threads * room) sums.resize(threads * room);
    uint8_t *all = bytes.data();
    int32_t *all_sums = sums.data();
    pool().run(c.images * c.height, threads, [&, all](int64_t item, int64_t) {
        const int64_t image = item / c.height, y = item % c.height;
        used.expand_row(c, item, all + (image * rows + y + c.pad_h) * row_bytes);
    });
    pool().run(c.images * c.out_height, threads, [&, all, all_sums](int64_t item, int64_t thread) {
        const int64_t image = item / c.out_height, oy = item % c.out_height;
        const uint8_t *first = all + (image * rows + oy * c.stride_h) * row_bytes;
        used.dense_row(c, tiles, first, item, all_sums + thread * room);
    });
}

void convolve(EventConv &c) {
    Layer layer = layout_of(c);
    const Kernels &used = kernels();
    const Estimate cost = estimate(c, layer, used);
    c.wants_dense = can_be_dense(c) && cost.dense < cost.events;
    if (c.wants_dense && c.dense) {
        convolve_dense(c, threads_for(c.threads, cost.dense));
        return;
    }
    const int64_t threads = threads_for(c.threads, cost.events);
    const int64_t groups = layer.depthwise ? 1 : c.groups, each = c.channels / groups;
    const int64_t rows = c.images * c.out_height, in_rows = c.images * c.height;
    layer.weights = static_cast<const int8_t *>(c.packed);
    layer.totals = reinterpret_cast<const int32_t *>(layer.weights + weight_bytes(c, layer));
    thread_local std::vector<Pixel> pixels;
    thread_local std::vector<uint32_t> lists, flat;
    thread_local std::vector<int64_t> complements;
    thread_local std::vector<int32_t> wide;
    const int64_t longest = std::min(each, (each + kWorthwhileRows) / 2) + 1;  // list of a pixel
    layer.row_room = c.width * longest + kRoom;
    const int64_t per_group = in_rows * layer.row_room + kRoom, most = layer.taps * each + 2 * kRoom;
    const int64_t columns = c.width * c.kernel_h * longest + 2 * kRoom, per_thread = 2 * most + columns;
    const int64_t places = layer.taps + c.width + 1;
    const int64_t padded = words_of(c.out_channels) * 64;
    if (!layer.depthwise) {
        if ((int64_t)pixels.size() < groups * in_rows * c.width) pixels.resize(groups * in_rows * c.width);
        if ((int64_t)lists.size() < groups * per_group) lists.resize(groups * per_group);
        if ((int64_t)flat.size() < threads * per_thread) flat.resize(threads * per_thread);
        if ((int64_t)complements.size() < threads * places) complements.resize(threads * places);
        if ((int64_t)wide.size() < threads * padded) wide.resize(threads * padded);
        Pixel *all_pixels = pixels.data();
        uint32_t *all_lists = lists.data();
        pool().run(groups * in_rows, threads, [&, all_pixels, all_lists](int64_t item, int64_t) {
            const int64_t group = item / in_rows;
            Pixel *own = all_pixels + group * in_rows * c.width;
            used.list_row(c, layer, item % in_rows, group, own, all_lists + group * per_group);
            for (int64_t x = 0; x < c.width; ++x) own[item % in_rows * c.width + x].start += group * per_group;
        });
        layer.pixels = all_pixels;
        layer.lists = all_lists;
    }
    layer.parts = 1;
    if (groups == 1 && !layer.depthwise) {
        if (layer.far && layer.taps > 1) layer.parts = layer.blocks;  // one block's weights after the other's
        while (layer.parts < layer.blocks && rows * layer.parts < 2 * threads && threads > 1) ++layer.parts;
    }
    uint32_t *all_flat = flat.data();
    int64_t *all_complements = complements.data();
    int32_t *all_wide = wide.data();
    pool().run(rows * layer.parts, threads, [&, all_flat, all_complements, all_wide](int64_t item, int64_t thread) {
        Neuron neuron = {};
        if (!layer.depthwise) {
            neuron.flat = all_flat + thread * per_thread;
            neuron.silent = neuron.flat + most;
            neuron.columns = neuron.silent + most;
            neuron.complements = all_complements + thread * places;
            neuron.column = neuron.complements + layer.taps;
            neuron.wide = all_wide + thread * padded;
        }
        used.work(layer, item % rows, item / rows, neuron);
    });
}

Stem layout_of(const EventStem &c) {
    Stem stem = {};
    stem.conv = &c;
    stem.row_length = (c.width + 2 * c.pad_w) * c.channels + 2;  // the last pair may have one behind the row
    Tiles &t = stem.tiles;
    t.weights = static_cast<const uint8_t *>(c.packed);
    t.kernel_h = c.kernel_h;
    t.steps = (c.kernel_w * c.channels + 1) / 2;
    t.padded = words_of(c.out_channels) * 64;
    t.out_channels = c.out_channels;
    t.out_width = c.out_width;
    t.apart_x = 2 * c.stride_w * c.channels;
    t.apart_y = 2 * stem.row_length;
    return stem;
}

void run_stem(const EventStem &c) {
    const Stem stem = layout_of(c);
    const Kernels &used = kernels();
    const int64_t rows = c.height + 2 * c.pad_h, image_size = rows * stem.row_length, padded = stem.tiles.padded;
    const double products = (double)(c.images * c.out_height * c.out_width * c.kernel_h * stem.tiles.steps * padded);
    const int64_t threads = threads_for(c.threads, products / used.costs.products_per_ns);
    const int64_t room = c.pool_h * c.out_width * padded;
    thread_local std::vector<int16_t> quantised;
    thread_local std::vector<int32_t> rings;
    thread_local std::vector<float> results;
    quantised.assign((size_t)(c.images * image_size), 0);
    if ((int64_t)rings.size() < threads * room) rings.resize(threads * room);
    results.assign((size_t)(threads * padded), 0.0f);
    int16_t *all = quantised.data();
    int32_t *all_rings = rings.data();
    float *all_results = results.data();
    pool().run(c.images * c.height, threads, [&, all](int64_t item, int64_t) {
        const int64_t image = item / c.height, y = item % c.height;
        used.quantise_row(c, image, y, all + image * image_size + (y + c.pad_h) * stem.row_length);
    });
    const int64_t parts = threads == 1 ? 1 : std::min(c.pooled_height, 2 * threads);
    pool().run(c.images * parts, threads, [&, all, all_rings, all_results](int64_t item, int64_t thread) {
        const int64_t image = item / parts, part = item % parts;
        const int64_t first = c.pooled_height * part / parts, last = c.pooled_height * (part + 1) / parts;
        const uint8_t *bytes = reinterpret_cast<const uint8_t *>(all + image * image_size);
        used.stem_rows(stem, image, bytes, first, last, all_rings + thread * room, all_results + thread * padded);
    });
}

// Where a row or column of a resized image lies between two of the image's, as torch computes it.
struct Between {
    int64_t first, second;
    float weight;  // of the second
};

Between between(int64_t place, int64_t length, int64_t out_length) {
    const float scale = (float)length / (float)out_length;
    const float real = std::max(0.0f, __builtin_fmaf(scale, (float)place + 0.5f, -0.5f));
    const int64_t first = std::min((int64_t)real, length - 1);
    return {first, std::min(first + 1, length - 1), std::min(std::max(real - (float)first, 0.0f), 1.0f)};
}

void resize(const EventResize &c) {
    const int64_t room = (c.out_width + 15) / 16 * 16;
    std::vector<int32_t> left, right;
    std::vector<float> weight;
    for (int64_t x = 0; x < room; ++x) {
        const Between place = between(std::min(x, c.out_width - 1), c.width, c.out_width);
        left.push_back((int32_t)place.first);
        right.push_back((int32_t)place.second);
        weight.push_back(place.weight);
    }
    const Resize r = {c.width, c.out_width, left.data(), right.data(), weight.data()};
    const Kernels &used = kernels();
    const int64_t threads = threads_for(c.threads, 0.3 * (double)(c.channels * c.padded_height * c.padded_width));
    pool().run(c.channels * c.padded_height, threads, [&](int64_t item, int64_t) {
        const int64_t channel = item / c.padded_height, y = item % c.padded_height;
        const Between place = between(y, c.height, c.out_height);
        const float *plane = c.input + channel * c.height * c.width, mean = c.mean[channel];
        float *out = c.output + item * c.padded_width;
        const int64_t inside = y < c.out_height ? c.out_width : 0;
        if (inside)
            used.resize_row(r, plane + place.first * c.width, plane + place.second * c.width, place.weight, mean, out);
        std::fill(out + inside, out + c.padded_width, mean);
    });
}

// The pixel nearest to one of an enlarged row or column, as torch computes it.
int64_t nearest(int64_t place, int64_t length, int64_t out_length) {
    const float scale = (float)length / (float)out_length;
    return std::min((int64_t)std::floor((float)place * scale), length - 1);
}

void sum(const EventSum &c) {
    const Kernels &used = kernels();
    std::vector<int64_t> columns;
    for (int64_t x = 0; x < c.width; ++x) columns.push_back(nearest(x, c.other_width, c.width));
    const int64_t threads = threads_for(c.threads, 0.3 * (double)(c.images * c.height * c.width * c.channels));
    pool().run(c.images * c.height, threads, [&](int64_t row, int64_t) {
        const int64_t from = row / c.height * c.other_height + nearest(row % c.height, c.other_height, c.height);
        used.sum_row(c, row, c.other + from * c.other_width * c.channels, columns.data());
    });
}

// Returns how many boxes are left.
int64_t suppress(const EventBoxes &c) {
    constexpr int64_t kBehind = 16;
    const int64_t room = c.number + kBehind;
    std::vector<float> sides((size_t)(5 * room), 0.0f);
    std::vector<int32_t> labels((size_t)room, 0), marked((size_t)room, 0);
    float *side[5];
    for (int64_t k = 0; k < 5; ++k) side[k] = sides.data() + k * room;
    for (int64_t i = 0; i < c.number; ++i) {
        const float *box = c.boxes + 4 * c.order[i];
        for (int64_t k = 0; k < 4; ++k) side[k][i] = box[k];
        side[4][i] = (box[2] - box[0]) * (box[3] - box[1]);
        labels[(size_t)i] = c.labels ? (int32_t)c.labels[c.order[i]] : 0;
    }
    float limit = (float)c.threshold;  // the largest that is not above it: overlaps are float, too
    if ((double)limit > c.threshold) limit = std::nextafterf(limit, -2.0f);
    const Boxes boxes = {side[0], side[1], side[2], side[3], side[4], labels.data(), marked.data(), c.number, limit};
    const Kernels &used = kernels();
    int64_t left = 0;
    for (int64_t i = 0; i < c.number && left < c.most; ++i) {
        if (marked[(size_t)i]) continue;
        c.kept[left++] = c.order[i];
        used.mark_overlapping(boxes, i, i + 1);
    }
    return left;
}

// Calls pass(layer, from, to, sums) for pieces of a layer that stay in the nearest cache, and adds up their sums in order.
void run_hoyer(HoyerLayer &layer, void (*pass)(const HoyerLayer &, int64_t, int64_t, double *)) {
    constexpr int64_t kNeurons = 1 << 14;
    const int64_t pieces = (layer.number + kNeurons - 1) / kNeurons;
    std::vector<double> sums((size_t)pieces * 2);
    const auto work = [&](int64_t piece, int64_t) {
        const int64_t from = piece * kNeurons;
        pass(layer, from, std::min(from + kNeurons, layer.number), &sums[(size_t)piece * 2]);
    };
    const int64_t threads = std::min(layer.threads, pieces);
    if (layer.parallel && threads > 1) {
        struct Task {
            const decltype(work) *of;
            const int64_t pieces;
            std::atomic<int64_t> next;
        } task = {&work, pieces, {0}};
        const auto serve = [](void *argument) {
            Task &task = *static_cast<Task *>(argument);
            for (int64_t piece; (piece = task.next.fetch_add(1)) < task.pieces;) (*task.of)(piece, 0);
        };
        layer.parallel(serve, &task, (unsigned)threads, 0);
    } else {
        pool().run(pieces, threads, work);
    }
    layer.sums[0] = layer.sums[1] = 0;
    for (size_t piece = 0; piece < (size_t)pieces; ++piece)
        for (size_t k = 0; k < 2; ++k) layer.sums[k] += sums[piece * 2 + k];
}

template <typename Work> int guarded(const Work &work) {
    try {
        work();
    } catch (const std::exception &) {
        return 1;
    }
    return 0;
}

void highest(const EventHighest &c) {
    for (int64_t pixel = 0; pixel < c.pixels; ++pixel)
        for (int64_t word = 0; word < c.words; ++word) {
            uint64_t above = 0;
            for (int64_t set = c.sets - 1; set >= 0; --set) {
                const uint64_t spikes = c.spikes[set][pixel * c.words + word];
                c.out[(pixel * c.sets + set) * c.words + word] = spikes & ~above;
                above |= spikes;
            }
        }
}

// Weights [out_channels][channels][kernel_h][kernel_w] in the order of `Tiles`, as many to 32 bits as there is room for.
template <typename Conv, typename Weight>
void pack_tiles(const Conv &c, const Tiles &t, const Weight *weight, Weight *into) {
    constexpr int64_t each = 4 / sizeof(Weight);
    for (int64_t o = 0; o < c.out_channels; ++o)
        for (int64_t i = 0; i < c.channels; ++i)
            for (int64_t ky = 0; ky < c.kernel_h; ++ky)
                for (int64_t kx = 0; kx < c.kernel_w; ++kx) {
                    const int64_t place = kx * c.channels + i;
                    into[((ky * t.steps + place / each) * t.padded + o) * each + place % each] =
                        weight[((o * c.channels + i) * c.kernel_h + ky) * c.kernel_w + kx];
                }
}

}  // namespace

extern "C" {

int events_version(void) { return 4; }

int events_use(int level) {
    const Kernels *found = find_kernels(level);
    if (!found) return -1;
    chosen.store(found);
#ifdef EVENTS_X86
    if (found == &avx512vnni::kernels) return 3;
#endif
    return found->width == 64 ? 2 : found->width == 32 ? 1 : 0;
}

int64_t events_packed_bytes(const EventConv *c) {
    const Layer layer = layout_of(*c);
    const int64_t blocks = (layer.depthwise ? 1 : c->groups) * layer.blocks;
    return weight_bytes(*c, layer) + blocks * layer.taps * layer.words * 64 * (int64_t)sizeof(int32_t);
}

void events_pack(const EventConv *c, const int8_t *weight, void *packed) {
    const Layer layer = layout_of(*c);
    const Kernels &used = kernels();
    int8_t *rows = static_cast<int8_t *>(packed);
    const int64_t each = c->channels / c->groups, outs = c->out_channels / c->groups, block = layer.words * 64;
    if (layer.depthwise) {
        std::memset(packed, 0, (size_t)events_packed_bytes(c));
        for (int64_t o = 0; o < c->out_channels; ++o)
            for (int64_t tap = 0; tap < layer.taps; ++tap)
                rows[(o / 64 * layer.taps + tap) * 64 + o % 64] = weight[o * layer.taps + tap];
        return;
    }
    int32_t *totals = reinterpret_cast<int32_t *>(rows + weight_bytes(*c, layer));
    for (int64_t group = 0; group < c->groups; ++group)
        for (int64_t b = 0; b < layer.blocks; ++b)
            for (int64_t tap = 0; tap < layer.taps; ++tap) {
                const int64_t turned = tap % c->kernel_w * c->kernel_h + tap / c->kernel_w;
                int8_t *into = rows + ((group * layer.blocks + b) * layer.taps + turned) * layer.tap_bytes;
                int32_t *total = totals + ((group * layer.blocks + b) * layer.taps + turned) * block;
                for (int64_t o = 0; o < block; ++o) {
                    const int64_t channel = b * block + o, place = used.place_of(o);
                    total[o] = 0;
                    for (int64_t i = 0; i < each; ++i) {
                        const int8_t w =
                            channel < outs ? weight[((group * outs + channel) * each + i) * layer.taps + tap] : 0;
                        total[o] += w;
                        into[i * block + place] = used.stored(o, w);
                    }
                }
            }
}

int64_t events_packed_dense_bytes(const EventConv *c) {
    if (!can_be_dense(*c)) return 0;
    const Tiles t = dense_tiles(*c);
    return t.kernel_h * t.steps * t.padded * 4;
}

void events_pack_dense(const EventConv *c, const int8_t *weight, void *packed) {
    std::memset(packed, 0, (size_t)events_packed_dense_bytes(c));
    pack_tiles(*c, dense_tiles(*c), weight, static_cast<int8_t *>(packed));
}

int events_conv(EventConv *layer) {
    return guarded([&] { convolve(*layer); });
}

int64_t events_packed_stem_bytes(const EventStem *c) {
    const Stem stem = layout_of(*c);
    return c->kernel_h * stem.tiles.steps * stem.tiles.padded * 4;
}

void events_pack_stem(const EventStem *c, const int16_t *weight, void *packed) {
    std::memset(packed, 0, (size_t)events_packed_stem_bytes(c));
    pack_tiles(*c, layout_of(*c).tiles, weight, static_cast<int16_t *>(packed));
}

int events_stem(const EventStem *stem) {
    return guarded([&] { run_stem(*stem); });
}

int events_resize(const EventResize *image) {
    return guarded([&] { resize(*image); });
}

int64_t events_suppress(const EventBoxes *boxes) {
    int64_t left = 0;
    return guarded([&] { left = suppress(*boxes); }) ? -1 : left;
}

void events_threshold(const float *x, int64_t pixels, int64_t channels, const float *level, const float *sign,
                      uint64_t *spikes, int64_t threads) {
    threads = threads_for(threads, 0.3 * (double)(pixels * channels));
    const int64_t parts = threads == 1 ? 1 : 4 * threads;
    const Kernels &used = kernels();
    pool().run(parts, threads, [&](int64_t part, int64_t) {
        used.threshold(x, pixels * part / parts, pixels * (part + 1) / parts, channels, level, sign, spikes);
    });
}

void events_pool(const uint64_t *x, int64_t images, int64_t height, int64_t width, int64_t words, int64_t out_height,
                 int64_t out_width, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                 int64_t pad_h, int64_t pad_w, const uint64_t *inverted, uint64_t *out) {
    for (int64_t pixel = 0; pixel < images * out_height * out_width; ++pixel) {
        const int64_t image = pixel / (out_height * out_width);
        const int64_t oy = pixel / out_width % out_height, ox = pixel % out_width;
        const int64_t top = oy * stride_h - pad_h, left = ox * stride_w - pad_w;
        for (int64_t w = 0; w < words; ++w) {
            uint64_t bits = 0;
            for (int64_t y = top < 0 ? 0 : top; y < top + kernel_h && y < height; ++y)
                for (int64_t col = left < 0 ? 0 : left; col < left + kernel_w && col < width; ++col)
                    bits |= x[((image * height + y) * width + col) * words + w];
            out[pixel * words + w] = inverted ? bits ^ inverted[w] : bits;
        }
    }
}

int events_hoyer(HoyerLayer *layer, int pass) {
    return guarded([&] { run_hoyer(*layer, kernels().hoyer[layer->brief ? 1 : 0][pass]); });
}

int events_sum(const EventSum *maps) {
    return guarded([&] { sum(*maps); });
}

int events_run(const EventStep *steps, int64_t number, int64_t *wanting) {
    *wanting = 0;
    for (const EventStep *step = steps; step < steps + number; ++step) {
        int failed = 0;
        if (step->kind == 0) {
            EventConv *c = static_cast<EventConv *>(step->call);
            failed = events_conv(c);
            *wanting += c->wants_dense && !c->dense;
        } else if (step->kind == 1) {
            failed = events_stem(static_cast<const EventStem *>(step->call));
        } else if (step->kind == 2) {
            const EventThreshold &c = *static_cast<const EventThreshold *>(step->call);
            events_threshold(c.x, c.pixels, c.channels, c.level, c.sign, c.spikes, c.threads);
        } else if (step->kind == 4) {
            failed = events_sum(static_cast<const EventSum *>(step->call));
        } else if (step->kind == 5) {
            highest(*static_cast<const EventHighest *>(step->call));
        } else {
            const EventPool &c = *static_cast<const EventPool *>(step->call);
            events_pool(c.x, c.images, c.height, c.width, c.words, c.out_height, c.out_width, c.kernel_h, c.kernel_w,
                        c.stride_h, c.stride_w, c.pad_h, c.pad_w, c.inverted, c.out);
        }
        if (failed) return failed;
    }
    return 0;
}

}  // extern "C"
