// CRC-32 as zlib and gzip have it (polynomial 0x04C11DB7, bits reflected): what packs keep of every expert.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gangline {

// Continues `crc` (0 at the start of a message) over more bytes, with the widest instructions that run here.
std::uint32_t crc32(std::uint32_t crc, const std::uint8_t* data, std::size_t count);

// The same by tables alone.
std::uint32_t crc32_by_tables(std::uint32_t crc, const std::uint8_t* data, std::size_t count);

// Replaces a message by 16 bytes that have the same remainder, the ones that end the checksum's register included: carry-less
// products take 64 bytes at a time. `count` is a multiple of 16, at least 64. x86-64 with PCLMULQDQ only.
void crc32_fold(std::uint32_t remainder, const std::uint8_t* data, std::size_t count, std::uint8_t* out);

// A remainder times x^power, modulo the polynomial; bit 31 is the coefficient of x^0.
constexpr std::uint32_t times_power(std::uint32_t remainder, int power) {
    for (int i = 0; i < power; ++i) remainder = (remainder >> 1) ^ ((remainder & 1U) != 0 ? 0xEDB88320U : 0U);
    return remainder;
}

}  // namespace gangline
