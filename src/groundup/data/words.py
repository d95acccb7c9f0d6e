"""Words and sentences as the published quality rules count them: spaCy's English splitting.

The rules of C4, Gopher and FineWeb were tuned on spaCy's tokens: punctuation apart, clitics cut
off ("do", "n't"), hyphenated words in three. A text is cut at blanks, and each piece is split
once per process and remembered, since pieces repeat as words do (Zipf).
"""

from functools import lru_cache
from itertools import chain

import regex

PIECES_KEPT = 400_000  # about 100 MB; then the table starts anew
LONGEST_PIECE = 1000  # characters; what is longer (base64, no blanks) is cut there first

OPEN = (
    r"""…,:;!?¿؟¡()\[\]{}<>_\#*&。？！，、；：～·।،۔؛٪'"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉"""
    r"§%=—–\p{Sc}\p{So}"
)
UNITS = (
    "km²|km³|km|m²|m³|dm|cm²|cm|mm²|mm|µm|nm|ha|kg|mg|µg|g|t|lb|oz|mph|kmh|km/h|hPa|Pa|mbar|mb|"
    "kB|KB|kb|MB|Mb|Kb|GB|gb|Gb|TB|tb|Tb|T|G|M|K|m|%"
)
PREFIX = regex.compile(rf"\.\.+|[{OPEN}]|\+(?!\d)")
SUFFIX = regex.compile(
    rf"(?:\.\.+|[{OPEN.replace('=', '').replace('§', '').replace('%', '')}]|['’][sS]"
    rf"|(?<=\d)(?:\+|{UNITS})"
    r"""|(?<=[\p{Ll}\p{Lo}\p{M}\d%²\-+…,:;!?()\[\]{}<>_\#*&'"”“`‘’»«]|\p{Lu}\p{Lu})\.)$"""
)
INFIX = regex.compile(
    r"""\.\.+|…|\p{So}|(?<=\d)[-+*^](?=[\d-])|(?<=[\p{Ll}\p{Lo}'"”“`‘’])\.(?=[\p{Lu}\p{Lo}'"”“`‘’])"""
    r"|(?<=\p{L}),(?=\p{L})|(?<=[\p{L}\d])(?:---?|——|[-–—~])(?=\p{L})|(?<=[\p{L}\d])[:<>=/](?=\p{L})"
)
ADDRESS = regex.compile(
    r"(?:(?:https?|ftp)://|mailto:)?(?:[\w.+-]+@)?(?:[a-z0-9][\w-]*\.)+[a-z]{2,}(?::\d+)?(?:[/?#](?:\S*[\w/=&+-])?)?"
)
CLITIC = regex.compile(
    r"(?i)(do|does|did|have|has|had|is|are|was|were|wo|would|ca|could|sha|should|must|might|may"
    r"|need|ought|ai|dare)(n['’]?t)"
    r"|(i|you|he|she|it|we|they|who|what|when|where|why|how|there|that|this)(['’](?:m|re|ve|ll|d))"
    r"|(would|could|should|might|must)(['’]ve)|(i)(m|ve)|(that|what)(s)|(can)(not)|(gon|got)(na|ta)"
    r"|(let)(['’]s)|(\d{1,2})((?-i:[ap]m))"
)
LONGEST_CLITIC = 8  # of letters alone: shouldnt
# fmt: off
WHOLE = frozenset((
    "and/or", "ol'", "ol’", "e.g.", "i.e.", "E.g.", "I.e.", "a.m.", "p.m.", "vs.", "v.s.", "Mr.",
    "Mrs.", "Ms.", "Dr.", "Prof.", "St.", "Jr.", "Sr.", "Co.", "Corp.", "Inc.", "Ltd.", "Bros.",
    "Gen.", "Gov.", "Messrs.", "Mt.", "Ph.D.", "Rep.", "Rev.", "Sen.", "Adm.", "Jan.", "Feb.",
    "Mar.", "Apr.", "Jun.", "Jul.", "Aug.", "Sep.", "Sept.", "Oct.", "Nov.", "Dec.", "Ala.",
    "Ariz.", "Ark.", "Calif.", "Colo.", "Conn.", "Del.", "Fla.", "Ga.", "Ia.", "Id.", "Ill.",
    "Ind.", "Kan.", "Kans.", "Ky.", "La.", "Mass.", "Md.", "Mich.", "Minn.", "Miss.", "Mo.",
    "Mont.", "Neb.", "Nebr.", "Nev.", "Okla.", "Ore.", "Pa.", "Tenn.", "Va.", "Wash.", "Wis.",
)) | {f"{letter}." for letter in "abcdefghijklmnopqrstuvwxyz"}
# fmt: on
SENTENCE_ENDS = frozenset(
    "!.?։؟۔܀܁܂߹।॥၊။።፧፨᙮᜵᜶᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗！．？｡。"
    "\u061d\u061e\u0837\u0839\u083d\u083e\u17d4\u17d5\u17d6\u17d9\u17da\u1b7d\u1b7e\u2e53\u2e54"
) | frozenset(
    chr(code)
    for first, last in (
        (0x10A56, 0x10A57),
        (0x10F55, 0x10F59),
        (0x10F86, 0x10F89),
        (0x11047, 0x11048),
        (0x110BE, 0x110C1),
        (0x11141, 0x11143),
        (0x111C5, 0x111C6),
        (0x111CD, 0x111CD),
        (0x111DE, 0x111DF),
        (0x11238, 0x11239),
        (0x1123B, 0x1123C),
        (0x112A9, 0x112A9),
        (0x1144B, 0x1144C),
        (0x115C2, 0x115C3),
        (0x115C9, 0x115D7),
        (0x11641, 0x11642),
        (0x1173C, 0x1173E),
        (0x11944, 0x11944),
        (0x11946, 0x11946),
        (0x11A42, 0x11A43),
        (0x11A9B, 0x11A9C),
        (0x11C41, 0x11C42),
        (0x11EF7, 0x11EF8),
        (0x11F43, 0x11F44),
        (0x16A6E, 0x16A6F),
        (0x16AF5, 0x16AF5),
        (0x16B37, 0x16B38),
        (0x16B44, 0x16B44),
        (0x16E98, 0x16E98),
        (0x1BC9F, 0x1BC9F),
        (0x1DA88, 0x1DA88),
    )
    for code in range(first, last + 1)
)  # fmt: skip
PUNCTUATION = regex.compile(r"\p{P}+")


class Pieces(dict[str, tuple[str, ...]]):
    """Blank-free pieces of text and their words, split when first seen."""

    def __missing__(self, piece: str) -> tuple[str, ...]:
        if len(piece) > LONGEST_PIECE:
            if piece.isalnum():
                return (piece,)
            cuts = range(0, len(piece), LONGEST_PIECE)
            return tuple(w for n in cuts for w in split_piece(piece[n : n + LONGEST_PIECE]))
        if len(self) >= PIECES_KEPT:
            self.clear()
        self[piece] = words = self.ended(piece) or tuple(split_piece(piece))
        return words

    def ended(self, piece: str) -> tuple[str, ...] | None:
        """Return the words of letters with one mark behind, the usual new piece; else None."""
        core, mark = piece[:-1], piece[-1]
        if not (core.isalpha() and core.isascii()) or piece in WHOLE:
            return None
        if mark in ",;:!?)" or (mark == "." and core[-1].islower()):
            return (*self[core], mark)
        return None


def split_piece(piece: str) -> list[str]:
    """Return the words of a text without blanks: affixes peeled off, the rest cut inside."""
    before: list[str] = []
    after: list[str] = []
    while piece and piece not in WHOLE and not piece.isalpha():
        if found := PREFIX.match(piece):
            before.append(found[0])
            piece = piece[found.end() :]
            continue
        if ADDRESS.fullmatch(piece) or not (found := SUFFIX.search(piece)):
            break
        after.append(found[0])
        piece = piece[: found.start()]
    return [*before, *split_core(piece), *reversed(after)]


def split_core(core: str) -> list[str]:
    """Cut a piece without affixes at clitics and at hyphens, slashes and the like inside."""
    if not core:
        return []
    letters = core.isalpha()
    if not (letters and len(core) > LONGEST_CLITIC) and (clitic := CLITIC.fullmatch(core)):
        return [part for part in clitic.groups() if part]
    if letters or core in WHOLE or ADDRESS.fullmatch(core):
        return [core]
    words = []
    start = 0
    for found in INFIX.finditer(core):
        words += [core[start : found.start()], found[0]]
        start = found.end()
    return [word for word in (*words, core[start:]) if word]


PIECES = Pieces()


@lru_cache(maxsize=2)  # rules that follow each other look at the same text
def split_words(text: str) -> tuple[str, ...]:
    """Return the words of a text, punctuation marks included as words of their own."""
    return tuple(chain.from_iterable(map(PIECES.__getitem__, text.split())))


def count_sentences(line: str) -> int:
    """Return how many sentences a line holds: a new one starts behind . ? ! and other marks."""
    count = 1
    ended = False
    for word in chain.from_iterable(map(PIECES.__getitem__, line.split())):
        if word in SENTENCE_ENDS:
            ended = True
        elif ended and not PUNCTUATION.fullmatch(word):
            count += 1
            ended = False
    return count
