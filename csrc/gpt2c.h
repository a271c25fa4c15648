/* gpt2c's kernels: every op, forward and backward, on memory that the caller owns.
 *
 * This header lists the ops. build.py gives it to cffi, which reads plain declarations only. The NumPy reference
 * (gpt2c/kernels/reference) and the binding (gpt2c/kernels/binding.py) have the same ops with the same names and
 * argument order, without the arguments that only C needs: sizes, scratch memory and the team of threads (team.h).
 * Python passes a pool where a kernel takes a team; build.py generates the function between them.
 *
 * Letters: B batch, T time, N = B*T rows, C channels, OC output channels, V vocabulary, NH heads, HS = C/NH head size,
 * D pairs of a head's channels, KV key and value heads, W channels of q, k and v, P positions, S offsets.
 * Order: outputs, inputs, scalars, scratch, sizes, team. Arrays are C-contiguous float32 unless their type says
 * otherwise. Sizes are positive; only decode_step's N may be 0.
 * Parameter gradients (dweight, dbias, dwte, dwpe) are accumulated (+=), because batches add up; matmul_backward
 * overwrites its own if asked. Activations and their gradients are overwritten (=), except the dx of a norm.
 * The same inputs give the same bits with any number of threads. No kernel allocates, prints, exits or keeps state. */

#ifndef GPT2C_H
#define GPT2C_H

#include <stdint.h>

typedef struct Pool Pool;
typedef struct Team Team;

/* ---- the machine -------------------------------------------------------------------------------------------- */

/* Returns 1 if the CPU and the operating system support the x86 feature ("avx2", "fma", "avx512f", ...), else 0. */
int cpu_supports(const char *feature);

/* Runs `iterations` rounds of independent multiply-adds of this precision (FP32, BF16, FP16, INT8) in registers for
 * each thread; those of FP16 are added to floats as often as in a product. Returns the number of operations done. The
 * caller times it: operations / seconds is the peak of this instruction set. sums (threads) is scratch. */
double fma_burn(double *sums, int64_t iterations, int precision, Team *team);

/* Reads data (n) once, except a remainder of less than 1 KB, and returns the sum of the floats that it read. The caller
 * times it: 4n / seconds is the memory's read bandwidth. sums (SLICES) is scratch. */
enum { SLICES = 64 };
double memory_read(const float *data, double *sums, int64_t n, Team *team);

/* Sends a cache line to and fro between two threads, `rounds` times (below 2^30). Returns the mean nanoseconds of one
 * way, or 0 if the two did not run at the same time, which is known after some 6 ms. line (16) is 0, on a cache line of
 * its own; way (1) is scratch. */
double line_travel(int32_t *line, double *way, int64_t rounds, Team *team);

/* A pool is the memory of `threads` threads that run kernels together: pool_size bytes that start on a cache line. The
 * caller is one of the threads. pool_start starts the others and returns `threads`. If the system refuses a thread, it
 * ends those that it started and returns the lower number that the system allowed. pool_stop ends the threads; then the
 * caller may free the memory. Only one thread at a time may call kernels with a pool. After a fork the child must not
 * use its parent's pool: it has the memory but not the threads. */
int64_t pool_size(int threads);
int pool_start(Pool *pool, int threads);
void pool_stop(Pool *pool);

/* The type of a weight or of a cache. FP16 is IEEE half precision; weights hold no NaN or infinity. INT8 is of weights,
 * an unsigned byte with a scale for each row: weight = scale * (byte - 128). SIGNED8 is of caches, a signed byte with a
 * scale for each row: number = scale * byte. */
enum { FP32, FP16, INT8, BF16, SIGNED8 };

/* The precision of an op's products. BF16: both factors are rounded to 16 bits, to nearest even, and the products are
 * added in float; denormals count as 0. FP16: each row of a factor, along the sum, is scaled by a power of two and
 * rounded to 11 bits, and short runs of products are added in halves (gemm.c); forward of up to 16 rows, and attention,
 * multiply floats.
 *
 * An array that is a factor of products of BF16 may hold 16 bits itself, rounded when it is written: half the memory,
 * and the same products. It is a void pointer here, and the argument out_type, x_type or qkv_type says FP32 or BF16.
 * BF16 is for products of BF16 alone. */

/* Floats of scratch memory that a kernel needs; gemm_scratch_size is for lora_forward, lora_scratch_size for
 * lora_backward. */
int64_t gemm_scratch_size(int threads);
int64_t matmul_scratch_size(int64_t N, int64_t C, int64_t OC, int precision, int out_type, int type, int threads);
int64_t matmul_backward_scratch_size(int64_t C, int64_t OC, int precision, int type, int threads);
int64_t lora_scratch_size(int64_t N, int64_t R, int threads);
int64_t attention_scratch_size(int64_t T, int64_t P, int64_t HS, int threads);

/* ---- ragged batches ----------------------------------------------------------------------------------------- */

/* Where an op has offsets (S), a batch may be ragged: then B is 1 and the T rows are S - 1 sequences one after the
 * other, of which the i-th has rows offsets[i] to offsets[i + 1]. offsets NULL and S 0: B sequences of T rows. */

/* ---- encoder: token + position embedding -------------------------------------------------------------------- */

/* out (B,T,C) = wte[idx] + wpe[position + t], t counted in each sequence;  idx (B,T) in [0,V), wte (V,C) of `type`, wpe
 * (P,C) for all positions there are or NULL, scale (V) for INT8, else NULL. */
void encoder_forward(float *out, const int32_t *idx, const void *wte, const float *wpe, const float *scale,
                     const int32_t *offsets, int64_t position, int type, int64_t B, int64_t T, int64_t C, int64_t S,
                     Team *team);

/* dwte (V,C) += , dwpe (P,C) += the rows of dout (B,T,C); either may be NULL. */
void encoder_backward(float *dwte, float *dwpe, const float *dout, const int32_t *idx, const int32_t *offsets,
                      int64_t B, int64_t T, int64_t C, int64_t S, Team *team);

/* ---- layernorm ---------------------------------------------------------------------------------------------- */

/* out (N,C) = (x - mean) * rstd * weight + bias; weight, bias (C). mean and rstd (N) are for the backward pass. */
void layernorm_forward(void *out, float *mean, float *rstd, const float *x, const float *weight, const float *bias,
                       float eps, int out_type, int64_t N, int64_t C, Team *team);

/* dx (N,C), dweight and dbias (C) +=. dx too, because x is the residual stream: dx already holds the gradient of the
 * skip connection. dweight or dbias may be NULL. */
void layernorm_backward(float *dx, float *dweight, float *dbias, const float *dout, const float *x, const float *weight,
                        const float *mean, const float *rstd, int64_t N, int64_t C, Team *team);

/* ---- rmsnorm ------------------------------------------------------------------------------------------------ */

/* out (N,C) = x * rstd * weight;  rstd (N) = 1 / sqrt(mean(x^2) + eps) is kept for the backward pass. */
void rmsnorm_forward(void *out, float *rstd, const float *x, const float *weight, float eps, int out_type, int64_t N,
                     int64_t C, Team *team);

/* dx (N,C) +=, as layernorm_backward's, dweight (C) +=, which may be NULL. */
void rmsnorm_backward(float *dx, float *dweight, const float *dout, const float *x, const float *weight,
                      const float *rstd, int64_t N, int64_t C, Team *team);

/* ---- matmul ------------------------------------------------------------------------------------------------- */

/* out (N,OC) = x (N,C) weight (OC,C)^T + bias (OC); bias may be NULL. With INT8 weights scale is (OC), each row of x is
 * quantized to 8 bits with its own scale, and C is at most 65536; `precision` is that of other weights. */
void matmul_forward(void *out, const void *x, const void *weight, const float *bias, const float *scale, int precision,
                    int out_type, int x_type, int type, float *scratch, int64_t N, int64_t C, int64_t OC, Team *team);

/* dweight (OC,C) += dout^T x and dbias (OC) += column sums of dout (N,OC); both are overwritten if `accumulate` is 0.
 * Then dx (N,C) = dout weight, added to the old dx if `add`. Each of them may be NULL, dx may be x if it is written. */
void matmul_backward(float *dx, float *dweight, float *dbias, const float *dout, const void *x, const void *weight,
                     const float *scale, int accumulate, int precision, int add, int x_type, int type, float *scratch,
                     int64_t N, int64_t C, int64_t OC, Team *team);

/* ---- lora: low-rank adapters -------------------------------------------------------------------------------- */

/* out (N,OC) = y + u up^T, u (N,R) = scale * x down^T: the adapter down (R,C), up (OC,R) of a linear layer with the
 * input x (N,C) and the output y (N,OC). out may be y; u is for the backward pass. */
void lora_forward(float *out, float *u, const float *y, const float *x, const float *down, const float *up, float scale,
                  float *scratch, int64_t N, int64_t C, int64_t OC, int64_t R, Team *team);

/* dup (OC,R) += dout^T u and ddown (R,C) += du^T x with du = scale * dout up; both are overwritten if `accumulate` is
 * 0. Then dx (N,C) = du down, the adapter's part of the gradient. Each of them may be NULL, dx may be x. */
void lora_backward(float *dx, float *ddown, float *dup, const float *dout, const float *x, const float *u,
                   const float *down, const float *up, float scale, int accumulate, float *scratch, int64_t N,
                   int64_t C, int64_t OC, int64_t R, Team *team);

/* out (C,R) = x (R,C)^T, for files that store linear weights as (C,OC). */
void matrix_transpose(float *out, const float *x, int64_t R, int64_t C, Team *team);

/* ---- decoding: one step of inference in one call ---------------------------------------------------------------- */

/* A linear layer: weight (OC,C) of `type`, scale (OC) for INT8, bias (OC) or NULL. */
typedef struct {
    const void *weight;
    const float *scale, *bias;
    int64_t C, OC;
    int type;
} Linear;

/* A stage of a decoding step: an op on the newest token of each of N texts. It reads x and writes out, or adds to it.
 * An op ignores the fields of others. */
enum {
    /* out (N,C) = rows of linear (V,C) + rows of wpe (P,C), which may be NULL */
    ENCODER,
    /* out (N,C) = (x - mean) * rstd * gain + shift;  x (N,C), gain and shift (C) */
    LAYERNORM,
    /* out (N,C) = x * rstd * gain */
    RMSNORM,
    /* out (N,OC) = linear(x (N,C)) with products of `precision`; `then` says what follows. With an adapter, down (R,C)
     * and up (OC,R), factor * x down^T up^T is added before that; down is else NULL. low (N,R) is scratch memory. */
    MATMUL,
    /* out (N,NH HS) from x (N,(NH + 2 KV) HS), as attention_forward's qkv, and the texts' keys and values (S,KV,P,HS)
     * of type `cache`, with scales (S,KV,P) for SIGNED8, where the token's own are stored first. q and k in x are
     * turned by their rows of cos and sin (at least P,HS/2), unless these are NULL. */
    ATTENTION
};
/* What a MATMUL does with its result: writes it, adds it to the old out, writes GELU of it, or writes out (N,OC/2) =
 * silu(gate) * up of the two halves of its columns, with inner (N,OC/2) as scratch memory. */
enum { WRITE, ADD, GELU, SWIGLU };
typedef struct {
    int op, then, precision;
    float *out, *x, *inner;
    Linear linear;
    const float *wpe, *gain, *shift, *cos, *sin;
    float eps;
    const float *down, *up;
    float *low, factor;
    void *keys, *values;
    float *key_scales, *value_scales;
    int cache;
    int64_t C, NH, KV, HS, P, R;
} Stage;

/* One decoding step for N texts, N small: the `count` stages in their order. Text i has its newest token in tokens (N),
 * at positions[i] (N), and its keys and values in slot slots[i] (N); the slots differ. A text gets the same bits alone
 * and with others. */
void decode_step(const Stage *stages, int64_t count, const int32_t *tokens, const int32_t *slots,
                 const int32_t *positions, float *scratch, int64_t N, Team *team);
int64_t decode_scratch_size(const Stage *stages, int64_t count, int64_t N, int threads);

/* ---- attention: causal, grouped-query ------------------------------------------------------------------------ */

/* out (B,T,C) from qkv (B,T,W). A row of qkv holds q of NH heads, then k, then v of KV heads of HS channels: W = C + 2
 * KV HS. Query head h attends to key head h / (NH / KV); KV = NH is multi-head attention. lse (B,NH,T), the log of each
 * row's softmax denominator, is all that the backward pass needs of the T x T scores. With a cache, keys and values
 * (B,KV,P,HS), else both NULL, the T tokens stand at `position` and after it in their text: their k and v go to its
 * rows from there on, rounded to the cache's `type`, and their q attend to all rows up to their own, as the cache holds
 * them. SIGNED8 has a scale for each row in key_scales and value_scales (B,KV,P), which are NULL otherwise. Without a
 * cache, dropout > 0 multiplies the softmax by factors as dropout_forward's: a row is a token, a column a key of its
 * sequence, each head has its own. out has the type of qkv. */
void attention_forward(void *out, float *lse, void *keys, void *values, float *key_scales, float *value_scales,
                       const void *qkv, const int32_t *offsets, int64_t position, double dropout, uint64_t key,
                       uint64_t first, int precision, int qkv_type, int type, float *scratch, int64_t B, int64_t T,
                       int64_t C, int64_t NH, int64_t W, int64_t P, int64_t S, Team *team);

/* dqkv (B,T,W) from dout (B,T,C) and what the forward pass read and wrote; dqkv may be qkv. */
void attention_backward(float *dqkv, const float *dout, const void *qkv, const void *out, const float *lse,
                        const int32_t *offsets, double dropout, uint64_t key, uint64_t first, int precision,
                        int qkv_type, float *scratch, int64_t B, int64_t T, int64_t C, int64_t NH, int64_t W, int64_t S,
                        Team *team);

/* ---- rope: rotary positions ---------------------------------------------------------------------------------- */

/* out (B,T,W): a row of qkv (B,T,W) holds heads of 2D channels, q, k and v. Of the first `heads`, those of q and k,
 * each pair (i, i + D) is turned by the angle whose cosine and sine stand in the token's row of cos and sin (at least
 * position + T,D); the others are copied. out may be qkv. */
void rope_forward(void *out, const float *qkv, const float *cos, const float *sin, const int32_t *offsets,
                  int64_t heads, int64_t position, int out_type, int64_t B, int64_t T, int64_t W, int64_t D, int64_t S,
                  Team *team);

/* dqkv (B,T,W) = dout (B,T,W), its pairs turned back; dqkv may be dout. */
void rope_backward(float *dqkv, const float *dout, const float *cos, const float *sin, const int32_t *offsets,
                   int64_t heads, int64_t position, int64_t B, int64_t T, int64_t W, int64_t D, int64_t S, Team *team);

/* ---- elementwise -------------------------------------------------------------------------------------------- */

/* out (n) = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), the tanh form of GELU. out may be x, whose type it has.
 */
void gelu_forward(void *out, const void *x, int x_type, int64_t n, Team *team);

/* dx (n) = dout * gelu'(x); dx may be dout. */
void gelu_backward(float *dx, const float *dout, const void *x, int x_type, int64_t n, Team *team);

/* out (N,C) = silu(gate) * up, silu(gate) = gate / (1 + e^-gate); a row of x (N,2C) holds gate, then up. out has the
 * type of x. */
void swiglu_forward(void *out, const void *x, int x_type, int64_t N, int64_t C, Team *team);

/* dx (N,2C) = the gradients of gate and up, from dout (N,C); dx may be x. */
void swiglu_backward(float *dx, const float *dout, const void *x, int x_type, int64_t N, int64_t C, Team *team);

/* out (n) = x + branch; out may be x. */
void residual_forward(float *out, const float *x, const float *branch, int64_t n, Team *team);

/* out (N,C) = x * factor: 0 with probability `dropout`, in [0, 1), else 1 / (1 - dropout). The factors are a function
 * of key, column and row number: row i has number first + i, whose upper 32 bits are those of first. The gradient of x
 * is the same op on that of out. out may be x. */
void dropout_forward(float *out, const float *x, double dropout, uint64_t key, uint64_t first, int64_t N, int64_t C,
                     Team *team);

/* ---- softmax + cross-entropy -------------------------------------------------------------------------------- */

/* losses (N) = lse - logits[target] in nats, lse (N) = log(sum(exp(logits (N,V)))). Target -1 is ignored: loss 0. */
void crossentropy_forward(float *losses, float *lse, const float *logits, const int32_t *targets, int64_t N, int64_t V,
                          Team *team);

/* dlogits (N,V) = (exp(logits - lse) - onehot(target)) * weights[row] * scale; rows of ignored targets and of weight 0
 * are 0. weights (N) may be NULL: all 1. dlogits may be logits. */
void crossentropy_backward(float *dlogits, const float *logits, const float *lse, const int32_t *targets,
                           const float *weights, float scale, int64_t N, int64_t V, Team *team);

/* ---- optimizer ---------------------------------------------------------------------------------------------- */

/* AdamW step t = 1, 2, ... of n parameters: updates param, m and v in place from grad * grad_scale. */
void adamw_update(float *param, float *m, float *v, const float *grad, float learning_rate, double beta1, double beta2,
                  float eps, float weight_decay, int64_t t, float grad_scale, int64_t n, Team *team);

/* Returns the Euclidean norm of grad (n), summed in double in an order that depends on n alone. sums (SLICES) is
 * scratch. */
double global_norm(const float *grad, double *sums, int64_t n, Team *team);

#endif
