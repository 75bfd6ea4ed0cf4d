"""Shared libraries without any code, for what a program is linked with and never calls; written without a compiler.

A program for a GPU asks the dynamic linker for gigabytes of libraries before its first line. Bound lazily it starts as
well with libraries that have the right names and nothing in them; only the variables among what it asks for must be
there. The parts of such a file are those of the generic ABI (elf(5), "Dynamic Linking").
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

_PAGE = 4096
_X86_64 = 62
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_READ_WRITE = 6
_DT_NULL, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 0, 4, 5, 6, 10, 11, 14
_GLOBAL_OBJECT = 0x11
_WORD = 8
_HEADER, _SEGMENT, _SYMBOL = 64, 56, 24


def write(path: Path, variables: Sequence[str] = ()) -> None:
    """An x86-64 library named like its file, with one word of zeros for each of the `variables`, without versions."""
    path.write_bytes(library(path.name, variables))
    path.chmod(0o755)


def library(soname: str, variables: Sequence[str] = ()) -> bytes:
    """The bytes of such a library: one segment, loaded as it stands in the file."""
    strings = b"\0"
    names = []
    for name in (soname, *variables):
        names.append(len(strings))
        strings += name.encode() + b"\0"
    count = 1 + len(variables)
    strings_at = _HEADER + 3 * _SEGMENT
    symbols_at = _aligned(strings_at + len(strings))
    hash_at = symbols_at + count * _SYMBOL
    # One bucket with all symbols in a chain: the shortest table that the linker can search.
    table = struct.pack(f"<{4 + count - 1}I", 1, count, count - 1, 0, *range(count - 1))
    dynamic_at = _aligned(hash_at + len(table))
    entries = (
        (_DT_SONAME, names[0]),
        (_DT_HASH, hash_at),
        (_DT_STRTAB, strings_at),
        (_DT_SYMTAB, symbols_at),
        (_DT_STRSZ, len(strings)),
        (_DT_SYMENT, _SYMBOL),
        (_DT_NULL, 0),
    )
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    words_at = dynamic_at + len(dynamic)
    end = words_at + len(variables) * _WORD
    symbols = bytes(_SYMBOL) + b"".join(
        struct.pack("<IBBHQQ", name, _GLOBAL_OBJECT, 0, 1, words_at + number * _WORD, _WORD)
        for number, name in enumerate(names[1:])
    )
    magic = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)  # 64 bits, little endian, version 1, System V
    header = magic + struct.pack("<HHIQQQIHHHHHH", 3, _X86_64, 1, 0, _HEADER, 0, 0, _HEADER, _SEGMENT, 3, 0, 0, 0)
    segments = (
        (_PT_LOAD, 0, end, _PAGE),
        (_PT_DYNAMIC, dynamic_at, len(dynamic), 8),
        (_PT_GNU_STACK, 0, 0, 16),  # without it the linker would make the program's stack executable
    )
    found = header + b"".join(
        struct.pack("<IIQQQQQQ", kind, _READ_WRITE, at, at, at, size, size, align) for kind, at, size, align in segments
    )
    for at, part in ((strings_at, strings), (symbols_at, symbols), (hash_at, table), (dynamic_at, dynamic)):
        found = found.ljust(at, b"\0") + part
    return found.ljust(end, b"\0")


def _aligned(offset: int) -> int:
    return (offset + 7) // 8 * 8
