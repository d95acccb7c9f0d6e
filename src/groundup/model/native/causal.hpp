// What both forms of causal attention (training.cpp, tiled.hpp) are made of: vectors of 16 numbers,
// tensors, blocks of queries, and the softmax of a row.

#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float v16 __attribute__((vector_size(64), aligned(4)));  // any CPU: the compiler splits it
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));

constexpr long LANES = 16;

inline v16 load(const float* x) { return *(const v16*)x; }
inline void store(float* x, v16 v) { *(v16*)x = v; }

typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef float v4 __attribute__((vector_size(16), aligned(4)));

// All numbers of a vector by one operation, half with half.
template <class Operation>
inline float folded(const v16& v, Operation f) {
    v8 halves[2];
    std::memcpy(halves, &v, sizeof halves);
    v8 eight = f(halves[0], halves[1]);
    v4 quarters[2];
    std::memcpy(quarters, &eight, sizeof quarters);
    v4 four = f(quarters[0], quarters[1]);
    return f(f(four[0], four[2]), f(four[1], four[3]));
}

inline float sum(const v16& v) {
    return folded(v, [](const auto& a, const auto& b) { return a + b; });
}

inline float largest(const v16& v) {
    return folded(v, [](const auto& a, const auto& b) { return a > b ? a : b; });
}

// e^x to two units in the last place: x = n ln 2 + r, a polynomial in r, n added to the exponent.
inline v16 exponential(v16 x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits behind the point
    v16 low = x - x - 87.0f;
    x = x < low ? low : x;
    v16 n = (x * 1.44269504f + round) - round;
    v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    v16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i16 bits = (__builtin_convertvector(n, i16) + 127) << 23;
    v16 power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

// A tensor [B, heads, T, D], the last dimension dense; attention.py fills these in.
struct Tensor {
    void* data;
    long batch, head, time;  // steps between neighbours, in elements
    int bf16;
};

struct Shape {
    long B, H, K, T, D;
    long past;  // keys before the first query's own; none where there are gradients
    float scale;
    const int32_t* first;  // [B, T], the first key that a query looks at; null: all before it
    long keys() const { return past + T; }
};

inline long rounded_up(long x, long grain) { return (x + grain - 1) / grain * grain; }

// At most `rows` queries: which they are, and the keys that any of them looks at, from one multiple
// of `grain` to another.
struct Block {
    long start, count, low, width;
    Block(const Shape& s, long b, long start, long rows, long grain)
        : start(start), count(std::min(rows, s.T - start)), low(0) {
        const int32_t* first = s.first + b * s.T + start;
        if (s.first) low = *std::min_element(first, first + count) / grain * grain;
        width = rounded_up(s.past + start + count - low, grain);
    }
    // The columns [from, to) of row i that its query looks at.
    long from(const Shape& s, long b, long i) const {
        return s.first ? s.first[b * s.T + start + i] - low : 0;
    }
    long to(const Shape& s, long i) const { return s.past + start + i + 1 - low; }
};

// Columns of a score that lie within [from, to) out of 16 from c on.
inline i16 within(long c, long from, long to) {
    i16 column = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    column += int32_t(c);
    return (column >= int32_t(from)) & (column < int32_t(to));
}

// Turn a row of scores into e^(score - shift), zero outside [from, to); return their sum.
inline float weigh(float* row, long width, long from, long to, float shift) {
    v16 total = {}, zero = {};
    for (long c = 0; c < width; c += LANES) {
        v16 weight = exponential(load(row + c) - shift);
        if (c < from || c + LANES > to) weight = within(c, from, to) ? weight : zero;
        total += weight;
        store(row + c, weight);
    }
    return sum(total);
}

inline float top(const float* row, long width, long from, long to) {
    v16 most = v16{} - INFINITY, none = most;
    for (long c = 0; c < width; c += LANES) {
        v16 score = load(row + c);
        if (c < from || c + LANES > to) score = within(c, from, to) ? score : none;
        most = score > most ? score : most;
    }
    return largest(most);
}
