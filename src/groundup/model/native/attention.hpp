// Attention of new tokens over a paged cache.

#pragma once
#include <vector>

#include "rows.hpp"
#include "team.hpp"

// Where T tokens' keys and values go, and what they look at.
struct Step {
    const float *cosine, *sine;
    const int32_t *tables, *owner, *at;
    long table_stride, T, R, size;  // blocks of `size` tokens; the first R tokens attend
};

struct Heads {
    long H, G, D, window, turned;
    float scale;
};

// Keys and values, [slots, G, D] each, and where a position of a token's request lies in them.
struct Cached {
    const Step& step;
    const Heads& heads;
    float *keys, *values;
    long slot(long t, long s) const {
        long block = step.tables[step.owner[t] * step.table_stride + s / step.size];
        return (block * step.size + s % step.size) * heads.G * heads.D;
    }
};

// Turn one head of a token by its angles, in layers that have positions.
inline void turn(const Cached& cached, long t, const float* x, float* out) {
    const Step& step = cached.step;
    long D = cached.heads.D;
    if (cached.heads.turned)
        rotate(x, step.cosine + t * D, step.sine + t * D, D, out);
    else
        std::memcpy(out, x, D * sizeof(float));
}

// Turn a token's keys k [G, D] and store them with its values.
inline void store(const Cached& cached, long t, const float* k, const float* v) {
    long G = cached.heads.G, D = cached.heads.D, place = cached.slot(t, cached.step.at[t]);
    for (long g = 0; g < G; g++) turn(cached, t, k + g * D, cached.keys + place + g * D);
    std::memcpy(cached.values + place, v, G * D * sizeof(float));
}

// The products of one row with `count` others, which begin at `places` of `rows`.
inline void dots(const float* one, const float* rows, const long* places, long count, long D,
                 float* out) {
    for (long s = 0; s < count; s += LANES) {
        long some = std::min(LANES, count - s), d = 0;
        numbers products[LANES] = {};
        for (long i = 0; i < some; i++)
            for (d = 0; d + LANES <= D; d += LANES)
                products[i] += *(const numbers*)(one + d) * *(const numbers*)(rows + places[s + i] + d);
        numbers found = sums(products);
        for (; d < D; d++)
            for (long i = 0; i < some; i++) found[i] += one[d] * rows[places[s + i] + d];
        std::memcpy(out + s, &found, some * sizeof(float));
    }
}

// N registers of a weighted sum of `count` rows.
template <int N>
void mix_part(const float* weight, const float* rows, const long* places, long count, float* out) {
    numbers total[N];
    for (int i = 0; i < N; i++) total[i] = numbers{};
    for (long s = 0; s < count; s++)
        for (int i = 0; i < N; i++)
            total[i] += weight[s] * *(const numbers*)(rows + places[s] + i * LANES);
    for (int i = 0; i < N; i++) *(numbers*)(out + i * LANES) = total[i];
}

// The weighted sum of `count` rows, which begin at `places` of `rows`.
inline void mix(const float* weight, const float* rows, const long* places, long count, long D,
                float* out) {
    long d = 0;
    for (; d + 4 * LANES <= D; d += 4 * LANES) mix_part<4>(weight, rows + d, places, count, out + d);
    for (; d + LANES <= D; d += LANES) mix_part<1>(weight, rows + d, places, count, out + d);
    for (; d < D; d++) {
        out[d] = 0.0f;
        for (long s = 0; s < count; s++) out[d] += weight[s] * rows[places[s] + d];
    }
}

// Let a token's queries q [H, D] of one group attend to positions 0 to `at` of its request, or the
// last `window` of them.
inline void attend_group(const Cached& cached, long t, long g, const float* q, float* out) {
    const Step& step = cached.step;
    const Heads& heads = cached.heads;
    long D = heads.D, group = heads.H / heads.G, last = step.at[t];
    long first = heads.window > 0 ? std::max(0L, last + 1 - heads.window) : 0, count = last + 1 - first;
    static thread_local std::vector<float> scores, turned;
    static thread_local std::vector<long> places;
    places.resize(count);
    for (long s = 0; s < count; s++) places[s] = cached.slot(t, first + s) + g * D;
    turned.resize(group * D);
    scores.resize(group * count);
    for (long h = 0; h < group; h++) turn(cached, t, q + (g * group + h) * D, turned.data() + h * D);
    for (long h = 0; h < group; h++)
        dots(turned.data() + h * D, cached.keys, places.data(), count, D, scores.data() + h * count);
    for (float& score : scores) score *= heads.scale;
    for (long h = 0; h < group; h++) {
        float* row = scores.data() + h * count;
        float largest = *std::max_element(row, row + count), total = 0.0f;
#pragma omp simd
        for (long s = 0; s < count; s++) row[s] = exponential(row[s] - largest);
        for (long s = 0; s < count; s++) total += row[s];
        for (long s = 0; s < count; s++) row[s] /= total;
    }
    for (long h = 0; h < group; h++)
        mix(scores.data() + h * count, cached.values, places.data(), count, D, out + (g * group + h) * D);
}
