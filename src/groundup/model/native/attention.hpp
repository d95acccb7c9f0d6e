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
    long H, G, D, window;
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

// Turn a token's keys k [G, D] and store them with its values.
inline void store(const Cached& cached, long t, const float* k, const float* v) {
    const Step& step = cached.step;
    long G = cached.heads.G, D = cached.heads.D, place = cached.slot(t, step.at[t]);
    for (long g = 0; g < G; g++)
        rotate(k + g * D, step.cosine + t * D, step.sine + t * D, D, cached.keys + place + g * D);
    std::memcpy(cached.values + place, v, G * D * sizeof(float));
}

// Let a token's queries q [H, D] of one group attend to positions 0 to `at` of its request, or the
// last `window` of them.
inline void attend_group(const Cached& cached, long t, long g, const float* q, float* out) {
    const Step& step = cached.step;
    const Heads& heads = cached.heads;
    long D = heads.D, group = heads.H / heads.G, last = step.at[t];
    long first = heads.window > 0 ? std::max(0L, last + 1 - heads.window) : 0, count = last + 1 - first;
    static thread_local std::vector<float> scores, turned;
    turned.resize(group * D);
    scores.resize(group * count);
    for (long h = 0; h < group; h++)
        rotate(q + (g * group + h) * D, step.cosine + t * D, step.sine + t * D, D, turned.data() + h * D);
    for (long s = 0; s < count; s++) {
        const float* key = cached.keys + cached.slot(t, first + s) + g * D;
        for (long h = 0; h < group; h++)
            scores[h * count + s] = dot(turned.data() + h * D, key, D) * heads.scale;
    }
    for (long h = 0; h < group; h++) {
        float* row = scores.data() + h * count;
        float largest = *std::max_element(row, row + count), total = 0.0f;
#pragma omp simd
        for (long s = 0; s < count; s++) row[s] = exponential(row[s] - largest);
        for (long s = 0; s < count; s++) total += row[s];
        for (long s = 0; s < count; s++) row[s] /= total;
    }
    float* mixed = out + g * group * D;
    std::fill(mixed, mixed + group * D, 0.0f);
    for (long s = 0; s < count; s++) {
        const float* value = cached.values + cached.slot(t, first + s) + g * D;
        for (long h = 0; h < group; h++) {
            float weight = scores[h * count + s], *sum = mixed + h * D;
#pragma omp simd
            for (long d = 0; d < D; d++) sum[d] += weight * value[d];
        }
    }
}
