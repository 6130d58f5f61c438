/* SPDX-License-Identifier: MIT
 *
 * The architecture's baseline. x86-64 has no fused multiply-add there: the C library's fmaf() gives
 * the right bits, slowly.
 */
#define LPSGD_KERNEL lpsgd_kernel_default
#define LPSGD_TARGET
#include "lpsgd_cpu_kernel.h"
