// Matrix products of few rows: every output is one sum, in one order, however many rows there are.

#pragma once
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bf16.hpp"
#include "rows.hpp"
#include "team.hpp"

// ---------------------------------------------------------------- products in float32

// A matrix of N outputs: float32 or bfloat16 [N, K], or int8 in panels with a scale an output.
// kernels.py fills these in.
enum Kind { FLOAT32, BFLOAT16, INT8 };
struct Matrix {
    const void* weight;
    const float *scale, *bias;
    long N;
    int kind;
};

inline float wide(float x) { return x; }
inline float wide(uint16_t x) { return from_bf16(x); }
inline numbers load(const float* at) { return *(const numbers*)at; }
inline numbers load(const uint16_t* at) {
    typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2)));
    typedef uint32_t words __attribute__((vector_size(LANES * 4)));
    return (numbers)(__builtin_convertvector(*(const halves*)at, words) << 16);
}

// N outputs for M rows, as vectors yet to be summed up, rows `step` apart. Four sums of each run side
// by side, so that no addition waits for the one before.
template <int M, int N = 1, class Weight>
void dot_rows(const Weight* weight, const float* x, long K, numbers* out, long step) {
    numbers acc[N][M][4];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int i = 0; i < 4; i++) acc[n][m][i] = numbers{};
    auto add = [&](long at, int i) {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            numbers w = load(weight + n * K + at);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) acc[n][m][i] += w * *(const numbers*)(x + m * K + at);
        }
    };
    long k = 0;
    for (; k + 4 * LANES <= K; k += 4 * LANES)
#pragma GCC unroll 8
        for (int i = 0; i < 4; i++) add(k + i * LANES, i);
    for (; k + LANES <= K; k += LANES) add(k, 0);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
            out[m * step + n] = (acc[n][m][0] + acc[n][m][1]) + (acc[n][m][2] + acc[n][m][3]);
}

#if defined(__AVX512F__)  // rows for one output, and for WIDE ones, whose sums the registers hold
constexpr int ROWS = 5, WIDE_ROWS = 3, WIDE = 2;
#else
constexpr int ROWS = 3, WIDE_ROWS = 3, WIDE = 1;
#endif

// One output for `rows` rows, at most M.
template <int M, class Weight>
void dot_few(const Weight* weight, const float* x, long K, long rows, numbers* out, long step) {
    if (rows == M) dot_rows<M>(weight, x, K, out, step);
    else if constexpr (M > 1) dot_few<M - 1>(weight, x, K, rows, out, step);
}

// `count` outputs for some rows, as dot_rows leaves them. For few rows each is made after the other,
// so that weights come as one stream, which is what memory is fastest at; else WIDE_ROWS at a time stay
// in the nearest cache.
template <class Weight>
void dot_group(const Weight* weight, long count, const float* x, long rows, long K, bool few,
                      numbers* out, long step) {
    auto dots = [&](long c, long r, long some) {
        dot_few<ROWS>(weight + c * K, x + r * K, K, some, out + r * step + c, step);
    };
    for (long c = 0; c < count && few; c++)
        for (long r = 0, some; r < rows; r += some) {
            some = rows - r <= ROWS ? rows - r : std::min((rows - r + 1) / 2, long(ROWS));
            dots(c, r, some);
        }
    for (long r = 0; r < rows && !few; r += WIDE_ROWS) {
        long some = std::min(rows - r, long(WIDE_ROWS)), c = 0;
        for (; c + WIDE <= count && some == WIDE_ROWS; c += WIDE)
            dot_rows<WIDE_ROWS, WIDE>(weight + c * K, x + r * K, K, out + r * step + c, step);
        for (; c < count; c++) dots(c, r, some);
    }
}

// Up to MANY rows, or MANY at a time, are summed up together for GROUP outputs; for no more rows than
// that, more outputs are.
constexpr long MANY = 16, GROUP = 4;
inline long grouped(long M) { return M > GROUP ? GROUP : LANES; }

// Outputs n .. n + count of one matrix, `grouped` at most, for all rows; `place(m)` says where a
// row's begin.
template <class Weight, class Place>
void columns(const Matrix& matrix, long n, long count, const float* x, const float* add, float* out,
             long M, long K, Place place) {
    const Weight* weight = (const Weight*)matrix.weight + n * K;
    long whole = K / LANES * LANES, step = grouped(M);
    numbers dots[MANY * GROUP];
    float found[MANY * GROUP];
    for (long m = 0, rows; m < M; m += rows) {
        rows = std::min(M - m, MANY);
        dot_group(weight, count, x + m * K, rows, K, M <= MANY, dots, step);
        for (long i = 0; i < rows * step; i += LANES) *(numbers*)(found + i) = sums(dots + i);
        for (long r = 0; r < rows; r++) {
            float* row = found + r * step;
            for (long k = whole; k < K; k++)
                for (long c = 0; c < count; c++) row[c] += wide(weight[c * K + k]) * x[(m + r) * K + k];
            if (matrix.bias)
                for (long c = 0; c < count; c++) row[c] += matrix.bias[n + c];
            if (add)
                for (long c = 0; c < count; c++) row[c] += add[place(m + r) + c];
            std::copy(row, row + count, out + place(m + r));
        }
    }
}

// Several products of the same x, their outputs side by side, plus `add`.
inline void product_in_floats(Crew& crew, const Matrix* matrices, int count, const float* x,
                             const float* add, float* out, long M, long K) {
    long width = 0;
    for (int i = 0; i < count; i++) width += matrices[i].N;
    crew.spans(width, [&](long first, long last) {
        for (long column = first, step; column < last; column += step) {
            const Matrix* matrix = matrices;
            long n = column;
            while (n >= matrix->N) n -= (matrix++)->N;
            step = std::min({grouped(M), last - column, matrix->N - n});
            auto place = [=](long m) { return m * width + column; };
            auto make = matrix->kind == BFLOAT16 ? columns<uint16_t, decltype(place)>
                                                 : columns<float, decltype(place)>;
            make(*matrix, n, step, x, add, out, M, K, place);
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
    if (matrices->kind != INT8) {
        if (!std::is_same_v<Prepare, Ready>) crew.each(M, prepare);
        return product_in_floats(crew, matrices, count, x, add, out, M, K);
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
