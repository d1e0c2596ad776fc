"""Characters and tokens of one conversation: subword tokenizers compared with their bytes, and the rules of marks."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.api.given_weights import Mark
from dataflex.integrations.llamafactory.turn_weights import Encoded, MessageWeight, RowError, encode

PIECES = (
    *(
        "the answer ",
        "sums ",
        "is",
        " 42",
        "\n\n",
        "  ",
        "\t",
        "naïve café ",
        "北京天气",
        "🙂👍🏽",
        "e\u0301",
        "don't ",
        "1234567",
    ),
    *("<think>", "</think>", "x = f(y)\n    return", " a", "."),
)


def tokenizer_of(byte_level: bool) -> Any:
    """Return a subword tokenizer, of bytes or of characters with a mark for each space."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=20)) for _ in range(200)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token=None if byte_level else "<unk>"))
    specials = ["<unk>", "<s>", "</s>"]
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:  # as Llama 2: a mark before the text and for each space, and bytes for unknown characters
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        known = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=known, limit_alphabet=40)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="module", params=[True, False], ids=["bytes", "characters"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer_of(request.param)


def processor_of(tokenizer: Any, template: str = "chatml", **changes: Any) -> Any:
    """Return LLaMA-Factory's processor."""
    from llamafactory.data.processor import SupervisedDatasetProcessor
    from llamafactory.data.template import TEMPLATES

    given = {"cutoff_len": 4096, "mask_history": False, "train_on_prompt": False, **changes}
    form = copy.copy(TEMPLATES[template])
    form.enable_thinking = given.pop("enable_thinking", True)
    tokenizer = copy.deepcopy(tokenizer)
    form.fix_special_tokens(tokenizer)
    return SupervisedDatasetProcessor(
        template=form, tokenizer=tokenizer, processor=None, data_args=SimpleNamespace(**given)
    )


def row_of(*contents: str) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    media = dict.fromkeys(("_images", "_videos", "_audios"))
    return {"_prompt": messages[:-1], "_response": messages[-1:], "_system": "", "_tools": "", **media}


def encoded(processor: Any, row: dict[str, Any], *given: MessageWeight, marks: tuple[Mark, ...] = ()) -> Encoded:
    made = encode(processor, row, given, 1.0, marks)
    plain = processor._encode_data_example(
        *(row[name] for name in ("_prompt", "_response", "_system", "_tools")), [], [], []
    )
    assert (made.input_ids, made.labels) == plain  # what LLaMA-Factory makes itself
    return made


def characters_of(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    """Return the first character of each token of a text that is not white space, or its first character.

    The bytes of a token are read from its name, and not from the offsets of the tokenizer.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    names, is_byte_level = tokenizer.convert_ids_to_tokens(ids), "<0x00>" not in tokenizer.get_vocab()
    owners = [place for place, character in enumerate(text) for _ in character.encode()]
    data = text.encode()
    if not is_byte_level:  # the mark of a space has three bytes
        marked = "▁" + text.replace(" ", "▁")
        data, owners = marked.encode(), [max(0, i - 1) for i, each in enumerate(marked) for _ in each.encode()]
    found, begin = list[int](), 0
    for name in names:
        if is_byte_level:
            raw = bytes(byte_of[character] for character in name)
        else:
            raw = bytes([int(name[3:5], 16)]) if name.startswith("<0x") else name.encode()
        assert data[begin : begin + len(raw)] == raw
        own = owners[begin : begin + len(raw)]
        found.append(next((place for place in own if not text[place].isspace()), own[0]))
        begin += len(raw)
    assert begin == len(data)
    return found


@pytest.mark.parametrize("seed", range(25))
def test_a_token_has_the_weight_of_its_first_visible_character(tokenizer: Any, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices([piece for piece in PIECES if "think" not in piece], k=12))
    bounds = sorted(rng.sample(range(len(text) + 1), 6))
    spans = [(bounds[i], bounds[i + 1], rng.choice([0.0, 0.5, 2.0])) for i in (0, 2, 4)]
    processor = processor_of(tokenizer)
    made = encoded(processor, row_of("ask", text), MessageWeight(), MessageWeight(3.0, spans))
    factors = np.ones(len(text))
    for begin, end, weight in spans:
        factors[begin:end] = weight
    # The response of chatml is one text: the content, <|im_end|> and a line feed.
    whole = text + "<|im_end|>\n"
    body = processor.tokenizer.encode(text, add_special_tokens=False)
    trained = [label for label in made.labels if label != -100]
    assert trained == processor.tokenizer.encode(whole, add_special_tokens=False)
    assert trained[: len(body)] == body  # the end is a special token, so nothing is merged over it
    expected = [3.0 * factors[place] for place in characters_of(processor.tokenizer, text, body)]
    assert made.weights == [*expected, *[3.0] * (len(trained) - len(body))]
    assert len(set(made.weights)) > 1


THINK = Mark(begin="<think>", end="</think>", weight=0.25)
CODE = Mark(begin="```", end="```", weight=0.5)


def texts_by_weight(processor: Any, made: Encoded) -> list[tuple[str, float]]:
    """Return the text of each run of trained tokens of equal weight."""
    found: list[tuple[list[int], float]] = []
    for token, weight in zip([label for label in made.labels if label != -100], made.weights, strict=True):
        if found and found[-1][1] == weight:
            found[-1][0].append(token)
        else:
            found.append(([token], weight))
    return [(processor.tokenizer.decode(tokens), weight) for tokens, weight in found]


@pytest.fixture(scope="module")
def of_bytes() -> Any:
    return tokenizer_of(True)


def test_marks_include_their_delimiters_and_multiply(of_bytes: Any) -> None:
    processor, marks = processor_of(of_bytes), (THINK, CODE)
    text = "a <think>is ```x = f(y)``` 42</think>\n\nthe answer ```42```."
    made = encoded(processor, row_of("<think>ask", text), MessageWeight(), MessageWeight(2.0, (), marks), marks=marks)
    assert texts_by_weight(processor, made) == [
        ("a", 2.0),
        (" <think>is ", 0.5),  # the first space belongs to the token " <"
        ("```x = f(y)```", 0.25),
        (" 42</think>", 0.5),
        ("\n\nthe answer ", 2.0),
        ("```42```", 1.0),
        (".<|im_end|>\n", 2.0),
    ]
    assert made.marks == [1, 2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<think> a", "'<think>' (character 0 of a response) is not closed by '</think>'"),
        ("a </think>", "'</think>' (character 2 of a response) ends no '<think>'"),
        ("<think></think></think>", "'</think>' (character 15 of a response) ends no '<think>'"),
        ("<think>a<think></think></think>", "'<think>' (character 8 of a response) begins inside another '<think>'"),
        ("``` a ``` b ```", "'```' (character 12 of a response) is not closed by '```'"),
    ],
)
def test_marks_without_counterparts_are_refused(of_bytes: Any, text: str, problem: str) -> None:
    marks = (THINK, CODE)
    with pytest.raises(RowError) as error:
        encoded(processor_of(of_bytes), row_of("a", text), MessageWeight(), MessageWeight(1.0, (), marks), marks=marks)
    assert str(error.value) == problem


THOUGHT = "<think>\nx = f(y)\n</think>\n\nthe answer is 42"


def test_thoughts_that_a_template_removes_take_their_spans_with_them(of_bytes: Any) -> None:
    contents, ask = ["ask", THOUGHT, "ask", THOUGHT], MessageWeight()
    answer = THOUGHT.index("answer")
    spans = [(8, 9, 7.0), (answer, answer + 6, 0.5)]  # in the thought, and in the rest
    given = [ask, MessageWeight(1.0, spans), ask, MessageWeight(1.0, spans)]
    processor = processor_of(of_bytes, "qwen3", enable_thinking=False)
    made = encoded(processor, row_of(*contents), *given)
    turn = [("the", 1.0), (" answer", 0.5), (" is 42<|im_end|>\n", 1.0)]
    assert texts_by_weight(processor, made) == [*turn[:2], (turn[2][0] + "the", 1.0), *turn[1:]]
    processor = processor_of(of_bytes, "qwen3")
    made = encoded(processor, row_of("ask", THOUGHT), *given[:2])
    assert texts_by_weight(processor, made)[:3] == [("<think>\n", 1.0), ("x", 7.0), (" = f(y)\n</think>\n\nthe", 1.0)]
    processor = processor_of(of_bytes, "qwen3", mask_history=True)
    processor.template.preserve_thinking = False
    made = encoded(processor, row_of(*contents), *given)
    assert [weight for _, weight in texts_by_weight(processor, made)] == [1.0, 7.0, 1.0, 0.5, 1.0]


def test_content_that_a_template_changes_otherwise_has_no_spans(of_bytes: Any) -> None:
    processor = processor_of(of_bytes, "qwen3")
    row = row_of("ask", '{"name": "f", "arguments": {}}')
    row["_response"][0]["role"] = "function"
    with pytest.raises(RowError, match="changes the content of message 2"):
        encoded(processor, row, MessageWeight(), MessageWeight(1.0, [(0, 2, 0.5)]))
    mark = Mark(begin="<tool_call>", end="</tool_call>", weight=0.5)
    made = encoded(processor, row, MessageWeight(), MessageWeight(1.0, (), (mark,)), marks=(mark,))
    [*_, call, end] = texts_by_weight(processor, made)
    assert (call[0].startswith("<tool_call>"), call[0].endswith("</tool_call>"), call[1]) == (True, True, 0.5)
    assert end == ("<|im_end|>\n", 1.0)


def test_a_tokenizer_without_characters_serves_weights_of_messages_alone(of_bytes: Any) -> None:
    class Slow:
        is_fast = False

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    processor = processor_of(of_bytes)
    processor.tokenizer = Slow(processor.tokenizer)
    made = encoded(processor, row_of("ask", "is 42"), MessageWeight(), MessageWeight(0.5))
    assert set(made.weights) == {0.5}
    with pytest.raises(RowError, match="set use_fast_tokenizer: true"):
        encoded(processor, row_of("ask", "is 42"), MessageWeight(), MessageWeight(1.0, [(0, 2, 0.5)]))


def test_media_are_refused(of_bytes: Any) -> None:
    row = {**row_of("a", "b"), "_images": ["a.png"]}
    with pytest.raises(RowError, match="images, videos or audios"):
        encode(processor_of(of_bytes), row, [MessageWeight()] * 2, 1.0)
