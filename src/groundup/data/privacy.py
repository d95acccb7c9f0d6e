"""Personal data and secrets: found by pattern and check digit, replaced or a reason to drop.

Precision comes first: a number is a card only when Luhn's sum and the issuer's prefix hold, an IBAN
only when its country's length and the remainder modulo 97 do, and so on. Names are not looked for.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from groundup.core.config import field
from groundup.core.types import Document

Kind = Literal["email", "ip", "phone", "card", "iban", "secret"]

# Each pattern begins with a set of characters, so that the search can skip to them; what must not
# stand before it is asked one character later.
EMAIL = re.compile(
    r"(?<![\w.+%/@-])[A-Za-z0-9][\w.+%'-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
    r"[A-Za-z]{2,24}\b(?![@:(])",
    re.ASCII,
)
LONGEST_NAME, LONGEST_HOST = 64, 600  # characters of an address before and behind its @
FILE_ENDS = frozenset(
    ["png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "pdf", "zip"]
)  # icon@2x.png
IPV4 = re.compile(r"\d(?<![\w.\-+/]\d)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?![\w\-+]|\.\w)", re.ASCII)
IPV6 = re.compile(r"[23](?<![\w:.].)[0-9a-f]{3}(?::{1,2}[0-9a-f]{1,4}){2,7}(?:::)?(?![\w:])", re.I)
VERSION_BEFORE = re.compile(
    r"(?:\bec|versions?|release|build|firmware|\bv|section|§|rev)\.?\s*$", re.I
)
PHONE = re.compile(
    r"[+(1-9](?<![\w.+/-].)(?:(?<=\+)[1-9]\d{0,2}(?:[ .\-]?\(?\d{1,5}\)?){2,6}"
    r"|(?:(?<=1)[ .-](?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])|(?<=\()[2-9]\d\d\) ?|(?<=[2-9])\d\d[-.])"
    r"[2-9]\d\d[-. ]\d{4})(?![\w/]|[.\-]\d)",
    re.ASCII,
)
PHONE_NUMBER = re.compile(
    r"[(\d](?<!\d.)(?:(?<=\()\d{2,5}|(?<=\d)\d{1,4})\)?(?:[ ./-]?\d{2,5}){1,4}(?![\w/]|[.\-]\d)",
    re.ASCII,
)
PHONE_BEFORE = re.compile(
    r"\b(?:tel(?:ephone)?|phone|fax|mobile|cell)(?: number)?[.:]{0,2} {0,2}$",
    re.ASCII | re.IGNORECASE,
)
CARD = re.compile(r"\d(?<![\w.\-+]\d)[ -]?(?:\d[ -]?){11,17}\d(?![\w]|[.\-]\d)", re.ASCII)
ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|(?:62|35)\d{14}"
)
IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z]\d{2}(?: ?[A-Z0-9]){11,30}(?![A-Za-z0-9])")
IBAN_LENGTHS = {
    country: int(length)
    for length, countries in (
        ("15", "NO"), ("16", "BE"), ("18", "DK FI FO GL NL SD"), ("19", "MK SI"),
        ("20", "AT BA EE KZ LT LU XK"), ("21", "CH HR LI LV"),
        ("22", "BG BH CR DE GB GE IE ME RS VA"), ("23", "AE GI IL IQ OM SO TL"),
        ("24", "AD CZ ES MD PK RO SA SE SK TN VG"), ("25", "LY PT ST"), ("26", "IS TR"),
        ("27", "BI DJ FR GR IT MC MR SM"), ("28", "AL AZ BY CY DO GT HU LB NI PL SV"),
        ("29", "BR EG PS QA UA"), ("30", "JO KW MU"), ("31", "MT SC"), ("32", "LC"), ("33", "RU"),
    )
    for country in countries.split()
}  # fmt: skip
# by what stands in every text that holds one, each the pattern of a key of a known form
SECRETS = {
    "PRIVATE KEY": r"-----BEGIN [A-Z ]*PRIVATE KEY[A-Z ]*-----.*?"
    r"(?:-----END [A-Z ]*PRIVATE KEY[A-Z ]*-----|\Z)",
    "AKIA": r"\bAKIA[0-9A-Z]{16}\b",
    "ASIA": r"\bASIA[0-9A-Z]{16}\b",
    **{f"gh{kind}_": rf"\bgh{kind}_[A-Za-z0-9]{{36,}}" for kind in "pousr"},
    "github_pat_": r"\bgithub_pat_[A-Za-z0-9_]{60,}",
    "glpat-": r"\bglpat-[\w-]{20,}",
    "xox": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "AIza": r"\bAIza[\w-]{35}\b",
    "k_live_": r"\b[rs]k_live_[A-Za-z0-9]{16,}",
    "sk-": r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}",
    "hf_": r"\bhf_[A-Za-z]{30,}\b",
    "npm_": r"\bnpm_[A-Za-z0-9]{36}\b",
    "SG.": r"\bSG\.[\w-]{20,}\.[\w-]{40,}",
    "eyJ": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
}
KEYS = {hint: re.compile(pattern, re.ASCII | re.DOTALL) for hint, pattern in SECRETS.items()}
ASSIGNED = re.compile(r"[:=]")
NAME_BEFORE = re.compile(
    r"\b(?:api[_-]?key|secret(?:[_-]?key)?|access[_-]?token|auth[_-]?token|passw(?:or)?d|pwd)"
    r"""["']?\s{0,3}$""",
    re.ASCII | re.IGNORECASE,
)
VALUE = re.compile(r"""[:=]\s{0,3}["']?(?P<value>[A-Za-z0-9_/+=.-]{16,}\b)""", re.ASCII)
LOOK_AHEAD = 256  # what tells whether a value is random
LOOK_BACK = 32  # longer than any name that stands before a number or a secret


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What happens to each kind: email, ip, phone, card, iban, secret."""

    replace: tuple[Kind, ...] = field(
        ("secret", "iban", "card", "email", "phone", "ip"), help="kinds that become a placeholder"
    )
    drop: tuple[Kind, ...] = field((), help="kinds that drop the whole document")
    placeholder: str = field("<{kind}>", help="what stands for them, {kind} in capitals")


def privacy(config: Privacy, document: Document, counts: Counter[str]) -> Document | str:
    """Replace personal data, counted as "email replaced" and so on, or drop the document."""
    text = document.text
    for kind, find in FINDERS.items():
        if kind not in config.replace and kind not in config.drop:
            continue
        spans = find(text)
        if not spans:
            continue
        if kind in config.drop:
            return f"holds {kind}"
        counts[f"{kind} replaced"] += len(spans)
        text = replace_spans(text, spans, config.placeholder.format(kind=kind.upper()))
    return document if text is document.text else replace(document, text=text)


Span = tuple[int, int]


def replace_spans(text: str, spans: Sequence[Span], placeholder: str) -> str:
    """Return the text with each (start, end) replaced; spans are in order and apart."""
    parts: list[str] = []
    place = 0
    for start, end in spans:
        parts += [text[place:start], placeholder]
        place = end
    return "".join((*parts, text[place:]))


def find_emails(text: str) -> list[Span]:
    """Return where e-mail addresses stand; icon@2x.png and git@host: are none."""
    spans: list[Span] = []
    free, at = 0, text.find("@")
    while at >= 0:
        found = EMAIL.search(text, max(free, at - LONGEST_NAME), at + LONGEST_HOST)
        if found and found[0].rpartition(".")[2].lower() not in FILE_ENDS:
            spans.append(found.span())
        free = max(at + 1, found.end() if found else 0)
        at = text.find("@", free)
    return spans


def find_ips(text: str) -> list[Span]:
    """Return where public IPv4 and IPv6 addresses stand; four-part version numbers are none."""
    return sorted(
        found.span()
        for pattern in (IPV4, IPV6)
        for found in pattern.finditer(text)
        if is_public(found[0])
        and not VERSION_BEFORE.search(text[max(0, found.start() - 12) : found.start()])
    )


def is_public(address: str) -> bool:
    """Return whether an address is one, and reaches somebody on the internet."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def find_phones(text: str) -> list[Span]:
    """Return where telephone numbers stand: international, North American, or behind "tel"."""
    spans = [found.span() for found in PHONE.finditer(text)]
    spans += [
        found.span()
        for found in PHONE_NUMBER.finditer(text)
        if PHONE_BEFORE.search(text[max(0, found.start() - LOOK_BACK) : found.start()])
    ]
    return apart((a, b) for a, b in spans if 7 <= sum(map(str.isdigit, text[a:b])) <= 15)


def apart(spans: Iterable[Span]) -> list[Span]:
    """Return spans in order, without those that begin inside the one before."""
    kept: list[Span] = []
    for span in sorted(spans):
        if not kept or span[0] >= kept[-1][1]:
            kept.append(span)
    return kept


def find_cards(text: str) -> list[Span]:
    """Return where payment cards stand: an issuer's prefix and length, and Luhn's check digit."""
    return [
        found.span()
        for found in CARD.finditer(text)
        if ISSUERS.fullmatch(digits := re.sub(r"\D", "", found[0])) and luhn(digits)
    ]


def luhn(digits: str) -> bool:
    """Return whether the last digit is Luhn's check digit of the others (ISO/IEC 7812-1)."""
    values = [int(digit) for digit in reversed(digits)]
    doubled = [2 * value - 9 * (value > 4) for value in values[1::2]]
    return (sum(values[::2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


def find_ibans(text: str) -> list[Span]:
    """Return where IBANs stand: the country's length, and remainder 1 modulo 97 (ISO 13616)."""
    spans = []
    for found in IBAN.finditer(text):
        length = IBAN_LENGTHS.get(found[0][:2], 0)
        end = found.start()
        characters = ""
        while len(characters) < length and end < found.end():
            characters += text[end].strip()
            end += 1
        rest_free = end == len(text) or not text[end].isalnum()
        if length and len(characters) == length and rest_free and mod_97(characters) == 1:
            spans.append((found.start(), end))
    return spans


def mod_97(iban: str) -> int:
    """Return the remainder of an IBAN read as a number, letters as 10 to 35."""
    return int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97


def find_secrets(text: str) -> list[Span]:
    """Return where keys, tokens and passwords stand; prose and variable names are none."""
    spans = [
        found.span()
        for hint, pattern in KEYS.items()
        if hint in text
        for found in pattern.finditer(text)
    ]
    free = 0
    for sign in ASSIGNED.finditer(text):
        start = sign.start()
        if start < free or not NAME_BEFORE.search(text[max(0, start - LOOK_BACK) : start]):
            continue
        found = VALUE.match(text, start, start + LOOK_AHEAD)
        if found and is_random(found["value"]):
            whole = VALUE.match(text, start) or found
            spans.append(whole.span("value"))
            free = whole.end()
    return apart(spans)


def is_random(value: str) -> bool:
    """Return whether a value changes between letters and digits as keys do and names do not."""
    kinds = ["d" if c.isdigit() else "u" if c.isupper() else "l" for c in value if c.isalnum()]
    changes = sum(a != b for a, b in pairwise(kinds))
    return "d" in kinds and len(set(kinds)) > 1 and changes >= len(kinds) / 4


FINDERS: dict[Kind, Callable[[str], list[Span]]] = {
    "secret": find_secrets,  # first: a key may hold what looks like a number
    "iban": find_ibans,
    "card": find_cards,
    "email": find_emails,
    "phone": find_phones,
    "ip": find_ips,
}
