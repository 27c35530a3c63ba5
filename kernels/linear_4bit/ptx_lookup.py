"""PTX that decodes a block of packed values out of a table in a thread's registers.

The values that share a scale are 16 different ones at most. `build` computes them once, rounded as dequantizing rounds
them, and keeps their low and their high bytes in four registers each; `decode` then looks the eight values of a word
up by byte permutations. Operands are numbered as inline assembly numbers them, results first.
"""

BUILD_OPERANDS = ",".join(["=r"] * 8 + ["f"] * 17)
# Results are written while operands are still read.
DECODE_OPERANDS = ",".join(["=&h"] * 8 + ["r"] * 9)


def build(dtype: str) -> str:
    """Of a scale $8 and a code $9 to $24: the 16 scaled values, low bytes to $0-$3, high ones to $4-$7.

    `dtype` is `bf16` or `f16`, as PTX calls them.
    """
    products = [f"mul.rn.f32 p{i}, $8, ${9 + i};" for i in range(16)]
    rounded = [f"cvt.rn.{dtype}x2.f32 t{i}, p{2 * i + 1}, p{2 * i};" for i in range(8)]
    low = [f"prmt.b32 ${i}, t{2 * i}, t{2 * i + 1}, 0x6420;" for i in range(4)]
    high = [f"prmt.b32 ${4 + i}, t{2 * i}, t{2 * i + 1}, 0x7531;" for i in range(4)]
    return "\n".join(["{.reg .f32 p<16>; .reg .b32 t<8>;", *products, *rounded, *low, *high, "}"])


def decode() -> str:
    """Of a word $8 and a table $9 to $16: its eight values of 16 bits, in their order, to $0-$7.

    A byte permutation looks four nibbles up among eight bytes by their lower three bits. It is made for both halves
    of the table, and another picks by the fourth bit; so for the low bytes and for the high ones.
    """
    lines = [
        "{.reg .b32 index, half, low, high, first, second, pair;",
        "and.b32 index, $8, 0x77777777;",
        "shr.u32 half, $8, 1;",
        "lop3.b32 half, half, 0x44444444, 0x32103210, 0xEA;",  # (half & 0x4..) | 0x3210..: of which half byte i is
    ]
    for four in range(2):
        if four:
            lines += ["shr.u32 index, index, 16;", "shr.u32 half, half, 16;"]
        for plane, place in (("low", 9), ("high", 13)):
            lines += [
                f"prmt.b32 first, ${place}, ${place + 1}, index;",
                f"prmt.b32 second, ${place + 2}, ${place + 3}, index;",
                f"prmt.b32 {plane}, first, second, half;",
            ]
        # The even value of a byte is its high nibble.
        for byte, order in enumerate(("0x4051", "0x6273")):
            even = 4 * four + 2 * byte
            lines += [f"prmt.b32 pair, low, high, {order};", f"mov.b32 {{${even}, ${even + 1}}}, pair;"]
    return "\n".join([*lines, "}"])
