// What is done to one row of numbers: sums, norms, gates, rotation, rounding to int8.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float v4 __attribute__((vector_size(16), aligned(4)));
typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef float v16 __attribute__((vector_size(64), aligned(4)));

// Numbers that fill a register. Wider vectors run anywhere too, and several times slower.
#if defined(__AVX512F__)
typedef v16 numbers;
#elif defined(__AVX__)
typedef v8 numbers;
#else
typedef v4 numbers;
#endif
constexpr long LANES = sizeof(numbers) / sizeof(float);

template <class Half, class Whole>
Half folded(const Whole& v) {
    Half halves[2];
    std::memcpy(halves, &v, sizeof halves);
    return halves[0] + halves[1];
}

inline float sum(const v4& v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float sum(const v8& v) { return sum(folded<v4>(v)); }
inline float sum(const v16& v) { return sum(folded<v8>(v)); }

// Parts of WIDE numbers, of two vectors side by side: the halves of each are added.
template <long WIDE>
numbers halved(const numbers& a, const numbers& b) {
    typedef int32_t places __attribute__((vector_size(sizeof(numbers))));
    places first;
    for (long i = 0; i < LANES; i++) first[i] = i * 2 / WIDE * WIDE + i % (WIDE / 2);
    return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, first + int32_t(WIDE / 2));
}

// `sum` of as many vectors as one has numbers, in the same order, many times as fast; they are lost.
template <long COUNT = LANES>
numbers sums(numbers* v) {
    if constexpr (COUNT == 2) return halved<2>(v[0], v[1]);
    for (long i = 0; i < COUNT / 2; i++) v[i] = halved<COUNT>(v[2 * i], v[2 * i + 1]);
    if constexpr (COUNT > 2) return sums<COUNT / 2>(v);
}

// e^x to two units in the last place: x = n ln 2 + r, a polynomial in r, and n added to the exponent.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = std::nearbyint(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

inline void rotate(const float* x, const float* cosine, const float* sine, long D, float* out) {
    long half = D / 2;
#pragma omp simd
    for (long d = 0; d < half; d++) {
        out[d] = x[d] * cosine[d] - x[d + half] * sine[d];
        out[d + half] = x[d + half] * cosine[d + half] + x[d] * sine[d + half];
    }
}

inline float dot(const float* a, const float* b, long D) {
    numbers acc = {};
    long d = 0;
    for (; d + LANES <= D; d += LANES) acc += *(const numbers*)(a + d) * *(const numbers*)(b + d);
    float total = sum(acc);
    for (; d < D; d++) total += a[d] * b[d];
    return total;
}

inline void norm_row(const float* x, const float* weight, float* out, long K, float eps, int shift) {
    float factor = 1.0f / std::sqrt(dot(x, x, K) / float(K) + eps), add = shift ? 1.0f : 0.0f;
    for (long k = 0; k < K; k++) out[k] = x[k] * factor * (weight[k] + add);
}

// silu(gate) * up.
inline void gate_row(const float* gate, const float* up, float* out, long N) {
#pragma omp simd
    for (long n = 0; n < N; n++) out[n] = gate[n] / (1.0f + exponential(-gate[n])) * up[n];
}

// One row's activations as int8 and their scale, the largest one at 127; ties round to even.
inline void quantize_row(const float* x, long K, long stride, int8_t* q, float* scale, int32_t* total) {
    float largest = 0.0f;
#pragma omp simd reduction(max : largest)
    for (long k = 0; k < K; k++) largest = std::fabs(x[k]) > largest ? std::fabs(x[k]) : largest;
    float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    int32_t s = 0;
#pragma omp simd reduction(+ : s)
    for (long k = 0; k < K; k++) {
        int32_t value = int32_t(std::nearbyint(x[k] * inverse));
        q[k] = int8_t(value);
        s += value;
    }
    for (long k = K; k < stride; k++) q[k] = 0;
    *scale = largest / 127.0f;
    *total = s;
}
