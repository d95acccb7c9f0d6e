"""Personal data: each kind found, near misses left alone, replaced or a reason to drop."""

from collections import Counter

import pytest

from groundup.core.errors import ConfigError
from groundup.core.types import Document
from groundup.data import privacy
from groundup.data.privacy import FINDERS
from groundup.data.steps import make_step

FOUND = {
    "email": [
        "write to jane.doe+list@mail.example.co.uk.",
        "<bob@example.org>",
        "Mail:x_1@a-b.museum,",
        "o'neil@example.com",
    ],
    "ip": ["from 8.8.8.8 today", "(93.184.216.34)", "2001:4860:4860::8888", "at 1.1.1.1."],
    "phone": [
        "+49 30 901820",
        "+1 (212) 555-0187",
        "call (415) 555-2671 now",
        "415-555-2671",
        "Tel. 030 901820",
        "phone: 0171/2345678",
        "+44 20 7946 0958.",
        "+4915112345678",
    ],
    "card": ["4111 1111 1111 1111", "5555555555554444", "3782-822463-10005", "6011111111111117"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "NO9386011117947."],
    "secret": [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1B2" * 9,
        "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc",
        "api_key = 'f3A9c2E1b7D4a8F6c5E2'",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
    ],
}
NEAR = {
    "email": [
        "icon@2x.png",
        "git@github.com:me/it",
        "@decorator.name",
        "a @ b.com",
        "user@localhost",
    ],
    "ip": [
        "version 1.2.3.4",
        "the enzyme EC 3.1.1.11",
        "v10.20.30.40",
        "127.0.0.1",
        "192.168.1.7",
        "256.1.1.1",
        "1.2.3.4.5",
        "std::vector",
        "12:34:56",
        "abc::def",
        "8.8.8.8-rc1",
    ],
    "phone": [
        "2024-01-31",
        "ISBN 978-3-16-148410-0",
        "1990-1995",
        "3.14159265358979",
        "10.1000/182-555-1234",
        "+5 points",
        "12:30-14:00",
        "1,234,567,890",
        "192.168.100.1000",
        "x = 415-555",
    ],
    "card": [
        "4111 1111 1111 1112",
        "9783161484100",
        "1234567890123",
        "0000000000000000",
        "41111111111111111111111",
    ],
    "iban": [
        "DE89 3704 0044 0532 0130 01",
        "GB82WEST1234569876543",
        "ABCD1234",
        "XX89370400440532013000",
    ],
    "secret": [
        "the password: correcthorsebatterystaple",
        "api_key = os.environ.get_the_value_of_it",
        "secret_key: your-secret-key-goes-here",
        "sk-learn and hf_datasets",
        "a public key",
        "token = tokenizer.encode_plus_special_2",
    ],
}


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, texts in FOUND.items() for t in texts])
def test_what_is_private_is_found_whole(kind, text):
    document = Document(id="a", text=f"Before {text} after.", source="a")
    counts = Counter()
    changed = make_step("privacy", {"replace": [kind]})(document, counts)
    assert f"<{kind.upper()}>" in changed.text
    assert counts == {f"{kind} replaced": 1}
    assert changed.text.startswith("Before ")
    assert changed.text.endswith("after.")
    left = changed.text.replace(f"<{kind.upper()}>", "")
    assert sum(map(str.isdigit, left)) == 0
    assert make_step("privacy", {"drop": [kind]})(document, counts) == f"holds {kind}"


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, texts in NEAR.items() for t in texts])
def test_near_misses_stay(kind, text):
    assert FINDERS[kind](f"Before {text} after.") == []


def test_plain_text_comes_back_itself():
    document = Document(id="a", text="No data of anybody, in 3 lines\nof 1995.", source="a")
    assert make_step("privacy")(document, Counter()) is document


def test_unknown_steps_and_options_are_named():
    with pytest.raises(ConfigError, match="did you mean 'privacy'"):
        make_step("privcy")
    with pytest.raises(ConfigError, match="step privacy: unknown key 'drops'"):
        make_step("privacy", {"drops": ["email"]})
    with pytest.raises(ConfigError, match="step privacy"):
        make_step("privacy", {"drop": ["mail"]})


def test_names_of_secrets_without_end_take_linear_time(monkeypatch):
    looked_at = []

    def counting(value):
        looked_at.append(len(value))
        return is_random(value)

    is_random = privacy.is_random
    monkeypatch.setattr(privacy, "is_random", counting)
    assert privacy.find_secrets("api_key=" * 2000) == []
    assert max(looked_at) <= 256
    secret = "a1B2" * 300
    assert privacy.find_secrets(f"api_key={secret} end") == [(8, 8 + len(secret))]
