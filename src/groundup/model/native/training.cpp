// The hot loops of training on a CPU that torch has no fast operator for: causal attention with its
// gradients, and the softmax of the vocabulary. Built on first use by native.py, called through
// ctypes. Tensors are float32 or bfloat16, arithmetic is float32; attention in bfloat16 goes by tiles
// where the processor has some (tiled.hpp).
//
// Names: B rows, H query heads, K key/value heads, T positions, D head size (a multiple of 16).

#include <vector>

#include "bf16.hpp"
#include "causal.hpp"
#include "tiled.hpp"

namespace {

constexpr long BLOCK = 48;  // queries that are scored at a time

// ---------------------------------------------------------------- products

// C[M, 16 N] (+)= A B, where A(m, k) lies at a[m * row + k * column]: as it is, or transposed.
template <int M, int N>
void tile(const float* a, long row, long column, const float* b, long ldb, float* c, long ldc,
          long K, bool add) {
    v16 acc[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) acc[m][n] = add ? load(c + m * ldc + n * LANES) : v16{};
    for (long k = 0; k < K; k++) {
        v16 right[N];
        for (int n = 0; n < N; n++) right[n] = load(b + k * ldb + n * LANES);
        for (int m = 0; m < M; m++) {
            float left = a[m * row + k * column];
            for (int n = 0; n < N; n++) acc[m][n] += left * right[n];
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(c + m * ldc + n * LANES, acc[m][n]);
}

template <int N>
void rows_of_tiles(long M, const float* a, long row, long column, const float* b, long ldb,
                   float* c, long ldc, long K, bool add) {
    long m = 0;
    for (; m + 6 <= M; m += 6)
        tile<6, N>(a + m * row, row, column, b, ldb, c + m * ldc, ldc, K, add);
    for (; m < M; m++) tile<1, N>(a + m * row, row, column, b, ldb, c + m * ldc, ldc, K, add);
}

// C[M, N] (+)= A B; N is a multiple of 16.
void product(long M, long N, long K, const float* a, long row, long column, const float* b,
             long ldb, float* c, long ldc, bool add) {
    long n = 0;
    for (; n + 64 <= N; n += 64) rows_of_tiles<4>(M, a, row, column, b + n, ldb, c + n, ldc, K, add);
    for (; n < N; n += 16) rows_of_tiles<1>(M, a, row, column, b + n, ldb, c + n, ldc, K, add);
}

// ---------------------------------------------------------------- attention

// `count` positions of a head from `start` on, as float32 [count, D] times `factor`.
void read(const Tensor& x, const Shape& s, long b, long h, long start, long count, float factor,
          float* out) {
    long at = b * x.batch + h * x.head + start * x.time;
    for (long t = 0; t < count; t++, at += x.time, out += s.D) {
        if (x.bf16) {
            const uint16_t* row = (const uint16_t*)x.data + at;
            for (long d = 0; d < s.D; d++) out[d] = from_bf16(row[d]) * factor;
        } else {
            const float* row = (const float*)x.data + at;
            for (long d = 0; d < s.D; d++) out[d] = row[d] * factor;
        }
    }
}

void write(const float* x, const Shape& s, long b, long h, long start, long count, float factor,
           const Tensor& out) {
    long at = b * out.batch + h * out.head + start * out.time;
    for (long t = 0; t < count; t++, at += out.time, x += s.D) {
        if (out.bf16) {
            uint16_t* row = (uint16_t*)out.data + at;
            for (long d = 0; d < s.D; d++) row[d] = to_bf16(x[d] * factor);
        } else {
            float* row = (float*)out.data + at;
            for (long d = 0; d < s.D; d++) row[d] = x[d] * factor;
        }
    }
}

void transpose(const float* x, long T, long D, float* out, long wide) {  // [T, D] to [D, wide]
    for (long some = 0; some < T; some += LANES)  // whose rows stay in the nearest cache
        for (long d = 0; d < D; d++)
            for (long t = some; t < std::min(T, some + LANES); t++) out[d * wide + t] = x[t * D + d];
    for (long d = 0; d < D; d++) std::fill(out + d * wide + T, out + (d + 1) * wide, 0.0f);
}

// The fp32 copies that a thread works on.
struct Scratch {
    long wide;  // between rows of scores: a little more than keys, so that rows share no cache set
    std::vector<float> q, k, v, kt, vt, d_out, weights, slopes, out, dk, dv;
    Scratch(const Shape& s, bool backward) : wide(rounded_up(s.keys(), LANES) + LANES) {
        long all = s.keys() * s.D, block = BLOCK * s.D, turned = s.D * wide;
        q.resize(block), out.resize(block), k.resize(all), v.resize(all), kt.resize(turned);
        weights.resize(BLOCK * wide);
        if (!backward) return;
        d_out.resize(block), vt.resize(turned), slopes.resize(BLOCK * wide);
        dk.resize(all), dv.resize(all);
    }
};

void forward_head(const Shape& s, long b, long g, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& out, float* log_z, Scratch& own) {
    read(k, s, b, g, 0, s.keys(), 1.0f, own.k.data());
    read(v, s, b, g, 0, s.keys(), 1.0f, own.v.data());
    transpose(own.k.data(), s.keys(), s.D, own.kt.data(), own.wide);
    for (long h = g * s.H / s.K; h < (g + 1) * s.H / s.K; h++)
        for (long start = 0; start < s.T; start += BLOCK) {
            Block block(s, b, start, BLOCK, LANES);
            read(q, s, b, h, start, block.count, s.scale, own.q.data());
            product(block.count, block.width, s.D, own.q.data(), s.D, 1, own.kt.data() + block.low,
                    own.wide, own.weights.data(), own.wide, false);
            float totals[BLOCK];
            for (long i = 0; i < block.count; i++) {
                float* row = own.weights.data() + i * own.wide;
                long from = block.from(s, b, i), to = block.to(s, i);
                float shift = top(row, block.width, from, to);
                totals[i] = weigh(row, block.width, from, to, shift);
                log_z[(b * s.H + h) * s.T + start + i] = shift + std::log(totals[i]);
            }
            long keys = s.past + start + block.count - block.low;
            product(block.count, s.D, keys, own.weights.data(), own.wide, 1,
                    own.v.data() + block.low * s.D, s.D, own.out.data(), s.D, false);
            for (long i = 0; i < block.count; i++)
                for (long d = 0; d < s.D; d++) own.out[i * s.D + d] /= totals[i];
            write(own.out.data(), s, b, h, start, block.count, 1.0f, out);
        }
}

// Slopes of the scores: weight * (d_weight - mean of d_weight), the mean being the weighted one.
void soften(float* weights, float* slopes, long width) {
    v16 mean = {};
    for (long c = 0; c < width; c += LANES) mean += load(weights + c) * load(slopes + c);
    float shift = sum(mean);
    for (long c = 0; c < width; c += LANES)
        store(slopes + c, load(weights + c) * (load(slopes + c) - shift));
}

void backward_head(const Shape& s, long b, long g, const Tensor& q, const Tensor& k,
                   const Tensor& v, const Tensor& d_out, const float* log_z, const Tensor& dq,
                   const Tensor& dk, const Tensor& dv, Scratch& own) {
    read(k, s, b, g, 0, s.T, 1.0f, own.k.data());
    read(v, s, b, g, 0, s.T, 1.0f, own.v.data());
    transpose(own.k.data(), s.T, s.D, own.kt.data(), own.wide);
    transpose(own.v.data(), s.T, s.D, own.vt.data(), own.wide);
    std::fill(own.dk.begin(), own.dk.end(), 0.0f);
    std::fill(own.dv.begin(), own.dv.end(), 0.0f);
    float *weights = own.weights.data(), *slopes = own.slopes.data();
    for (long h = g * s.H / s.K; h < (g + 1) * s.H / s.K; h++)
        for (long start = 0; start < s.T; start += BLOCK) {
            Block block(s, b, start, BLOCK, LANES);
            long keys = start + block.count - block.low, at = block.low * s.D;
            read(q, s, b, h, start, block.count, s.scale, own.q.data());
            read(d_out, s, b, h, start, block.count, 1.0f, own.d_out.data());
            product(block.count, block.width, s.D, own.q.data(), s.D, 1, own.kt.data() + block.low,
                    own.wide, weights, own.wide, false);
            product(block.count, block.width, s.D, own.d_out.data(), s.D, 1,
                    own.vt.data() + block.low, own.wide, slopes, own.wide, false);
            for (long i = 0; i < block.count; i++) {
                float* row = weights + i * own.wide;
                weigh(row, block.width, block.from(s, b, i), block.to(s, i),
                      log_z[(b * s.H + h) * s.T + start + i]);
                soften(row, slopes + i * own.wide, block.width);
            }
            product(keys, s.D, block.count, weights, 1, own.wide, own.d_out.data(), s.D,
                    own.dv.data() + at, s.D, true);
            product(keys, s.D, block.count, slopes, 1, own.wide, own.q.data(), s.D,
                    own.dk.data() + at, s.D, true);
            product(block.count, s.D, keys, slopes, own.wide, 1, own.k.data() + at, s.D,
                    own.out.data(), s.D, false);
            write(own.out.data(), s, b, h, start, block.count, s.scale, dq);
        }
    write(own.dk.data(), s, b, g, 0, s.T, 1.0f, dk);
    write(own.dv.data(), s, b, g, 0, s.T, 1.0f, dv);
}

// ---------------------------------------------------------------- cross-entropy

// One row of V logits becomes the gradient of its loss -log p(target) + z_loss log(Z)^2, in place.
template <class Number, class Read, class Write>
void loss_row(Number* row, long V, long target, float z_loss, float* room, float* nll, float* log_z,
              bool wanted, Read wide, Write narrow) {
    long padded = rounded_up(V, LANES);
    for (long v = 0; v < V; v++) room[v] = wide(row[v]);
    std::fill(room + V, room + padded, -INFINITY);
    float picked = room[target], most = top(room, padded, 0, V);
    float total = weigh(room, padded, 0, V, most);
    *log_z = most + std::log(total);
    *nll = *log_z - picked;
    if (!wanted) return;
    float slope = (1.0f + 2.0f * z_loss * *log_z), share = slope / total;
    float own = room[target] * share - 1.0f;
    for (long v = 0; v < V; v++) row[v] = narrow(room[v] * share);
    row[target] = narrow(own);
}

}  // namespace

extern "C" {

void cross_entropy(void* logits, const int64_t* targets, long N, long V, float z_loss, float* nll,
                   float* log_z, int bf16, int wanted, int threads) {
    auto same = [](float x) { return x; };
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(V + LANES);
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++)
            if (bf16)
                loss_row((uint16_t*)logits + n * V, V, targets[n], z_loss, room.data(), nll + n,
                         log_z + n, wanted, from_bf16, to_bf16);
            else
                loss_row((float*)logits + n * V, V, targets[n], z_loss, room.data(), nll + n,
                         log_z + n, wanted, same, same);
    }
}

void attention(const Shape* s, const Tensor* q, const Tensor* k, const Tensor* v, const Tensor* out,
               float* log_z, int threads) {
    if (tiled::takes(*s, {q, k, v, out}))
        return tiled::attention(*s, *q, *k, *v, *out, log_z, threads);
#pragma omp parallel num_threads(threads)
    {
        Scratch own(*s, false);
#pragma omp for schedule(dynamic)
        for (long n = 0; n < s->B * s->K; n++)
            forward_head(*s, n / s->K, n % s->K, *q, *k, *v, *out, log_z, own);
    }
}

void attention_backward(const Shape* s, const Tensor* q, const Tensor* k, const Tensor* v,
                        const Tensor* d_out, const float* log_z, const Tensor* dq, const Tensor* dk,
                        const Tensor* dv, int threads) {
    if (tiled::takes(*s, {q, k, v, d_out}))
        return tiled::attention_backward(*s, *q, *k, *v, *d_out, log_z, *dq, *dk, *dv, threads);
#pragma omp parallel num_threads(threads)
    {
        Scratch own(*s, true);
#pragma omp for schedule(dynamic)
        for (long n = 0; n < s->B * s->K; n++)
            backward_head(*s, n / s->K, n % s->K, *q, *k, *v, *d_out, log_z, *dq, *dk, *dv, own);
    }
}

}
