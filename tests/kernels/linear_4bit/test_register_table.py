"""Checks the PTX that decodes 4-bit words, with an interpreter for the few instructions that it uses."""

import re

import pytest
import torch

from halfbyte.kernels.linear_4bit import ptx_lookup
from halfbyte.kernels.quantize_4bit import reference


def permute(low, high, selector):
    """Computes prmt.b32: each byte of the result is one of eight bytes, or that byte's sign bit repeated."""
    source = [(word >> 8 * place) & 0xFF for word in (low, high) for place in range(4)]
    result = 0
    for place in range(4):
        choice = (selector >> 4 * place) & 0xF
        byte = source[choice & 7]
        if choice & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * place
    return result


def bits(value, dtype):
    return value.to(dtype).view(torch.int16).item() & 0xFFFF


def run(assembly, registers):
    """Runs the instructions and returns the registers; fp32 registers hold 0-d tensors, others integers."""

    def read(operand):
        return registers[operand] if operand in registers else int(operand, 0)

    for line in re.sub(r"\.reg[^;]*;", "", assembly.strip()[1:-1]).split(";"):
        if not line.strip():
            continue
        name, operands = line.strip().split(None, 1)
        if name == "mov.b32":
            low, high, pair = re.fullmatch(r"\{(.*), (.*)\}, (.*)", operands).groups()
            registers[low], registers[high] = read(pair) & 0xFFFF, read(pair) >> 16
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        a, b, *rest = [*map(read, sources), None]
        match name:
            case "and.b32":
                registers[target] = a & b
            case "shr.u32":
                registers[target] = a >> b
            case "lop3.b32":
                assert rest[1] == 0xEA  # the truth table of (a & b) | c
                registers[target] = (a & b) | rest[0]
            case "prmt.b32":
                registers[target] = permute(a, b, rest[0])
            case "mul.rn.f32":
                registers[target] = a * b
            case "cvt.rn.bf16x2.f32":
                registers[target] = bits(a, torch.bfloat16) << 16 | bits(b, torch.bfloat16)
            case "cvt.rn.f16x2.f32":
                registers[target] = bits(a, torch.float16) << 16 | bits(b, torch.float16)
            case _:
                raise AssertionError(f"unknown instruction {name}")
    return registers


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_nibble_at_every_position_equals_the_reference(name, dtype, quant_type):
    code = reference.CODES[quant_type]
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        scale = torch.rand((), generator=generator)
        table = run(ptx_lookup.build(name), {"$8": scale, **{f"${9 + i}": code[i] for i in range(16)}})
        planes = {f"${9 + i}": table[f"${i}"] for i in range(8)}
        for first in range(16):
            packed = torch.tensor([(first + 3 * i) % 16 << 4 | (first + 5 * i) % 16 for i in range(4)])
            word = sum(int(byte) << 8 * place for place, byte in enumerate(packed))
            decoded = run(ptx_lookup.decode(), {"$8": word, **planes})
            expected = reference.dequantize_4bit(packed.byte(), scale.view(1), code, (8,), dtype, 64)
            assert [decoded[f"${i}"] for i in range(8)] == [bits(value, dtype) for value in expected]
