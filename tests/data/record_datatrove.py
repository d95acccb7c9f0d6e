"""Record datatrove's decisions on the texts of quality_texts.py.

In an environment of its own: pip install datatrove==0.10.1 spacy "xxhash<4" orjson; then
python tests/data/record_datatrove.py
"""

import json
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline import filters
from datatrove.pipeline.filters.c4_filters import C4ParagraphFilter
from quality_texts import quality_texts

FILTERS = {
    "gopher-repetition": filters.GopherRepetitionFilter(),
    "gopher-quality": filters.GopherQualityFilter(),
    "c4": filters.C4QualityFilter(),
    "c4-open": filters.C4QualityFilter(filter_no_terminal_punct=False),
    "paragraphs": C4ParagraphFilter(),
    "fineweb": filters.FineWebQualityFilter(),
}


def decision(rule, text: str) -> list:
    document = Document(text=text, id="a")
    try:
        result = rule.filter(document)
    except ZeroDivisionError:  # no words or no lines: nothing to keep
        return [False, ""]
    kept = result if isinstance(result, bool) else result[0]
    return [bool(kept), document.text if kept else ""]


def main() -> None:
    texts = quality_texts()
    recorded = {}
    for name, rule in FILTERS.items():
        decisions = [decision(rule, text) for text in texts]
        recorded[name] = {
            "kept": "".join("-+"[kept] for kept, _ in decisions),
            "characters": sum(len(text) for _, text in decisions),
        }
        print(name, recorded[name]["kept"].count("+"), "of", len(texts))
    place = Path(__file__).parent / "datatrove_decisions.json"
    place.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
