// Random layers, comparisons and pools by the event-driven kernels and by plain loops, for a sanitizer to watch.
//
// fuzz SECONDS SEED, seconds of the processor's: every instruction set that it has, 1 to 3 threads in each of two
// callers. Buffers end where the interface says that they end. Exit status 1 and the case, if one differs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"

namespace {

typedef std::vector<uint64_t> Words;

struct Random {
    std::mt19937_64 engine;
    int64_t upto(int64_t least, int64_t most) {
        return least + (int64_t)(engine() % (uint64_t)(most - least + 1));
    }
    float real() { return (float)upto(-1000, 1000) / 256; }
    bool one_of(int number) { return upto(1, number) == 1; }
};

int64_t words_of(int64_t channels) { return (channels + 63) / 64; }

bool bit(const Words &map, int64_t pixel, int64_t channels, int64_t c) {
    return map[pixel * words_of(channels) + c / 64] >> (c % 64) & 1;
}

Words random_map(Random &random, int64_t pixels, int64_t channels) {
    const int64_t densities[] = {0, 3, 15, 50, 51, 85, 100}, density = densities[random.upto(0, 6)];
    Words map(pixels * words_of(channels));
    for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < channels; ++c)
            if (random.upto(0, 99) < density) map[p * words_of(channels) + c / 64] |= 1ull << (c % 64);
    return map;
}

void fail(const char *what, const EventConv &c, int64_t place) {
    std::fprintf(stderr, "%s differ at %lld: images %lld of %lldx%lldx%lld, to %lld channels, kernel %lldx%lld, groups "
                 "%lld, threads %lld\n", what, (long long)place, (long long)c.images, (long long)c.channels,
                 (long long)c.height, (long long)c.width, (long long)c.out_channels, (long long)c.kernel_h,
                 (long long)c.kernel_w, (long long)c.groups, (long long)c.threads);
    std::exit(1);
}

void choose_channels(Random &random, EventConv &c) {
    const int64_t kind = random.upto(0, 4);
    c.groups = 1;
    c.channels = random.upto(1, 150), c.out_channels = random.upto(1, 300);
    if (kind == 0) {  // grouped
        c.groups = random.upto(2, 4);
        c.channels = c.groups * random.upto(1, 40), c.out_channels = c.groups * random.upto(1, 70);
    } else if (kind == 1) {  // depthwise
        c.groups = c.channels, c.out_channels = c.channels * random.upto(1, 2);
    } else if (kind == 2) {  // so many that 16 bits do not hold the sums
        c.channels = random.upto(250, 1500), c.out_channels = random.upto(1, 40);
    }
}

void choose_geometry(Random &random, EventConv &c) {
    c = {};
    choose_channels(random, c);
    int64_t *in[] = {&c.height, &c.width}, *out[] = {&c.out_height, &c.out_width};
    int64_t *kernel[] = {&c.kernel_h, &c.kernel_w}, *stride[] = {&c.stride_h, &c.stride_w};
    int64_t *pad[] = {&c.pad_h, &c.pad_w}, *dilation[] = {&c.dilation_h, &c.dilation_w};
    for (int i = 0; i < 2; ++i) {
        *kernel[i] = c.channels > 200 || random.one_of(2) ? random.upto(0, 1) * 2 + 1 : random.upto(1, 7);
        *stride[i] = random.upto(1, 2), *dilation[i] = random.upto(1, 2), *pad[i] = random.upto(0, *kernel[i] / 2 + 2);
        const int64_t reach = *dilation[i] * (*kernel[i] - 1) + 1 - 2 * *pad[i];
        *in[i] = std::max(random.upto(1, 5), reach);
        *out[i] = (*in[i] - reach) / *stride[i] + 1;
    }
    c.images = random.upto(1, 2);
    c.threads = random.upto(1, 3);
}

std::vector<int8_t> choose_weights(Random &random, EventConv &c) {
    const int64_t each = c.channels / c.groups * c.kernel_h * c.kernel_w, kind = random.upto(0, 3);
    std::vector<int8_t> weight(c.out_channels * each);
    for (size_t i = 0; i < weight.size(); ++i)
        weight[i] = (int8_t)(kind == 0 ? 127 : kind == 1 ? -127 : kind == 2 ? 127 - 254 * (int)(i % 2)
                                                                            : random.upto(-127, 127));
    c.safe = each;
    for (int64_t o = 0; o < c.out_channels; ++o) {
        std::vector<int> sizes;
        for (int64_t i = 0; i < each; ++i) sizes.push_back(std::abs(weight[o * each + i]));
        std::sort(sizes.rbegin(), sizes.rend());
        int64_t number = 0;
        for (int total = 0; number < each && (total += sizes[number]) <= 32766;) ++number;
        c.safe = std::max<int64_t>(1, std::min(c.safe, number));
    }
    return weight;
}

std::vector<int64_t> sums_of(const EventConv &c, const Words &map, const std::vector<int8_t> &weight) {
    std::vector<int64_t> sums(c.images * c.out_height * c.out_width * c.out_channels);
    const int64_t each = c.channels / c.groups, outs = c.out_channels / c.groups;
    for (int64_t place = 0; place < (int64_t)sums.size(); ++place) {
        const int64_t o = place % c.out_channels, pixel = place / c.out_channels;
        const int64_t ox = pixel % c.out_width, oy = pixel / c.out_width % c.out_height;
        const int64_t image = pixel / c.out_width / c.out_height;
        for (int64_t ky = 0; ky < c.kernel_h; ++ky)
            for (int64_t kx = 0; kx < c.kernel_w; ++kx) {
                const int64_t y = oy * c.stride_h - c.pad_h + ky * c.dilation_h;
                const int64_t x = ox * c.stride_w - c.pad_w + kx * c.dilation_w;
                if (y < 0 || y >= c.height || x < 0 || x >= c.width) continue;
                for (int64_t i = 0; i < each; ++i)
                    if (bit(map, (image * c.height + y) * c.width + x, c.channels, o / outs * each + i))
                        sums[place] += weight[((o * each + i) * c.kernel_h + ky) * c.kernel_w + kx];
            }
    }
    return sums;
}

// Compares bits with expected(place) for each of pixels * channels places, and those beyond the channels with 0.
template <typename Expected>
void compare(const char *what, const EventConv &c, const Words &found, int64_t channels, const Expected &expected) {
    const int64_t padded = words_of(channels) * 64;
    for (int64_t p = 0; p < (int64_t)found.size() * 64 / padded; ++p)
        for (int64_t o = 0; o < padded; ++o)
            if (bit(found, p, channels, o) != (o < channels && expected(p * channels + o)))
                fail(what, c, p * channels + o);
}

void check_layer(Random &random) {
    EventConv c;
    choose_geometry(random, c);
    const std::vector<int8_t> weight = choose_weights(random, c);
    const Words map = random_map(random, c.images * c.height * c.width, c.channels);
    const std::vector<int64_t> sums = sums_of(c, map, weight);
    const int64_t words = words_of(c.out_channels), padded = words * 64, pixels = sums.size() / c.out_channels;
    std::vector<int8_t> packed(events_packed_bytes(&c));
    events_pack(&c, weight.data(), packed.data());
    std::vector<int8_t> dense(events_packed_dense_bytes(&c));  // taken where a dense layer would be faster
    if (!dense.empty()) events_pack_dense(&c, weight.data(), dense.data()), c.dense = dense.data();
    c.packed = packed.data(), c.input = map.data(), c.beside = 1;
    const bool real = random.one_of(2);
    std::vector<float> scale(padded), bias(padded), residual(sums.size()), y(sums.size()), given(sums.size());
    for (int64_t o = 0; o < c.out_channels; ++o) scale[o] = random.real() / 16, bias[o] = random.real();
    const bool with_residual = random.one_of(2), keeps = random.one_of(2);
    for (size_t i = 0; real && i < y.size(); ++i) {
        residual[i] = random.real();
        const float product = (float)sums[i] * scale[i % c.out_channels];
        y[i] = product + bias[i % c.out_channels];
        if (with_residual) y[i] = residual[i] + y[i];
    }
    if (real) {
        c.scale = scale.data(), c.bias = bias.data();
        c.residual = with_residual ? residual.data() : nullptr, c.real = keeps ? given.data() : nullptr;
    }
    c.num_spikes = random.upto(real && keeps ? 0 : 1, 3);
    std::vector<std::vector<int32_t>> thresholds(c.num_spikes, std::vector<int32_t>(padded, INT32_MAX));
    std::vector<std::vector<float>> levels(c.num_spikes, std::vector<float>(padded, INFINITY));
    std::vector<std::vector<float>> signs(c.num_spikes, std::vector<float>(padded, 1.0f));
    std::vector<Words> inverted(c.num_spikes, Words(words)), spikes(c.num_spikes, Words(pixels * words, ~0ull));
    const int32_t extremes[] = {INT32_MIN, -32769, -32768, -32767, 32766, 32767, 32768, INT32_MAX};
    for (int64_t k = 0; k < c.num_spikes; ++k) {
        const bool turned = random.one_of(2);
        for (int64_t o = 0; o < c.out_channels; ++o) {
            const int64_t place = random.upto(0, pixels - 1) * c.out_channels + o;
            const bool turn = turned && random.one_of(2), extreme = random.one_of(4);
            thresholds[k][o] = extreme ? extremes[random.upto(0, 7)] : (int32_t)(sums[place] + random.upto(0, 1));
            signs[k][o] = turn ? -1.0f : 1.0f;
            levels[k][o] = extreme ? (turn ? -INFINITY : INFINITY) : signs[k][o] * y[place];
            inverted[k][o / 64] |= (uint64_t)turn << (o % 64);
        }
        c.spikes[k] = spikes[k].data(), c.threshold[k] = thresholds[k].data(), c.level[k] = levels[k].data();
        if (turned) c.inverted[k] = inverted[k].data(), c.sign[k] = signs[k].data();
    }
    if (events_conv(&c)) fail("memory", c, 0);
    if (real && keeps && std::memcmp(given.data(), y.data(), y.size() * sizeof(float))) fail("real values", c, 0);
    for (int64_t k = 0; k < c.num_spikes; ++k)
        compare("spikes", c, spikes[k], c.out_channels, [&](int64_t place) {
            const int64_t o = place % c.out_channels;
            if (real) return signs[k][o] * y[place] >= levels[k][o];
            return (sums[place] >= thresholds[k][o]) != (bool)(inverted[k][o / 64] >> (o % 64) & 1);
        });
}

void check_threshold(Random &random) {
    EventConv c = {};
    c.channels = random.upto(1, 200), c.images = random.upto(1, 150), c.threads = random.upto(1, 3);
    const int64_t padded = words_of(c.channels) * 64;
    std::vector<float> x(c.images * c.channels), level(padded, INFINITY), sign(padded, 1.0f);
    for (float &value : x) value = random.real();
    for (int64_t i = 0; i < c.channels; ++i) level[i] = random.real(), sign[i] = random.one_of(3) ? -1.0f : 1.0f;
    const bool signed_ = random.one_of(2);
    Words spikes(c.images * padded / 64, ~0ull);
    events_threshold(x.data(), c.images, c.channels, level.data(), signed_ ? sign.data() : nullptr, spikes.data(),
                     c.threads);
    compare("comparisons", c, spikes, c.channels, [&](int64_t place) {
        const int64_t i = place % c.channels;
        return (signed_ ? sign[i] : 1.0f) * x[place] >= level[i];
    });
}

void check_stem(Random &random) {
    EventStem c = {};
    c.images = random.upto(1, 2), c.channels = random.upto(1, 4), c.out_channels = random.upto(1, 100);
    c.threads = random.upto(1, 3), c.step = 0.01f, c.limit = 32767;
    int64_t *in[] = {&c.height, &c.width}, *out[] = {&c.out_height, &c.out_width};
    int64_t *kernel[] = {&c.kernel_h, &c.kernel_w}, *stride[] = {&c.stride_h, &c.stride_w};
    int64_t *pad[] = {&c.pad_h, &c.pad_w}, *pooled[] = {&c.pooled_height, &c.pooled_width};
    int64_t *pool[] = {&c.pool_h, &c.pool_w}, *step[] = {&c.pool_stride_h, &c.pool_stride_w};
    int64_t *edge[] = {&c.pool_pad_h, &c.pool_pad_w};
    for (int i = 0; i < 2; ++i) {
        *kernel[i] = random.upto(1, 7), *stride[i] = random.upto(1, 3), *pad[i] = random.upto(0, *kernel[i]);
        *in[i] = *kernel[i] + random.upto(0, 9);
        *out[i] = (*in[i] + 2 * *pad[i] - *kernel[i]) / *stride[i] + 1;
        *pool[i] = std::min(random.upto(1, 3), *out[i]), *step[i] = random.upto(1, 3), *edge[i] = *pool[i] / 2;
        *pooled[i] = (*out[i] + 2 * *edge[i] - *pool[i]) / *step[i] + 1;
    }
    const int64_t each = c.channels * c.kernel_h * c.kernel_w, padded = words_of(c.out_channels) * 64;
    const int64_t most = std::min<int64_t>(32766, INT32_MAX / (32767 * each)), kind = random.upto(0, 1);
    const bool turned = random.one_of(2), more = random.one_of(2), normal = random.one_of(2);
    std::vector<int16_t> weight(c.out_channels * each);
    for (int16_t &value : weight) value = (int16_t)(kind ? most : random.upto(-most, most));
    std::vector<float> x(c.images * c.channels * c.height * c.width), mean(c.channels), std_(c.channels, 1.0f);
    for (float &value : x) value = random.one_of(20) ? INFINITY : random.real() * (float)(kind ? 1000 : 1);
    for (int64_t i = 0; normal && i < c.channels; ++i) mean[i] = random.real(), std_[i] = 0.3f + (float)i;
    std::vector<float> level(padded, INFINITY), sign(padded, 1.0f), scale(padded), bias(padded), factor(padded), shift(padded);
    for (int64_t o = 0; o < c.out_channels; ++o) {
        scale[o] = std::fabs(random.real()) / 4096, bias[o] = level[o] = random.real(), sign[o] = random.one_of(2) ? -1.0f : 1.0f;
        factor[o] = random.real(), shift[o] = random.real();
    }
    const int64_t pixels = c.images * c.pooled_height * c.pooled_width;
    auto value_of = [&](int64_t image, int64_t oy, int64_t ox, int64_t o) {
        int64_t sum = 0;
        for (int64_t i = 0; i < each; ++i) {
            const int64_t channel = i / (c.kernel_h * c.kernel_w), col = ox * c.stride_w - c.pad_w + i % c.kernel_w;
            const int64_t row = oy * c.stride_h - c.pad_h + i / c.kernel_w % c.kernel_h;
            if (row < 0 || row >= c.height || col < 0 || col >= c.width) continue;
            float v = x[((image * c.channels + channel) * c.height + row) * c.width + col];
            if (normal) v = (v - mean[channel]) / std_[channel];
            sum += weight[o * each + i] * (int64_t)std::rint(std::max(-c.limit, std::min(c.limit, v / c.step)));
        }
        const float product = (float)sum * scale[o];
        return product + bias[o];
    };
    std::vector<float> y(pixels * c.out_channels, -INFINITY), real(y.size());
    for (int64_t place = 0; place < (int64_t)y.size(); ++place) {
        const int64_t o = place % c.out_channels, pixel = place / c.out_channels;
        const int64_t px = pixel % c.pooled_width, py = pixel / c.pooled_width % c.pooled_height;
        for (int64_t window = 0; window < c.pool_h * c.pool_w; ++window) {
            const int64_t oy = py * c.pool_stride_h - c.pool_pad_h + window / c.pool_w;
            const int64_t ox = px * c.pool_stride_w - c.pool_pad_w + window % c.pool_w;
            if (oy >= 0 && oy < c.out_height && ox >= 0 && ox < c.out_width)
                y[place] = std::max(y[place], value_of(pixel / c.pooled_width / c.pooled_height, oy, ox, o));
        }
    }
    std::vector<int8_t> packed(events_packed_stem_bytes(&c));
    events_pack_stem(&c, weight.data(), packed.data());
    Words spikes(pixels * padded / 64, ~0ull);
    c.packed = packed.data(), c.input = x.data(), c.scale = scale.data(), c.bias = bias.data();
    c.real = random.one_of(4) ? nullptr : real.data();
    c.num_spikes = 1, c.level[0] = level.data(), c.spikes[0] = spikes.data();
    if (normal) c.mean = mean.data(), c.std = std_.data();
    if (turned) c.sign[0] = sign.data();
    if (more) c.more_scale = factor.data(), c.more_bias = shift.data();
    EventConv geometry = {};  // for the message
    geometry.images = c.images, geometry.height = c.height, geometry.width = c.width, geometry.channels = c.channels;
    geometry.out_channels = c.out_channels, geometry.kernel_h = c.kernel_h, geometry.kernel_w = c.kernel_w;
    geometry.threads = c.threads;
    if (events_stem(&c)) fail("memory", geometry, 0);
    compare("spikes of a stem", geometry, spikes, c.out_channels, [&](int64_t place) {
        return (turned ? sign[place % c.out_channels] : 1.0f) * y[place] >= level[place % c.out_channels];
    });
    for (int64_t place = 0; c.real && place < (int64_t)y.size(); ++place) {
        const float product = y[place] * factor[place % c.out_channels];
        if (real[place] != (more ? product + shift[place % c.out_channels] : y[place]))
            fail("real values of a stem", geometry, place);
    }
}

void check_pool(Random &random) {
    EventConv c;
    choose_geometry(random, c);
    const int64_t words = words_of(c.channels), out_height = random.upto(1, c.out_height + 1);
    const int64_t out_width = random.upto(1, c.out_width + 1), pixels = c.images * out_height * out_width;
    const Words map = random_map(random, c.images * c.height * c.width, c.channels);
    const Words mask = random_map(random, 1, c.channels);
    const bool masked = random.one_of(2);
    Words out(pixels * words, ~0ull);
    events_pool(map.data(), c.images, c.height, c.width, words, out_height, out_width, c.kernel_h, c.kernel_w,
                c.stride_h, c.stride_w, c.pad_h, c.pad_w, masked ? mask.data() : nullptr, out.data());
    compare("pools", c, out, c.channels, [&](int64_t place) {
        const int64_t channel = place % c.channels, pixel = place / c.channels, ox = pixel % out_width;
        const int64_t oy = pixel / out_width % out_height, image = pixel / out_width / out_height;
        bool found = false;
        for (int64_t y = oy * c.stride_h - c.pad_h; y < oy * c.stride_h - c.pad_h + c.kernel_h; ++y)
            for (int64_t x = ox * c.stride_w - c.pad_w; x < ox * c.stride_w - c.pad_w + c.kernel_w; ++x)
                if (y >= 0 && y < c.height && x >= 0 && x < c.width)
                    found |= bit(map, (image * c.height + y) * c.width + x, c.channels, channel);
        return found != (masked && bit(mask, 0, c.channels, channel));
    });
}

// An image of one value stays so; the best box stays, and so do those that others do not touch.
void check_vision(Random &random) {
    EventResize c = {};
    c.channels = 2, c.height = random.upto(1, 40), c.width = random.upto(1, 90), c.threads = random.upto(1, 3);
    c.out_height = random.upto(1, 40), c.out_width = random.upto(1, 90);
    c.padded_height = c.out_height + random.upto(0, 3), c.padded_width = c.out_width + random.upto(0, 3);
    const std::vector<float> image(2 * c.height * c.width, 3), mean(2, 1);
    std::vector<float> out(2 * c.padded_height * c.padded_width);
    c.input = image.data(), c.mean = mean.data(), c.output = out.data();
    if (events_resize(&c)) fail("memory", {}, 0);
    for (int64_t i = 0; i < (int64_t)out.size(); ++i) {
        const bool inside = i % c.padded_width < c.out_width && i / c.padded_width % c.padded_height < c.out_height;
        if (std::fabs(out[i] - (inside ? 3 : 1)) > 1e-5f) fail("resizes", {}, i);
    }
    EventBoxes b = {};
    b.number = random.upto(0, 70), b.most = random.upto(0, 70), b.threshold = 0.5;
    std::vector<float> boxes(4 * b.number);
    std::vector<int64_t> order(b.number), labels(b.number), kept(std::min(b.most, b.number));
    for (int64_t i = 0; i < b.number; ++i) {  // neighbours by two have the same box
        for (int side = 0; side < 4; ++side) boxes[4 * i + side] = (float)(i / 2 * 10 + side / 2 * 5);
        order[i] = b.number - 1 - i, labels[i] = random.one_of(2);
    }
    b.boxes = boxes.data(), b.order = order.data(), b.labels = labels.data(), b.kept = kept.data();
    std::vector<int64_t> expected;
    for (int64_t i = b.number - 1; i >= 0 && (int64_t)expected.size() < b.most; --i)
        if (i % 2 || i == b.number - 1 || labels[i] != labels[i + 1]) expected.push_back(i);
    const int64_t left = events_suppress(&b);
    if (std::vector<int64_t>(kept.begin(), kept.begin() + left) != expected) fail("boxes", {}, left);
}

// A map and a smaller one, added up in place, and the spikes of the sum: its odd channels.
void check_sum(Random &random) {
    EventSum c = {};
    c.images = random.upto(1, 2), c.height = random.upto(1, 9), c.width = random.upto(1, 9), c.threads = random.upto(1, 3);
    c.channels = random.upto(1, 140), c.other_height = random.upto(1, c.height), c.other_width = random.upto(1, c.width);
    const int64_t pixels = c.images * c.height * c.width, words = words_of(c.channels);
    std::vector<float> map(pixels * c.channels), level(words * 64, INFINITY);
    std::vector<float> other(c.images * c.other_height * c.other_width * c.channels, 2);
    for (size_t i = 0; i < map.size(); ++i) map[i] = (float)(i % c.channels % 2);
    std::fill(level.begin(), level.begin() + c.channels, 3.0f);
    Words spikes(pixels * words, ~0ull);
    c.input = c.sum = map.data(), c.other = other.data();
    c.num_spikes = 1, c.level[0] = level.data(), c.spikes[0] = spikes.data();
    if (events_sum(&c)) fail("memory", {}, 0);
    for (int64_t i = 0; i < (int64_t)map.size(); ++i)
        if (map[i] != 2 + i % c.channels % 2 ||
            bit(spikes, i / c.channels, c.channels, i % c.channels) != (bool)(i % c.channels % 2))
            fail("sums", {}, i);
}

// So large a layer that threads do overlap, on one core too: as one thread computes it.
void check_threads(Random &random) {
    EventConv c = {};
    c.beside = c.images = 1, c.height = c.width = c.out_height = c.out_width = 12, c.channels = 128, c.out_channels = 1024;
    c.kernel_h = c.kernel_w = 3, c.stride_h = c.stride_w = c.pad_h = c.pad_w = c.dilation_h = c.dilation_w = 1;
    c.groups = 1, c.safe = 258;
    std::vector<int8_t> weight(c.out_channels * c.channels * 9);
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = (int8_t)(i * i % 255 - 127);
    const Words map = random_map(random, 144, c.channels);
    std::vector<int8_t> packed(events_packed_bytes(&c));
    events_pack(&c, weight.data(), packed.data());
    const std::vector<int32_t> threshold(c.out_channels, 100);
    Words spikes[2] = {Words(144 * 16), Words(144 * 16)};
    c.packed = packed.data(), c.input = map.data(), c.num_spikes = 1, c.threshold[0] = threshold.data();
    for (int i = 0; i < 2; ++i) {
        c.threads = 1 + i * random.upto(1, 2), c.spikes[0] = spikes[i].data();
        const EventStep step = {0, &c};
        int64_t wanting;
        if (i ? events_run(&step, 1, &wanting) : events_conv(&c)) fail("memory", c, 0);
    }
    if (spikes[0] != spikes[1]) fail("threads", c, 0);
}

// A bfloat16 rounded as a processor rounds.
uint16_t brief(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float real_of(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

float stored(float x, const float *) { return x; }
uint16_t stored(float x, const uint16_t *) { return brief(x); }
float value_of(float x) { return x; }
float value_of(uint16_t x) { return real_of(x); }

// A Hoyer layer's passes in training over numbers of a type, with threads of the library's own and with those of a caller.
template <typename T> void check_training(Random &random) {
    const int64_t number = random.one_of(4) ? random.upto(16000, 50000) : random.upto(0, 200);
    std::vector<T> u(number), ds(number), spikes(number), du(number), wanted_spikes(number), wanted_du(number);
    const auto as = [](float x) { return stored(x, static_cast<const T *>(nullptr)); };
    for (int64_t i = 0; i < number; ++i) u[i] = as(random.real()), ds[i] = as(random.real());
    HoyerLayer layer = {};
    layer.number = number, layer.threads = random.upto(1, 3), layer.brief = sizeof(T) == 2;
    if (random.one_of(2))
        layer.parallel = [](void (*work)(void *), void *argument, unsigned threads, unsigned) {
            std::vector<std::thread> others;
            for (unsigned i = 1; i < threads; ++i) others.emplace_back(work, argument);
            work(argument);
            for (std::thread &other : others) other.join();
        };
    const float v = (float)random.upto(1, 40) / 16, threshold = (float)random.upto(1, 16) / 16;
    const float low = 0, high = 2, q = (float)random.upto(1, 40) / 16, pull = (float)random.upto(-8, 8) / 16;
    layer.potential = u.data(), layer.v = v, layer.threshold = threshold;
    layer.low = low, layer.high = high, layer.q = q, layer.pull = pull;
    double sums[3] = {};
    for (int64_t i = 0; i < number; ++i) {
        const float z = value_of(as(value_of(u[i]) / v)), c = std::fmin(std::fmax(z, 0.0f), 1.0f);
        float dz = z > 0 && z < 1 ? (z * -q + 1.0f) * pull : 0.0f;
        dz += value_of(ds[i]) * 0.5f;
        if (!(z > low && z < high)) dz = 0;
        wanted_spikes[i] = as(z >= threshold ? 1.0f : 0.0f), wanted_du[i] = as(dz / v);
        sums[0] += c, sums[1] += c * c, sums[2] -= z * dz / v;
    }
    const auto near = [&](double found, double wanted) { return std::fabs(found - wanted) <= 1e-3 * (double)(number + 1); };
    if (events_hoyer(&layer, 0) || !near(layer.sums[0], sums[0]) || !near(layer.sums[1], sums[1])) fail("moments", {}, 0);
    layer.output = spikes.data();
    if (events_hoyer(&layer, 1) || spikes != wanted_spikes) fail("spikes of a layer in training", {}, 0);
    layer.output = du.data(), layer.arriving = ds.data();
    if (events_hoyer(&layer, 2) || !near(layer.sums[0], sums[2])) fail("gradients", {}, 0);
    for (int64_t i = 0; i < number; ++i)
        if (value_of(du[i]) != value_of(wanted_du[i])) fail("du", {}, 0);  // 0 and -0 are equal
}

}  // namespace

int main(int, char **argv) {
    const double end = std::atof(argv[1]) * CLOCKS_PER_SEC;
    Random random{std::mt19937_64(std::atoi(argv[2]))};
    int64_t rounds = 0, layers = 0, levels = 0;
    do {
        const int level = (int)(rounds % 4);
        if (events_use(level) != level) continue;
        levels |= 1 << level, layers += 6;
        std::vector<std::thread> callers;
        for (int number = 0; number < 2; ++number)
            callers.emplace_back([seed = random.engine()] {
                Random own{std::mt19937_64(seed)};
                for (int i = 0; i < 3; ++i) {
                    check_layer(own), check_threshold(own), check_pool(own), check_stem(own);
                    check_vision(own), check_sum(own), check_training<float>(own), check_training<uint16_t>(own);
                }
                check_threads(own);  // last: it leaves large buffers to this caller, whose ends nobody would miss
            });
        for (std::thread &caller : callers) caller.join();
    } while (++rounds < 4 || (double)std::clock() < end);
    std::printf("%lld layers, instruction sets %lld\n", (long long)layers, (long long)levels);
}
