/* SPDX-License-Identifier: MIT */
#ifdef __x86_64__
#define LPSGD_KERNEL lpsgd_kernel_avx512
#define LPSGD_LANES 16
#define LPSGD_TARGET __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c")))
#include "lpsgd_cpu_vector.h"

#include <immintrin.h>

LPSGD_VECTOR vfloat fma_each(vfloat a, vfloat b, vfloat c)
{
    return _mm512_fmadd_ps(a, b, c);
}

/* Entries of a table of eight. Its two copies fill a vector, so that a fourth bit of i is no matter. */
typedef vfloat table8;

LPSGD_VECTOR table8 table8_of(const float *from)
{
    return _mm512_broadcast_f32x8(_mm256_loadu_ps(from));
}

LPSGD_VECTOR vfloat look_up8(table8 table, vint i)
{
    return _mm512_permutexvar_ps((__m512i)i, table);
}

typedef struct table32 {
    vfloat low, high;
} table32;

LPSGD_VECTOR table32 table32_of(const float *from, float least)
{
    (void)least;
    return (table32){_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
}

LPSGD_VECTOR vfloat look_up32(const table32 *table, vint i, int careful)
{
    (void)careful;
    return _mm512_permutex2var_ps(table->low, (__m512i)i, table->high);
}

/* Whether there is a y, other than 0, that the tables do not serve. */
LPSGD_VECTOR int any_unserved(vfloat y, const table32 *table)
{
    const __m512i bits = (__m512i)y, from = _mm512_sub_epi32(bits, _mm512_set1_epi32(0x00800000));
    (void)table;
    return _mm512_mask_cmpge_epu32_mask(_mm512_test_epi32_mask(bits, bits), from,
                                        _mm512_set1_epi32(LPSGD_ORDINARY)) != 0;
}

LPSGD_VECTOR vfloat from_float16(vhalf h)
{
    return _mm512_cvtph_ps((__m256i)h);
}

LPSGD_VECTOR vhalf to_float16(vfloat x)
{
    return (vhalf)_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

LPSGD_VECTOR vfloat load_float8(const char *from)
{
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i_u *)from));
    return _mm512_cvtph_ps(_mm256_slli_epi16(bytes, 8));
}

/* lpsgd_to_float8_stochastic for a and b. */
LPSGD_VECTOR void store_float8(char *to, vfloat a, vfloat b, const uint16_t *random8)
{
    const __m512i low = _mm512_castsi256_si512((__m256i)to_float16(a));
    const __m512i h = _mm512_inserti64x4(low, (__m256i)to_float16(b), 1);
    const __m512i unsign = _mm512_set1_epi16(0x7fff), magnitude = _mm512_and_si512(h, unsign);
    const __mmask32 is_nan = _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16(0x7c00));
    __m512i rounded = _mm512_min_epi16(magnitude, _mm512_set1_epi16(0x7b00));
    rounded = _mm512_add_epi16(rounded, _mm512_loadu_si512(random8));
    rounded = _mm512_mask_mov_epi16(rounded, is_nan, _mm512_set1_epi16(0x7e00));
    rounded = _mm512_or_si512(rounded, _mm512_andnot_si512(unsign, h));
    _mm256_storeu_si256((__m256i_u *)to, _mm512_cvtepi16_epi8(_mm512_srli_epi16(rounded, 8)));
}

#include "lpsgd_cpu_kernel.h"
#else
typedef int lpsgd_no_avx512;
#endif
