// Blocks as GGUF files have them, and ours of int4.py.
#pragma once

#include <cstring>

#include "block_formats.h"

namespace logitkernels {

// A source reads a unit, a block, group or superblock of one feature, as the file has it: `bytes` for `blocks` blocks
// of 32 weights. The layouts are those of https://github.com/ggml-org/ggml, src/ggml-common.h, and of ../int4.py.
template <class Format>
struct Source;

inline uint16_t load16(const uint8_t* source) {
    uint16_t value;
    std::memcpy(&value, source, sizeof value);
    return value;
}

// Nibbles of 2 n integers, eight at a time: the lower ones are the first n, the upper ones the others.
template <int N>
inline void read_nibbles(const uint8_t* source, uint8_t* integers) {
    constexpr uint64_t nibbles = 0x0f0f0f0f0f0f0f0fu;
    for (int i = 0; i < N; i += 8) {
        uint64_t bytes;
        std::memcpy(&bytes, source + i, sizeof bytes);
        const uint64_t lower = bytes & nibbles, upper = bytes >> 4 & nibbles;
        std::memcpy(integers + i, &lower, sizeof lower);
        std::memcpy(integers + N + i, &upper, sizeof upper);
    }
}

// Adds a fifth bit to each of 32 integers, eight at a time: each byte of `bits` keeps one bit of the source, and
// the sum carries it to the byte's top.
inline void read_fifth_bits(const uint8_t* source, uint8_t* integers) {
    for (int i = 0; i < 4; ++i) {
        const uint64_t bits = (source[i] * 0x0101010101010101u) & 0x8040201008040201u;
        uint64_t eight;
        std::memcpy(&eight, integers + 8 * i, sizeof eight);
        eight |= ((bits + 0x7f7f7f7f7f7f7f7fu) & 0x8080808080808080u) >> 3;
        std::memcpy(integers + 8 * i, &eight, sizeof eight);
    }
}

// The integers 128 n + 32 j + i, i < 32, have bits 2 j and 2 j + 1 of byte 32 n + i.
inline uint8_t two_bits(const uint8_t* source, int n, int j, int i) { return source[32 * n + i] >> (2 * j) & 3; }

template <>
struct Source<Q40> {
    static constexpr int64_t bytes = 18, blocks = 1;
    static void read(const uint8_t* source, Unit& unit) {
        unit.scale = load16(source);
        read_nibbles<16>(source + 2, unit.integers);
    }
};
template <>
struct Source<IQ4NL> : Source<Q40> {};

template <>
struct Source<Q41> {
    static constexpr int64_t bytes = 20, blocks = 1;
    static void read(const uint8_t* source, Unit& unit) {
        unit.scale = load16(source);
        unit.minimum = load16(source + 2);
        read_nibbles<16>(source + 4, unit.integers);
    }
};

template <>
struct Source<Q50> {
    static constexpr int64_t bytes = 22, blocks = 1;
    static void read(const uint8_t* source, Unit& unit) {
        unit.scale = load16(source);
        read_nibbles<16>(source + 6, unit.integers);
        read_fifth_bits(source + 2, unit.integers);
    }
};

template <>
struct Source<Q51> {
    static constexpr int64_t bytes = 24, blocks = 1;
    static void read(const uint8_t* source, Unit& unit) {
        unit.scale = load16(source);
        unit.minimum = load16(source + 2);
        read_nibbles<16>(source + 8, unit.integers);
        read_fifth_bits(source + 4, unit.integers);
    }
};

template <>
struct Source<Q80> {
    static constexpr int64_t bytes = 34, blocks = 1;
    static void read(const uint8_t* source, Unit& unit) {
        unit.scale = load16(source);
        std::memcpy(unit.integers, source + 2, 32);
    }
};

template <>
struct Source<MXFP4> {
    static constexpr int64_t bytes = 17, blocks = 1;
    static void read(const uint8_t* source, Unit& unit) {
        unit.scales[0] = source[0];
        read_nibbles<16>(source + 1, unit.integers);
    }
};

// The file subtracts minima; panels add them.
inline uint16_t negated(uint16_t float16) { return float16 ^ 0x8000; }

template <>
struct Source<Q2K> {
    static constexpr int64_t bytes = 84, blocks = kSuperBlocks;
    static void read(const uint8_t* source, Unit& unit) {
        for (int i = 0; i < 16; ++i) {
            unit.scales[i] = source[i] & 15;
            unit.minima[i] = source[i] >> 4;
        }
        for (int n = 0; n < 2; ++n)
            for (int j = 0; j < 4; ++j)
                for (int i = 0; i < 32; ++i) unit.integers[128 * n + 32 * j + i] = two_bits(source + 16, n, j, i);
        unit.scale = load16(source + 80);
        unit.minimum = negated(load16(source + 82));
    }
};

template <>
struct Source<Q3K> {
    static constexpr int64_t bytes = 110, blocks = kSuperBlocks;
    static void read(const uint8_t* source, Unit& unit) {
        const uint8_t *third_bits = source, *lower = source + 32, *scales = source + 96;
        for (int n = 0; n < 2; ++n)
            for (int j = 0; j < 4; ++j)
                for (int i = 0; i < 32; ++i)
                    unit.integers[128 * n + 32 * j + i] =
                        uint8_t(two_bits(lower, n, j, i) | (third_bits[i] >> (4 * n + j) & 1) << 2);
        for (int i = 0; i < 16; ++i) {
            const int low = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4, high = scales[8 + i % 4] >> (i / 4 * 2) & 3;
            unit.scales[i] = uint8_t((low | high << 4) - 32);
        }
        unit.scale = load16(source + 108);
    }
};

// Eight scales and eight minima of six bits.
inline void read_scales(const uint8_t* source, Unit& unit) {
    for (int i = 0; i < 4; ++i) {
        unit.scales[i] = source[i] & 63;
        unit.minima[i] = source[4 + i] & 63;
        unit.scales[4 + i] = uint8_t((source[8 + i] & 15) | (source[i] >> 6) << 4);
        unit.minima[4 + i] = uint8_t(source[8 + i] >> 4 | (source[4 + i] >> 6) << 4);
    }
}

template <>
struct Source<Q4K> {
    static constexpr int64_t bytes = 144, blocks = kSuperBlocks;
    static void read(const uint8_t* source, Unit& unit) {
        unit.scale = load16(source);
        unit.minimum = negated(load16(source + 2));
        read_scales(source + 4, unit);
        for (int n = 0; n < 4; ++n) read_nibbles<32>(source + 16 + 32 * n, unit.integers + 64 * n);
    }
};

template <>
struct Source<Q5K> {
    static constexpr int64_t bytes = 176, blocks = kSuperBlocks;
    static void read(const uint8_t* source, Unit& unit) {
        unit.scale = load16(source);
        unit.minimum = negated(load16(source + 2));
        read_scales(source + 4, unit);
        for (int n = 0; n < 4; ++n) read_nibbles<32>(source + 48 + 32 * n, unit.integers + 64 * n);
        for (int b = 0; b < 8; ++b)
            for (int i = 0; i < 32; ++i) unit.integers[32 * b + i] |= uint8_t((source[16 + i] >> b & 1) << 4);
    }
};

template <>
struct Source<Q6K> {
    static constexpr int64_t bytes = 210, blocks = kSuperBlocks;
    static void read(const uint8_t* source, Unit& unit) {
        for (int n = 0; n < 2; ++n) {
            read_nibbles<64>(source + 64 * n, unit.integers + 128 * n);
            for (int j = 0; j < 4; ++j)
                for (int i = 0; i < 32; ++i)
                    unit.integers[128 * n + 32 * j + i] |= uint8_t(two_bits(source + 128, n, j, i) << 4);
        }
        std::memcpy(unit.scales, source + 192, 16);
        unit.scale = load16(source + 208);
    }
};

template <>
struct Source<IQ4XS> {
    static constexpr int64_t bytes = 136, blocks = kSuperBlocks;
    static void read(const uint8_t* source, Unit& unit) {
        unit.scale = load16(source);
        const uint16_t upper = load16(source + 2);
        for (int b = 0; b < 8; ++b) {
            const int low = source[4 + b / 2] >> (b % 2 * 4) & 15, high = upper >> (2 * b) & 3;
            unit.scales[b] = uint8_t((low | high << 4) - 32);
            read_nibbles<16>(source + 8 + 16 * b, unit.integers + 32 * b);
        }
    }
};

// A group's float32 scale, its zero, and its nibbles, two neighbours in a byte.
template <int kBlocks>
struct GroupSource {
    static constexpr int64_t bytes = 5 + 16 * kBlocks, blocks = kBlocks;
    static void read(const uint8_t* source, Unit& unit) {
        std::memcpy(&unit.group_scale, source, sizeof unit.group_scale);
        unit.zero = source[4];
        for (int i = 0; i < 16 * kBlocks; ++i) {
            unit.integers[2 * i] = source[5 + i] & 15;
            unit.integers[2 * i + 1] = source[5 + i] >> 4;
        }
    }
};
template <>
struct Source<Int4By32> : GroupSource<1> {};
template <>
struct Source<Int4By64> : GroupSource<2> {};
template <>
struct Source<Int4By128> : GroupSource<4> {};

}  // namespace logitkernels
