// bfloat16 in memory: the upper half of a float32.

#pragma once
#include <cstdint>
#include <cstring>

inline float from_bf16(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline uint16_t to_bf16(float x) {  // to nearest, ties to even, as torch rounds
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // not a number
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
