"""Pre-tokenisers and normalisers by name: how text is cut and unified before tokens are looked up.

The patterns are those of the published tokenizers, written without possessive quantifiers,
which not every regular-expression engine has; none of them can match differently without.
"""

from tokenizers import Regex, normalizers

from groundup.core.errors import ConfigError, closest

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

PATTERNS = {
    # words with the space before them; case-sensitive contractions; runs of digits
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # cl100k_base, and Llama 3: digits in threes; line ends apart from indentation
    "gpt4": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # o200k_base: words also end where lower case turns to upper case
    "gpt4o": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2 to 3: as gpt4, digits one by one
    "qwen2": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # source code: identifiers cut at underscores and capitals, digits one by one, indentation whole
    "code": r"[^\r\n\p{L}\p{N}]?(?:\p{Lu}+(?!\p{Ll})|\p{Lu}?[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+|[\r\n]+[ \t]*|\s+(?!\S)|\s+",
}
PATTERNS["llama3"] = PATTERNS["gpt4"]

NORMALIZERS = {
    "none": lambda: None,
    "nfc": normalizers.NFC,
    "nfkc": normalizers.NFKC,
    "lowercase": normalizers.Lowercase,
    # BERT: controls removed, Chinese characters set apart, and for uncased text lower case
    # without accents
    "bert-cased": lambda: normalizers.BertNormalizer(lowercase=False),
    "bert-uncased": normalizers.BertNormalizer,
}


def pattern(name: str) -> str:
    """Return a pattern by name, or the regular expression itself."""
    if name in PATTERNS:
        return PATTERNS[name]
    if name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"unknown pattern {name!r}{closest(name, PATTERNS)}")
    try:
        Regex(name)
    except Exception as err:  # the library raises bare Exception
        raise ConfigError(f"pattern {name!r} is no regular expression: {err}") from err
    return name


def normalizer(name: str) -> normalizers.Normalizer | None:
    """Return a new normaliser by name; None for "none"."""
    if name not in NORMALIZERS:
        raise ConfigError(f"unknown normalizer {name!r}{closest(name, NORMALIZERS)}")
    made: normalizers.Normalizer | None = NORMALIZERS[name]()
    return made
