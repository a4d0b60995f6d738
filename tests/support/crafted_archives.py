"""Archives that no honest program writes, as functions of their size; headers are encoded one by one."""

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable

END = bytes(1024)


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, linkname: str = "") -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.linkname = kind, size, linkname
    return entry.tobuf(tarfile.GNU_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def patched(block: bytes, **fields: bytes) -> bytes:
    """A header with other bytes at some offsets, given as `at124=b"..."`, and the checksum that fits them."""
    changed = bytearray(block)
    for place, content in fields.items():
        start = int(place.removeprefix("at"))
        changed[start : start + len(content)] = content
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def file(name: str, content: bytes = b"abc") -> bytes:
    return header(name, size=len(content)) + padded(content)


def extended(content: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header with any content; the length that precedes a record is not added."""
    return header("extended", kind, len(content)) + padded(content)


def record(key: bytes, value: bytes) -> bytes:
    """One record of pax; its length counts its own digits."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while len(rest) + len(str(length)) != length:
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def negative(block: bytes, size: int = 512) -> bytes:
    return patched(block, at124=b"\xff" + (2**88 - size).to_bytes(11, "big"))


def sparse(**fields: bytes) -> bytes:
    return patched(header("s.bin", tarfile.GNUTYPE_SPARSE), at257=b"ustar  \0", at483=b"%011o\0" % (3 << 30), **fields)


def xz_with_a_dictionary(encoded_size: int) -> bytes:
    """The beginning of an xz file; `encoded_size` 0x24 is a dictionary of 1 GiB."""
    block = bytes([2, 0, 0x21, 1, encoded_size, 0, 0, 0])
    return b"\xfd7zXZ\0\0\4\xe6\xd6\xb4\x46" + block + zlib.crc32(block).to_bytes(4, "little") + bytes(64)


FILE = file("a.bin")
_LONG_NAME = tarfile.GNUTYPE_LONGNAME
_SPARSE_1_0 = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0")

# What is refused, and never half of it kept.
DAMAGED: dict[str, bytes] = {
    "sparse map of words": extended(record(b"GNU.sparse.map", b"a,b")) + FILE,
    "sparse map of words in the file": extended(_SPARSE_1_0) + file("a.bin", b"xx\nyy\n"),
    "sparse map below zero": extended(_SPARSE_1_0) + file("a.bin", b"-5\n"),
    "sparse file of 3 GiB": sparse(),
    "sparse file with an invalid number": sparse(at386=b"zzzzzzzzzzz\0"),
    "sparse file, cut off in its map": sparse(at482=b"\1") + b"\1" * 100,
    "size below zero in pax": extended(record(b"size", b"-1024")) + FILE,
    "size below zero in pax of a folder": FILE + extended(record(b"size", b"-2048")) + header("d", tarfile.DIRTYPE),
    "size of 30 digits": extended(record(b"size", b"9" * 30)) + FILE,
    "size of 5000 digits": extended(record(b"size", b"9" * 5000)) + FILE,
    "size of an exabyte": patched(header("a.bin"), at124=b"\x80" + (2**60).to_bytes(11, "big")),
    "size below zero": negative(header("n.bin"), 1024) + FILE,
    "size below zero of a long name": negative(header("n", _LONG_NAME)) + FILE,
    "size below zero of pax": negative(header("n", tarfile.XHDTYPE)) + FILE,
    "size below zero of an unknown type": negative(header("n", b"Q")) + FILE,
    "record length of 400 digits": extended(b"9" * 400 + b" size=1\n") + FILE,
    "record length of 5900 digits": extended(b"9" * 5900 + b" size=1\n") + FILE,
    "record length of zero": extended(b"0 size=1\n") + FILE,
    "record length before its own end": extended(b"2 size=1\n") + FILE,
    "record length below zero": extended(b"-9 size=1\n") + FILE,
    "record without a value": extended(b"6 size\n") + FILE,
    "record without a length": extended(b"size=1\n") + FILE,
    "record length behind the end": extended(b"99 size=1\n") + FILE,
    "15000 records": extended(b"4 =\n" * 15_000) + FILE,
    "record that is no text": extended(record(b"hdrcharset", b"BINARY") + record(b"path", b"\xff\xfe")) + FILE,
    "two long names of a file": extended(b"a\0", _LONG_NAME) + extended(b"b\0", _LONG_NAME) + FILE,
    "two extended headers of a file": extended(record(b"path", b"a")) + extended(record(b"path", b"b")) + FILE,
    "one path for all files": extended(record(b"path", b"b.bin"), tarfile.XGLTYPE) + FILE,
    "extended header without a file": extended(record(b"comment", b"x")),
    "extended header that is cut off": extended(b"x" * 5000)[:2000],
    "vendor's extended header": extended(record(b"path", b"../../evil"), tarfile.SOLARIS_XHDTYPE) + FILE,
    "part of 300 bytes": extended(record(b"path", b"n" * 300)) + FILE,
    "part of 300 bytes, 100 characters": extended(record(b"path", "€".encode() * 100)) + FILE,
    "name of 5500 bytes": extended(record(b"path", b"/".join([b"d" * 10] * 500))) + FILE,
    "1900 folders deep": extended(record(b"path", b"d/" * 1900 + b"f")) + FILE,
    "17 folders deep": file("d/" * 16 + "f"),
    "symbolic link": header("l", tarfile.SYMTYPE, linkname="/etc"),
    "hard link": FILE + header("h", tarfile.LNKTYPE, linkname="a.bin"),
    "character device": header("c", tarfile.CHRTYPE),
    "block device": header("c", tarfile.BLKTYPE),
    "pipe": header("c", tarfile.FIFOTYPE),
    "unknown type": header("z", b"Z", 3) + padded(b"abc"),
    "volume header": header("v", b"V") + FILE,
    "folder dump": header("D", b"D", 3) + padded(b"abc") + FILE,
    "the same name twice": FILE + FILE,
    "the same name but for case": FILE + file("A.BIN"),
    "the same name but for a ligature": file("ﬁle") + file("FILE"),
    "the same name but for a dot at the end": FILE + file("a.bin."),
    "a folder, then a file of its name": header("d", tarfile.DIRTYPE) + file("d"),
    "a file, then a folder of its name": file("d") + header("D", tarfile.DIRTYPE),
    "a file, then a file below it": file("d") + file("d/e"),
    "a file, then a file that it is below": file("d/e") + file("d"),
    "name of a device": FILE + file("deep/CON"),
    "name of a device with an ending": file("lpt1.txt"),
    "path out of the folder": FILE + file("../x"),
    "absolute path": FILE + file("/x"),
    "only the end": b"",
    "only a folder": header("d", tarfile.DIRTYPE),
}
DAMAGED = {name: content + END for name, content in DAMAGED.items()} | {
    "nothing": b"",
    "cut off in a file": FILE[:600],
    "no end": FILE,
    "gzip of garbage": gzip.compress(b"garbage" * 300),
    "gzip, cut off": gzip.compress(FILE + END)[:-9],
    "gzip, and something behind it": gzip.compress(FILE + END) + b"garbage",
    "gzip with another checksum": gzip.compress(FILE + END)[:-8] + bytes(8),
    "bzip2, cut off": bz2.compress(FILE + END)[:-9],
    "xz, cut off": lzma.compress(FILE + END)[:-9],
    "xz that needs 1 GiB to unpack": xz_with_a_dictionary(0x24),
}


# What grows: n is about the number of its bytes before it is compressed.


def chain_of_long_names(n: int) -> bytes:
    return extended(b"abc\0", _LONG_NAME) * (n // 1024) + FILE + END


def chain_of_extended_headers(n: int) -> bytes:
    return extended(record(b"comment", b"x")) * (n // 1024) + FILE + END


def all_extensions_of_many_files(n: int) -> bytes:
    """As many extended headers before each file as are allowed."""
    comment = record(b"comment", b"x")
    long_name, of_all = extended(b"long\0", _LONG_NAME), extended(comment, tarfile.XGLTYPE)
    names = (record(b"path", b"%d" % number) for number in range(n // 3584))
    return b"".join(of_all + long_name + extended(comment + name) + header("a") for name in names) + END


def digits_in_an_extended_header(n: int) -> bytes:
    return extended(b"1" * n) + FILE + END


def records_in_extended_headers(n: int) -> bytes:
    """As many records before each file as are allowed."""
    one = extended(b"4 =\n" * 255)
    return b"".join(one + file(str(number)) for number in range(n // len(one) + 1)) + END


def small_files(n: int) -> bytes:
    return b"".join(header(f"{number}") for number in range(n // 512)) + END


def deep_files(n: int) -> bytes:
    return b"".join(header("/".join([f"{number:05}"] * 16)) for number in range(n // 512)) + END


def combining_marks_in_a_name(n: int) -> bytes:
    """Normalizing this text is quadratic in many implementations."""
    return extended(record(b"path", ("a" + "\u0315\u0300" * (n // 4)).encode())) + FILE + END


def zeros_behind(start: bytes, n: int, end: bytes) -> bytes:
    """Compressed: a header, `n` zeros padded to blocks, and what follows."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = [packer.compress(start)]
    packed += [packer.compress(bytes(1 << 20)) for _ in range(n >> 20)]
    packed += [packer.compress(bytes(n % (1 << 20) + -n % 512) + end), packer.flush()]
    return b"".join(packed)


def large_extended_header(n: int) -> bytes:
    return zeros_behind(header("extended", tarfile.XHDTYPE, n), n, FILE + END)


def large_zeros(n: int) -> bytes:
    return zeros_behind(header("zeros", size=n), n, END)


def many_gzip_streams(n: int) -> bytes:
    """Empty streams, then one with a file."""
    return gzip.compress(b"") * (n // 20) + gzip.compress(FILE + END)


GROWING: dict[str, Callable[[int], bytes]] = {
    make.__name__: make
    for make in (
        chain_of_long_names,
        chain_of_extended_headers,
        all_extensions_of_many_files,
        digits_in_an_extended_header,
        records_in_extended_headers,
        small_files,
        deep_files,
        combining_marks_in_a_name,
        large_extended_header,
        large_zeros,
        many_gzip_streams,
    )
}
