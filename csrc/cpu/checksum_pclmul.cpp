// Compiled for PCLMULQDQ; entered only where the processor has it. "Fast CRC Computation for Generic Polynomials Using
// PCLMULQDQ Instruction" (Gopal et al., Intel, 2009): 128 bits of the message that d bits of it follow may be replaced by their
// two halves times x^(d + 64) and x^d modulo the polynomial, added to what lies d bits later.

#include "checksum.hpp"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

namespace gangline {
namespace {

// Of reflected numbers the product comes out one bit too low, and a remainder of 32 bits stands in the high half of 64: hence
// the shift, and 32 taken from the powers.
__m128i factors(int bits) {
    const auto factor = [](int power) { return static_cast<long long>(std::uint64_t{times_power(0x80000000U, power)} << 1); };
    return _mm_set_epi64x(factor(bits - 32), factor(bits + 32));
}

__m128i moved(__m128i a, __m128i factor, __m128i onto) {
    const __m128i low = _mm_clmulepi64_si128(a, factor, 0x00), high = _mm_clmulepi64_si128(a, factor, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), onto);
}

}  // namespace

void crc32_fold(std::uint32_t remainder, const std::uint8_t* data, std::size_t count, std::uint8_t* out) {
    const auto load = [&data] {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
        data += 16;
        return bytes;
    };
    static const __m128i by_64 = factors(512), by_16 = factors(128);
    __m128i lanes[4];
    for (__m128i& lane : lanes) lane = load();
    lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(remainder)));
    for (count -= 64; count >= 64; count -= 64)
        for (__m128i& lane : lanes) lane = moved(lane, by_64, load());
    __m128i one = lanes[0];
    for (int i = 1; i < 4; ++i) one = moved(one, by_16, lanes[i]);
    for (; count >= 16; count -= 16) one = moved(one, by_16, load());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), one);
}

}  // namespace gangline

#endif
