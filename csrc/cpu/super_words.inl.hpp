// ggml super-blocks (Q4_K, Q5_K, Q6_K): 256 weights along a row, whose groups have integer scales of their own.
//
//   Q4_K  144 bytes: fp16 d, fp16 dmin, 12 bytes of 6-bit scales s and mins m of 8 groups, then for each two groups 32 bytes
//         of nibbles (low ones first): d * s * q - dmin * m
//   Q5_K  176 bytes: the same with 32 bytes of fifth bits (bit g of a byte belongs to group g) before the nibbles
//   Q6_K  210 bytes: 128 bytes of low nibbles, 64 of upper bit pairs, 16 signed scales s of 16 groups, fp16 d: d * s * (q - 32)
//
// Activations share a scale over 128 columns, half a block. With s and m integers, the sums of a half,
//   I = sum over groups of s * (dot product of codes and activations)  and  M = sum over groups of m * (sum of activations),
// are exact, in whatever order they are added. Between halves the sums are fp32, one half after the other:
//   y = fma(x scale, fma(-dmin, M, d * I), y), of Q6_K (where m is s) y = fma(x scale, d * (I - 32 M), y).
// So all the ways to compute a product that are written here give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "matrix.hpp"
#include "vec.inl.hpp"

namespace gangline {
namespace {

constexpr int super_columns = 256;
constexpr int half_columns = 128;

// One block with a byte for each code.
struct SuperRow {
    alignas(64) std::uint8_t codes[super_columns];
    std::int16_t scales[16], mins[16];
    float d, d_min;
};

inline float half_at(const std::uint8_t* p) {
    std::uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return f16_to_float(bits);
}

// Scales and mins of Q4_K and Q5_K, one a byte: the first four are the low 6 bits of the bytes 0-3 and 4-7; the last four have
// their low nibbles in the bytes 8-11 and their upper bits on top of the others.
struct SixBits {
    std::uint64_t scales, mins;
};
inline SixBits six_bits(const std::uint8_t* p) {
    std::uint32_t a, b, c;
    std::memcpy(&a, p, 4);
    std::memcpy(&b, p + 4, 4);
    std::memcpy(&c, p + 8, 4);
    const std::uint64_t scales = (c & 0x0f0f0f0fu) | ((a >> 2) & 0x30303030u);
    const std::uint64_t mins = ((c >> 4) & 0x0f0f0f0fu) | ((b >> 2) & 0x30303030u);
    return {scales << 32 | (a & 0x3f3f3f3fu), mins << 32 | (b & 0x3f3f3f3fu)};
}

inline void unpack_six_bits(const std::uint8_t* block, SuperRow& row) {
    const SixBits six = six_bits(block + 4);
    for (int g = 0; g < 8; ++g) {
        row.scales[g] = static_cast<std::int16_t>(six.scales >> 8 * g & 63);
        row.mins[g] = static_cast<std::int16_t>(six.mins >> 8 * g & 63);
    }
    row.d = half_at(block);
    row.d_min = half_at(block + 2);
}

struct Q4_K {
    static constexpr int bytes = 144, group = 32, code_bits = 4;
    static constexpr bool has_mins = true;
    static void unpack_scales(const std::uint8_t* block, SuperRow& row) { unpack_six_bits(block, row); }
    static void unpack_codes(const std::uint8_t* block, SuperRow& row) {
        for (int pair = 0; pair < 4; ++pair) {
            const std::uint8_t* codes = block + 16 + 32 * pair;
            std::uint8_t* out = row.codes + 64 * pair;
            for (int i = 0; i < 32; ++i) out[i] = codes[i] & 15;
            for (int i = 0; i < 32; ++i) out[32 + i] = codes[i] >> 4;
        }
    }
};

struct Q5_K {
    static constexpr int bytes = 176, group = 32, code_bits = 5;
    static constexpr bool has_mins = true;
    static void unpack_scales(const std::uint8_t* block, SuperRow& row) { unpack_six_bits(block, row); }
    static void unpack_codes(const std::uint8_t* block, SuperRow& row) {
        const std::uint8_t* fifth = block + 16;
        for (int pair = 0; pair < 4; ++pair) {
            const std::uint8_t* codes = block + 48 + 32 * pair;
            std::uint8_t* out = row.codes + 64 * pair;
            for (int i = 0; i < 32; ++i) {
                out[i] = static_cast<std::uint8_t>((codes[i] & 15) | (fifth[i] >> 2 * pair & 1) << 4);
                out[32 + i] = static_cast<std::uint8_t>(codes[i] >> 4 | (fifth[i] >> (2 * pair + 1) & 1) << 4);
            }
        }
    }
};

struct Q6_K {
    static constexpr int bytes = 210, group = 16, code_bits = 6;
    static constexpr bool has_mins = false;
    static void unpack_codes(const std::uint8_t* block, SuperRow& row) {
        for (int half = 0; half < 2; ++half) {
            const std::uint8_t* low = block + 64 * half;
            const std::uint8_t* high = block + 128 + 32 * half;
            std::uint8_t* out = row.codes + 128 * half;
            for (int i = 0; i < 32; ++i) {
                out[i] = static_cast<std::uint8_t>((low[i] & 15) | (high[i] & 3) << 4);
                out[32 + i] = static_cast<std::uint8_t>((low[32 + i] & 15) | (high[i] >> 2 & 3) << 4);
                out[64 + i] = static_cast<std::uint8_t>(low[i] >> 4 | (high[i] >> 4 & 3) << 4);
                out[96 + i] = static_cast<std::uint8_t>(low[32 + i] >> 4 | high[i] >> 6 << 4);
            }
        }
    }
    static void unpack_scales(const std::uint8_t* block, SuperRow& row) {
        for (int g = 0; g < 16; ++g) row.scales[g] = row.mins[g] = static_cast<std::int8_t>(block[192 + g]);
        row.d = half_at(block + 208);
        row.d_min = 0.0f;
    }
};

// Memory of one thread that is kept. No standard container: their code would leave this translation unit.
class SumRoom {
public:
    SumRoom() = default;
    SumRoom(const SumRoom&) = delete;
    SumRoom& operator=(const SumRoom&) = delete;
    ~SumRoom() { std::free(data_); }
    std::int16_t* want(std::size_t count) {
        if (count > count_) {
            std::free(data_);
            data_ = static_cast<std::int16_t*>(std::malloc(count * sizeof(std::int16_t)));
            count_ = data_ == nullptr ? 0 : count;
            if (data_ == nullptr) throw std::bad_alloc();
        }
        return data_;
    }

private:
    std::int16_t* data_ = nullptr;
    std::size_t count_ = 0;
};

// Sums of the activations over the groups of a format, [tokens, cols / group], of some tokens.
struct GroupSums {
    const std::int16_t* data;
    std::ptrdiff_t stride;
};

inline std::int16_t sum_of(const std::int8_t* q, int count) {
    int sum = 0;
    for (int i = 0; i < count; ++i) sum += q[i];
    return static_cast<std::int16_t>(sum);
}

template <class F>
inline GroupSums group_sums(const Activations& x, int token, int tokens, int cols) {
    static thread_local SumRoom room;
    const std::ptrdiff_t stride = cols / F::group;
    std::int16_t* sums = room.want(static_cast<std::size_t>(tokens * stride));
    for (int t = 0; t < tokens; ++t) {
        const std::int8_t* q = x.q + std::ptrdiff_t{token + t} * x.padded;
        for (int g = 0; g < stride; ++g) sums[t * stride + g] = sum_of(q + std::ptrdiff_t{g} * F::group, F::group);
    }
    return {sums, stride};
}

}  // namespace
}  // namespace gangline
