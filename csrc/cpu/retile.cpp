#include "retile.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "buffer.hpp"
#include "threads.hpp"
#include "tile_layout.hpp"

namespace gangline {
namespace {

constexpr int block_columns = 32;
constexpr std::uint32_t nibbles = 0x0F0F0F0F;

std::uint32_t word_at(const std::uint8_t* p) {
    std::uint32_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

void put_word(std::uint8_t* p, std::uint32_t word) { std::memcpy(p, &word, sizeof word); }

// The low nibbles of 16 bytes are the first half of a block. Words of four neighbouring codes, two to a byte.
void put_nibbles(const std::uint8_t (&codes)[16], int row, std::uint8_t* group) {
    for (int half = 0; half < 2; ++half) {
        const std::uint32_t first = word_at(codes + 8 * half), second = word_at(codes + 8 * half + 4);
        std::uint8_t* at = group + half * quad_bytes + 4 * row;
        put_word(at, (first & nibbles) | (second & nibbles) << 4);
        put_word(at + 2 * quad_bytes, (first >> 4 & nibbles) | (second & ~nibbles));
    }
}

// What a ggml block is in tiles: where its scale and its codes lie, and how the codes of one row go into a group.
struct Q4_0Blocks {
    static constexpr Format tiles = Format::tile_int4;
    static constexpr int bytes = 18, scale_bytes = 2;
    static bool put(const std::uint8_t* block, int row, std::uint8_t* scale, std::uint8_t* group) {
        std::memcpy(scale + 2 * row, block, 2);
        std::uint8_t codes[16];
        std::memcpy(codes, block + 2, 16);
        put_nibbles(codes, row, group);
        return true;
    }
};

struct Q8_0Blocks {
    static constexpr Format tiles = Format::tile_int8;
    static constexpr int bytes = 34, scale_bytes = 2;
    static bool put(const std::uint8_t* block, int row, std::uint8_t* scale, std::uint8_t* group) {
        std::memcpy(scale + 2 * row, block, 2);
        // Signed bytes become unsigned ones with 128 for zero.
        for (int quad = 0; quad < step_quads; ++quad) {
            put_word(group + quad * quad_bytes + 4 * row, word_at(block + 2 + 4 * quad) ^ 0x80808080U);
        }
        return true;
    }
};

struct Mxfp4Blocks {
    static constexpr Format tiles = Format::tile_mxfp4;
    static constexpr int bytes = 17, scale_bytes = 1;
    static bool put(const std::uint8_t* block, int row, std::uint8_t* scale, std::uint8_t* group) {
        scale[row] = block[0];
        std::uint8_t codes[16];
        for (int half = 0; half < 4; ++half) put_word(codes + 4 * half, without_negative_zero(word_at(block + 1 + 4 * half)));
        put_nibbles(codes, row, group);
        return block[0] != 255;
    }
    // ggml does not know the sign of zero.
    static std::uint32_t without_negative_zero(std::uint32_t codes) {
        const std::uint32_t any = (codes | codes << 1 | codes << 2) & 0x44444444U;
        return codes & (0x77777777U | any << 1);
    }
};

// One block of 16 rows, of which `rows` are there. Rows that are not get the scale 0 and the codes of zero.
template <class Blocks>
bool retile_rows(const std::uint8_t* blocks, int rows, const TileLayout& tile, std::uint8_t* out) {
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{tile.groups} * Blocks::bytes;
    bool held = true;
    for (int first = 0; first < tile.groups; first += stripe_groups) {
        const int count = tile.groups_from(first);
        std::uint8_t* head = out + static_cast<std::size_t>(first / stripe_groups) * tile.stripe_bytes;
        std::uint8_t* codes = head + tile.head_bytes(count);
        const std::size_t scales = static_cast<std::size_t>(count * tile_rows * Blocks::scale_bytes);
        std::memset(head + scales, 0, tile.head_bytes(count) - scales);
        if (rows < tile_rows) {
            std::memset(head, 0, scales);
            std::memset(codes, Blocks::tiles == Format::tile_int8 ? 0x80 : 0, tile.group_bytes * static_cast<std::size_t>(count));
        }
        for (int g = 0; g < count; ++g) {
            const std::uint8_t* block = blocks + std::ptrdiff_t{first + g} * Blocks::bytes;
            for (int row = 0; row < rows; ++row) {
                held &= Blocks::put(block + row * row_bytes, row, head + g * tile_rows * Blocks::scale_bytes,
                                    codes + static_cast<std::size_t>(g) * tile.group_bytes);
            }
        }
    }
    return held;
}

template <class Blocks>
TileLayout layout_of(const RetileJob& job) {
    if (job.rows < 1 || job.cols < block_columns || job.cols % block_columns != 0) {
        throw std::invalid_argument("blocks come in rows of a multiple of 32 columns");
    }
    return TileLayout::of(Blocks::tiles, block_columns, false, job.cols);
}

template <class Blocks>
struct Retile {
    static bool apart(const RetileJob& job) {
        const TileLayout tile = layout_of<Blocks>(job);
        const std::size_t source = static_cast<std::size_t>(tile_rows * tile.groups * Blocks::bytes);
        const int count = (job.rows + tile_rows - 1) / tile_rows;
        std::atomic<bool> held{true};
        parallel([&](int worker, int workers) {
            const Range part = share(count, 1, worker, workers);
            for (int i = part.begin; i < part.end; ++i) {
                const std::size_t at = static_cast<std::size_t>(i);
                const int rows = std::min(tile_rows, job.rows - i * tile_rows);
                if (!retile_rows<Blocks>(job.blocks + at * source, rows, tile, job.tiles + at * tile.block_bytes)) {
                    held.store(false, std::memory_order_relaxed);
                }
            }
        });
        return held.load();
    }

    static bool in_place(const RetileJob& job) {
        const TileLayout tile = layout_of<Blocks>(job);
        const std::size_t bytes = static_cast<std::size_t>(tile_rows * tile.groups * Blocks::bytes);
        if (job.rows % tile_rows != 0 || tile.block_bytes != bytes || job.tiles > job.blocks) {
            throw std::invalid_argument("tiles of another size than the blocks cannot take their place");
        }
        Buffer<std::uint8_t> room;
        std::uint8_t* copy = room.want(bytes);
        bool held = true;
        for (int i = 0; i < job.rows / tile_rows; ++i) {
            const std::size_t at = static_cast<std::size_t>(i) * bytes;
            std::memcpy(copy, job.blocks + at, bytes);
            held &= retile_rows<Blocks>(copy, tile_rows, tile, job.tiles + at);
        }
        return held;
    }
};

template <class Call>
bool with_blocks(const std::string& codec, Call call) {
    if (codec == "ggml:Q4_0") return call(Retile<Q4_0Blocks>{});
    if (codec == "ggml:Q8_0") return call(Retile<Q8_0Blocks>{});
    if (codec == "ggml:MXFP4") return call(Retile<Mxfp4Blocks>{});
    throw std::invalid_argument("'" + codec + "' has no tile form in the native core");
}

}  // namespace

bool retile(const std::string& codec, const RetileJob& job) {
    return with_blocks(codec, [&](auto blocks) { return blocks.apart(job); });
}

bool retile_in_place(const std::string& codec, const RetileJob& job) {
    return with_blocks(codec, [&](auto blocks) { return blocks.in_place(job); });
}

}  // namespace gangline
