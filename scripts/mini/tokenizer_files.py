"""CLIP and T5 tokenizers made from code: every byte (CLIP) or Latin-1 letter (T5), and words of captions.

Both represent every caption: CLIP's byte pairs cover every byte, T5's pieces every printable Latin-1
character. Common words are one token each, so a caption fits into CLIP's 77.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, T5Tokenizer

_START, _END = "<|startoftext|>", "<|endoftext|>"

# Words of photographs' captions, most frequent first.
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


def clip_tokenizer(*, pad_token: str = _END, words: Iterable[str] | None = None) -> CLIPTokenizer:
    """Returns byte-pair encoding over all 256 bytes, 254 merges, 768 tokens; the end token has the highest id.

    The merges are learned from `words`, most frequent first; without them, from words of photographs'
    captions.
    """
    alphabet = sorted(ByteLevel.alphabet())
    # "!" is the first of the sorted alphabet, hence token 0, as in CLIP's own vocabulary.
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    merges = list(_learned_merges(tuple(_WORDS.split() if words is None else words), count=254))
    tokens += ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate([*tokens, _START, _END])}
    assert len(vocabulary) == 768, "two merges made one token"
    # vocab= and merges=, not files: transformers 5 ignores vocab_file= and builds an almost empty vocabulary.
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def t5_tokenizer(words: Iterable[str] | None = None) -> T5Tokenizer:
    """Returns a unigram model: specials, printable Latin-1 characters, then whole words, most frequent first.

    Without `words` it takes those of photographs' captions, in lower case and capitalized, up to 640 pieces
    in all.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    letters = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x100)) if code != 0xAD]
    pieces += [(letter, -10.0) for letter in letters]
    endings = ["s", "es", "ed", "ing", "er", "ly", "th", "an", "on"]
    if words is None:
        photographs = list(dict.fromkeys(_WORDS.split()))
        spellings = [f"▁{word}" for word in photographs] + [f"▁{word.capitalize()}" for word in photographs]
        known = [*endings, *spellings][: 640 - len(pieces)]
    else:
        known = [*endings, *(f"▁{word}" for word in words)]
    # A known word has a better score than its letters at any rank: each letter costs 10.
    step = min(0.005, 6.0 / len(known))
    pieces += [(piece, -5.0 - step * rank) for rank, piece in enumerate(known)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


@cache
def _learned_merges(known: tuple[str, ...], *, count: int) -> tuple[tuple[str, str], ...]:
    """Returns the first pairs that byte-pair training joins over `known`; frequent words have more weight.

    It has its own loop because the trainer of `tokenizers` breaks ties in another order at every call.
    """
    words = {(*word[:-1], word[-1] + "</w>"): 1 + 40 // (rank + 1) for rank, word in enumerate(known)}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        weights: Counter[tuple[str, str]] = Counter()
        for symbols, weight in words.items():
            for pair in pairwise(symbols):
                weights[pair] += weight
        best = max(weights, key=lambda pair: (weights[pair], pair))
        merges.append(best)
        words = {_merged(symbols, best): weight for symbols, weight in words.items()}
    return tuple(merges)


def _merged(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)
