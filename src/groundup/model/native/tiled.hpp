// Causal attention and its gradients in bfloat16 by tiles of AMX: 16 rows times 16 columns over 32
// numbers at once, added up in float32. The softmax and its slopes are float32 too, and rounded where
// a product takes them in, as in flash attention (Dao et al. 2022, arXiv 2205.14135).
//
// A left matrix lies by rows. A right one lies in tiles of 16 columns and 32 rows; a word of it is
// two numbers of one column, "a pair". Names as in training.cpp; D is a multiple of 32.

#pragma once
#include <initializer_list>
#include <vector>

#include "causal.hpp"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace tiled {

constexpr long SIDE = 16, BLOCK = 32;  // of a tile; queries that are scored at a time, and a tile's depth

struct alignas(64) Line {
    uint32_t words[SIDE];
};

inline bool takes(const Shape& s, std::initializer_list<const Tensor*> tensors) {
    constexpr int ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM: Linux gives tiles on request
    static const bool given = syscall(SYS_arch_prctl, ask, tile_data) == 0;
    for (const Tensor* x : tensors)
        if (!x->bf16) return false;
    return given && s.D % BLOCK == 0;
}

// This thread's tiles, all of them 16 rows of 64 bytes. Who had them before (oneDNN) finds them as
// they were. GCC does not tell that configurations and tiles are read from memory: hence the fences.
inline void fence() { asm volatile("" ::: "memory"); }

class Tiles {
    struct alignas(64) Setting {
        uint8_t palette, row, unused[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } before, own = {};

public:
    Tiles() {
        own.palette = 1;
        std::fill(own.row_bytes, own.row_bytes + 8, 64);
        std::fill(own.rows, own.rows + 8, 16);
        fence();
        _tile_storeconfig(&before);
        _tile_loadconfig(&own);
        fence();
    }
    ~Tiles() {
        fence();
        _tile_loadconfig(&before);
    }
};

// C[32, 32] (+)= A[32, 32 steps] B. Rows of A and C are so many numbers apart; b and beside are the
// tiles of the first and the last 16 columns, each step `b_step` lines further.
inline void square(const uint16_t* a, long a_row, const Line* b, const Line* beside, long b_step,
                   float* c, long c_row, long steps, bool add) {
    const uint16_t* a_low = a + SIDE * a_row;
    float* c_low = c + SIDE * c_row;
    fence();
    if (add) {
        _tile_loadd(0, c, c_row * 4);
        _tile_loadd(1, c + SIDE, c_row * 4);
        _tile_loadd(2, c_low, c_row * 4);
        _tile_loadd(3, c_low + SIDE, c_row * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long n = 0; n < steps; n++) {
        _tile_loadd(4, a + n * BLOCK, a_row * 2);
        _tile_loadd(6, b + n * b_step, 64);
        _tile_loadd(7, beside + n * b_step, 64);
        _tile_loadd(5, a_low + n * BLOCK, a_row * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_row * 4);
    _tile_stored(1, c + SIDE, c_row * 4);
    _tile_stored(2, c_low, c_row * 4);
    _tile_stored(3, c_low + SIDE, c_row * 4);
}

// ---------------------------------------------------------------- how numbers lie

// A square of 16 x 16 words turned over; rows are so many words apart.
inline void turn(const uint32_t* x, long x_row, uint32_t* out, long out_row) {
    __m512i a[SIDE], b[SIDE];
    for (long i = 0; i < SIDE; i++) a[i] = _mm512_loadu_si512(x + i * x_row);
    for (long i = 0; i < SIDE; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (long i = 0; i < SIDE; i += 4)
        for (long j = 0; j < 2; j++) {  // a[i + n]: columns n, 4 + n, ... of rows i to i + 3
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (long n = 0; n < 4; n++) {
        __m512i even = _mm512_shuffle_i32x4(a[n], a[4 + n], 0x88);
        __m512i odd = _mm512_shuffle_i32x4(a[n], a[4 + n], 0xdd);
        __m512i even_low = _mm512_shuffle_i32x4(a[8 + n], a[12 + n], 0x88);
        __m512i odd_low = _mm512_shuffle_i32x4(a[8 + n], a[12 + n], 0xdd);
        _mm512_storeu_si512(out + n * out_row, _mm512_shuffle_i32x4(even, even_low, 0x88));
        _mm512_storeu_si512(out + (4 + n) * out_row, _mm512_shuffle_i32x4(odd, odd_low, 0x88));
        _mm512_storeu_si512(out + (8 + n) * out_row, _mm512_shuffle_i32x4(even, even_low, 0xdd));
        _mm512_storeu_si512(out + (12 + n) * out_row, _mm512_shuffle_i32x4(odd, odd_low, 0xdd));
    }
}

inline __m256i rounded(v16 x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }

inline __m512i paired(__m256i first, __m256i second) {
    __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
    return _mm512_or_si512(_mm512_cvtepu16_epi32(first), high);
}

// Tiles [count / 32][D / 16] of a right matrix from its rows [count, D].
inline void as_right(const uint16_t* rows, long count, long D, Line* out) {
    for (long t = 0; t < count; t += BLOCK)
        for (long d = 0; d < D; d += SIDE)
            for (long i = 0; i < BLOCK; i += 2, out++) {
                const uint16_t* row = rows + (t + i) * D + d;
                __m256i first = _mm256_loadu_si256((const __m256i*)row);
                __m256i second = _mm256_loadu_si256((const __m256i*)(row + D));
                _mm512_store_si512(out, paired(first, second));
            }
}

// Tiles [count / 16][D / 32] of the right matrix [D, count] from the rows [count, D] of its transpose.
inline void as_right_turned(const uint16_t* rows, long count, long D, Line* out) {
    for (long t = 0; t < count; t += SIDE)
        for (long d = 0; d < D; d += BLOCK, out += SIDE)
            turn((const uint32_t*)(rows + t * D + d), D / 2, out->words, SIDE);
}

// The left matrix [D, 32] from the rows [32, D] of its transpose.
inline void as_left_turned(const uint16_t* rows, long D, Line* out) {
    as_right(rows, BLOCK, D, out);
    for (long d = 0; d < D; d += SIDE) turn(out[d].words, SIDE, out[d].words, SIDE);
}

// `count` positions of a head from `start` on, and zeros up to a multiple of 32.
inline void read(const Tensor& x, const Shape& s, long b, long h, long start, long count, uint16_t* out) {
    const uint16_t* from = (const uint16_t*)x.data + b * x.batch + h * x.head + start * x.time;
    for (long t = 0; t < count; t++)
        for (long d = 0; d < s.D; d += BLOCK)
            _mm512_store_si512(out + t * s.D + d, _mm512_loadu_si512(from + t * x.time + d));
    std::fill(out + count * s.D, out + rounded_up(count, BLOCK) * s.D, 0);
}

// One position of a head, times a factor.
inline void write_row(const float* x, float factor, long D, const Tensor& to, long b, long h, long t) {
    uint16_t* out = (uint16_t*)to.data + b * to.batch + h * to.head + t * to.time;
    for (long d = 0; d < D; d += SIDE)
        _mm256_storeu_si256((__m256i*)(out + d), rounded(load(x + d) * factor));
}

// All positions of a head from what lies as [D, wide].
inline void write_turned(const float* x, long wide, float factor, const Shape& s, const Tensor& to,
                         long b, long h) {
    alignas(64) uint32_t square[SIDE][SIDE];
    for (long t = 0; t < s.T; t += SIDE)
        for (long d = 0; d < s.D; d += SIDE) {
            turn((const uint32_t*)x + d * wide + t, wide, square[0], SIDE);
            Tensor part = to;
            part.data = (uint16_t*)to.data + d;
            for (long i = 0; i < std::min(SIDE, s.T - t); i++)
                write_row((const float*)square[i], factor, SIDE, part, b, h, t + i);
        }
}

// What a thread works on. Rows of scores are `wide` numbers apart: a little more than keys, so that
// they share no cache set.
struct Room {
    long keys, wide;
    std::vector<Line> lines;
    size_t used = 0;
    uint16_t *rows, *q, *d_out, *rounded;
    Line *k_turned, *v_turned, *k_right, *v_right, *q_left, *d_out_left, *weights_right, *slopes_right;
    float *scores, *slopes, *out, *dk, *dv;

    Room(const Shape& s, bool backward) : keys(rounded_up(s.keys(), BLOCK)), wide(keys + BLOCK) {
        for (int real = 0; real < 2; real++) {  // the first time to see how much is wanted
            lines.resize(used);
            used = 0;
            take(rows, keys * s.D), take(q, BLOCK * s.D), take(rounded, BLOCK * wide);
            take(k_turned, keys * s.D / 32), take(scores, BLOCK * wide), take(out, BLOCK * s.D);
            if (!backward) {
                take(v_right, keys * s.D / 32);
                continue;
            }
            take(v_turned, keys * s.D / 32), take(k_right, keys * s.D / 32);
            take(d_out, BLOCK * s.D), take(q_left, s.D), take(d_out_left, s.D);
            take(weights_right, wide), take(slopes_right, wide), take(slopes, BLOCK * wide);
            take(dk, s.D * wide), take(dv, s.D * wide);
        }
    }

    template <class Number>
    void take(Number*& place, long count) {
        place = (Number*)(lines.data() + used);
        used += (count * sizeof(Number) + sizeof(Line) - 1) / sizeof(Line);
    }
};

// ---------------------------------------------------------------- attention

// Scores of 32 left rows with the keys of a block.
inline void scored(const uint16_t* left, const Line* right, const Block& block, long D, long wide,
                   float* scores) {
    right += block.low * D / 32;
    for (long c = 0; c < block.width; c += BLOCK, right += D)
        square(left, D, right, right + D / 2, SIDE, scores + c, wide, D / BLOCK, false);
}

// 32 rows over the keys of a block times the right matrix of all keys [keys, D].
inline void combined(const uint16_t* left, const Line* right, const Block& block, long D, long wide,
                     float* out) {
    right += block.low * D / 32;
    for (long d = 0; d < D; d += BLOCK)
        square(left, wide, right + d, right + d + SIDE, D, out + d, D, block.width / BLOCK, false);
}

// sums[D, keys] += left[D, 32] right[32, keys of a block].
inline void spread(const Line* left, const Line* right, const Block& block, long D, long wide, float* sums) {
    for (long c = 0; c < block.width; c += BLOCK)
        for (long d = 0; d < D; d += BLOCK)
            square((const uint16_t*)(left + d), BLOCK, right + c, right + c + SIDE, 0,
                   sums + d * wide + block.low + c, wide, 1, true);
}

inline v16 masked(v16 x, long c, long from, long to) {
    return c < from || c + LANES > to ? (within(c, from, to) ? x : v16{}) : x;
}

// Write e^(scale score - shift) rounded, zero outside [from, to); return its sum before rounding.
inline float weigh(const float* scores, uint16_t* weights, long width, long from, long to, float scale,
                   float shift) {
    v16 total = {};
    for (long c = 0; c < width; c += LANES) {
        v16 weight = {};
        if (c + LANES > from && c < to)
            weight = masked(exponential(load(scores + c) * scale - shift), c, from, to);
        total += weight;
        _mm256_store_si256((__m256i*)(weights + c), rounded(weight));
    }
    return _mm512_reduce_add_ps((__m512)total);
}

inline void forward_head(const Shape& s, long b, long g, const Tensor& q, const Tensor& k,
                         const Tensor& v, const Tensor& out, float* log_z, Room& own) {
    read(k, s, b, g, 0, s.keys(), own.rows);
    as_right_turned(own.rows, own.keys, s.D, own.k_turned);
    read(v, s, b, g, 0, s.keys(), own.rows);
    as_right(own.rows, own.keys, s.D, own.v_right);
    for (long h = g * s.H / s.K; h < (g + 1) * s.H / s.K; h++)
        for (long start = 0; start < s.T; start += BLOCK) {
            Block block(s, b, start, BLOCK, BLOCK);
            read(q, s, b, h, start, block.count, own.q);
            scored(own.q, own.k_turned, block, s.D, own.wide, own.scores);
            float totals[BLOCK];
            for (long i = 0; i < block.count; i++) {
                float* row = own.scores + i * own.wide;
                long from = block.from(s, b, i), to = block.to(s, i);
                float shift = s.scale * top(row, block.width, from, to);
                totals[i] = weigh(row, own.rounded + i * own.wide, block.width, from, to, s.scale, shift);
                log_z[(b * s.H + h) * s.T + start + i] = shift + std::log(totals[i]);
            }
            combined(own.rounded, own.v_right, block, s.D, own.wide, own.out);
            for (long i = 0; i < block.count; i++)
                write_row(own.out + i * s.D, 1.0f / totals[i], s.D, out, b, h, start + i);
        }
}

// Turn a row of scores into weights, zero outside [from, to); return the weighted mean of their slopes.
inline float weigh_again(float* row, const float* slopes, long width, long from, long to, float scale,
                         float log_z) {
    v16 mean = {};
    for (long c = 0; c < width; c += LANES) {
        v16 weight = {};
        if (c + LANES > from && c < to)
            weight = masked(exponential(load(row + c) * scale - log_z), c, from, to);
        mean += weight * load(slopes + c);
        store(row + c, weight);
    }
    return _mm512_reduce_add_ps((__m512)mean);
}

// Weights of a block and the slopes of its scores, weight * (slope - mean), as the products of the
// gradients take them: as right matrices [32, keys], the slopes by rows as well.
inline void softened(const Shape& s, long b, const Block& block, const float* log_z, Room& own) {
    for (long i = 0; i < BLOCK; i += 2) {
        float *row = own.scores + i * own.wide, *slopes = own.slopes + i * own.wide, mean[2];
        for (long j = 0; j < 2; j++) {
            bool there = i + j < block.count;
            mean[j] = weigh_again(row + j * own.wide, slopes + j * own.wide, block.width,
                                  there ? block.from(s, b, i + j) : 0, there ? block.to(s, i + j) : 0,
                                  s.scale, there ? log_z[i + j] : 0.0f);
        }
        uint16_t* by_rows = own.rounded + i * own.wide;
        for (long c = 0; c < block.width; c += SIDE) {
            __m256i weight[2], slope[2];
            for (long j = 0; j < 2; j++) {
                v16 exact = load(row + j * own.wide + c);
                weight[j] = rounded(exact);
                slope[j] = rounded(exact * (load(slopes + j * own.wide + c) - mean[j]));
                _mm256_store_si256((__m256i*)(by_rows + j * own.wide + c), slope[j]);
            }
            _mm512_store_si512(own.weights_right + c + i / 2, paired(weight[0], weight[1]));
            _mm512_store_si512(own.slopes_right + c + i / 2, paired(slope[0], slope[1]));
        }
    }
}

inline void backward_head(const Shape& s, long b, long g, const Tensor& q, const Tensor& k,
                          const Tensor& v, const Tensor& d_out, const float* log_z, const Tensor& dq,
                          const Tensor& dk, const Tensor& dv, Room& own) {
    read(k, s, b, g, 0, s.T, own.rows);
    as_right_turned(own.rows, own.keys, s.D, own.k_turned);
    as_right(own.rows, own.keys, s.D, own.k_right);
    read(v, s, b, g, 0, s.T, own.rows);
    as_right_turned(own.rows, own.keys, s.D, own.v_turned);
    std::fill(own.dk, own.dk + s.D * own.wide, 0.0f);
    std::fill(own.dv, own.dv + s.D * own.wide, 0.0f);
    for (long h = g * s.H / s.K; h < (g + 1) * s.H / s.K; h++)
        for (long start = 0; start < s.T; start += BLOCK) {
            Block block(s, b, start, BLOCK, BLOCK);
            read(q, s, b, h, start, block.count, own.q);
            read(d_out, s, b, h, start, block.count, own.d_out);
            as_left_turned(own.q, s.D, own.q_left);
            as_left_turned(own.d_out, s.D, own.d_out_left);
            scored(own.q, own.k_turned, block, s.D, own.wide, own.scores);
            scored(own.d_out, own.v_turned, block, s.D, own.wide, own.slopes);
            softened(s, b, block, log_z + (b * s.H + h) * s.T + start, own);
            spread(own.d_out_left, own.weights_right, block, s.D, own.wide, own.dv);
            spread(own.q_left, own.slopes_right, block, s.D, own.wide, own.dk);
            combined(own.rounded, own.k_right, block, s.D, own.wide, own.out);
            for (long i = 0; i < block.count; i++)
                write_row(own.out + i * s.D, s.scale, s.D, dq, b, h, start + i);
        }
    write_turned(own.dk, own.wide, s.scale, s, dk, b, g);
    write_turned(own.dv, own.wide, 1.0f, s, dv, b, g);
}

inline void attention(const Shape& s, const Tensor& q, const Tensor& k, const Tensor& v,
                      const Tensor& out, float* log_z, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Room own(s, false);
#pragma omp for schedule(dynamic)
        for (long n = 0; n < s.B * s.K; n++)
            forward_head(s, n / s.K, n % s.K, q, k, v, out, log_z, own);
    }
}

inline void attention_backward(const Shape& s, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& d_out, const float* log_z, const Tensor& dq,
                               const Tensor& dk, const Tensor& dv, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Room own(s, true);
#pragma omp for schedule(dynamic)
        for (long n = 0; n < s.B * s.K; n++)
            backward_head(s, n / s.K, n % s.K, q, k, v, d_out, log_z, dq, dk, dv, own);
    }
}

}  // namespace tiled

#else

namespace tiled {

inline bool takes(const Shape&, std::initializer_list<const Tensor*>) { return false; }
inline void attention(const Shape&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, float*,
                      int) {}
inline void attention_backward(const Shape&, const Tensor&, const Tensor&, const Tensor&,
                               const Tensor&, const float*, const Tensor&, const Tensor&,
                               const Tensor&, int) {}

}  // namespace tiled

#endif
