/* target.h: opens and closes a region compiled for more than the baseline, with gcc and clang alike, so no file needs
 * compiler flags of its own and plain setuptools can build the extension. */
#ifndef BN_CPU_TARGET_H
#define BN_CPU_TARGET_H

#define BN_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BN_TARGET_BEGIN(features)                                                                                      \
    BN_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define BN_TARGET_END _Pragma("clang attribute pop")
#define BN_UNROLL _Pragma("unroll")
#else
#define BN_TARGET_BEGIN(features) _Pragma("GCC push_options") BN_PRAGMA(GCC target(features))
#define BN_TARGET_END _Pragma("GCC pop_options")
/* Sanitizers put a check on every access, and compiling the unrolled templates with them takes a quarter of an hour. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define BN_UNROLL _Pragma("GCC unroll 1")
#else
#define BN_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

/* What takes a constant argument, a number of rows or whether something is there, and is compiled once for each; under
 * sanitizers once for all, for the reason above. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define BN_INLINE static inline
#else
#define BN_INLINE static inline __attribute__((always_inline))
#endif

/* The same for extensions of ARMv8.2, which clang lists as "a,b" and gcc as "+a+b". */
#if defined(__clang__)
#define BN_TARGET_BEGIN_ARM(list, sum) BN_TARGET_BEGIN(list)
#else
#define BN_TARGET_BEGIN_ARM(list, sum) BN_TARGET_BEGIN("arch=armv8.2-a" sum)
#endif

#endif
