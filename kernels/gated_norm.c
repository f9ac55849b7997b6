/* LN(SiLU(gate) * value) and its gradient on the CPU, a row at a time: what a row needs between its
 * loops stays in the processor's first cache, and memory is passed over once.
 *
 * kernels/c_gated_norm.py compiles this for the machine it runs on. A row of `hidden` is F gates and
 * F values, each padded with zeros to P. Numbers are float32 (4 bytes) or bfloat16 (2 bytes); arithmetic is float32.
 */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "bfloat16.h"

/* A row as float32: itself, or widened into `room`. */
static inline const float *widen(const char *row, int64_t bytes, float *room, int64_t count) {
    if (bytes == 4)
        return (const float *)row;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j)
        room[j] = float_of((uint32_t)((const uint16_t *)row)[j] << 16);
    return room;
}

/* A row rounded to bfloat16. */
static inline void narrow(const float *row, char *out, int64_t count) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j)
        ((uint16_t *)out)[j] = rounded(row[j]) >> 16;
}

/* 1 / (1 + e^-x), within 2e-7 of its value. e^y = 2^n e^r with |r| <= ln(2)/2, e^r by the Taylor
 * series up to r^7; ln(2) in two parts keeps r exact. Where e^-x is cut off, at 1.2e38, the result
 * is below every normal float32 that x times it could matter to. NaN stays NaN in the series. */
static inline float sigmoid(float x) {
    float y = -x > 88.0f ? 88.0f : -x; /* not fminf, which no instruction is */
    y = y < -87.0f ? -87.0f : y;
    float n = (y * 1.44269504f + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float series = 1.0f / 5040;
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    float power = float_of((uint32_t)((int32_t)n + 127) << 23);
    return 1.0f / (1.0f + series * power);
}

/* out (rows, P), mean and rstd (rows) from hidden (rows, 2P), weight and bias (F). */
void gated_norm(const char *hidden, int64_t hidden_bytes, const float *weight, const float *bias,
                char *out, int64_t out_bytes, float *mean, float *rstd, int64_t rows, int64_t F,
                int64_t P, double eps) {
#pragma omp parallel for if (rows * F > 32768)
    for (int64_t i = 0; i < rows; ++i) {
        float gates[F], values[F], product[F];
        const char *row = hidden + i * 2 * P * hidden_bytes;
        const float *gate = widen(row, hidden_bytes, gates, F);
        const float *value = widen(row + P * hidden_bytes, hidden_bytes, values, F);
        float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < F; ++j) {
            product[j] = gate[j] * sigmoid(gate[j]) * value[j];
            sum += product[j];
        }
        const float centre = sum / F;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < F; ++j)
            squares += (product[j] - centre) * (product[j] - centre);
        const float scale = 1.0f / sqrtf(squares / F + (float)eps);
        char *target = out + i * P * out_bytes;
        float *normed = out_bytes == 4 ? (float *)target : product;
#pragma omp simd
        for (int64_t j = 0; j < F; ++j)
            normed[j] = (product[j] - centre) * scale * weight[j] + bias[j];
        if (out_bytes == 2)
            narrow(product, target, F);
        memset(target + F * out_bytes, 0, (P - F) * out_bytes);
        mean[i] = centre;
        rstd[i] = scale;
    }
}

/* d_hidden (rows, 2P), and what each thread has of the gradients of weight and bias, zeroed on
 * entry: d_parameters (threads, 2, F). How many threads there are fixes which rows each has. */
void gated_norm_backward(const char *grad, int64_t grad_bytes, const char *hidden,
                         int64_t hidden_bytes, const float *weight, const float *mean,
                         const float *rstd, char *d_hidden, float *d_parameters, int64_t threads,
                         int64_t rows, int64_t F, int64_t P) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * F > 32768)
    for (int64_t i = 0; i < rows; ++i) {
        float gates[F], values[F], grads[F], normed[F], open[F];
        float *d_weight = d_parameters + omp_get_thread_num() * 2 * F, *d_bias = d_weight + F;
        const char *row = hidden + i * 2 * P * hidden_bytes;
        const float *gate = widen(row, hidden_bytes, gates, F);
        const float *value = widen(row + P * hidden_bytes, hidden_bytes, values, F);
        const float *d_out = widen(grad + i * P * grad_bytes, grad_bytes, grads, F);
        const float centre = mean[i], scale = rstd[i];
        float sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
        for (int64_t j = 0; j < F; ++j) {
            open[j] = sigmoid(gate[j]);
            normed[j] = (gate[j] * open[j] * value[j] - centre) * scale;
            d_weight[j] += d_out[j] * normed[j];
            d_bias[j] += d_out[j];
            sum += d_out[j] * weight[j];
            along += d_out[j] * weight[j] * normed[j];
        }
        sum /= F;
        along /= F;
        char *target = d_hidden + i * 2 * P * hidden_bytes;
        float *d_gate = hidden_bytes == 4 ? (float *)target : normed;
        float *d_value = hidden_bytes == 4 ? (float *)target + P : open;
#pragma omp simd
        for (int64_t j = 0; j < F; ++j) {
            float d_product = (d_out[j] * weight[j] - sum - normed[j] * along) * scale;
            float x = gate[j], s = open[j];
            d_gate[j] = d_product * value[j] * s * (1.0f + x * (1.0f - s));
            d_value[j] = d_product * x * s;
        }
        if (hidden_bytes == 2) {
            narrow(normed, target, F);
            narrow(open, target + P * 2, F);
        }
        memset(target + F * hidden_bytes, 0, (P - F) * hidden_bytes);
        memset(target + (P + F) * hidden_bytes, 0, (P - F) * hidden_bytes);
    }
}
