// What lies between the products of training on a CPU: norms, gates and rotation, and their
// gradients, each in one pass over memory. Built on first use by native.py, called through ctypes.
// What is gated or turned is float32 or bfloat16, all else float32, and so is arithmetic.
//
// Names: N rows, E numbers of a row; B, H, T, D as in training.cpp.

#include <algorithm>
#include <vector>

#include "bf16.hpp"
#include "rows.hpp"

namespace {

constexpr long BLOCK = 64;     // rows whose shares in a weight's gradient are added up first
constexpr long SPAN = 1 << 14;  // gated numbers that a thread takes at a time

inline float wide(float x) { return x; }
inline float wide(uint16_t x) { return from_bf16(x); }
inline void put(float& place, float x) { place = x; }
inline void put(uint16_t& place, float x) { place = to_bf16(x); }

inline float logistic(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <class Number>
void gated(const Number* gate, const Number* up, Number* out, long count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long start = 0; start < count; start += SPAN) {
        long end = std::min(count, start + SPAN);
#pragma omp simd
        for (long n = start; n < end; n++) {
            float g = wide(gate[n]);
            put(out[n], g * logistic(g) * wide(up[n]));
        }
    }
}

template <class Number>
void gated_backward(const Number* gate, const Number* up, Number* out, Number* d_gate, Number* d_up,
                    long count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long start = 0; start < count; start += SPAN) {
        long end = std::min(count, start + SPAN);
#pragma omp simd
        for (long n = start; n < end; n++) {
            float g = wide(gate[n]), u = wide(up[n]), d = wide(out[n]);
            float share = logistic(g), silu = g * share;
            put(d_gate[n], d * u * (share + silu * (1.0f - share)));
            put(d_up[n], d * silu);
            put(out[n], silu * u);
        }
    }
}

// One position of a head, turned by its angles, or back by them where way is -1.
template <class Number>
void turn_row(const Number* x, const float* cosine, const float* sine, long D, float way,
              Number* out) {
    long half = D / 2;
#pragma omp simd
    for (long d = 0; d < half; d++) {
        float first = wide(x[d]), second = wide(x[d + half]);
        put(out[d], first * cosine[d] - way * second * sine[d]);
        put(out[d + half], second * cosine[d + half] + way * first * sine[d + half]);
    }
}

// Steps are between neighbours of x [B, H, T, D] in elements, D being dense; out is [B, T, H, D].
template <class Number>
void turned(const Number* x, const long* steps, const float* cosine, const float* sine,
            long table_step, const long* shape, float way, Number* out, int threads) {
    long B = shape[0], H = shape[1], T = shape[2], D = shape[3];
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < B * T; row++) {
        long b = row / T, t = row % T, angle = b * table_step + t * D;
        for (long h = 0; h < H; h++)
            turn_row(x + b * steps[0] + h * steps[1] + t * steps[2], cosine + angle, sine + angle, D,
                     way, out + (row * H + h) * D);
    }
}

}  // namespace

extern "C" {

void gate(const void* gate, const void* up, void* out, long count, int bf16, int threads) {
    if (bf16)
        gated((const uint16_t*)gate, (const uint16_t*)up, (uint16_t*)out, count, threads);
    else
        gated((const float*)gate, (const float*)up, (float*)out, count, threads);
}

// The gradients by gate and up; `out` comes as the gradient by the gated numbers, and leaves as them.
void gate_backward(const void* gate, const void* up, void* out, void* d_gate, void* d_up, long count,
                   int bf16, int threads) {
    if (bf16)
        gated_backward((const uint16_t*)gate, (const uint16_t*)up, (uint16_t*)out,
                       (uint16_t*)d_gate, (uint16_t*)d_up, count, threads);
    else
        gated_backward((const float*)gate, (const float*)up, (float*)out, (float*)d_gate,
                       (float*)d_up, count, threads);
}

void turn(const void* x, const long* steps, const float* cosine, const float* sine, long table_step,
          const long* shape, float way, void* out, int bf16, int threads) {
    if (bf16)
        turned((const uint16_t*)x, steps, cosine, sine, table_step, shape, way, (uint16_t*)out,
               threads);
    else
        turned((const float*)x, steps, cosine, sine, table_step, shape, way, (float*)out, threads);
}

// Rows over their root mean square times the weight, and the factor of each row.
void norm(const float* x, const float* weight, float* out, float* scale, long N, long E, float eps,
          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < N; n++) {
        const float* row = x + n * E;
        float factor = 1.0f / std::sqrt(dot(row, row, E) / float(E) + eps);
#pragma omp simd
        for (long e = 0; e < E; e++) out[n * E + e] = row[e] * factor * weight[e];
        scale[n] = factor;
    }
}

// dx = scale (g - x scale^2 mean(g x)), g = d_out weight; the weight's gradient is added up in one
// order whatever the threads are.
void norm_backward(const float* x, const float* weight, const float* scale, const float* d_out,
                   float* dx, float* d_weight, long N, long E, int threads) {
    long blocks = (N + BLOCK - 1) / BLOCK;
    std::vector<float> shares(blocks * E);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long block = 0; block < blocks; block++) {
        float* share = shares.data() + block * E;
        for (long n = block * BLOCK; n < std::min(N, (block + 1) * BLOCK); n++) {
            const float *row = x + n * E, *d = d_out + n * E;
            float overlap = 0.0f, factor = scale[n];
#pragma omp simd reduction(+ : overlap)
            for (long e = 0; e < E; e++) overlap += d[e] * weight[e] * row[e];
            float pull = overlap * factor * factor * factor / float(E);
#pragma omp simd
            for (long e = 0; e < E; e++) {
                share[e] += d[e] * row[e] * factor;
                dx[n * E + e] = d[e] * weight[e] * factor - row[e] * pull;
            }
        }
    }
    std::fill(d_weight, d_weight + E, 0.0f);
    for (long block = 0; block < blocks; block++)
        for (long e = 0; e < E; e++) d_weight[e] += shares[block * E + e];
}

}
