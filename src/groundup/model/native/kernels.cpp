// The hot loops of inference on a CPU; built on first use by kernels.py, called through ctypes.
//
// Every result depends on its own row alone, in one order of additions, however many rows a call
// has and however many threads run: the same request gives the same bits whatever else runs.
//
// Names: M rows of activations, N outputs, K inputs of a matrix product; T tokens, H query heads,
// G key/value heads, D head size. Matrices are row-major float32 unless said otherwise.

#include "attention.hpp"
#include "products.hpp"

namespace {

// One decoder layer with norms before attention and MLP, as kernels.py describes it.
struct Layer {
    const float *norm, *mlp_norm, *q_norm, *k_norm;  // the last two may be absent
    Matrix qkv[3], o, gate_up[2], down;
    Heads heads;
    long E, wide;  // the hidden size and the MLP's
    float eps;
};

// What a layer computes on its way, for T tokens.
struct Scratch {
    std::vector<float> normed, qkv, mixed, wide, gated;
    Bytes bytes;
    Scratch(const Layer& l, long T)
        : normed(T * l.E),
          qkv(T * (l.heads.H + 2 * l.heads.G) * l.heads.D),
          mixed(T * l.heads.H * l.heads.D),
          wide(T * 2 * l.wide),
          gated(T * l.wide),
          bytes(T, std::max({l.E, l.wide, l.heads.H * l.heads.D})) {}
};

// x of T tokens after one layer, in place.
void one_layer(Crew& crew, const Layer& l, const Step& step, float* x, float* keys, float* values,
               Scratch& s) {
    const Heads& h = l.heads;
    long T = step.T, q_width = h.H * h.D, width = q_width + 2 * h.G * h.D;
    float *normed = s.normed.data(), *gated = s.gated.data();
    auto norm_by = [&](const float* weight) {
        return [=, &l](long t) { norm_row(x + t * l.E, weight, normed + t * l.E, l.E, l.eps, 0); };
    };
    product(crew, l.qkv, 3, normed, norm_by(l.norm), nullptr, s.qkv.data(), T, l.E, s.bytes);
    Cached cached{step, h, keys, values};
    crew.each(T, [&](long t) {
        float* row = s.qkv.data() + t * width;
        for (long i = 0; l.q_norm && i < h.H + h.G; i++)
            norm_row(row + i * h.D, i < h.H ? l.q_norm : l.k_norm, row + i * h.D, h.D, l.eps, 0);
        store(cached, t, row + q_width, row + q_width + h.G * h.D);
    });
    crew.each(T * h.G, [&](long i) {  // tokens of one request meet the same keys one after the other
        long t = i % T;
        attend_group(cached, t, i / T, s.qkv.data() + t * width, s.mixed.data() + t * q_width);
    });
    product(crew, &l.o, 1, s.mixed.data(), Ready(), x, x, T, q_width, s.bytes);
    product(crew, l.gate_up, 2, normed, norm_by(l.mlp_norm), nullptr, s.wide.data(), T, l.E, s.bytes);
    auto gate = [&](long t) {
        const float* row = s.wide.data() + t * 2 * l.wide;
        gate_row(row, row + l.wide, gated + t * l.wide, l.wide);
    };
    product(crew, &l.down, 1, gated, gate, x, x, T, l.wide, s.bytes);
}

// Row `at` of a matrix goes into its panel, four bytes beside those of the panel's other rows.
void place_row(const std::vector<uint8_t>& bytes, uint8_t* packed, long at) {
    long stride = long(bytes.size());
    uint8_t* out = packed + at / PANEL * stride * PANEL + at % PANEL * 4;
    for (long k = 0; k < stride; k += 4) std::memcpy(out + k * PANEL, &bytes[k], 4);
}

}  // namespace

extern "C" {

int int8_offset() { return OFFSET; }

// Up to three products of the same x, their outputs side by side.
void linear(const Matrix* matrices, int count, const float* x, float* out, long M, long K,
            int threads) {
    Bytes bytes(matrices->kind == INT8 ? M : 0, K);
    run_team(threads, [&](Crew& crew) {
        product(crew, matrices, count, x, Ready(), nullptr, out, M, K, bytes);
    });
}

void rms_norm(const float* x, const float* weight, float* out, long M, long K, float eps, int shift,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(M < 16 ? 1 : threads)
    for (long m = 0; m < M; m++) norm_row(x + m * K, weight, out + m * K, K, eps, shift);
}

// Rows of both lie `stride` apart.
void silu_mul(const float* gate, const float* up, long stride, float* out, long M, long N, int threads) {
#pragma omp parallel for schedule(static) num_threads(M < 4 ? 1 : threads)
    for (long m = 0; m < M; m++) gate_row(gate + m * stride, up + m * stride, out + m * N, N);
}

// Store the keys and values of T tokens; then let the first R of them attend. Strides are those of
// tokens.
void attend(const Step* step, const Heads* heads, const float* q, const float* k, const float* v,
            long q_stride, long k_stride, long v_stride, float* keys, float* values, float* out,
            int threads) {
    Cached cached{*step, *heads, keys, values};
    run_team(threads, [&](Crew& crew) {
        crew.each(step->T, [&](long t) { store(cached, t, k + t * k_stride, v + t * v_stride); });
        crew.each(step->R * heads->G, [&](long i) {
            long t = i % step->R;
            attend_group(cached, t, i / step->R, q + t * q_stride, out + t * heads->H * heads->D);
        });
    });
}

// x of T tokens after `count` layers of one shape and, where there is one, a last norm, in place.
void layers(const Layer* layers, long count, const Step* step, float* x, float* const* keys,
            float* const* values, const float* norm, int threads) {
    Scratch scratch(*layers, step->T);
    run_team(threads, [&](Crew& crew) {
        for (long i = 0; i < count; i++)
            one_layer(crew, layers[i], *step, x, keys[i], values[i], scratch);
        long E = layers->E;
        float eps = layers->eps;
        if (norm)
            crew.each(step->T, [&](long t) { norm_row(x + t * E, norm, x + t * E, E, eps, 0); });
    });
}

// int8 rows in panels; `first` is the row that they start at.
void pack(const int8_t* rows, long N, long K, uint8_t* packed, long first, int threads) {
    long stride = padded(K);
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> bytes(stride, uint8_t(OFFSET));
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            const int8_t* row = rows + n * K;
            for (long k = 0; k < K; k++) bytes[k] = uint8_t(row[k] + OFFSET);
            place_row(bytes, packed, first + n);
        }
    }
}

// int8 rows and scales of a float32 matrix, in panels; `first` is the row that it starts at.
void quantize(const float* weight, long N, long K, uint8_t* packed, float* scale, long first,
              int threads) {
    long stride = padded(K);
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> bytes(stride, uint8_t(OFFSET));
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            const float* row = weight + n * K;
            float largest = 0.0f;
#pragma omp simd reduction(max : largest)
            for (long k = 0; k < K; k++) largest = std::max(largest, std::fabs(row[k]));
            float unit = largest / 127.0f, divisor = unit > 0.0f ? unit : 1.0f;
            long at = first + n;
            scale[at] = unit;
#pragma omp simd
            for (long k = 0; k < K; k++)
                bytes[k] = uint8_t(int32_t(std::nearbyint(row[k] / divisor)) + OFFSET);
            place_row(bytes, packed, at);
        }
    }
}

}  // extern "C"
