/* Softmax and cross-entropy of logits (N,V) in one op: losses (N) = lse - logits[target] with
 * lse (N) = log(sum(exp(logits))) of each row.
 *
 * The softmax is never stored: lse is enough to recompute it for the gradient, softmax - onehot(target). Forward reads
 * a row twice (maximum, sum), the second time from the cache; backward reads and writes it once. Threads share the
 * rows. */

#include "internal.h"
#include "vmath.h"

void crossentropy_forward(float *losses, float *lse, const float *logits, const int32_t *targets, int64_t N, int64_t V,
                          Team *team) {
    for_shared (i, N, worth(V), team) {
        const float *row = logits + i * V;
        float highest = row[0];
        vf maximum = vf_set1(row[0]);
        int64_t j = 0;
        for (; j + VF_LEN <= V; j += VF_LEN) maximum = vf_max(maximum, vf_load(row + j));
        for (; j < V; j++) highest = row[j] > highest ? row[j] : highest;
        highest = vf_hmax(vf_max(maximum, vf_set1(highest)));
        vf sum = vf_set1(0.0f);
        for (j = 0; j < V; j += VF_LEN) {
            vf e = vf_exp(vf_sub(vf_load_n(row + j, V - j), vf_set1(highest)));
            sum = vf_add(sum, vf_keep_n(e, V - j));
        }
        lse[i] = highest + logf(vf_sum(sum));
        losses[i] = targets[i] < 0 ? 0.0f : lse[i] - row[targets[i]];
    }
}

void crossentropy_backward(float *dlogits, const float *logits, const float *lse, const int32_t *targets,
                           const float *weights, float scale, int64_t N, int64_t V, Team *team) {
    for_shared (i, N, worth(V), team) {
        const float *row = logits + i * V;
        const float factor = weights ? weights[i] * scale : scale;
        float *drow = dlogits + i * V;
        if (targets[i] < 0 || (weights && weights[i] == 0.0f)) {
            memset(drow, 0, (size_t)V * sizeof(float));
            continue;
        }
        for (int64_t j = 0; j < V; j += VF_LEN) {
            vf softmax = vf_exp(vf_sub(vf_load_n(row + j, V - j), vf_set1(lse[i])));
            vf_store_n(drow + j, vf_mul(softmax, vf_set1(factor)), V - j);
        }
        drow[targets[i]] -= factor;
    }
}
