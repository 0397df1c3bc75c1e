/* SPDX-License-Identifier: Apache-2.0 */
/* CRC-32C (Castagnoli, reflected, as in RFC 3720): of what a snapshot's files hold. */
#include "vmmsnapshot.h"

#include <immintrin.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#define POLYNOMIAL 0x82f63b78u /* x^32 is not written; bit 31 is x^0 */

/* Three lanes hide the three cycles that a crc32 takes; three of them are a page but for 64 bytes. */
enum { LANE = 1344 };

static pthread_once_t once = PTHREAD_ONCE_INIT;
static uint32_t table[256];
static uint32_t power[64]; /* power[k]: x^(8 * 2^k) mod P */
static uint64_t lane_1, lane_2;
static bool fast;

/* a * b mod P; bit 31 is x^0. */
static uint32_t multiply(uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit)
            product ^= b;
        b = b & 1 ? b >> 1 ^ POLYNOMIAL : b >> 1;
    }
    return product;
}

/* crc * x^(8n): what n bytes of zeros make of it, but for the inversions. */
static uint32_t shift(uint32_t crc, uint64_t n)
{
    for (unsigned k = 0; n; k++, n >>= 1)
        if (n & 1)
            crc = multiply(crc, power[k]);
    return crc;
}

static void prepare(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ POLYNOMIAL : crc >> 1;
        table[byte] = crc;
    }
    power[0] = 1u << 23; /* x^8 */
    for (unsigned k = 1; k < 64; k++)
        power[k] = multiply(power[k - 1], power[k - 1]);
    /* A carry-less product of two reflected 32-bit polynomials lies one bit low in its 64, and crc32 of 64 bits
     * multiplies by x^32: hence x^(8 * LANE - 33), which is (x^(8 * LANE - 40)) * x^7. */
    lane_1 = multiply(shift(1u << 31, LANE - 5), 1u << 24);
    lane_2 = multiply(shift(1u << 31, 2 * LANE - 5), 1u << 24);
    fast = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
}

static uint32_t by_table(uint32_t crc, const uint8_t *p, size_t n)
{
    while (n--)
        crc = crc >> 8 ^ table[(uint8_t)crc ^ *p++];
    return crc;
}

static inline uint64_t word(const uint8_t *p)
{
    uint64_t value;
    memcpy(&value, p, sizeof(value));
    return value;
}

__attribute__((target("sse4.2,pclmul"))) static uint64_t moved(uint64_t crc, uint64_t by)
{
    const __m128i product =
        _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)crc), _mm_cvtsi64_si128((long long)by), 0);
    return _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(product));
}

__attribute__((target("sse4.2,pclmul"))) static uint32_t by_instruction(uint32_t crc, const uint8_t *p,
                                                                        size_t n)
{
    uint64_t a = crc;
    for (; n >= 3 * LANE; p += 3 * LANE, n -= 3 * LANE) {
        uint64_t b = 0, c = 0;
        for (size_t i = 0; i < LANE; i += 8) {
            a = _mm_crc32_u64(a, word(p + i));
            b = _mm_crc32_u64(b, word(p + LANE + i));
            c = _mm_crc32_u64(c, word(p + 2 * LANE + i));
        }
        a = moved(a, lane_2) ^ moved(b, lane_1) ^ c;
    }
    for (; n >= 8; p += 8, n -= 8)
        a = _mm_crc32_u64(a, word(p));
    for (; n; p++, n--)
        a = _mm_crc32_u8((uint32_t)a, *p);
    return (uint32_t)a;
}

uint32_t vmm_crc32c(uint32_t crc, const void *bytes, size_t n)
{
    pthread_once(&once, prepare);
    return ~(fast ? by_instruction(~crc, bytes, n) : by_table(~crc, bytes, n));
}

uint32_t vmm_crc32c_portable(uint32_t crc, const void *bytes, size_t n)
{
    pthread_once(&once, prepare);
    return ~by_table(~crc, bytes, n);
}

uint32_t vmm_crc32c_zeros(uint32_t crc, uint64_t n)
{
    pthread_once(&once, prepare);
    return ~shift(~crc, n);
}
