"""Tests that the license of a base comes from its model card, and stays unknown if the card states none."""

import pytest

from halfbyte.trainer.pretrained.license import Licence, base_licence

COMMIT = "b" * 40
DEV = """---
language:
- en
license: other
license_name: flux-1-dev-non-commercial-license
license_link: LICENSE.md
extra_gated_prompt: By clicking "Agree", you agree.
---

![FLUX.1 [dev]](./dev_grid.jpg)
"""


def test_flux_devs_card(tmp_path):
    (tmp_path / "README.md").write_text(DEV)
    name = "flux-1-dev-non-commercial-license"
    link = f"https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/{COMMIT}/LICENSE.md"
    assert base_licence(tmp_path, "black-forest-labs/FLUX.1-dev", COMMIT) == Licence("other", name, link)
    assert base_licence(tmp_path, None, None) == Licence("other", name, None), "a local folder has no page"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", Licence("apache-2.0")),
        (
            "---\nlicense: other\nlicense_link: https://stability.ai/x\n---\n",
            Licence("other", None, "https://stability.ai/x"),
        ),
        ("# no metadata, license: mit\n", None),
        ("---\ntags: [x]\n---\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlicense: 'mit\"><script>'\n---\n", None),
        ("---\nlicense: {a: [\n---\n", None),
        ("---\n- a list\n---\n", None),
        (None, None),
    ],
)
def test_any_card(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert base_licence(tmp_path, "a/b", COMMIT) == expected


def test_a_card_in_an_unknown_encoding_causes_a_warning(tmp_path, caplog):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert base_licence(tmp_path, "a/b", COMMIT) is None
    (record,) = caplog.records
    assert str(tmp_path / "README.md") in record.message
