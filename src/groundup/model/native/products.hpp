// Matrix products of few rows: every output is one sum, in one order, however many rows there are.

#pragma once
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "rows.hpp"
#include "team.hpp"

// ---------------------------------------------------------------- float32 products

// A matrix of N outputs: float32 [N, K], or int8 in panels with a scale an output. kernels.py
// fills these in.
struct Matrix {
    const void* weight;
    const float *scale, *bias;
    long N;
    int int8;
};

// One output for M rows. Weights are read as one stream, which is what memory is fastest at; four
// sums run side by side, so that no addition waits for the one before.
template <int M>
void dot_rows(const float* weight, const float* x, long K, float* out) {
    numbers acc[M][4] = {};
    long k = 0;
    for (; k + 4 * LANES <= K; k += 4 * LANES)
        for (int i = 0; i < 4; i++) {
            long at = k + i * LANES;
            numbers w = *(const numbers*)(weight + at);
            for (int m = 0; m < M; m++) acc[m][i] += w * *(const numbers*)(x + m * K + at);
        }
    for (int m = 0; m < M; m++) {
        float total = sum((acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]));
        for (long j = k; j < K; j++) total += weight[j] * x[m * K + j];
        out[m] = total;
    }
}

// Each output of few rows is made after the other, so that weights come as one stream; of MANY, those
// of several outputs stay in the nearest cache, beside a few rows.
constexpr long MANY = 16, NEAR_BYTES = 3 << 13;
#if defined(__AVX512F__)
constexpr int ROWS = 5;  // whose sums the registers hold
#else
constexpr int ROWS = 3;
#endif

// One output for `rows` rows, at most M.
template <int M>
void dot_few(const float* weight, const float* x, long K, long rows, float* out) {
    if (rows == M) dot_rows<M>(weight, x, K, out);
    else if constexpr (M > 1) dot_few<M - 1>(weight, x, K, rows, out);
}

// Outputs n .. n + count of one matrix for all rows; `place(m)` says where a row's begin.
template <class Place>
void columns_f32(const Matrix& matrix, long n, long count, const float* x, const float* add, float* out,
                 long M, long K, Place place) {
    const float* weight = (const float*)matrix.weight + n * K;
    auto put = [&](long m, long c, float value) {
        long at = place(m) + c;
        out[at] = value + (matrix.bias ? matrix.bias[n + c] : 0.0f) + (add ? add[at] : 0.0f);
    };
    for (long m = 0, rows; m < M; m += rows) {
        rows = M - m <= ROWS ? M - m : std::min((M - m + 1) / 2, long(ROWS));
        for (long c = 0; c < count; c++) {
            float found[ROWS];
            dot_few<ROWS>(weight + c * K, x + m * K, K, rows, found);
            for (long i = 0; i < rows; i++) put(m + i, c, found[i]);
        }
    }
}

// Several products of the same x, their outputs side by side, plus `add`.
inline void product_f32(Crew& crew, const Matrix* matrices, int count, const float* x,
                        const float* add, float* out, long M, long K) {
    long width = 0, most = M > MANY ? std::max(1L, NEAR_BYTES / (K * long(sizeof(float)))) : 1;
    for (int i = 0; i < count; i++) width += matrices[i].N;
    crew.spans(width, [&](long first, long last) {
        for (long column = first, step; column < last; column += step) {
            const Matrix* matrix = matrices;
            long n = column;
            while (n >= matrix->N) n -= (matrix++)->N;
            step = std::min({most, last - column, matrix->N - n});
            auto place = [=](long m) { return m * width + column; };
            columns_f32(*matrix, n, step, x, add, out, M, K, place);
        }
    });
}

// ---------------------------------------------------------------- int8 products
//
// Weights lie in panels of 16 outputs: [N/16][K/4][16][4] bytes, so that one 64-byte vector meets
// four inputs broadcast to all lanes. K is padded to fours and N to sixteens with zeros.

constexpr int PANEL = 16;

inline long padded(long K) { return (K + 3) / 4 * 4; }

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
// activation under w's sign no sum exceeds 2 * 128 * 127 < 2^15.
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

// Activations as int8.
struct Bytes {
    std::vector<int8_t> a;
    std::vector<float> scale;
    std::vector<int32_t> total;
    Bytes(long M, long K) : a(M * padded(K)), scale(M), total(M) {}
};

struct Ready {  // for inputs that need no preparation
    void operator()(long) const {}
};

// The products of x with `count` matrices; `prepare(m)` first makes its row m.
template <class Prepare>
void product(Crew& crew, const Matrix* matrices, int count, const float* x, Prepare prepare,
             const float* add, float* out, long M, long K, Bytes& bytes) {
    if (!matrices->int8) {
        if (!std::is_same_v<Prepare, Ready>) crew.each(M, prepare);
        return product_f32(crew, matrices, count, x, add, out, M, K);
    }
    long stride = padded(K), panels = (matrices->N + PANEL - 1) / PANEL;
    crew.each(M, [&](long m) {
        prepare(m);
        quantize_row(x + m * K, K, stride, &bytes.a[m * stride], &bytes.scale[m], &bytes.total[m]);
    });
    Quantized q{*matrices,         bytes.a.data(), bytes.scale.data(), bytes.total.data(),
                add, out, stride};
    crew.spans((panels + 1) / 2, [&](long first, long last) {
        for (long pair = first; pair < last; pair++) {
            if (pair * 2 + 1 < panels) int8_panels<2>(q, pair * 2, M);
            else int8_panels<1>(q, pair * 2, M);
        }
    });
}
