/* SPDX-License-Identifier: MIT */
#ifdef __x86_64__
#define LPSGD_KERNEL lpsgd_kernel_avx2
#define LPSGD_LANES 8
#define LPSGD_TARGET __attribute__((target("avx2,fma,f16c")))
#include "lpsgd_cpu_vector.h"

#include <immintrin.h>

LPSGD_VECTOR vfloat fma_each(vfloat a, vfloat b, vfloat c)
{
    return _mm256_fmadd_ps(a, b, c);
}

typedef vfloat table8;

LPSGD_VECTOR table8 table8_of(const float *from)
{
    return load_float(from);
}

LPSGD_VECTOR vfloat look_up8(table8 table, vint i)
{
    return _mm256_permutevar8x32_ps(table, (__m256i)i);
}

/* Eight entries in a row are in a vector, at their numbers modulo 8: those that most elements need. */
typedef struct table32 {
    vfloat window;
    vint start; /* the bits of the least y whose entry is in it */
    const float *all;
} table32;

LPSGD_VECTOR table32 table32_of(const float *from, float least)
{
    const int usual = 11, last = 23, of_least = lpsgd_bits(least) >> 26; /* usual: 2^-39 to 2^25 */
    const int first = of_least < usual ? usual : of_least > last ? last : of_least;
    float window[8];
    for (int i = first; i < first + 8; i++)
        window[i & 7] = from[i];
    return (table32){load_float(window), (first << 26) + (vint){0}, from};
}

LPSGD_VECTOR vfloat look_up32(const table32 *table, vint i, int careful)
{
    if (careful)
        return _mm256_i32gather_ps(table->all, (__m256i)(i & 31), 4);
    return look_up8(table->window, i);
}

/* Whether there is a y whose entry is not in the window. Those in it are ordinary. */
LPSGD_VECTOR int any_unserved(vfloat y, const table32 *table)
{
    return !_mm256_testz_si256((__m256i)((vint)y - table->start),
                               _mm256_set1_epi32(~((8 << 26) - 1)));
}

LPSGD_VECTOR vfloat from_float16(vhalf h)
{
    return _mm256_cvtph_ps((__m128i)h);
}

LPSGD_VECTOR vhalf to_float16(vfloat x)
{
    return (vhalf)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

LPSGD_VECTOR vfloat load_float8(const char *from)
{
    const __m128i bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i_u *)from));
    return _mm256_cvtph_ps(_mm_slli_epi16(bytes, 8));
}

/* lpsgd_to_float8_stochastic for a and b. */
LPSGD_VECTOR void store_float8(char *to, vfloat a, vfloat b, const uint16_t *random8)
{
    const __m256i h = _mm256_set_m128i((__m128i)to_float16(b), (__m128i)to_float16(a));
    const __m256i unsign = _mm256_set1_epi16(0x7fff), magnitude = _mm256_and_si256(h, unsign);
    const __m256i is_nan = _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(0x7c00));
    __m256i rounded = _mm256_min_epi16(magnitude, _mm256_set1_epi16(0x7b00));
    rounded = _mm256_add_epi16(rounded, _mm256_loadu_si256((const __m256i_u *)random8));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi16(0x7e00), is_nan);
    rounded = _mm256_or_si256(rounded, _mm256_andnot_si256(unsign, h));
    rounded = _mm256_srli_epi16(rounded, 8);
    _mm_storeu_si128((__m128i_u *)to, _mm_packus_epi16(_mm256_castsi256_si128(rounded),
                                                     _mm256_extracti128_si256(rounded, 1)));
}

#include "lpsgd_cpu_kernel.h"
#else
typedef int lpsgd_no_avx2;
#endif
