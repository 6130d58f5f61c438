/* SPDX-License-Identifier: MIT
 *
 * exchange_double.c: a DLPack exchange table that presents tensors in cuda_double.c's memory as CUDA
 * tensors and everything else as another table does.
 */
#include "cuda_double.h"
#include "dlpack_abi.h"

/* The table over `of`, which is borrowed. */
const lpsgd_dl_api *exchange_double(const lpsgd_dl_api *of);

/* The calling thread's current stream of a device, as torch.cuda.set_stream. */
void exchange_set_stream(int device, int number);

/* Whether to answer an error in place of a stream. */
void exchange_fail(int fail);

static const lpsgd_dl_api *original;
static lpsgd_dl_api table;
static _Thread_local int current_stream[DOUBLE_DEVICES];
static int failing;

static int read_tensor(void *tensor, lpsgd_dl_tensor *out)
{
    const int error = original->dltensor_from_py_object_no_sync(tensor, out);
    const int device = error ? -1 : double_device_of(out->data);
    if (device >= 0)
        out->device = (lpsgd_dl_device){LPSGD_DL_CUDA, device};
    return error;
}

static int read_stream(int32_t device_type, int32_t device, void **out)
{
    if (device_type != LPSGD_DL_CUDA || device < 0 || device >= DOUBLE_DEVICES || failing)
        return -1;
    *out = double_stream(device, current_stream[device]);
    return 0;
}

const lpsgd_dl_api *exchange_double(const lpsgd_dl_api *of)
{
    original = of;
    table = *of;
    table.dltensor_from_py_object_no_sync = read_tensor;
    table.current_work_stream = read_stream;
    return &table;
}

void exchange_set_stream(int device, int number)
{
    current_stream[device] = number;
}

void exchange_fail(int fail)
{
    failing = fail;
}
