/*
 * rans.h: bytes stored in nearly as few bits as their distribution has entropy: a range coder of asymmetric numeral
 * systems (Duda 2013, arXiv 1311.2540; interleaved as in Giesen 2014, arXiv 1402.3392) with one table of frequencies
 * for the whole stream and blocks that decode on their own, on all threads.
 *
 *   stream of `size` bytes     kind, table, then of each block its length (u32), then the blocks; nothing where size =
 * 0 kind (u8) and table        0: three counts, LEB128. The bytes are 0..242, five base-three digits, and a byte's
 *                                 weight is the product of the counts of its digits: codes that do not depend on
 *                                 each other (quant/fifths.h) need no more
 *                              1: 256 frequencies, LEB128, whose sum is 4096
 *   block                      65536 bytes (the last: what is left): four states (u32), then words (u16)
 *
 * Numbers are little-endian. A state x is at least 2^16; byte i of a block comes from state i mod 4:
 *
 *   slot = x mod 4096; the byte s whose slots [start, start + frequency) hold it
 *   x = frequency * (x / 4096) + slot - start; if x < 2^16: x = 2^16 x + the next word
 *
 * A block is whole if all words were read and all states ended as 2^16, where the encoder began: most damage is
 * noticed.
 */
#ifndef BN_FORMATS_RANS_H
#define BN_FORMATS_RANS_H

#include "base/error.h"

BN_EXTERN_C_BEGIN

#define BN_RANS_BLOCK 65536

/* At most this many bytes code `size` bytes; false on overflow. */
bool bn_rans_bound(size_t size, size_t *out);
/* Writes the shorter of the two kinds of stream to `out`, which has room for bn_rans_bound(size) bytes; *written is its
 * length. Uses all threads; the stream does not depend on how many. */
BN_CHECKED bn_status bn_rans_encode(const uint8_t *bytes, size_t size, uint8_t *out, size_t *written);
/* BN_OK if a stream of `length` bytes could hold `size` bytes at all: to ask before memory is taken for them. */
BN_CHECKED bn_status bn_rans_check_size(size_t length, size_t size);
/* Decodes exactly `size` bytes on all threads. Trusts nothing: BN_ERR_VALUE says what is wrong with the stream, and in
 * which block. */
BN_CHECKED bn_status bn_rans_decode(const uint8_t *stream, size_t length, uint8_t *bytes, size_t size);

BN_EXTERN_C_END
#endif
