"""CLIP and T5 tokenizers made from code: every byte (CLIP) or Latin-1 letter (T5), and words of captions.

Both keep a caption whole: CLIP's byte pairs know every byte, T5's pieces every printable Latin-1 character,
and common words are one token each, so that a caption fits into CLIP's 77.
"""

import json

from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, T5Tokenizer

_START, _END = "<|startoftext|>", "<|endoftext|>"

# Words that captions of photographs are made of, most frequent first.
_WORDS = """
a the of in on with and photo photograph picture an at is to by from over under near behind front white
black red blue green yellow brown orange grey dark bright light old young small large big long wooden stone
man woman people person cat dog bird horse flower tree trees grass leaf leaves forest mountain mountains
lake river sea ocean beach sand sky cloud clouds sun sunset sunrise night day moon stars rock rocks snow ice
water field hill valley desert road street city building buildings house tower bridge temple church castle
window door wall roof train car boat ship plane rocket launch pad bicycle cup coffee table spoon plate food
fruit bread camera tripod book chair face head eyes hand hair portrait smiling looking standing sitting
walking holding wearing suit uniform hat shirt astronaut space shuttle flag coat close up view aerial
macro landscape background foreground shadow reflection pattern texture brick gravel metal glass wood paper
cell cells skin coins coin text page clock chelsea motorcycle wheel stereo garage color colour grayscale
morning evening summer winter autumn spring left right top bottom center middle between through across along
two three four many few some its his her their one style soft sharp blurred blurry warm cold
dragonfly petals bloom pavilion palace harbor fog mist rain drops waves path garden park island cliff
"""


def clip_tokenizer(*, pad_token: str = _END) -> CLIPTokenizer:
    """Byte-pair encoding over all 256 bytes, 254 merges, 768 tokens; the end token has the highest id."""
    alphabet = sorted(ByteLevel.alphabet())
    # "!" is the first of the sorted alphabet, hence token 0, as in CLIP's own vocabulary.
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    merges = _learned_merges(count=254)
    tokens += ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate([*tokens, _START, _END])}
    assert len(vocabulary) == 768, "two merges made one token"
    # vocab= and merges=, not files: transformers 5 ignores vocab_file= and builds an almost empty vocabulary.
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """A unigram model: specials, printable Latin-1 characters, then words by rank: 640 pieces."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    letters = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x100)) if code != 0xAD]
    pieces += [(letter, -10.0) for letter in letters]
    words = list(dict.fromkeys(_WORDS.split()))
    spellings = [f"▁{word}" for word in words] + [f"▁{word.capitalize()}" for word in words]
    endings = ["s", "es", "ed", "ing", "er", "ly", "th", "an", "on"]
    room = 640 - len(pieces)
    pieces += [(piece, -5.0 - 0.005 * rank) for rank, piece in enumerate([*endings, *spellings][:room])]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _learned_merges(*, count: int) -> list[tuple[str, str]]:
    """The first byte pairs that byte-pair training joins over the word list, frequent words weighing more."""
    words = _WORDS.split()
    weighted = [word for rank, word in enumerate(words) for _ in range(1 + 40 // (rank + 1))]
    tokenizer = CLIPTokenizer().backend_tokenizer
    # Letters that end a word are their own symbols: leave room for them, then take as many merges as asked.
    trainer = BpeTrainer(
        vocab_size=256 + 26 + count,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(weighted, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges][:count]
