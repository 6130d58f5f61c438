/* SPDX-License-Identifier: MIT
 *
 * lpsgd_internal.h: what the files of csrc share and lpsgd.h does not promise.
 */
#ifndef LPSGD_INTERNAL_H
#define LPSGD_INTERNAL_H

#include "lpsgd_element.h"

/* Checks hyper and folds it into k. has_momentum: LPSGDM, else LPSGD. */
lpsgd_status lpsgd_fold(const lpsgd_hyper *hyper, int has_momentum, lpsgd_scalars *k);

/* Bytes of an element; 0 for what is no lpsgd_dtype. */
int64_t lpsgd_itemsize(lpsgd_dtype dtype);

/* Checks a list and counts its elements. */
lpsgd_status lpsgd_check_list(const lpsgd_buffer *list, int64_t count, lpsgd_dtype dtype,
                              int has_momentum, const lpsgd_scalars *k, int64_t *total);

/* One step over one buffer in the calling thread; momentum_buffer == NULL is LPSGD. */
typedef void lpsgd_kernel(const lpsgd_buffer *buffer, lpsgd_dtype dtype, const lpsgd_scalars *k);
lpsgd_kernel lpsgd_kernel_default;
#ifdef __x86_64__
lpsgd_kernel lpsgd_kernel_avx2, lpsgd_kernel_avx512;
#endif

#endif
