/* Random words from a counter, for dropout: Philox 4x32-7, Salmon et al. 2011, doi:10.1145/2063384.2063405.
 *
 * Integers alone, so every instruction set computes the same bits. The functions are plain C: in a loop over counters,
 * the compiler puts one counter in each lane of a vector. */

#ifndef PHILOX_H
#define PHILOX_H

#include <stdint.h>

/* Which elements dropout keeps: those whose random word is at least `threshold`; they are multiplied by `scale`. */
typedef struct {
    uint32_t key[2], threshold;
    float scale;
    uint32_t head;  /* 0 where there are no heads */
    uint64_t first; /* the number of the first row; adding a row's index carries nothing to the upper 32 bits */
} Dropout;

static inline Dropout dropout_of(double rate, uint64_t key, uint64_t first) {
    const uint32_t threshold = (uint32_t)(rate * 0x1p32);
    return (Dropout){{(uint32_t)key, (uint32_t)(key >> 32)}, threshold, (float)(1.0 / (1.0 - rate)), 0, first};
}

/* The factors of columns 4 block to 4 block + 3 in a row: 0 or scale, each from a word of one counter. */
static inline __attribute__((always_inline)) void keep_four(float factors[4], const Dropout *drop, uint32_t block,
                                                            uint32_t row) {
    uint32_t a = block, b = drop->head, c = (uint32_t)drop->first + row, d = (uint32_t)(drop->first >> 32);
#pragma GCC unroll 7
    for (uint32_t round = 0; round < 7; round++) {
        const uint64_t first = (uint64_t)a * 0xD2511F53u, second = (uint64_t)c * 0xCD9E8D57u;
        a = (uint32_t)(second >> 32) ^ b ^ (drop->key[0] + round * 0x9E3779B9u);
        c = (uint32_t)(first >> 32) ^ d ^ (drop->key[1] + round * 0xBB67AE85u);
        b = (uint32_t)second;
        d = (uint32_t)first;
    }
    factors[0] = a >= drop->threshold ? drop->scale : 0.0f;
    factors[1] = b >= drop->threshold ? drop->scale : 0.0f;
    factors[2] = c >= drop->threshold ? drop->scale : 0.0f;
    factors[3] = d >= drop->threshold ? drop->scale : 0.0f;
}

#endif
