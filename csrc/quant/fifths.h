/*
 * fifths.h: five ternary codes in a byte, 1.6 bits each: the form in which weights lie in files.
 *
 * n codes (row by row) take m = ceil(n / 5) bytes. Byte j holds the codes j, j + m, j + 2m, j + 3m and j + 4m, each as
 * code + 1 in base three:
 *
 *   byte[j] = sum over k = 0..4 of (code[j + k m] + 1) 3^k          0..242; 243 to 255 are refused
 *
 * So a stretch of codes is one digit of a stretch of bytes, and no byte has to be taken apart for its neighbours in a
 * row. The digits of places n and beyond are 0, so a weight has one packed form and no other.
 */
#ifndef BN_QUANT_FIFTHS_H
#define BN_QUANT_FIFTHS_H

#include "base/error.h"

BN_EXTERN_C_BEGIN

#define BN_FIFTHS_PER_BYTE 5
/* 3^5: bytes below this stand for codes. */
#define BN_FIFTHS_VALUES 243

/* m. Wants n >= 0. */
static inline int64_t bn_fifths_bytes(int64_t n) {
    return n / BN_FIFTHS_PER_BYTE + (n % BN_FIFTHS_PER_BYTE != 0 ? 1 : 0);
}

/* Packs n codes into bn_fifths_bytes(n) bytes, on all threads; BN_ERR_VALUE names the first that is not -1, 0 or 1. */
BN_CHECKED bn_status bn_fifths_pack(const int8_t *codes, int64_t n, uint8_t *bytes);

/* BN_OK if all bn_fifths_bytes(n) bytes are such as bn_fifths_pack makes; BN_ERR_VALUE names the first that is not. */
BN_CHECKED bn_status bn_fifths_check(const uint8_t *bytes, int64_t n);

/* Unpacks n codes on all threads; fails as bn_fifths_check does. */
BN_CHECKED bn_status bn_fifths_unpack(const uint8_t *bytes, int64_t n, int8_t *codes);

/* Unpacks the codes begin..end (0 <= begin <= end <= n) of n into codes[0..end - begin). Bytes that bn_fifths_check
 * would refuse give some code or other: check them first. */
void bn_fifths_unpack_range(const uint8_t *bytes, int64_t n, int64_t begin, int64_t end, int8_t *codes);

BN_EXTERN_C_END
#endif
