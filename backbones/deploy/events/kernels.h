// Event-driven layers on an ordinary CPU: the C interface of the library, see kernels.cpp.
//
// Spikes are bits: a map of N images is uint64_t [N][height][width][words], words = ceil(channels / 64), bit c % 64 of
// word c / 64 being channel c; bits beyond the channels are 0. Real maps are float [N][height][width][channels].
#pragma once
#include <cstdint>

#define EVENTS_MAX_OUTPUTS 8

extern "C" {

// A convolution over bits, or a linear layer as one of 1x1 over a map of 1x1, and what is made of its sums.
struct EventConv {
    int64_t images, height, width, channels;      // of the input
    int64_t out_height, out_width, out_channels;  // of the output
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
    int64_t safe;         // so many weights of a neuron never add up to more than 32766 or less than -32766
    int64_t threads;
    int64_t beside;       // neurons beside each other in a row that are computed as one of so many times the channels, 64
                          // in all; spikes are written for each of them. 1: none
    const void *packed;   // by events_pack
    const void *dense;    // by events_pack_dense, or null: as a dense layer, where that is estimated to be faster
    int64_t wants_dense;  // set where it would be faster, and `dense` is null
    const uint64_t *input;
    // The sums as spikes: sum >= threshold, turned round where the bit of `inverted` is set.
    int64_t num_spikes;
    const int32_t *threshold[EVENTS_MAX_OUTPUTS];   // [padded channels], of padding INT32_MAX
    const uint64_t *inverted[EVENTS_MAX_OUTPUTS];   // [words], or null
    uint64_t *spikes[EVENTS_MAX_OUTPUTS];
    // The sums as real values y = scale * sum + bias (+ residual), where scale is not null; then spikes are those of
    // sign * y >= level.
    const float *scale, *bias;                      // [padded channels]
    const float *residual;                          // as `real`, or null
    float *real;                                    // or null
    const float *level[EVENTS_MAX_OUTPUTS];         // [padded channels], of padding infinity
    const float *sign[EVENTS_MAX_OUTPUTS];          // [padded channels], or null
};

// A convolution over real values in fixed point, perhaps a max-pool of it, and what is made of the results y.
struct EventStem {
    int64_t images, height, width, channels;      // of the input, float [N][channels][height][width]
    int64_t out_height, out_width, out_channels;  // of the convolution
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    int64_t pooled_height, pooled_width, pool_h, pool_w, pool_stride_h, pool_stride_w, pool_pad_h, pool_pad_w;
    int64_t threads;
    const void *packed;   // by events_pack_stem
    const float *input;
    const float *factor, *mean, *std;             // [channels], each may be null: x = (factor * input - mean) / std
    float step, limit;                            // q = round(clip(x / step, -limit, limit))
    const float *scale, *bias;                    // y = scale * sum + bias, [padded channels]; no scale is negative
    const float *more_scale, *more_bias;          // or null: the real map is more_scale * y + more_bias
    float *real;                                  // [N][pooled height][pooled width][channels], or null
    int64_t num_spikes;                           // where sign * y >= level
    const float *level[EVENTS_MAX_OUTPUTS], *sign[EVENTS_MAX_OUTPUTS];
    uint64_t *spikes[EVENTS_MAX_OUTPUTS];
};

// A comparison, and a max-pool of bits, as the arguments of events_threshold and events_pool.
struct EventThreshold {
    const float *x;
    int64_t pixels, channels;
    const float *level, *sign;
    uint64_t *spikes;
    int64_t threads;
};

struct EventPool {
    const uint64_t *x;
    int64_t images, height, width, words, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    const uint64_t *inverted;
    uint64_t *out;
};

// A real map and another one, enlarged to its size by the nearest pixel, added up, and the spikes of the sum.
struct EventSum {
    int64_t images, height, width, channels;      // float [N][height][width][channels]
    int64_t other_height, other_width;
    int64_t threads;
    const float *input, *other;
    float *sum;                                   // perhaps the input itself
    int64_t num_spikes;                           // where sign * sum >= level, as in EventConv
    const float *level[EVENTS_MAX_OUTPUTS], *sign[EVENTS_MAX_OUTPUTS];
    uint64_t *spikes[EVENTS_MAX_OUTPUTS];
};

// Spikes of the last of several maps that fires, set behind set in each pixel.
struct EventHighest {
    int64_t pixels, words, sets;
    const uint64_t *spikes[EVENTS_MAX_OUTPUTS];   // [pixels][words]
    uint64_t *out;                                // [pixels][sets][words]
};

// A call of the library: 0 EventConv, 1 EventStem, 2 EventThreshold, 3 EventPool, 4 EventSum, 5 EventHighest.
struct EventStep {
    int64_t kind;
    void *call;
};

// An image, resized bilinearly, between pixels' corners, and padded with the mean on the right and below.
struct EventResize {
    int64_t channels, height, width;              // of the input, float [channels][height][width]
    int64_t out_height, out_width;                // of what is resized
    int64_t padded_height, padded_width;          // of the output, float [channels][padded height][padded width]
    int64_t threads;
    const float *input, *mean;                    // [channels]: resized is the image less it, which is added then
    float *output;
};

// Boxes of which those go that overlap with a better one of their label.
struct EventBoxes {
    int64_t number, most;       // boxes, and the most that are kept
    const float *boxes;         // [number][4]: x1, y1, x2, y2
    const int64_t *order;       // [number]: the best first
    const int64_t *labels;      // [number], of 32 bits, or null: all are alike
    double threshold;           // of the overlap, over the union: larger ones go
    int64_t *kept;              // [most]: numbers of the boxes that stay, the best first
};

// A Hoyer layer in training, see backbones/hoyer.py: a pass over its neurons.
struct HoyerLayer {
    int64_t number, threads;
    int64_t brief;              // whether numbers are bfloat16, in place of float
    // Calls a function with its argument in so many threads, as GOMP_parallel does with those that torch computes by,
    // which otherwise would wait for work beside the library's own; or null.
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    const void *potential;      // u
    const void *arriving;       // gradients: ds
    void *output;               // spikes: 1 or 0; gradients: du
    float v;                    // |v_th|, rounded as numbers are: z = u / v
    float threshold;            // spikes: on z, rounded likewise
    float low, high, q, pull;   // gradients: ends of the surrogate gradient's window, sum c / sum c^2, 2 q dH
    double sums[2];             // moments: sum c, sum c^2; gradients: d|v_th|
};

// Chooses the instructions: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with VNNI, -1 the best of this processor. Returns what is used now, or
// -1 if the processor lacks what was asked for. Weights are packed for one choice.
int events_use(int level);

// Version of this interface.
int events_version(void);

// Bytes that events_pack writes.
int64_t events_packed_bytes(const EventConv *layer);

// Arranges int8 weights [out_channels][channels / groups][kernel_h][kernel_w] for events_conv.
void events_pack(const EventConv *layer, const int8_t *weight, void *packed);

// Arranges the same weights for a dense layer; 0 bytes where there is none: groups, or dilation along a row.
int64_t events_packed_dense_bytes(const EventConv *layer);
void events_pack_dense(const EventConv *layer, const int8_t *weight, void *packed);

// Computes the layer. Returns 0, or 1 if there is not enough memory.
int events_conv(EventConv *layer);

// Arranges int16 weights [out_channels][channels][kernel_h][kernel_w] for events_stem.
int64_t events_packed_stem_bytes(const EventStem *stem);
void events_pack_stem(const EventStem *stem, const int16_t *weight, void *packed);

// Computes the stem. Without a pool its sizes are 1, its strides 1 and its paddings 0. Returns as events_conv.
int events_stem(const EventStem *stem);

// Resizes an image. Returns as events_conv.
int events_resize(const EventResize *image);

// Returns how many boxes stay, or -1 if there is not enough memory.
int64_t events_suppress(const EventBoxes *boxes);

// Pass 0, moments, 1, spikes, or 2, gradients. Sums are the same whatever the number of threads. Returns as events_conv.
int events_hoyer(HoyerLayer *layer, int pass);

// Adds up two maps. Returns as events_conv.
int events_sum(const EventSum *maps);

// Makes calls one after the other. Returns as events_conv; `wanting` becomes the number of convolutions that want to be
// dense layers, and lack the weights for it.
int events_run(const EventStep *steps, int64_t number, int64_t *wanting);

// Spikes where sign * x >= level, x float [pixels][channels]; sign may be null; both padded as in EventConv.
void events_threshold(const float *x, int64_t pixels, int64_t channels, const float *level, const float *sign,
                      uint64_t *spikes, int64_t threads);

// Max-pooling of bits, an OR over each window; then bits of `inverted` [words], if it is not null, are turned round.
void events_pool(const uint64_t *x, int64_t images, int64_t height, int64_t width, int64_t words, int64_t out_height,
                 int64_t out_width, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                 int64_t pad_h, int64_t pad_w, const uint64_t *inverted, uint64_t *out);

}  // extern "C"
