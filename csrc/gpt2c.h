/* gpt2c's kernels: every op, forward and backward, on memory that the caller owns.
 *
 * This header is the op list. build.py feeds it to cffi, so it holds plain declarations only; the NumPy reference
 * (gpt2c/kernels/reference) and the binding (gpt2c/kernels/binding.py) have the same ops with the same names and
 * argument order, without what C must be told and arrays know: sizes, scratch, the team of threads (team.h). Python
 * hands a pool where a kernel has a team; build.py generates the function between.
 *
 * Letters: B batch, T time, N = B*T rows, C channels, OC output channels, V vocabulary, NH heads, HS = C/NH head size,
 * D pairs of a head's channels.
 * Order: outputs, inputs, scalars, scratch, sizes, team. All arrays are C-contiguous float32 unless typed otherwise,
 * all sizes positive, but N of decode_step, which may be 0.
 * Parameter gradients (dweight, dbias, dwte, dwpe) are accumulated (+=), because batches add up; matmul_backward writes
 * its own when asked. Activations and their gradients are written (=), except the dx of a norm.
 * Same inputs give the same bits, whoever computes what. No kernel allocates, prints, exits or keeps state. */

#ifndef GPT2C_H
#define GPT2C_H

#include <stdint.h>

typedef struct Pool Pool;
typedef struct Team Team;

/* ---- the machine -------------------------------------------------------------------------------------------- */

/* 1 if this CPU and operating system support the x86 feature ("avx2", "fma", "avx512f", ...), else 0. */
int cpu_supports(const char *feature);

/* Runs `iterations` rounds of independent fused multiply-adds in registers for each thread; returns the number of
 * floating-point operations done. The caller times it: operations / seconds is the peak of this instruction set.
 * sums (threads) is scratch. */
double fma_burn(double *sums, int64_t iterations, Team *team);

/* Reads data (n) once, up to a last part of less than 1 KB, and returns the sum of what it read. The caller times it:
 * 4n / seconds is the bandwidth of reading memory. sums (SLICES) is scratch. */
enum { SLICES = 64 };
double memory_read(const float *data, double *sums, int64_t n, Team *team);

/* A pool is memory for `threads` threads that run kernels together, the caller among them: pool_size bytes, which start
 * on a cache line. pool_start starts the others and returns how many there are in all, or the lower number for which
 * the system had room, and then none runs. pool_stop ends them; the memory is then the caller's again. One thread at a
 * time may call kernels with a pool, and a child of a fork, which has its memory but not its threads, none. */
int64_t pool_size(int threads);
int pool_start(Pool *pool, int threads);
void pool_stop(Pool *pool);

/* The type of a weight. FP16 is IEEE's half, without NaN and infinity; INT8 is 8 bits without sign, 128 too large, and
 * needs a scale for each of its rows. */
enum { FP32, FP16, INT8 };

/* Floats of scratch memory that kernels need: gemm's is that of matmul_backward. */
int64_t gemm_scratch_size(int threads);
int64_t matmul_scratch_size(int64_t N, int64_t C, int64_t OC, int type, int threads);
int64_t attention_scratch_size(int64_t T, int64_t HS, int threads);

/* ---- encoder: token + position embedding -------------------------------------------------------------------- */

/* out (B,T,C) = wte[idx] + wpe[position..];  idx (B,T) in [0,V), wte (V,C) of `type`, wpe (at least position + T,C),
 * scale (V) for INT8, else NULL. */
void encoder_forward(float *out, const int32_t *idx, const void *wte, const float *wpe, const float *scale,
                     int64_t position, int type, int64_t B, int64_t T, int64_t C, Team *team);

/* dwte (V,C) += , dwpe (T..,C) += the rows of dout (B,T,C). */
void encoder_backward(float *dwte, float *dwpe, const float *dout, const int32_t *idx, int64_t B, int64_t T, int64_t C,
                      Team *team);

/* ---- layernorm ---------------------------------------------------------------------------------------------- */

/* out (N,C) = (x - mean) * rstd * weight + bias;  mean, rstd (N) are kept for the backward pass. */
void layernorm_forward(float *out, float *mean, float *rstd, const float *x, const float *weight, const float *bias,
                       float eps, int64_t N, int64_t C, Team *team);

/* dx (N,C) += (x is the residual stream: its gradient already holds what came past the branch), dweight, dbias (C) +=.
 */
void layernorm_backward(float *dx, float *dweight, float *dbias, const float *dout, const float *x, const float *weight,
                        const float *mean, const float *rstd, int64_t N, int64_t C, Team *team);

/* ---- rmsnorm ------------------------------------------------------------------------------------------------ */

/* out (N,C) = x * rstd * weight;  rstd (N) = 1 / sqrt(mean(x^2) + eps) is kept for the backward pass. */
void rmsnorm_forward(float *out, float *rstd, const float *x, const float *weight, float eps, int64_t N, int64_t C,
                     Team *team);

/* dx (N,C) +=, as layernorm_backward's, dweight (C) +=. */
void rmsnorm_backward(float *dx, float *dweight, const float *dout, const float *x, const float *weight,
                      const float *rstd, int64_t N, int64_t C, Team *team);

/* ---- matmul ------------------------------------------------------------------------------------------------- */

/* out (N,OC) = x (N,C) weight (OC,C)^T + bias (OC), bias may be NULL. INT8: scale (OC), and each row of x is rounded to
 * 8 bits with a scale of its own; C at most 65536. */
void matmul_forward(float *out, const float *x, const void *weight, const float *bias, const float *scale, int type,
                    float *scratch, int64_t N, int64_t C, int64_t OC, Team *team);

/* dweight (OC,C) += dout^T x, dbias (OC) += column sums of dout (N,OC), both written instead if `accumulate` is 0; then
 * dx (N,C) = dout weight. dbias may be NULL, dx may be x. */
void matmul_backward(float *dx, float *dweight, float *dbias, const float *dout, const float *x, const float *weight,
                     int accumulate, float *scratch, int64_t N, int64_t C, int64_t OC, Team *team);

/* out (C,R) = x (R,C)^T: linear weights in files are (C,OC). */
void matrix_transpose(float *out, const float *x, int64_t R, int64_t C, Team *team);

/* ---- reading a model: a step of decoding in one call ----------------------------------------------------------- */

/* A linear layer: weight (OC,C) of `type`, scale (OC) for INT8, bias (OC) or NULL. */
typedef struct {
    const void *weight;
    const float *scale, *bias;
    int64_t C, OC;
    int type;
} Linear;

typedef struct {
    const float *ln_1_weight, *ln_1_bias, *ln_2_weight, *ln_2_bias;
    Linear c_attn, attn_proj, c_fc, mlp_proj;
} Layer;

/* A model to be read: L layers, inner channels F; wte is the lm_head as well. */
typedef struct {
    Linear wte;
    const float *wpe, *ln_f_weight, *ln_f_bias;
    const Layer *layers;
    int64_t L, NH, F;
    float eps;
} Decoder;

/* One more token for N texts at once, N small: logits (N,V) of what follows tokens (N), which stand at positions (N) in
 * the texts whose keys and values are slots (N), all different, of keys and values (L,S,NH,P,HS). The same bits for a
 * text alone and among others. */
void decode_step(float *logits, float *keys, float *values, const int32_t *tokens, const int32_t *slots,
                 const int32_t *positions, const Decoder *model, float *scratch, int64_t N, int64_t S, int64_t P,
                 Team *team);
int64_t decode_scratch_size(const Decoder *model, int64_t N, int64_t P, int threads);

/* ---- attention: causal, multi-head -------------------------------------------------------------------------- */

/* out (B,T,C) from qkv (B,T,3C), where a row holds q, k, v of NH heads; lse (B,NH,T), the log of each row's softmax
 * denominator, is all that the backward pass needs of the T x T scores; it may be NULL. With a cache, keys and values
 * (B,NH,P,HS), else both NULL, the T tokens stand at `position` and after it in their text: their k and v go to its
 * rows from there on, and their q attend to all rows up to their own. */
void attention_forward(float *out, float *lse, float *keys, float *values, const float *qkv, int64_t position,
                       float *scratch, int64_t B, int64_t T, int64_t C, int64_t NH, int64_t P, Team *team);

/* dqkv (B,T,3C) from dout (B,T,C) and what the forward pass read and wrote; dqkv may be qkv. */
void attention_backward(float *dqkv, const float *dout, const float *qkv, const float *out, const float *lse,
                        float *scratch, int64_t B, int64_t T, int64_t C, int64_t NH, Team *team);

/* ---- rope: rotary positions ---------------------------------------------------------------------------------- */

/* out (B,T,C): a row of qkv (B,T,C) holds heads of 2D channels, q, k and v. Of the first `heads`, those of q and k,
 * each pair (i, i + D) is turned by the angle whose cosine and sine stand in the token's row of cos and sin (at least
 * position + T,D); the others are copied. out may be qkv. */
void rope_forward(float *out, const float *qkv, const float *cos, const float *sin, int64_t heads, int64_t position,
                  int64_t B, int64_t T, int64_t C, int64_t D, Team *team);

/* dqkv (B,T,C) = dout (B,T,C), its pairs turned back; dqkv may be dout. */
void rope_backward(float *dqkv, const float *dout, const float *cos, const float *sin, int64_t heads, int64_t position,
                   int64_t B, int64_t T, int64_t C, int64_t D, Team *team);

/* ---- elementwise -------------------------------------------------------------------------------------------- */

/* out (n) = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), the tanh form of GELU. */
void gelu_forward(float *out, const float *x, int64_t n, Team *team);

/* dx (n) = dout * gelu'(x); dx may be dout. */
void gelu_backward(float *dx, const float *dout, const float *x, int64_t n, Team *team);

/* out (N,C) = silu(gate) * up, silu(gate) = gate / (1 + e^-gate); a row of x (N,2C) holds gate, then up. */
void swiglu_forward(float *out, const float *x, int64_t N, int64_t C, Team *team);

/* dx (N,2C) = the gradients of gate and up, from dout (N,C); dx may be x. */
void swiglu_backward(float *dx, const float *dout, const float *x, int64_t N, int64_t C, Team *team);

/* out (n) = x + branch; out may be x. */
void residual_forward(float *out, const float *x, const float *branch, int64_t n, Team *team);

/* ---- softmax + cross-entropy -------------------------------------------------------------------------------- */

/* losses (N) = lse - logits[target] in nats, lse (N) = log(sum(exp(logits (N,V)))); target -1 is ignored: loss 0. */
void crossentropy_forward(float *losses, float *lse, const float *logits, const int32_t *targets, int64_t N, int64_t V,
                          Team *team);

/* dlogits (N,V) = (exp(logits - lse) - onehot(target)) * scale, rows of ignored targets are 0; dlogits may be logits.
 */
void crossentropy_backward(float *dlogits, const float *logits, const float *lse, const int32_t *targets, float scale,
                           int64_t N, int64_t V, Team *team);

/* ---- optimizer ---------------------------------------------------------------------------------------------- */

/* One AdamW step, t = 1, 2, ..., on n parameters: param, m, v are updated in place from grad * grad_scale. */
void adamw_update(float *param, float *m, float *v, const float *grad, float learning_rate, double beta1, double beta2,
                  float eps, float weight_decay, int64_t t, float grad_scale, int64_t n, Team *team);

/* The Euclidean norm of grad (n), summed in double in an order that n alone decides. sums (SLICES) is scratch. */
double global_norm(const float *grad, double *sums, int64_t n, Team *team);

#endif
