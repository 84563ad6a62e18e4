"""What a record holds: its document, or why it is left out. Needs no heavy library: worker processes import it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import orjson

from moect.data.reading.files import Block
from moect.data_config import EvaluationConfig, FilterConfig, SourceConfig

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
EXAMPLES = 20  # bad documents whose places are kept


@dataclass
class Document:
    """A text, and what it came in.

    Attributes:
        text: the text.
        fields: the JSON object, the columns of a row that were asked for, {} for plain text.
        id: its name: the value of `id_field`, else of a field `id`, else file and line.
        n_bytes: of the text in UTF-8.
    """

    text: str
    fields: dict = field(default_factory=dict)
    id: str = ""
    n_bytes: int = field(default=0, compare=False)


@dataclass
class Tally:
    """How many documents were used and how many were not.

    Attributes:
        good: used.
        filtered: left out because a filter of the source says so.
        faults: number of bad documents by what is wrong with them.
        examples: place and fault of the first bad ones.
    """

    good: int = 0
    filtered: int = 0
    faults: Counter = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict) -> Tally:
        """The tally that `to_dict` made this of."""
        return cls(values["good"], values["filtered"], Counter(values["faults"]), list(values["examples"]))

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {**vars(self), "faults": dict(self.faults)}

    @property
    def bad(self) -> int:
        """Documents that cannot be used."""
        return self.faults.total()

    @property
    def seen(self) -> int:
        """All of them."""
        return self.good + self.filtered + self.bad

    def add(self, other: Tally) -> None:
        """Count what another has counted."""
        self.good += other.good
        self.filtered += other.filtered
        self.faults += other.faults
        self.examples += other.examples[: EXAMPLES - len(self.examples)]


class Fault(Exception):
    """Why a document cannot be used: the kind to count it under, and more about this one."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class RecordReader:
    """Documents from the records of one source.

    Args:
        source: names the fields and filters.
        root: folder that file names in ids start from.
    """

    def __init__(self, source: SourceConfig | EvaluationConfig, root: str):
        self.text_field = source.text_field
        self.answer_field = getattr(source, "answer_field", None)
        self.id_field = getattr(source, "id_field", None)
        self.filter = source.filter
        self.root = os.path.abspath(os.path.expanduser(root))

    @property
    def columns(self) -> list[str]:
        """Fields that a record must have."""
        names = [self.text_field, self.answer_field, self.id_field, *self.filter]
        return list(dict.fromkeys(name for name in names if name))

    @property
    def wished(self) -> list[str]:
        """Fields that are read where there are such."""
        return [] if self.id_field else ["id"]

    def documents(self, block: Block, tally: Tally, limit: int | None = None) -> Iterator[Document]:
        """The usable documents of a block, at most `limit`; `tally` counts them and the others."""
        stop = None if limit is None else tally.good + limit
        read = {"jsonl": self._read_json, "txt": self._read_text, "rows": self._read_row}[block.kind]
        inside = block.origin.startswith(self.root + os.sep)
        origin = _writable(block.origin[len(self.root) + 1 :] if inside else block.origin)
        for number, record in enumerate(block.records, start=block.first):
            if tally.good == stop:
                return
            try:
                if number == 1 and block.kind != "rows":
                    record = record.removeprefix(BYTE_ORDER_MARK)
                fields = read(record)
                if fields is None:  # a blank line, which is no document at all
                    continue
                n_bytes = _text_bytes(fields, self.text_field)
                if self.answer_field:
                    _text_bytes(fields, self.answer_field)
                name = self._id(fields) or f"{origin}:{number}"
            except Fault as fault:
                tally.faults[fault.kind] += 1
                if len(tally.examples) < EXAMPLES:
                    tally.examples.append(f"{_at(block, number)}: {fault.kind}{fault.detail}")
                continue
            if self.filter and not all(_holds(fields.get(key), wanted) for key, wanted in self.filter.items()):
                tally.filtered += 1
                continue
            tally.good += 1
            yield Document(fields[self.text_field], {} if block.kind == "txt" else fields, name, n_bytes)

    def _read_json(self, line: bytes) -> dict | None:
        try:
            fields = orjson.loads(line)
        except ValueError:  # rare, or a blank line: what exactly it is, the slower parser says
            text = _utf8(line)
            if not text.strip():
                return None
            fields = _json(text.rstrip("\r\n"))
        if type(fields) is not dict:
            raise Fault("not a JSON object", f" but a {type(fields).__name__}")
        return fields

    def _read_text(self, line: bytes) -> dict | None:
        text = _utf8(line)
        return {self.text_field: text.rstrip("\r\n")} if text.strip() else None

    def _read_row(self, row: dict) -> dict:
        fields = {}
        for name, value in row.items():
            try:
                fields[name] = _utf8(value, f"`{name}` is ") if type(value) is bytes else value
            except Fault:
                if name not in self.wished:  # a digest, say, which nobody has asked for
                    raise
                fields[name] = None
        return fields

    def _id(self, fields: dict) -> str | None:
        value = fields.get(self.id_field or "id")
        if type(value) is str and value or type(value) is int:
            return _writable(str(value))
        if self.id_field:
            raise Fault(f"no `{self.id_field}`" if value is None else f"`{self.id_field}` is neither text nor a number")
        return None


def _writable(name: str) -> str:
    """A name that can be written as UTF-8; not every file's name can, nor every text of JSON."""
    return name if name.isascii() else name.encode("utf-8", "replace").decode("utf-8")


def _at(block: Block, number: int) -> str:
    origin = _writable(block.origin)
    return f"{origin}, row {number}" if block.kind == "rows" else f"{origin}:{number}"


def _utf8(value: bytes, what: str = "") -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Fault(f"{what}not UTF-8", f" (byte {error.start})") from error


def _json(line: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise Fault("malformed JSON", f" ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise Fault("JSON beyond what can be read", f" ({error})") from error


def _text_bytes(fields: dict, name: str) -> int:
    """The bytes of a field's text in UTF-8, or the fault that it has."""
    value = fields.get(name)
    if type(value) is not str:
        raise Fault(f"`{name}` is not a string" if name in fields else f"no `{name}`")
    if not value or value.isspace():
        raise Fault(f"`{name}` is empty")
    try:
        return len(value) if value.isascii() else len(value.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise Fault(f"`{name}` is not valid Unicode") from error


def _holds(value, conditions: FilterConfig) -> bool:
    """Whether a field's value is as all conditions want it; a field that is not there is no value."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = isinstance(value, str)
    checks = (
        (conditions.equals, lambda wanted: value == wanted),
        (conditions.among, lambda wanted: value in wanted),
        (conditions.min, lambda wanted: number and value >= wanted),
        (conditions.max, lambda wanted: number and value <= wanted),
        (conditions.matches, lambda wanted: text and re.search(wanted, value) is not None),
        (conditions.min_characters, lambda wanted: text and len(value) >= wanted),
        (conditions.max_characters, lambda wanted: text and len(value) <= wanted),
    )
    return all(check(wanted) for wanted, check in checks if wanted is not None)
