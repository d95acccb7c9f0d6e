// What lies between the products of training on a CPU: norms, gates and rotation, and their
// gradients, each in one pass over memory. Built on first use by native.py, called through ctypes.
// Activations are float32 or bfloat16, all else float32, and so is arithmetic: what is bfloat16 is
// rounded once, as it is written.
//
// Names: N rows, E numbers of a row; B, H, K, T, D as in training.cpp.

#if defined(__AVX512BF16__)  // from these processors on, full registers do not slow the clock
#pragma GCC target("prefer-vector-width=512")
#endif

#include <algorithm>
#include <vector>

#include "bf16.hpp"
#include "rows.hpp"

namespace {

constexpr long BLOCK = 64;     // rows whose shares in a weight's gradient are added up first

inline float wide(float x) { return x; }
inline float wide(uint16_t x) { return from_bf16(x); }
inline void put(float& place, float x) { place = x; }
inline void put(uint16_t& place, float x) { place = to_bf16(x); }

inline float logistic(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Gate and up are `step` numbers from one row to the next, the gated rows lie side by side.
template <class Number>
void gated(const Number* gate, const Number* up, Number* out, long N, long E, long step,
           int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < N; n++) {
        const Number *from = gate + n * step, *beside = up + n * step;
        Number* to = out + n * E;
#pragma omp simd
        for (long e = 0; e < E; e++) {
            float g = wide(from[e]);
            put(to[e], g * logistic(g) * wide(beside[e]));
        }
    }
}

template <class Number>
void gated_backward(const Number* gate, const Number* up, Number* out, Number* d_gate, Number* d_up,
                    long N, long E, long step, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < N; n++) {
        const Number *from = gate + n * step, *beside = up + n * step;
        Number *own = out + n * E, *d_from = d_gate + n * step, *d_beside = d_up + n * step;
#pragma omp simd
        for (long e = 0; e < E; e++) {
            float g = wide(from[e]), u = wide(beside[e]), d = wide(own[e]);
            float share = logistic(g), silu = g * share;
            put(d_from[e], d * u * (share + silu * (1.0f - share)));
            put(d_beside[e], d * silu);
            put(own[e], silu * u);
        }
    }
}

// One position of a head, turned by its angles, or back by them where way is -1.
template <class From, class To>
void turn_row(const From* x, const float* cosine, const float* sine, long D, float way, To* out) {
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

// A row over its root mean square times the weight; returns the factor of the first.
template <class From, class To>
float normed_row(const From* x, const float* weight, To* out, long E, float eps) {
    float square = 0.0f;
#pragma omp simd reduction(+ : square)
    for (long e = 0; e < E; e++) square += wide(x[e]) * wide(x[e]);
    float factor = 1.0f / std::sqrt(square / float(E) + eps);
#pragma omp simd
    for (long e = 0; e < E; e++) put(out[e], wide(x[e]) * factor * weight[e]);
    return factor;
}

// dx = factor (g - x factor^2 mean(g x)), g = d_out weight; what the weight's gradient gets from
// this row is added to `share`.
template <class From, class To>
void normed_row_backward(const From* x, const float* weight, float factor, const To* d_out, From* dx,
                       float* share, long E) {
    float overlap = 0.0f;
#pragma omp simd reduction(+ : overlap)
    for (long e = 0; e < E; e++) overlap += wide(d_out[e]) * weight[e] * wide(x[e]);
    float pull = overlap * factor * factor * factor / float(E);
#pragma omp simd
    for (long e = 0; e < E; e++) {
        float d = wide(d_out[e]), own = wide(x[e]);
        share[e] += d * own * factor;
        put(dx[e], d * weight[e] * factor - own * pull);
    }
}

template <class From, class To>
void normed(const From* x, const float* weight, To* out, float* scale, long N, long E, float eps,
            int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < N; n++) scale[n] = normed_row(x + n * E, weight, out + n * E, E, eps);
}

// Do work(n, share) for all rows, and add up their shares in a gradient [E] in one order whatever
// the threads are: those of a block first, then the blocks'.
template <class Work>
void summed(long N, long E, float* total, int threads, Work work) {
    long blocks = (N + BLOCK - 1) / BLOCK;
    std::vector<float> shares(blocks * E);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long block = 0; block < blocks; block++)
        for (long n = block * BLOCK; n < std::min(N, (block + 1) * BLOCK); n++)
            work(n, shares.data() + block * E);
    std::fill(total, total + E, 0.0f);
    for (long block = 0; block < blocks; block++)
        for (long e = 0; e < E; e++) total[e] += shares[block * E + e];
}

template <class From, class To>
void normed_backward(const From* x, const float* weight, const float* scale, const To* d_out,
                     From* dx, float* d_weight, long N, long E, int threads) {
    summed(N, E, d_weight, threads, [&](long n, float* share) {
        normed_row_backward(x + n * E, weight, scale[n], d_out + n * E, dx + n * E, share, E);
    });
}

// Rows of H query, K key and K value heads side by side; passes.py fills this in. Queries and keys
// are normalised by their weights [D], where there are any, and turned.
struct Heads {
    long B, T, H, K, D;
    const float *q_weight, *k_weight, *cosine, *sine;
    long table_step;
    float eps;
    long turned() const { return H + K; }
    long all() const { return H + 2 * K; }
    const float* weight(long h) const { return h < H ? q_weight : k_weight; }
    long angle(long n) const { return n / T * table_step + n % T * D; }
};

template <class Number>
void made_heads(const Heads& s, const Number* x, Number* out, float* scale, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(s.D);
#pragma omp for schedule(static)
        for (long n = 0; n < s.B * s.T; n++)
            for (long h = 0; h < s.turned(); h++) {
                const Number* row = x + (n * s.all() + h) * s.D;
                const float *cosine = s.cosine + s.angle(n), *sine = s.sine + s.angle(n);
                long place = n * s.turned() + h;
                if (s.weight(h)) {
                    scale[place] = normed_row(row, s.weight(h), room.data(), s.D, s.eps);
                    turn_row(room.data(), cosine, sine, s.D, 1.0f, out + place * s.D);
                } else {
                    turn_row(row, cosine, sine, s.D, 1.0f, out + place * s.D);
                }
            }
    }
}

// d_q, d_k and d_v are [B, T, heads, D]; d_weights are the two norms' [2, D].
template <class Number>
void made_heads_backward(const Heads& s, const Number* x, const float* scale, const Number* d_q,
                         const Number* d_k, const Number* d_v, Number* dx, float* d_weights,
                         int threads) {
    summed(s.B * s.T, 2 * s.D, d_weights, threads, [&](long n, float* share) {
        static thread_local std::vector<float> room;
        room.resize(s.D);
        const float *cosine = s.cosine + s.angle(n), *sine = s.sine + s.angle(n);
        for (long h = 0; h < s.turned(); h++) {
            const Number* d = h < s.H ? d_q + (n * s.H + h) * s.D : d_k + (n * s.K + h - s.H) * s.D;
            long place = (n * s.all() + h) * s.D;
            if (s.weight(h)) {
                turn_row(d, cosine, sine, s.D, -1.0f, room.data());
                normed_row_backward(x + place, s.weight(h), scale[n * s.turned() + h],
                                  (const float*)room.data(), dx + place,
                                  share + (h < s.H ? 0 : s.D), s.D);
            } else {
                turn_row(d, cosine, sine, s.D, -1.0f, dx + place);
            }
        }
        long values = s.K * s.D;
        std::copy(d_v + n * values, d_v + (n + 1) * values, dx + (n * s.all() + s.turned()) * s.D);
    });
}

}  // namespace

extern "C" {

void gate(const void* gate, const void* up, void* out, long N, long E, long step, int bf16,
          int threads) {
    if (bf16)
        gated((const uint16_t*)gate, (const uint16_t*)up, (uint16_t*)out, N, E, step, threads);
    else
        gated((const float*)gate, (const float*)up, (float*)out, N, E, step, threads);
}

// The gradients by gate and up; `out` comes as the gradient by the gated numbers, and leaves as them.
void gate_backward(const void* gate, const void* up, void* out, void* d_gate, void* d_up, long N,
                   long E, long step, int bf16, int threads) {
    if (bf16)
        gated_backward((const uint16_t*)gate, (const uint16_t*)up, (uint16_t*)out,
                       (uint16_t*)d_gate, (uint16_t*)d_up, N, E, step, threads);
    else
        gated_backward((const float*)gate, (const float*)up, (float*)out, (float*)d_gate,
                       (float*)d_up, N, E, step, threads);
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
void norm(const void* x, const float* weight, void* out, float* scale, long N, long E, float eps,
          int x_bf16, int out_bf16, int threads) {
    auto run = [&](auto* from, auto* to) {
        normed(from, weight, to, scale, N, E, eps, threads);
    };
    if (x_bf16 && out_bf16) run((const uint16_t*)x, (uint16_t*)out);
    else if (x_bf16) run((const uint16_t*)x, (float*)out);
    else if (out_bf16) run((const float*)x, (uint16_t*)out);
    else run((const float*)x, (float*)out);
}

void norm_backward(const void* x, const float* weight, const float* scale, const void* d_out,
                   void* dx, float* d_weight, long N, long E, int x_bf16, int out_bf16,
                   int threads) {
    auto run = [&](auto* from, auto* d, auto* to) {
        normed_backward(from, weight, scale, d, to, d_weight, N, E, threads);
    };
    if (x_bf16 && out_bf16) run((const uint16_t*)x, (const uint16_t*)d_out, (uint16_t*)dx);
    else if (x_bf16) run((const uint16_t*)x, (const float*)d_out, (uint16_t*)dx);
    else if (out_bf16) run((const float*)x, (const uint16_t*)d_out, (float*)dx);
    else run((const float*)x, (const float*)d_out, (float*)dx);
}

void heads(const Heads* s, const void* x, void* out, float* scale, int bf16, int threads) {
    if (bf16) made_heads(*s, (const uint16_t*)x, (uint16_t*)out, scale, threads);
    else made_heads(*s, (const float*)x, (float*)out, scale, threads);
}

void heads_backward(const Heads* s, const void* x, const float* scale, const void* d_q,
                    const void* d_k, const void* d_v, void* dx, float* d_weights, int bf16,
                    int threads) {
    if (bf16)
        made_heads_backward(*s, (const uint16_t*)x, scale, (const uint16_t*)d_q,
                            (const uint16_t*)d_k, (const uint16_t*)d_v, (uint16_t*)dx, d_weights,
                            threads);
    else
        made_heads_backward(*s, (const float*)x, scale, (const float*)d_q, (const float*)d_k,
                            (const float*)d_v, (float*)dx, d_weights, threads);
}

}
