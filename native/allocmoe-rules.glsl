// What the shaders of the token rules share. allocmoe-token-rule.h says what the rules do; names here are those of there.
// One workgroup. A float whose least bit decides is handled as its bits, in integers: what a device does with tiny floats,
// and how exactly it divides, is its own affair.
#extension GL_EXT_shader_16bit_storage : require

#define BLOCK 256

layout(local_size_x = BLOCK, local_size_y = 1, local_size_z = 1) in;

const int RULE_BATCH        = 1;
const int VALUE_RELATIVE    = 1;
const int VALUE_REMAINING   = 2;
const int STRICT_ALONE      = 2;
const float STRICT_STEP     = 0.01;
const float STRICT_LEFT     = 400.0;
const uint KEY_NAN          = 0u;
const uint KEY_LOWEST       = 0x007fffffu;
const uint FLOAT_ONE        = 0x3f800000u;
const uint FLOAT_INF        = 0x7f800000u;
const uint FLOAT_NAN        = 0x7fc00000u;

bool is_nan(uint x) {
    return (x & 0x7fffffffu) > FLOAT_INF;
}

uint key_of(uint x) {
    const uint bits = x == 0x80000000u ? 0u : x;
    return (bits & 0x80000000u) != 0u ? ~bits : bits | 0x80000000u;
}

// A finite float that is not zero as mantissa * 2^(exponent - 150), the mantissa's highest bit being bit 23.
uint mantissa_of(uint x, out int exponent) {
    exponent      = int(x >> 23 & 255u);
    uint mantissa = x & 0x7fffffu;
    if (exponent > 0) {
        return mantissa | 0x800000u;
    }
    const int shift = 23 - findMSB(mantissa);
    exponent        = 1 - shift;
    return mantissa << shift;
}

// mantissa * 2^(exponent - 153) to the nearest float, to the even one of two. The mantissa's highest bit is bit 26, and its
// lowest stands for all below.
uint rounded(uint sign, int exponent, uint mantissa) {
    if (exponent >= 255) {
        return sign | FLOAT_INF;
    }
    if (exponent < 1) {
        const int shift = min(1 - exponent, 27);
        mantissa        = mantissa >> shift | uint((mantissa & ((1u << shift) - 1u)) != 0u);
        exponent        = 0;
    }
    const uint below  = mantissa & 7u;
    const uint result = exponent == 0 ? mantissa >> 3 : uint(exponent) << 23 | (mantissa >> 3 & 0x7fffffu);
    return sign | (result + uint(below > 4u || (below == 4u && (result & 1u) != 0u))); // into the exponent, if need be
}

uint divided(uint a, uint b) {
    const uint sign = (a ^ b) & 0x80000000u;
    const uint x    = a & 0x7fffffffu;
    const uint y    = b & 0x7fffffffu;
    if (is_nan(a) || is_nan(b) || (x == FLOAT_INF && y == FLOAT_INF) || (x == 0u && y == 0u)) {
        return FLOAT_NAN;
    }
    if (x == FLOAT_INF || y == 0u) {
        return sign | FLOAT_INF;
    }
    if (x == 0u || y == FLOAT_INF) {
        return sign;
    }
    int ex, ey;
    uint rest          = mantissa_of(x, ex);
    const uint divisor = mantissa_of(y, ey);
    if (rest < divisor) {
        rest <<= 1;
        --ex;
    }
    uint quotient = 0u;
    for (int i = 0; i < 27; ++i) {
        quotient <<= 1;
        if (rest >= divisor) {
            rest -= divisor;
            quotient |= 1u;
        }
        rest <<= 1;
    }
    return rounded(sign, ex - ey + 127, quotient | uint(rest != 0u));
}

uint subtracted(uint a, uint b) {
    b ^= 0x80000000u; // a + b from here
    uint x = a & 0x7fffffffu;
    uint y = b & 0x7fffffffu;
    if (is_nan(a) || is_nan(b)) {
        return FLOAT_NAN;
    }
    if (x == FLOAT_INF || y == FLOAT_INF) {
        return x == y && a != b ? FLOAT_NAN : x == FLOAT_INF ? a
                                                             : b;
    }
    if (x == 0u || y == 0u) {
        return x == 0u && y == 0u ? a & b : x == 0u ? b
                                                    : a;
    }
    if (x < y) {
        const uint other = a;
        a                = b;
        b                = other;
        x                = a & 0x7fffffffu;
        y                = b & 0x7fffffffu;
    }
    int exponent, ey;
    uint sum        = mantissa_of(x, exponent) << 3;
    uint less       = mantissa_of(y, ey) << 3;
    const int shift = min(exponent - ey, 27);
    less            = less >> shift | uint((less & ((1u << shift) - 1u)) != 0u);
    sum             = ((a ^ b) & 0x80000000u) == 0u ? sum + less : sum - less;
    if (sum == 0u) {
        return 0u;
    }
    const int up = 26 - findMSB(sum);
    sum          = up < 0 ? sum >> 1 | (sum & 1u) : sum << up;
    return rounded(a & 0x80000000u, exponent - up, sum);
}
