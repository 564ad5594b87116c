"""Settings in picture files: A1111's text, and a record with everything that makes the same picture again.

| format | A1111's text | the record, as JSON |
|---|---|---|
| PNG | text chunk "parameters" | text chunk "latentrt" |
| JPEG, WebP | EXIF UserComment, UTF-16 | EXIF MakerNote: "LatentRT", a zero byte, deflated |

`engine/infotext.py` has the text's language.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from .errors import MetadataError, shown

PARAMETERS = "parameters"
RECORD = "latentrt"
FORMAT = 1
"""The version of the record."""

READ = ("PNG", "JPEG", "WEBP", "GIF")
UNICODE = b"UNICODE\0"
ASCII = b"ASCII\0\0\0"
MAKER = b"LatentRT\0"
MAX_EXIF = 65_533
"""What fits a marker of a JPEG."""

MAX_RECORD = 2**20
Info = Mapping[Any, Any]


@dataclass(frozen=True)
class Metadata:
    """What a picture file says about its picture. parameters: A1111's text; stored: the record as it is in the file.
    None where the file says nothing."""

    parameters: str | None
    stored: str | bytes | None

    def record(self) -> dict[str, Any] | None:
        """The record, None if there is none. MetadataError if it is damaged, or of another version."""
        if self.stored is None:
            return None
        return _record(self.stored if isinstance(self.stored, str) else _inflated(self.stored))


def embed(image: Image.Image, parameters: str, record: Mapping[str, Any] | None = None) -> None:
    """Puts A1111's text and a record of JSON values into `image.info`, where `save_options` finds them."""
    image.info[PARAMETERS] = parameters
    if record is not None:
        image.info[RECORD] = json.dumps({"format": FORMAT, **record}, allow_nan=False)


def save_options(info: Info, format: str) -> dict[str, Any]:
    """The options of `Image.save` that write what `embed` put into `info`, for the formats PNG, JPEG and WEBP. Other
    formats have no place for it. MetadataError if it is too long for a JPEG."""
    if PARAMETERS not in info and RECORD not in info:
        return {}
    if format == "PNG":
        return {"pnginfo": _png_text(info)}
    if format not in ("JPEG", "WEBP"):
        return {}
    exif = _exif(info)
    if format == "JPEG" and len(exif) > MAX_EXIF:
        raise MetadataError(
            f"the picture's settings take {len(exif)} bytes, and a JPEG holds {MAX_EXIF}; write a .png or .webp, or "
            "leave them out with metadata=False"
        )
    return {"exif": exif}


def read(path: str | os.PathLike[str]) -> Metadata:
    """What a picture file says: ours, A1111's, and others' that write A1111's text. The pixels are not read.
    MetadataError if the file can't be read or is no PNG, JPEG, WebP or GIF."""
    try:
        with Image.open(path, formats=READ) as image:
            info = image.info
            exif = image.getexif().get_ifd(ExifTags.IFD.Exif) if "exif" in info else {}
            comment, note = exif.get(ExifTags.Base.UserComment), exif.get(ExifTags.Base.MakerNote)
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        raise MetadataError(
            f"{shown(str(path))} can't be read as a picture ({reason(error)}); pass the PNG, JPEG or WebP that was "
            "written"
        ) from error
    text = info.get(PARAMETERS, info.get("comment") if image.format == "GIF" else None)
    if text is None and isinstance(comment, bytes):
        text = _comment(comment)
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    stored = info.get(RECORD)
    if stored is None and isinstance(note, bytes) and note.startswith(MAKER):
        stored = note[len(MAKER) :]
    return Metadata(text if isinstance(text, str) else None, stored)


def reason(error: Exception) -> str:
    """What went wrong with a file, in words where the error has some."""
    return getattr(error, "strerror", None) or shown(error)


def _png_text(info: Info) -> PngInfo:
    text = PngInfo()
    for key in (PARAMETERS, RECORD):
        if key in info:
            text.add_text(key, info[key])
    return text


def _exif(info: Info) -> bytes:
    """EXIF in big-endian order, which is also that of its UTF-16: readers differ in which of the two they go by."""
    exif = Image.Exif()
    exif.endian = ">"
    tags = exif.get_ifd(ExifTags.IFD.Exif)
    if PARAMETERS in info:
        tags[ExifTags.Base.UserComment] = UNICODE + info[PARAMETERS].encode("utf-16-be")
    if RECORD in info:
        tags[ExifTags.Base.MakerNote] = MAKER + zlib.compress(info[RECORD].encode(), 9)
    return exif.tobytes()


def _comment(data: bytes) -> str:
    """A UserComment: eight bytes that name the encoding, then the text."""
    encoding, text = data[:8], data[8:]
    if encoding == UNICODE:
        if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return text.decode("utf-16", "replace")
        big_endian = text[::2].count(0) >= text[1::2].count(0)  # of Latin letters, the first bytes are 0
        return text.decode("utf-16-be" if big_endian else "utf-16-le", "replace")
    return (text if encoding in (ASCII, bytes(8)) else data).decode("utf-8", "replace").rstrip("\0")


def _inflated(data: bytes) -> str:
    try:
        return zlib.decompressobj().decompress(data, MAX_RECORD + 1).decode("utf-8", "replace")
    except zlib.error as error:
        raise MetadataError("the record in the picture is damaged; its A1111 text may still be right") from error


def _record(text: str) -> dict[str, Any]:
    if len(text) > MAX_RECORD:
        raise MetadataError(f"the record in the picture is longer than {MAX_RECORD} characters")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MetadataError("the record in the picture is not JSON; its A1111 text may still be right") from error
    version = record.pop("format", None) if isinstance(record, dict) else None
    if version != FORMAT:
        raise MetadataError(
            f"the record in the picture has the format {shown(version)}, and this version reads {FORMAT}; use the "
            "version of LatentRT that made the picture"
        )
    return record
