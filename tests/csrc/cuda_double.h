/* SPDX-License-Identifier: MIT
 *
 * cuda_double.h: what a test asks of the libcuda.so.1 that cuda_double.c is. It keeps a log of its
 * calls, fails where it is told to, and runs the kernels' source compiled as C, in memory of its own
 * that the host cannot touch at the addresses that kernels see.
 */
#ifndef CUDA_DOUBLE_H
#define CUDA_DOUBLE_H

#include "lpsgd_cuda_driver.h"

#include <stddef.h>

#define DOUBLE_FUNCTION(name, parameters) CUresult name parameters;
LPSGD_CUDA_DRIVER(DOUBLE_FUNCTION)

enum { DOUBLE_DEVICES = 64, DOUBLE_STREAMS = 4, DOUBLE_MEMORY = 1 << 24 /* bytes of a device */ };

/* As in a new process, with this number of devices, zeros in their memory and no log. */
void double_reset(int devices);

/* The version that the driver says it has; CUDA 13.0 after double_reset. */
void double_version(int version);

/* The nth call of this name from now on answers `error`, once; every one if nth is 0, none if -1. */
void double_fail(const char *name, int nth, CUresult error);

/* The calls since double_reset or double_forget, a line each: name, arguments, the error if any. */
const char *double_log(void);
void double_forget(void);

/* Whether launches run; otherwise they are checked alone, without the pointers in their arguments. */
void double_run(int run);

/* Memory of a device, aligned to 256 bytes; NULL: there is no more. */
void *double_allocate(int device, size_t size);

/* Whose memory it is; -1: none's. */
int double_device_of(const void *pointer);

/* Where the host finds what kernels find at `pointer`. */
void *double_host(const void *pointer);

/* Whether the host may touch the memory at the kernels' addresses too. */
void double_open(int open);

/* Stream 0 is NULL, the default stream of every device. */
CUstream double_stream(int device, int number);

/* Whether a stream is being captured: what is launched there does not run. */
void double_capture(int device, int number, int capturing);

/* Makes the kernel of this name leave a wrong bit in a momentum buffer, or fold a wrong step size;
 * "": none. */
void double_wrong(const char *name);

/* Whether the calling thread has no context and the usual capture mode, and no stream is left over. */
int double_is_left_as_found(void);

/* The device of the calling thread's current context; -1: there is none. */
int double_current(void);

#endif
