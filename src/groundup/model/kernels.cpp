// The hot loops of inference on a CPU; built on first use by kernels.py, called through ctypes.
//
// Every result depends on its own row alone, in one order of additions, however many rows a call
// has and however many threads run: the same request gives the same bits whatever else runs.
//
// Names: M rows of activations, N outputs, K inputs of a matrix product; T tokens, H query heads,
// G key/value heads, D head size. Matrices are row-major float32 unless said otherwise.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef float v16 __attribute__((vector_size(64), aligned(4)));  // any CPU: the compiler splits it

inline float sum(v16 v) {
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
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

// ---------------------------------------------------------------- float32 products

// A matrix of N outputs: float32 [N, K], or int8 in panels with a scale an output. kernels.py
// fills these in.
struct Matrix {
    const void* weight;
    const float *scale, *bias;
    long N;
    int int8;
};

constexpr long FEW = 4;  // up to so many rows every thread does small work itself: no waiting

// Do f(m) for every row: all of them in each thread where they are few, else shared out.
template <class Work>
void each_row(long M, Work f) {
    if (M < FEW) {
        for (long m = 0; m < M; m++) f(m);
    } else {
#pragma omp for schedule(static)
        for (long m = 0; m < M; m++) f(m);
    }
}

// Memory for rows: a thread's own where they are few, else `shared` by all.
struct Rows {
    std::vector<float> own;
    float* get(long M, long width, std::vector<float>& shared) {
        if (M >= FEW) return shared.data();
        own.resize(M * width);
        return own.data();
    }
};

// One output for M rows. Weights are read as one stream, which is what memory is fastest at; four
// sums run side by side, so that no addition waits for the one before.
template <int M>
void dot_rows(const float* weight, const float* x, long K, float* out) {
    v16 acc[M][4] = {};
    long k = 0;
    for (; k + 64 <= K; k += 64)
        for (int i = 0; i < 4; i++) {
            v16 w = *(const v16*)(weight + k + i * 16);
            for (int m = 0; m < M; m++) acc[m][i] += w * *(const v16*)(x + m * K + k + i * 16);
        }
    for (int m = 0; m < M; m++) {
        float total = sum((acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]));
        for (long j = k; j < K; j++) total += weight[j] * x[m * K + j];
        out[m] = total;
    }
}

// Several products of the same x, their outputs side by side, plus `add`; shared by all threads.
void product_f32(const Matrix* matrices, int count, const float* x, const float* add, float* out,
                 long M, long K) {
    long width = 0;
    for (int i = 0; i < count; i++) width += matrices[i].N;
#pragma omp for schedule(static)
    for (long column = 0; column < width; column++) {
        const Matrix* matrix = matrices;
        long n = column;
        while (n >= matrix->N) n -= (matrix++)->N;
        const float* weight = (const float*)matrix->weight + n * K;
        float bias = matrix->bias ? matrix->bias[n] : 0.0f;
        for (long m = 0; m < M; m += 4) {
            long rows = std::min(M - m, 4L);
            float found[4];
            if (rows == 4) dot_rows<4>(weight, x + m * K, K, found);
            else if (rows == 3) dot_rows<3>(weight, x + m * K, K, found);
            else if (rows == 2) dot_rows<2>(weight, x + m * K, K, found);
            else dot_rows<1>(weight, x + m * K, K, found);
            for (long j = 0; j < rows; j++) {
                long place = (m + j) * width + column;
                out[place] = found[j] + bias + (add ? add[place] : 0.0f);
            }
        }
    }
}

// ---------------------------------------------------------------- int8 products
//
// Weights lie in panels of 16 outputs: [N/16][K/4][16][4] bytes, so that one 64-byte vector meets
// four inputs broadcast to all lanes. K is padded to fours and N to sixteens with zeros.

constexpr int PANEL = 16;

#if defined(__AVX512VNNI__)
// dpbusd multiplies unsigned by signed bytes, so weights are stored plus 128, which is undone by
// 128 times the sum of the activations.
constexpr int OFFSET = 128;
template <int M, int P>
void int8_tile(const uint8_t* w, long panel_bytes, const int8_t* a, long stride, long K4,
               int32_t (*out)[P * PANEL]) {
    __m512i acc[M][P];
    for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) acc[m][p] = _mm512_setzero_si512();
    for (long k = 0; k < K4; k++) {
        __m512i weight[P];
        for (int p = 0; p < P; p++) weight[p] = _mm512_loadu_si512(w + p * panel_bytes + k * 64);
        for (int m = 0; m < M; m++) {
            int32_t four;
            std::memcpy(&four, a + m * stride + k * 4, 4);
            __m512i wide = _mm512_set1_epi32(four);
            for (int p = 0; p < P; p++) acc[m][p] = _mm512_dpbusd_epi32(acc[m][p], weight[p], wide);
        }
    }
    for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) _mm512_storeu_si512(out[m] + p * PANEL, acc[m][p]);
}
#elif defined(__AVX2__)
// maddubs multiplies unsigned by signed bytes too, and saturates sums of two; with |w| and the
// activation under w's sign no sum exceeds 2 * 127 * 127 < 2^15.
constexpr int OFFSET = 0;
template <int M, int P>
void int8_tile(const uint8_t* w, long panel_bytes, const int8_t* a, long stride, long K4,
               int32_t (*out)[P * PANEL]) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2 * P; half++) {
        const uint8_t* at = w + half / 2 * panel_bytes + half % 2 * 32;
        __m256i acc[M];
        for (int m = 0; m < M; m++) acc[m] = _mm256_setzero_si256();
        for (long k = 0; k < K4; k++) {
            __m256i weight = _mm256_loadu_si256((const __m256i*)(at + k * 64));
            __m256i size = _mm256_abs_epi8(weight);
            for (int m = 0; m < M; m++) {
                int32_t four;
                std::memcpy(&four, a + m * stride + k * 4, 4);
                __m256i wide = _mm256_sign_epi8(_mm256_set1_epi32(four), weight);
                __m256i pairs = _mm256_maddubs_epi16(size, wide);
                acc[m] = _mm256_add_epi32(acc[m], _mm256_madd_epi16(pairs, ones));
            }
        }
        for (int m = 0; m < M; m++) _mm256_storeu_si256((__m256i*)(out[m] + half * 8), acc[m]);
    }
}
#else
constexpr int OFFSET = 0;
template <int M, int P>
void int8_tile(const uint8_t* w, long panel_bytes, const int8_t* a, long stride, long K4,
               int32_t (*out)[P * PANEL]) {
    std::memset(out, 0, sizeof(int32_t) * M * P * PANEL);
    for (int p = 0; p < P; p++)
        for (long k = 0; k < K4; k++)
            for (int m = 0; m < M; m++)
                for (int n = 0; n < PANEL; n++)
                    for (int j = 0; j < 4; j++)
                        out[m][p * PANEL + n] += int32_t(int8_t(w[p * panel_bytes + k * 64 + n * 4 + j])) *
                                                 a[m * stride + k * 4 + j];
}
#endif

// One row's activations as int8 and their scale, the largest one at 127; ties round to even.
void quantize_row(const float* x, long K, long stride, int8_t* q, float* scale, int32_t* total) {
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

struct Quantized {
    const Matrix& matrix;
    const int8_t* a;
    const float* a_scale;
    const int32_t* a_total;
    const float* add;
    float* out;
    long stride;
};

template <int M, int P>
void int8_block(const Quantized& q, long panel, long m) {
    int32_t found[M][P * PANEL];
    long bytes = q.stride * PANEL, N = q.matrix.N;
    const uint8_t* weight = (const uint8_t*)q.matrix.weight + panel * bytes;
    int8_tile<M, P>(weight, bytes, q.a + m * q.stride, q.stride, q.stride / 4, found);
    long first = panel * PANEL, count = std::min<long>(N - first, P * PANEL);
    for (int i = 0; i < M; i++) {
        long place = (m + i) * N + first;
        float a_scale = q.a_scale[m + i];
        int32_t undo = OFFSET * q.a_total[m + i];
        for (long n = 0; n < count; n++) {
            float value = float(found[i][n] - undo) * (a_scale * q.matrix.scale[first + n]);
            if (q.matrix.bias) value += q.matrix.bias[first + n];
            q.out[place + n] = value + (q.add ? q.add[place + n] : 0.0f);
        }
    }
}

template <int P>
void int8_panels(const Quantized& q, long panel, long M) {
    long m = 0;
    for (; m + 8 <= M; m += 8) int8_block<8, P>(q, panel, m);
    if (m + 4 <= M) int8_block<4, P>(q, panel, m), m += 4;
    if (m + 2 <= M) int8_block<2, P>(q, panel, m), m += 2;
    if (m < M) int8_block<1, P>(q, panel, m);
}

// Activations as int8, a thread's own or shared like Rows.
struct Bytes {
    std::vector<int8_t> a;
    std::vector<float> scale;
    std::vector<int32_t> total;
    void resize(long M, long K) {
        a.resize(M * ((K + 3) / 4 * 4));
        scale.resize(M);
        total.resize(M);
    }
};

void product_int8(const Matrix& matrix, const float* x, const float* add, float* out, long M, long K,
                  Bytes& shared) {
    static thread_local Bytes own;
    long stride = (K + 3) / 4 * 4, panels = (matrix.N + PANEL - 1) / PANEL;
    if (M < FEW) own.resize(M, K);
    Bytes& bytes = M < FEW ? own : shared;
    each_row(M, [&](long m) {
        quantize_row(x + m * K, K, stride, bytes.a.data() + m * stride, &bytes.scale[m], &bytes.total[m]);
    });
    Quantized q{matrix, bytes.a.data(), bytes.scale.data(), bytes.total.data(), add, out, stride};
#pragma omp for schedule(static)
    for (long pair = 0; pair < (panels + 1) / 2; pair++) {
        if (pair * 2 + 1 < panels) int8_panels<2>(q, pair * 2, M);
        else int8_panels<1>(q, pair * 2, M);
    }
}

// The products of x with `count` matrices; called by all threads, and done when they return.
void product(const Matrix* matrices, int count, const float* x, const float* add, float* out, long M,
             long K, Bytes& shared) {
    if (matrices->int8) product_int8(*matrices, x, add, out, M, K, shared);
    else product_f32(matrices, count, x, add, out, M, K);
}

// ---------------------------------------------------------------- attention

void rotate(const float* x, const float* cosine, const float* sine, long D, float* out) {
    long half = D / 2;
#pragma omp simd
    for (long d = 0; d < half; d++) {
        out[d] = x[d] * cosine[d] - x[d + half] * sine[d];
        out[d + half] = x[d + half] * cosine[d + half] + x[d] * sine[d + half];
    }
}

inline float dot(const float* a, const float* b, long D) {
    v16 acc = {};
    long d = 0;
    for (; d + 16 <= D; d += 16) acc += *(const v16*)(a + d) * *(const v16*)(b + d);
    float total = sum(acc);
    for (; d < D; d++) total += a[d] * b[d];
    return total;
}

inline void norm_row(const float* x, const float* weight, float* out, long K, float eps, int shift) {
    float factor = 1.0f / std::sqrt(dot(x, x, K) / float(K) + eps), add = shift ? 1.0f : 0.0f;
    for (long k = 0; k < K; k++) out[k] = x[k] * factor * (weight[k] + add);
}

// silu(gate) * up, where the gate's N values lie before up's.
inline void gate_row(const float* x, float* out, long N) {
#pragma omp simd
    for (long n = 0; n < N; n++) out[n] = x[n] / (1.0f + exponential(-x[n])) * x[N + n];
}

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

// Turn the keys of T tokens and store them with the values; then let the first R tokens attend to
// their request's past: positions 0 to `at`, or the last `window` of them, found through the
// request's table of blocks. Called by all threads.
void attend_rows(const Step& step, const Heads& heads, const float* q, const float* k, const float* v,
                 long q_stride, long k_stride, long v_stride, float* keys, float* values, float* out) {
    long G = heads.G, D = heads.D, group = heads.H / G;
    auto slot = [&](long t, long s) {
        long block = step.tables[step.owner[t] * step.table_stride + s / step.size];
        return (block * step.size + s % step.size) * G * D;
    };
#pragma omp for schedule(static)
    for (long t = 0; t < step.T; t++)
        for (long g = 0; g < G; g++) {
            long place = slot(t, step.at[t]) + g * D;
            const float *cosine = step.cosine + t * D, *sine = step.sine + t * D;
            rotate(k + t * k_stride + g * D, cosine, sine, D, keys + place);
            std::memcpy(values + place, v + t * v_stride + g * D, D * sizeof(float));
        }
    static thread_local std::vector<float> scores, turned;
    turned.resize(group * D);
#pragma omp for schedule(static)
    for (long item = 0; item < step.R * G; item++) {
        long t = item / G, g = item % G, last = step.at[t];
        long first = heads.window > 0 ? std::max(0L, last + 1 - heads.window) : 0;
        long count = last + 1 - first;
        scores.resize(group * count);
        for (long h = 0; h < group; h++)
            rotate(q + t * q_stride + (g * group + h) * D, step.cosine + t * D, step.sine + t * D, D,
                   turned.data() + h * D);
        for (long s = 0; s < count; s++) {
            const float* key = keys + slot(t, first + s) + g * D;
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
        float* mixed = out + (t * heads.H + g * group) * D;
        std::fill(mixed, mixed + group * D, 0.0f);
        for (long s = 0; s < count; s++) {
            const float* value = values + slot(t, first + s) + g * D;
            for (long h = 0; h < group; h++) {
                float weight = scores[h * count + s], *sum = mixed + h * D;
#pragma omp simd
                for (long d = 0; d < D; d++) sum[d] += weight * value[d];
            }
        }
    }
}

// One decoder layer with norms before attention and MLP, as kernels.py describes it.
struct Layer {
    const float *norm, *mlp_norm, *q_norm, *k_norm;  // the last two may be absent
    Matrix qkv[3], o, gate_up[2], down;
    Heads heads;
    long E, wide;  // the hidden size and the MLP's
    float eps;
};

}  // namespace

extern "C" {

int int8_offset() { return OFFSET; }

// Up to three products of the same x, their outputs side by side.
void linear(const Matrix* matrices, int count, const float* x, float* out, long M, long K,
            int threads) {
    Bytes shared;
    if (matrices->int8 && M >= FEW) shared.resize(M, K);
#pragma omp parallel num_threads(threads)
    product(matrices, count, x, nullptr, out, M, K, shared);
}

void rms_norm(const float* x, const float* weight, float* out, long M, long K, float eps, int shift,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(M < 16 ? 1 : threads)
    for (long m = 0; m < M; m++) norm_row(x + m * K, weight, out + m * K, K, eps, shift);
}

void silu_mul(const float* x, float* out, long M, long N, int threads) {
#pragma omp parallel for schedule(static) num_threads(M < 4 ? 1 : threads)
    for (long m = 0; m < M; m++) gate_row(x + m * 2 * N, out + m * N, N);
}

void attend(const Step* step, const Heads* heads, const float* q, const float* k, const float* v,
            long q_stride, long k_stride, long v_stride, float* keys, float* values, float* out,
            int threads) {
#pragma omp parallel num_threads(threads)
    attend_rows(*step, *heads, q, k, v, q_stride, k_stride, v_stride, keys, values, out);
}

// x of T tokens after one layer, in place.
void layer(const Layer* layer, const Step* step, float* x, float* keys, float* values, int threads) {
    const Layer& l = *layer;
    const Heads& h = l.heads;
    long T = step->T, q_width = h.H * h.D, kv = h.G * h.D, width = q_width + 2 * kv;
    std::vector<float> qkv(T * width), mixed(T * q_width), wide(T * 2 * l.wide), normed, gated;
    Bytes bytes;
    if (T >= FEW) {
        normed.resize(T * l.E);
        gated.resize(T * l.wide);
        bytes.resize(T, std::max({l.E, l.wide, q_width}));
    }
#pragma omp parallel num_threads(threads)
    {
        static thread_local Rows own_normed, own_gated;
        float* n = own_normed.get(T, l.E, normed);
        float* g = own_gated.get(T, l.wide, gated);
        each_row(T, [&](long t) { norm_row(x + t * l.E, l.norm, n + t * l.E, l.E, l.eps, 0); });
        product(l.qkv, 3, n, nullptr, qkv.data(), T, l.E, bytes);
        if (l.q_norm) {
#pragma omp for schedule(static)
            for (long t = 0; t < T; t++)
                for (long i = 0; i < h.H + h.G; i++) {
                    float* head = qkv.data() + t * width + i * h.D;
                    norm_row(head, i < h.H ? l.q_norm : l.k_norm, head, h.D, l.eps, 0);
                }
        }
        const float* q = qkv.data();
        attend_rows(*step, h, q, q + q_width, q + q_width + kv, width, width, width, keys, values,
                    mixed.data());
        product(&l.o, 1, mixed.data(), x, x, T, q_width, bytes);
        each_row(T, [&](long t) { norm_row(x + t * l.E, l.mlp_norm, n + t * l.E, l.E, l.eps, 0); });
        product(l.gate_up, 2, n, nullptr, wide.data(), T, l.E, bytes);
        each_row(T, [&](long t) { gate_row(wide.data() + t * 2 * l.wide, g + t * l.wide, l.wide); });
        product(&l.down, 1, g, x, x, T, l.wide, bytes);
    }
}

// int8 rows and scales of a float32 matrix, in panels; `first` is the row that it starts at.
void quantize(const float* weight, long N, long K, uint8_t* packed, float* scale, long first,
              int threads) {
    long stride = (K + 3) / 4 * 4;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < N; n++) {
        const float* row = weight + n * K;
        float largest = 0.0f;
#pragma omp simd reduction(max : largest)
        for (long k = 0; k < K; k++) largest = std::max(largest, std::fabs(row[k]));
        float unit = largest / 127.0f, divisor = unit > 0.0f ? unit : 1.0f;
        scale[first + n] = unit;
        long at = first + n;
        uint8_t* out = packed + at / PANEL * stride * PANEL + at % PANEL * 4;
        for (long k = 0; k < K; k++)
            out[k / 4 * 64 + k % 4] = uint8_t(int32_t(std::nearbyint(row[k] / divisor)) + OFFSET);
    }
}

}  // extern "C"
