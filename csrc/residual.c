/* out (n) = x + branch: the skip connection around a block. The gradients of x and branch are both that of out.
 *
 * Memory limits the speed: 2 floats read and 1 written for each element. Threads share the elements. */

#include "internal.h"

void residual_forward(float *out, const float *x, const float *branch, int64_t n, Team *team) {
    for_shared (vector, ceil_div(n, VF_LEN), worth(VF_LEN), team) {
        const int64_t i = vector * VF_LEN;
        vf_store_n(out + i, vf_add(vf_load_n(x + i, n - i), vf_load_n(branch + i, n - i)), n - i);
    }
}
