"""Tests model cards: they state the facts of a run, and user text is displayed literally and never parsed."""

import ast
import re
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.load.base_error import BaseError
from halfbyte.trainer.denoiser.settings import quant_recipe
from halfbyte.trainer.export.provenance import Provenance
from halfbyte.trainer.pretrained.license import Licence
from halfbyte.trainer.publish.files import PushFile, SamplePicture
from halfbyte.trainer.publish.markdown import fenced
from halfbyte.trainer.publish.model_card import CardFacts, ValidationSummary, model_card, published_settings
from halfbyte.trainer.recipe.recipe import Recipe

COMMIT = "a" * 40
FLUX = Licence(
    "other",
    "flux-1-dev-non-commercial-license",
    f"https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/{COMMIT}/LICENSE.md",
)
NAMES = (
    "adapter_model.safetensors",
    "comfyui/dog.safetensors",
    "pytorch_lora_weights.safetensors",
    "transformer/config.json",
)


def recipe(prompts=("a dog",), **sections):
    values = {
        "model": {"family": "flux", "path": "black-forest-labs/FLUX.1-dev"},
        "data": {"path": "/home/ann/private pictures", "cache_dir": "/home/ann/cache"},
        "sample": {"prompts": list(prompts)},
        "output": {"dir": "/home/ann/runs/dog", "push_to_hub": "ann/dog"},
    }
    for section, settings_ in sections.items():
        values[section] = values.get(section, {}) | settings_
    return Recipe.model_validate(values)


def facts(prompts=("a dog",), **sections):
    pictures = [
        SamplePicture(
            prompt, PushFile(f"samples/{n:02d}.png", b""), PushFile(f"samples/{n:02d}-base.png", b"")
        )
        for n, prompt in enumerate(prompts)
    ]
    made_from = recipe(prompts, **sections)
    return CardFacts(
        "ann/dog",
        made_from,
        Provenance(
            "0.1.0",
            1000,
            "FluxPipeline",
            "FluxTransformer2DModel",
            "black-forest-labs/FLUX.1-dev",
            COMMIT,
            own_transformer=False,
            max_sequence_length=512,
            licence=FLUX,
            quant=quant_recipe(made_from),
        ),
        NAMES,
        tuple(pictures),
        BaseError(0.0921, 504, 252_000_000, 11_900_000_000),
        ValidationSummary(12, 0.5, 0.4),
    )


class Page(HTMLParser):
    """Collects a card's tags with their attributes, and the text of its table cells."""

    def __init__(self, card):
        super().__init__()
        self.tags, self.cells, self._cell = [], [], None
        body = ModelCard(card).text
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *attrs))
        if tag == "td":
            self._cell = ""

    def handle_endtag(self, tag):
        if tag == "td":
            self.cells.append(self._cell)
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data

    def handle_comment(self, data):
        self.tags.append(("comment", data))


def code(card, language):
    (found,) = re.findall(rf"^(`{{3,}}){language}\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)
    return found[1]


def as_one_line(text):
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


HOSTILE = [
    "a\n---\nlicense: mit\n---\n",
    '"><script>alert(1)</script><img src=x onerror=alert(1)>',
    "| a | b |\n| --- | --- |",
    "![x](http://evil.example/x.png) [y](javascript:alert(1)) <http://evil.example>",
    "```\n# out\n```\n~~~\n",
    "</details></td></table><!-- ",
    "{{ 7*7 }} {% raw %} $x$ &amp; &#60; \\ \\| @ann #1 **b** _i_ ~~s~~ `c`",
    "'; import os; os.remove('x') #\"\"\"",
    "www.evil.example http://evil.example ann@evil.example",
    "\u202eright to left\u2066 caf\xe9 \u0000 \x1b[31m\u2028\x85",
    "yes",
    "1e5",
    "- item\n  key: value",
]
# Unicode classes of the characters that change the display order of others.
REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
ANY_TEXT = st.text(min_size=1) | st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=3).map("".join)


@settings(deadline=None, max_examples=60)
@given(prompt=ANY_TEXT, prefix=st.text() | st.sampled_from(HOSTILE))
@example(prompt=HOSTILE[0], prefix=HOSTILE[0])
@example(prompt="a\x85---\x85b", prefix="sks\u2028---\u2028dog")
def test_user_text_is_never_parsed_as_markup(prompt, prefix):
    plain = model_card(facts(["a dog"], data={"caption_prefix": "sks "}))
    card = model_card(facts([prompt], data={"caption_prefix": prefix}))
    page = Page(card)
    displayed = prefix.strip() and as_one_line(prefix)
    if displayed:
        assert page.tags == Page(plain).tags
    assert page.cells[0] == as_one_line(prompt)
    data = ModelCard(card).data.to_dict()
    assert data["widget"] == [{"text": prompt, "output": {"url": "samples/00.png"}}]
    assert data.get("instance_prompt", "") == prefix.strip()
    assert data["license"] == "other"
    program = ast.parse(code(card, "python"))
    (call,) = [
        node
        for node in ast.walk(program)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipeline"
    ]
    assert ast.literal_eval(call.args[0]) == prompt
    written = yaml.safe_load(code(card, "yaml"))
    assert written["sample"]["prompts"] == [prompt]
    assert written["data"]["caption_prefix"] == prefix


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_adds_no_tag(text):
    card = model_card(facts([text], data={"caption_prefix": text}))
    assert not [character for character in card if unicodedata.bidirectional(character) in REORDERING]
    tags = Page(card).tags
    assert {tag for tag, *_ in tags} == {
        *("h1", "h2", "p", "a", "code", "pre", "details", "summary"),
        *("table", "thead", "tbody", "tr", "th", "td", "img"),
    }
    addresses = {value for _, *attrs in tags for name, value in attrs if name in ("href", "src")}
    assert all(a.startswith(("https://huggingface.co/black-forest-labs/", "samples/")) for a in addresses)
    assert {name for _, *attrs in tags for name, _ in attrs} <= {"href", "src", "alt", "class"}


def test_the_trigger_word_is_the_instance_prompt():
    text = model_card(facts(data={"trigger_word": "sks", "caption_prefix": "a photo of [trigger],"}))
    assert ModelCard(text).data.to_dict()["instance_prompt"] == "sks"
    assert "Trigger word: sks\n" in text
    assert "start with: a photo of sks," in text
    assert "trigger word" not in model_card(facts(data={"caption_prefix": "sks"})).lower()


def test_the_metadata_has_what_the_hub_lists_models_by():
    data = ModelCard(model_card(facts(data={"caption_prefix": "sks dog, "}))).data.to_dict()
    assert data == {
        "base_model": "black-forest-labs/FLUX.1-dev",
        "base_model_relation": "adapter",
        "base_model_revision": COMMIT,
        "library_name": "diffusers",
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": FLUX.license_link,
        "pipeline_tag": "text-to-image",
        "tags": [
            *("text-to-image", "diffusers", "diffusers-training", "lora", "qlora", "halfbyte"),
            *("flux", "template:sd-lora"),
        ],
        "instance_prompt": "sks dog,",
        "widget": [{"text": "a dog", "output": {"url": "samples/00.png"}}],
    }


def test_a_card_states_the_facts():
    card = model_card(facts())
    for fact in (
        f"at revision [`{COMMIT}`]",
        "step 1000",
        "0.5000 to 0.4000",
        "Quantization error: 9.21%",
        "252,000,000 of the 11,900,000,000 weights",
        "LoRA, rank 16, alpha 16, targets all-linear",
        "nf4 with double quantization, computed in bfloat16",
        "ComfyUI (comfyui/dog.safetensors)",
        "[flux-1-dev-non-commercial-license](<https://huggingface.co/",
    ):
        assert fact in card, fact
    assert "section `quant`" not in card
    assert model_card(facts()) == card


def test_a_base_that_was_already_quantized_is_described_as_it_was_stored():
    known = facts()
    stored = QuantRecipe("int8", skip=("proj_out",))
    card = model_card(replace(known, provenance=replace(known.provenance, quant=stored)))
    assert card.count("int8, outliers from 6, all but proj&#95;out, computed in bfloat16") == 3
    assert "nf4 with" not in card
    assert "section `quant`" in card


def test_unknown_facts_are_left_out():
    known = facts(())
    provenance = replace(known.provenance, base_model=None, revision=None, licence=None)
    card = model_card(
        replace(
            known,
            provenance=provenance,
            base_error=None,
            validation=None,
            names=("pytorch_lora_weights.safetensors",),
        )
    )
    data = ModelCard(card).data.to_dict()
    assert not data.keys() & {"base_model", "base_model_revision", "license", "license_link", "widget"}
    for absent in (
        "## Samples",
        "## Quantized base",
        "## License",
        "FluxTransformer2DModel",
        "error",
        "revision=",
    ):
        assert absent not in card.replace("revision: null", "").replace(": error", ""), absent
    ast.parse(code(card, "python"))
    known_card = model_card(known)
    assert "## License" in known_card
    assert "## Quantized base" in known_card
    assert "## Samples" in model_card(facts())


def test_no_path_of_the_machine_is_published():
    own = facts(
        model={
            "path": "/home/ann/models/flux",
            "transformer": "/home/ann/one.safetensors",
            "text_encoder": "/home/ann/t5",
        },
        lora={"init_from": "/home/ann/other"},
        validation={"path": "/home/ann/held out"},
    )
    given = {"own_transformer": True, "own_text_encoder": True}
    provenance = replace(own.provenance, base_model=None, revision=None, **given)
    card = model_card(replace(own, provenance=provenance))
    assert "/home/" not in card
    for part in ("transformer", "text encoder T5"):
        assert re.search(rf"^The {part} .*\blocal folder\b", card, re.MULTILINE), part
    published = published_settings(own.recipe)
    assert "path" not in published["model"]
    assert "path" not in published["data"]
    assert published["train"]["steps"] == 1000


@pytest.mark.parametrize(
    "sections",
    [
        {"quant": {"type": "int8"}},
        {"quant": {"type": "none"}},
        {"lora": {"dora": True}},
        {"lora": {"rslora": True, "targets": ["to_q", "to_k"]}},
        {"objective": {"loss": {"name": "huber"}}},
    ],
)
def test_every_kind_of_run_has_a_card(sections):
    card = model_card(facts(**sections))
    assert ModelCard(card).data.tags[0] == "text-to-image"
    kind = ("rs" if "rslora" in str(sections) else "") + ("DoRA" if "dora" in str(sections) else "LoRA")
    assert f"A {kind} for" in card


@pytest.mark.parametrize("text", ["```\n<b>\n```", "`````", "~~~\n````\n<b>"])
def test_a_fence_in_the_text_does_not_end_the_block(text):
    (block,) = MarkdownIt("commonmark").parse(fenced(text, "yaml"))
    assert (block.type, block.info, block.content) == ("fence", "yaml", f"{text}\n")
