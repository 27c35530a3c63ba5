"""Generates the PTX that decodes packed 4-bit values with a lookup table in a thread's registers.

Values that share a scale take at most 16 different values. `build` computes these 16 once per
block, with the rounding of dequantization, and splits them into 16 low bytes (four registers)
and 16 high bytes (four registers). `decode` then looks up the eight values of a packed word with
byte permutations (prmt), without touching memory.

Operands $0, $1, ... are numbered as in inline assembly: results first, then inputs.
"""

# Constraints for inline assembly: 8 result registers, 17 fp32 inputs.
BUILD_OPERANDS = ",".join(["=r"] * 8 + ["f"] * 17)
# 8 results of 16 bits, 9 inputs of 32 bits. "&" (early clobber): results
# are written while inputs are still read.
DECODE_OPERANDS = ",".join(["=&h"] * 8 + ["r"] * 9)


def build(dtype: str) -> str:
    """Returns PTX that builds the table: from a scale $8 and the 16 code values $9-$24 to eight registers.

    The scaled values' low bytes go to $0-$3 and their high bytes to $4-$7, four values per register. `dtype`
    is `bf16` or `f16`, as PTX calls them.
    """
    # p_i = scale * code_i in fp32, as dequantizing computes it.
    products = [f"mul.rn.f32 p{i}, $8, ${9 + i};" for i in range(16)]
    # Round two products into the halves of one register: t_i = [value 2i+1 | value 2i].
    rounded = [f"cvt.rn.{dtype}x2.f32 t{i}, p{2 * i + 1}, p{2 * i};" for i in range(8)]
    # Take the even bytes (low bytes of four values) and the odd bytes (high bytes) of two registers.
    low = [f"prmt.b32 ${i}, t{2 * i}, t{2 * i + 1}, 0x6420;" for i in range(4)]
    high = [f"prmt.b32 ${4 + i}, t{2 * i}, t{2 * i + 1}, 0x7531;" for i in range(4)]
    return "\n".join(["{.reg .f32 p<16>; .reg .b32 t<8>;", *products, *rounded, *low, *high, "}"])


def decode() -> str:
    """Returns PTX that decodes the word $8 with the table $9-$16 to its eight 16-bit values $0-$7, in order.

    A prmt selects four bytes out of eight by four 3-bit indices, but a
    nibble has 4 bits. So for four nibbles:

    1. Look up the lower three bits in the first half of the table (codes 0-7), and in the second half (codes
       8-15).
    2. Select between both results, byte by byte, by the nibble's fourth bit.

    This is done for the low bytes and for the high bytes. Then low and high
    bytes are interleaved into values.
    """
    # index: every nibble's lower three bits (prmt reads the fourth as "replicate the sign bit"). half: for a
    # prmt over (first, second), byte i is i, or i + 4 if nibble i has its fourth bit set; the shift moves
    # that bit to the 4's place of the nibble.
    lines = [
        "{.reg .b32 index, half, low, high, first, second, pair;",
        "and.b32 index, $8, 0x77777777;",
        "shr.u32 half, $8, 1;",
        "lop3.b32 half, half, 0x44444444, 0x32103210, 0xEA;",  # 0xEA: (half & 0x444...) | 0x3210...
    ]
    for four in range(2):  # the lower and the upper four nibbles of the word
        if four:
            lines += ["shr.u32 index, index, 16;", "shr.u32 half, half, 16;"]
        for plane, place in (("low", 9), ("high", 13)):
            lines += [
                f"prmt.b32 first, ${place}, ${place + 1}, index;",
                f"prmt.b32 second, ${place + 2}, ${place + 3}, index;",
                f"prmt.b32 {plane}, first, second, half;",
            ]
        # The even value of a byte is its high nibble, so the order of each byte's two values is swapped here.
        for byte, order in enumerate(("0x4051", "0x6273")):
            even = 4 * four + 2 * byte
            lines += [f"prmt.b32 pair, low, high, {order};", f"mov.b32 {{${even}, ${even + 1}}}, pair;"]
    return "\n".join([*lines, "}"])
