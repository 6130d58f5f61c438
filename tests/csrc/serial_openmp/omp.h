/* SPDX-License-Identifier: MIT
 *
 * omp.h: OpenMP for a compiler that is not asked to obey the pragmas: lists are cut for threads, and the
 * pieces stepped one after the other. The tests say how many threads there are.
 */
#ifndef SERIAL_OPENMP_H
#define SERIAL_OPENMP_H

extern int omp_threads;

static inline int omp_get_max_threads(void)
{
    return omp_threads;
}

#endif
