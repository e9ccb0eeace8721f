// The encoder of one row block, included once for every instruction set. Plain loops over the 16 rows of a block, a vector
// for the compiler: each lane is a row, and a group of each of the 16 rows is searched at the same time.
//
// Bit for bit what formats/clip.py, formats/mx.py and formats/tiled.py compute: the same operations, each rounded to fp32
// (no contraction), in the same order.

//
// No templates of the standard library that may end up out of line: the linker keeps one copy of each, and one made for a
// wide instruction set must not be it.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "encode.hpp"
#include "tile_layout.hpp"
#include "tile_scale.hpp"

namespace gangline {
namespace {

constexpr int lanes = tile_rows;
constexpr int largest_group = 128;
// The sum over a group: column i adds to partial sum i % 8; the eight are then added in halves.
constexpr int partial_sums = 8;
constexpr float smallest_scale = 0x1p-14F;
constexpr float largest_scale = 65504.0F;
// 1 - 1e-5: a candidate must win by more than the rounding noise of the scores.
constexpr float margin = static_cast<float>(1.0 - 1e-5);
// Adding and subtracting it rounds |x| < 2^22 to the nearest integer, halves to even.
constexpr float rounder = 12582912.0F;

struct Lanes {
    alignas(64) float v[lanes];
};

// The weights of one group of 16 rows, column after column; what a matrix lacks is zero.
struct Columns {
    Lanes at[largest_group];
    int count = 0;
};

struct Integers {
    alignas(64) std::int32_t v[lanes];
};

// The quads of one group, one code a byte: a word is four columns of one row.
struct Words {
    alignas(64) std::uint32_t at[largest_group / quad_columns][lanes];
};

inline int smaller(int a, int b) { return a < b ? a : b; }
inline float smaller(float a, float b) { return a < b ? a : b; }
inline float larger(float a, float b) { return a > b ? a : b; }

// What an error counts, in steps of the scale without clipping.
inline float penalty(float error) { return (error * error) * (error * 2.0F + 1.0F); }

inline std::uint32_t half_of(float scale) { return (std::bit_cast<std::uint32_t>(scale) >> 13) - (112U << 10); }

// Rounds a normal number of fp16's range to what fp16 holds.
inline float rounded_to_half(float scale) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(scale);
    return std::bit_cast<float>((bits + 0xFFFU + ((bits >> 13) & 1U)) & ~0x1FFFU);
}

// `count` neighbouring numbers from the one with the index `first`.
inline void load_run(const EncodeJob& job, std::ptrdiff_t first, int count, float* out) {
    const char* base = static_cast<const char*>(job.weights);
    if (job.number == Format::f32) {
        std::memcpy(out, base + first * 4, static_cast<std::size_t>(count) * 4);
        return;
    }
    std::uint16_t bits[largest_group];
    std::memcpy(bits, base + first * 2, static_cast<std::size_t>(count) * 2);
    if (job.number == Format::bf16) {
        for (int i = 0; i < count; ++i) out[i] = std::bit_cast<float>(std::uint32_t{bits[i]} << 16);
    } else {
        for (int i = 0; i < count; ++i) out[i] = scale_of_half(bits[i]);
    }
}

inline void load_group(const EncodeJob& job, int block, int group, Columns& w) {
    const int row = block * lanes, rows = smaller(lanes, job.tiles.rows - row);
    const int column = group * w.count, columns = smaller(w.count, job.tiles.cols - column);
    const std::ptrdiff_t first = row * job.row_stride + column * job.column_stride;
    if (rows < lanes || columns < w.count) {
        std::memset(w.at, 0, sizeof(Lanes) * static_cast<std::size_t>(w.count));
    }
    if (job.column_stride != 1) {
        for (int c = 0; c < columns; ++c) load_run(job, first + c * job.column_stride, rows, w.at[c].v);
        return;
    }
    float run[largest_group];
    for (int r = 0; r < rows; ++r) {
        load_run(job, first + r * job.row_stride, columns, run);
        for (int c = 0; c < columns; ++c) w.at[c].v[r] = run[c];
    }
}

// Smallest and largest of every lane; false if one is nan or infinite.
inline bool find_range(const Columns& w, Lanes& low, Lanes& high) {
    Lanes spoiled{};
    low = high = w.at[0];
    for (int c = 0; c < w.count; ++c) {
        for (int l = 0; l < lanes; ++l) {
            const float x = w.at[c].v[l];
            low.v[l] = x < low.v[l] ? x : low.v[l];
            high.v[l] = x > high.v[l] ? x : high.v[l];
            spoiled.v[l] += x * 0.0F;  // nan for nan and infinity
        }
    }
    bool sound = true;
    for (int l = 0; l < lanes; ++l) sound = sound && spoiled.v[l] == 0.0F;
    return sound;
}

inline const Lanes& added(Lanes* sums) {
    for (int half = partial_sums / 2; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) {
            for (int l = 0; l < lanes; ++l) sums[j].v[l] += sums[j + half].v[l];
        }
    }
    return sums[0];
}

// What the search of one group of every lane knows; see _Groups in formats/clip.py.
struct Search {
    const Columns& w;
    Lanes low, high, span, floor, ceil;
    Lanes unit;

    Lanes stored(float steps) const {
        Lanes out;
        for (int l = 0; l < lanes; ++l) {
            const float scale = span.v[l] / steps;
            out.v[l] = rounded_to_half(scale > smallest_scale ? scale : smallest_scale);
        }
        return out;
    }

    Lanes score(const Lanes& scale) const {
        Lanes inverse, ratio, sums[partial_sums] = {};
        for (int l = 0; l < lanes; ++l) {
            inverse.v[l] = 1.0F / scale.v[l];
            ratio.v[l] = scale.v[l] / unit.v[l];
        }
        for (int c = 0; c < w.count; c += partial_sums) {
            for (int j = 0; j < partial_sums; ++j) {
                for (int l = 0; l < lanes; ++l) {
                    const float x = w.at[c + j].v[l] * inverse.v[l];
                    float q = (x + rounder) - rounder;
                    q = q > floor.v[l] ? q : floor.v[l];
                    q = q < ceil.v[l] ? q : ceil.v[l];
                    sums[j].v[l] += penalty(std::fabs(q - x) * ratio.v[l]);
                }
            }
        }
        return added(sums);
    }

    Lanes clip_cost(const Lanes& scale) const {
        Lanes cost;
        for (int l = 0; l < lanes; ++l) {
            const float inverse = 1.0F / scale.v[l];
            const float under = floor.v[l] - low.v[l] * inverse, over = high.v[l] * inverse - ceil.v[l];
            const float most = under > over ? under : over;
            cost.v[l] = penalty((most > 0.0F ? most : 0.0F) * (scale.v[l] / unit.v[l]));
        }
        return cost;
    }

    Lanes best(const ClipSteps& steps) {
        Lanes best = stored(steps.plain);
        unit = best;
        Lanes least = score(best);
        Integers live;
        for (int l = 0; l < lanes; ++l) live.v[l] = -1;
        for (int i = 0; i < steps.count; ++i) {
            const Lanes candidate = stored(steps.tried[i]), cost = clip_cost(candidate);
            std::int32_t any = 0;
            for (int l = 0; l < lanes; ++l) {
                live.v[l] &= cost.v[l] < least.v[l] ? -1 : 0;
                any |= live.v[l];
            }
            if (any == 0) break;
            const Lanes found = score(candidate);
            for (int l = 0; l < lanes; ++l) {
                const bool better = live.v[l] != 0 && found.v[l] < least.v[l] * margin;
                best.v[l] = better ? candidate.v[l] : best.v[l];
                least.v[l] = better ? found.v[l] : least.v[l];
            }
        }
        return best;
    }
};

struct GroupScales {
    Lanes scale, zero, sign;
};

// Turns the sign of lanes whose largest magnitude is positive: a symmetric grid has one negative code more.
inline void give_wider_side(Columns& w, Lanes& low, Lanes& high, Lanes& sign) {
    for (int l = 0; l < lanes; ++l) {
        const float under = -low.v[l], over = high.v[l];
        sign.v[l] = over > under ? -1.0F : 1.0F;
        low.v[l] = -larger(under, over);
        high.v[l] = smaller(under, over);
    }
    for (int c = 0; c < w.count; ++c) {
        for (int l = 0; l < lanes; ++l) w.at[c].v[l] *= sign.v[l];
    }
}

// Finds scales (their signs apart) and zero points, for symmetric codes of the weights as give_wider_side() leaves them.
inline bool find_scales(Columns& w, int bits, bool has_zeros, const ClipSteps& steps, GroupScales& out) {
    Search search{w, {}, {}, {}, {}, {}, {}};
    if (!find_range(w, search.low, search.high)) return false;
    for (int l = 0; l < lanes; ++l) out.sign.v[l] = 1.0F;
    if (!has_zeros) give_wider_side(w, search.low, search.high, out.sign);
    const float levels = static_cast<float>((1 << bits) - 1);
    const float limit = largest_scale * static_cast<float>(has_zeros ? (1 << bits) - 1 : (1 << (bits - 1)) - 1);
    bool held = true;
    for (int l = 0; l < lanes; ++l) {
        if (has_zeros) {
            search.low.v[l] = smaller(search.low.v[l], 0.0F);
            search.high.v[l] = larger(search.high.v[l], 0.0F);
        }
        search.span.v[l] = has_zeros ? search.high.v[l] - search.low.v[l] : larger(-search.low.v[l], search.high.v[l]);
        held = held && search.span.v[l] <= limit;
    }
    if (!held) return false;
    const Lanes plain = search.stored(steps.plain);
    for (int l = 0; l < lanes; ++l) {
        const float zero = (-search.low.v[l] * (1.0F / plain.v[l]) + rounder) - rounder;
        out.zero.v[l] = has_zeros ? smaller(zero, levels) : static_cast<float>(1 << (bits - 1));
        search.floor.v[l] = -out.zero.v[l];
        search.ceil.v[l] = levels - out.zero.v[l];
    }
    out.scale = search.best(steps);
    return true;
}

// Four columns of a row in one word, that is one quad in its bytes.
inline void find_codes(const Columns& w, const GroupScales& found, float levels, Words& words) {
    for (int c = 0; c < w.count; c += quad_columns) {
        std::uint32_t* word = words.at[c / quad_columns];
        for (int l = 0; l < lanes; ++l) word[l] = 0;
        for (int j = 0; j < quad_columns; ++j) {
            for (int l = 0; l < lanes; ++l) {
                float q = ((w.at[c + j].v[l] / found.scale.v[l] + rounder) - rounder) + found.zero.v[l];
                q = q > 0.0F ? q : 0.0F;
                q = q < levels ? q : levels;
                word[l] |= static_cast<std::uint32_t>(static_cast<std::int32_t>(q)) << 8 * j;
            }
        }
    }
}

// The nearest of the doubled E2M1 magnitudes 0, 1, 2, 3, 4, 6, 8, 12, whose steps double at 4 and 8. Halfway goes to the
// even multiple of the step, which has the even code.
inline float magnitude(float x) {
    const float step = x < 4.0F ? 1.0F : x < 8.0F ? 2.0F : 4.0F, inverse = x < 4.0F ? 1.0F : x < 8.0F ? 0.5F : 0.25F;
    const float nearest = ((x * inverse + rounder) - rounder) * step;
    return nearest < 12.0F ? nearest : 12.0F;
}

inline std::int32_t magnitude_code(float magnitude) {
    const float above = 4.0F + (magnitude - 4.0F) * 0.5F, code = magnitude < 4.0F ? magnitude : above;
    return static_cast<std::int32_t>(code < 7.0F ? code : 7.0F);
}

inline float inverse_power(std::int32_t exponent) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(255 - exponent) << 23);
}

inline Lanes mx_error(const Columns& w, const Integers& exponent, float unit) {
    Lanes inverse, sums[partial_sums] = {};
    for (int l = 0; l < lanes; ++l) inverse.v[l] = inverse_power(exponent.v[l]);
    for (int c = 0; c < w.count; c += partial_sums) {
        for (int j = 0; j < partial_sums; ++j) {
            for (int l = 0; l < lanes; ++l) {
                const float x = std::fabs(w.at[c + j].v[l] * inverse.v[l]);
                sums[j].v[l] += penalty(std::fabs(magnitude(x) - x) * unit);
            }
        }
    }
    return added(sums);
}

inline bool encode_mx(const Columns& w, Integers& exponent, Words& words) {
    Lanes low, high;
    if (!find_range(w, low, high)) return false;
    Integers next;
    for (int l = 0; l < lanes; ++l) {
        const float peak = larger(-low.v[l], high.v[l]);
        // As a signed number, so that the sign of -0 counts as less than every exponent.
        const std::int32_t field = (std::bit_cast<std::int32_t>(peak) >> 23) - 2;
        exponent.v[l] = field > 2 ? field : 2;
        next.v[l] = exponent.v[l] + 1;
    }
    const Lanes clipping = mx_error(w, exponent, 1.0F), wider = mx_error(w, next, 2.0F);
    Lanes inverse;
    for (int l = 0; l < lanes; ++l) {
        if (wider.v[l] < clipping.v[l] * margin) exponent.v[l] = next.v[l];
        inverse.v[l] = inverse_power(exponent.v[l]);
    }
    for (int c = 0; c < w.count; c += quad_columns) {
        std::uint32_t* word = words.at[c / quad_columns];
        for (int l = 0; l < lanes; ++l) word[l] = 0;
        for (int j = 0; j < quad_columns; ++j) {
            for (int l = 0; l < lanes; ++l) {
                const float x = w.at[c + j].v[l] * inverse.v[l];
                const std::int32_t code = magnitude_code(magnitude(std::fabs(x)));
                const std::int32_t sign = code > 0 && x < 0.0F ? 8 : 0;
                word[l] |= static_cast<std::uint32_t>(code | sign) << 8 * j;
            }
        }
    }
    return true;
}

// Puts the quads, one code a byte, into their `bits`; `mask` picks the bits of a byte, from `shift` on.
inline std::uint8_t* gather(const Words& words, int quads, int bits, std::uint32_t mask, int shift, std::uint8_t* out) {
    const int packed = 8 / bits;
    for (int q = 0; q < quads; q += packed) {
        alignas(64) std::uint32_t sum[lanes] = {};
        for (int k = 0; k < packed; ++k) {
            const std::uint32_t* word = words.at[q + k];
            for (int l = 0; l < lanes; ++l) sum[l] |= ((word[l] >> shift) & mask) << k * bits;
        }
        std::memcpy(out, sum, quad_bytes);
        out += quad_bytes;
    }
    return out;
}

inline void store_codes(const Words& words, int columns, int bits, std::uint8_t* out) {
    const int quads = columns / quad_columns;
    if (bits == 3) {
        out = gather(words, quads, 2, 0x03030303U, 0, out);
        gather(words, quads, 1, 0x01010101U, 2, out);
        return;
    }
    if (bits == 6) {
        out = gather(words, quads, 4, 0x0F0F0F0FU, 0, out);
        gather(words, quads, 2, 0x03030303U, 4, out);
        return;
    }
    gather(words, quads, bits, 0xFFFFFFFFU, 0, out);
}

// Head and codes of one group of a row block; false as in encode.hpp.
inline bool encode_group(const EncodeJob& job, Columns& w, int rows, std::uint8_t* scales, std::uint8_t* zeros,
                         Words& words) {
    const Matrix& m = job.tiles;
    if (m.format == Format::tile_mxfp4) {
        Integers exponent;
        if (!encode_mx(w, exponent, words)) return false;
        for (int l = 0; l < rows; ++l) scales[l] = static_cast<std::uint8_t>(exponent.v[l]);
        return true;
    }
    const int bits = code_bits(m.format);
    GroupScales found;
    if (!find_scales(w, bits, m.has_zeros, job.steps, found)) return false;
    find_codes(w, found, static_cast<float>((1 << bits) - 1), words);
    for (int l = 0; l < rows; ++l) {
        const std::uint32_t sign = found.sign.v[l] < 0.0F ? 0x8000U : 0U;
        const auto half = static_cast<std::uint16_t>(half_of(found.scale.v[l]) | sign);
        std::memcpy(scales + 2 * l, &half, 2);
        if (m.has_zeros) zeros[l] = static_cast<std::uint8_t>(found.zero.v[l]);
    }
    return true;
}

// The scales that the search finds for every group of a row block, with their signs.
struct BlockScales {
    Lanes* of_group;

    explicit BlockScales(int groups) : of_group(new Lanes[static_cast<std::size_t>(groups)]) {}
    BlockScales(const BlockScales&) = delete;
    BlockScales& operator=(const BlockScales&) = delete;
    ~BlockScales() { delete[] of_group; }
};

constexpr float largest_byte_scale = 127.0F;

// Rounds the magnitude of one group's scales to bytes in units of the rows' scales, and turns the weights as the search did.
inline void round_scales(const Lanes& signed_scale, const Lanes& of_row, Columns& w, GroupScales& found, Lanes& bytes) {
    for (int l = 0; l < lanes; ++l) {
        found.sign.v[l] = signed_scale.v[l] < 0.0F ? -1.0F : 1.0F;
        const float count = (std::fabs(signed_scale.v[l]) / of_row.v[l] + rounder) - rounder;
        const float byte = smaller(larger(count, 1.0F), largest_byte_scale);
        found.scale.v[l] = byte * of_row.v[l];
        bytes.v[l] = byte * found.sign.v[l];
    }
    for (int c = 0; c < w.count; ++c) {
        for (int l = 0; l < lanes; ++l) w.at[c].v[l] *= found.sign.v[l];
    }
}

// One row block whose scales are bytes under a scale of each row, the largest of which is 127; see formats/tiled.py.
inline bool encode_byte_scaled(const EncodeJob& job, const TileLayout& layout, int block, BlockScales& scales, std::uint8_t* out) {
    const Matrix& m = job.tiles;
    const int bits = code_bits(m.format), rows = smaller(lanes, m.rows - block * lanes);
    Columns w;
    w.count = m.group;
    Words words;
    Lanes of_row{};
    for (int group = 0; group < layout.groups; ++group) {
        GroupScales found;
        load_group(job, block, group, w);
        if (!find_scales(w, bits, false, job.steps, found)) return false;
        for (int l = 0; l < lanes; ++l) {
            of_row.v[l] = larger(of_row.v[l], found.scale.v[l]);
            scales.of_group[group].v[l] = found.scale.v[l] * found.sign.v[l];
        }
    }
    for (int l = 0; l < lanes; ++l) of_row.v[l] /= largest_byte_scale;
    std::memset(out, 0, layout.row_scale_bytes);
    std::memcpy(out, of_row.v, sizeof(float) * static_cast<std::size_t>(rows));
    for (int group = 0; group < layout.groups; ++group) {
        const GroupPlace at = GroupPlace::of(layout, group);
        if (group % stripe_groups == 0) std::memset(out + at.scales, 0, at.codes - at.scales);
        GroupScales found;
        Lanes bytes;
        load_group(job, block, group, w);
        round_scales(scales.of_group[group], of_row, w, found, bytes);
        for (int l = 0; l < lanes; ++l) found.zero.v[l] = static_cast<float>(1 << (bits - 1));
        find_codes(w, found, static_cast<float>((1 << bits) - 1), words);
        for (int l = 0; l < rows; ++l) out[at.scales + static_cast<std::size_t>(l)] = static_cast<std::uint8_t>(static_cast<std::int8_t>(bytes.v[l]));
        store_codes(words, w.count, bits, out + at.codes);
    }
    return true;
}

bool encode_row_blocks(const EncodeJob& job, int begin, int end) {
    const Matrix& m = job.tiles;
    const TileLayout layout = TileLayout::of(m);
    Columns w;
    w.count = m.group;
    Words words;
    BlockScales scales(m.byte_scales ? layout.groups : 0);
    for (int block = begin; block < end; ++block) {
        std::uint8_t* out = const_cast<std::uint8_t*>(m.data) + static_cast<std::size_t>(block) * layout.block_bytes;
        if (m.byte_scales) {
            if (!encode_byte_scaled(job, layout, block, scales, out)) return false;
            continue;
        }
        for (int group = 0; group < layout.groups; ++group) {
            const GroupPlace at = GroupPlace::of(layout, group);
            if (group % stripe_groups == 0) std::memset(out + at.scales, 0, at.codes - at.scales);
            load_group(job, block, group, w);
            const int rows = smaller(lanes, m.rows - block * lanes);
            if (!encode_group(job, w, rows, out + at.scales, out + at.zeros, words)) return false;
            store_codes(words, w.count, code_bits(m.format), out + at.codes);
        }
    }
    return true;
}

}  // namespace
}  // namespace gangline
