#include "checksum.hpp"

#include <array>

#include "cpu_features.hpp"

namespace gangline {
namespace {

// table[k][b]: what byte b does to the register when k more bytes follow it in the same eight.
using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

constexpr Tables make_tables() {
    Tables tables{};
    for (std::uint32_t b = 0; b < 256; ++b) tables[0][b] = times_power(b, 8);
    for (std::size_t k = 1; k < 8; ++k)
        for (std::uint32_t b = 0; b < 256; ++b)
            tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 255U];
    return tables;
}

constexpr Tables tables = make_tables();

// Bytes one after the other into a register that is not complemented.
std::uint32_t feed(std::uint32_t remainder, const std::uint8_t* data, std::size_t count) {
    for (; count >= 8; data += 8, count -= 8) {
        std::uint32_t next = remainder;
        remainder = 0;
        for (std::size_t i = 0; i < 8; ++i) {
            const std::uint32_t byte = i < 4 ? data[i] ^ (next & 255U) : data[i];
            next >>= 8;
            remainder ^= tables[7 - i][byte];
        }
    }
    for (; count > 0; ++data, --count) remainder = (remainder >> 8) ^ tables[0][(remainder ^ *data) & 255U];
    return remainder;
}

#if defined(__x86_64__) || defined(_M_X64)
bool folds() {
    static const bool found = [] {
        const auto features = cpu_features();
        return features.at("pclmulqdq") && features.at("sse4_1");
    }();
    return found;
}
#endif

}  // namespace

std::uint32_t crc32_by_tables(std::uint32_t crc, const std::uint8_t* data, std::size_t count) {
    return ~feed(~crc, data, count);
}

std::uint32_t crc32(std::uint32_t crc, const std::uint8_t* data, std::size_t count) {
#if defined(__x86_64__) || defined(_M_X64)
    constexpr std::size_t fewest = 64;
    if (count >= fewest && folds()) {
        const std::size_t whole = count / 16 * 16;
        std::uint8_t rest[16];
        crc32_fold(~crc, data, whole, rest);
        return ~feed(feed(0, rest, sizeof rest), data + whole, count - whole);
    }
#endif
    return crc32_by_tables(crc, data, count);
}

}  // namespace gangline
