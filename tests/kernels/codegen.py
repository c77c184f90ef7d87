"""Compiles the kernels for any card on a machine without a GPU, with the arguments that the launcher would pass."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

import tma_moe
from tma_moe.launcher import Launch
from tma_moe.recipe import make_recipe
from tma_moe.tiles import Choice

SHORT = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of one kernel: PTX text, machine code (as text, too), bytes of shared memory, warps, registers
    and spilled bytes."""

    name: str
    arch: int
    ptx: str
    cubin: bytes
    ttgir: str
    shared: int
    warps: int
    registers: int
    spilled: int
    scratch: int

    @cached_property
    def sass(self) -> str:
        disassemble([self])
        return self.sass

    def count(self, instruction: str) -> int:
        return self.ptx.count(instruction)

    def assert_takes_turn(self, *, reads_early: bool) -> None:
        """The contract of tma_moe.pdl, in the machine code: the kernel waits once, and triggers once, after it.

        Unless it `reads_early`, it also loads nothing before. That cannot be read off a warp-specialised kernel, whose
        other warps' code may stand in front of the wait, though they begin behind it.
        """
        assert self.sass.count("ACQBULK") == 1, f"{self.name} has to wait for the kernel before it, once"
        assert self.sass.count("PREEXIT") == 1, f"{self.name} has to let the next kernel start, once"
        before, _ = self.sass.split("ACQBULK")
        assert "PREEXIT" not in before, f"{self.name} lets the next kernel start before it has waited"
        if not reads_early:
            assert not re.search(r"\bU?LD(G|GSTS)\b|UTMALDG", before), f"{self.name} loads before it has waited"
            assert not re.search(r"\bSTG\b|\bRED", before), f"{self.name} stores before it has waited"


def _type(argument: object) -> str:
    if isinstance(argument, torch.Tensor):
        return f"*{SHORT[argument.dtype]}"
    if hasattr(argument, "block_shape"):
        layout = f",{argument.layout!r}" if hasattr(argument, "layout") else ""
        return f"tensordesc<{SHORT[argument.base.dtype]}{list(argument.block_shape)}{layout}>"
    return "fp32" if isinstance(argument, float) else "i32"


HOPPER = GPUTarget("cuda", 90, 32)
INSTRUCTION = 16  # bytes, on all these cards


def compile_for_hopper(kernel, args: tuple, constants: tuple, options: dict, target: GPUTarget = HOPPER) -> Compiled:
    names = kernel.arg_names
    signature, constexprs, attrs = {}, {}, {}
    for index, name in enumerate(names):
        if index < len(args) and args[index] is None:
            signature[name] = "constexpr"
            constexprs[(index,)] = None
        elif index < len(args):
            signature[name] = _type(args[index])
            if isinstance(args[index], torch.Tensor):
                attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constexprs[(index,)] = constants[index - len(args)]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs, attrs)
    made = triton.compile(source, target=target, options=options)
    registers, spilled = _resources(made.asm["cubin"])
    return Compiled(
        name=made.metadata.name,
        arch=target.arch,
        ptx=made.asm["ptx"],
        cubin=made.asm["cubin"],
        ttgir=made.asm["ttgir"],
        shared=made.metadata.shared,
        warps=made.metadata.num_warps,
        registers=registers,
        spilled=spilled,
        scratch=made.metadata.global_scratch_size,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack (where spills go), as cuobjdump reports them."""
    text = _tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", content=cubin)
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def disassemble(kernels: Iterable[Compiled]) -> None:
    """Set `sass` of kernels for one card, all at once: most of what the disassembler takes for one is its start."""
    kernels = list({id(kernel): kernel for kernel in kernels if "sass" not in vars(kernel)}.values())
    if not kernels:
        return
    (arch,) = {kernel.arch for kernel in kernels}
    codes = [_machine_code(kernel.cubin) for kernel in kernels]
    name = f"SM{arch}{'a' if arch >= 90 else ''}"
    text = _tool(triton.knobs.nvidia.nvdisasm.path, "--binary", name, content=b"".join(codes))
    lines = re.findall(r"^\s*/\*([0-9a-f]+)\*/\s*(.*)$", text, re.MULTILINE)
    at = 0
    for kernel, code in zip(kernels, codes, strict=True):
        listed = [instruction for address, instruction in lines if at <= int(address, 16) < at + len(code)]
        assert len(listed) == len(code) // INSTRUCTION, kernel.name
        vars(kernel)["sass"] = "\n".join(listed)
        at += len(code)


def _machine_code(cubin: bytes) -> bytes:
    """The one section of instructions of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + number * size) for number in range(count)]
    named = [(cubin[sections[names][1] + name :], cubin[at : at + length]) for name, at, length in sections]
    (code,) = [content for name, content in named if name.startswith(b".text.")]
    return code


def _tool(path: str, *options: str, content: bytes) -> str:
    """What a tool for compiled kernels prints about a file with that content."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def kernels_of(choice: Choice, T: int, E: int, K: int, H: int, I: int, dtype: torch.dtype, patch) -> dict[str, tuple]:  # noqa: E741
    """The launches of one call by kernel name: (kernel, arguments, constants, options). `patch`: a monkeypatch.

    Experts are of `dtype`, too, or of FP8 if the choice is for it.
    """
    seen: dict[str, tuple] = {}

    def record(self, stream, grid, *args):
        seen[self.kernel.__name__] = (self.kernel, args, self.constants, self.options)

    patch.setattr(Launch, "__call__", record)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    meta = torch.device("meta")
    experts = tma_moe.ExpertWeights(E, H, I, device=meta, dtype=torch.float8_e4m3fn if choice.fp8 else dtype)
    ids = torch.empty(T, K, dtype=torch.int32, device=meta)
    x = torch.empty(T, H, dtype=dtype, device=meta)
    make_recipe(meta, E, K, H, I, choice).run(x, ids, ids.float(), experts)
    return seen
