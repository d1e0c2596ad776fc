"""Makes the inputs of less.yaml: a small LLaVA of random weights with its processor, and questions about drawn shapes.

The images have one shape each, in the way of the package easy-vqa. A question asks for the colour or the shape, or
whether a shape is in the image. The validation set has questions for the colour.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

FOLDER = Path("saves/examples/vision")
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 30),
    "blue": (30, 30, 220),
    "black": (10, 10, 10),
    "yellow": (230, 220, 40),
}
SHAPES = ("circle", "rectangle", "triangle")
QUESTIONS = {
    "color": "what color is the shape?",
    "shape": "what shape is in the image?",
    "present": "is there a {} in the image?",
}
"""Question of each kind."""
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""Text that LLaMA-Factory's template llava adds to every sample."""


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words in texts and of all ASCII characters, with the special token ``<image>``."""
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = dict.fromkeys(["<unk>", "<s>", "</s>", "<image>", *characters, *words])
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<image>"],
    )


def make_model(folder: Path, texts: list[str], *, hidden: int = 64, layers: int = 2, side: int = 32) -> Path:
    """Write a LLaVA of random weights with its processor; an image has 16 tokens.

    Args:
        folder: folder of the model.
        texts: texts with the words that the tokenizer knows.
        hidden: size of the hidden states, of the tower and of the language model.
        layers: layers of the tower, and of the language model.
        side: sides of an image in pixels. A patch is a quarter of a side.
    """
    tokenizer, size = make_tokenizer([*texts, SYSTEM, "USER: ASSISTANT:"]), {"height": side, "width": side}
    LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer,
        patch_size=side // 4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=side, patch_size=side // 4),
        text_config=LlamaConfig(
            **sizes,
            vocab_size=len(tokenizer),
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def draw(colour: str, shape: str, rng: random.Random, side: int = 32) -> Image.Image:
    """Return an image of one shape at a random place."""
    image = Image.new("RGB", (side, side), (250, 250, 250))
    size = rng.randint(side // 2, 2 * side // 3)
    left, top = rng.randint(1, side - size - 1), rng.randint(1, side - size - 1)
    box, pen, fill = (left, top, left + size, top + size), ImageDraw.Draw(image), COLOURS[colour]
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "rectangle":
        pen.rectangle(box, fill=fill)
    else:
        pen.polygon([(left, top + size), (left + size, top + size), (left + size / 2, top)], fill=fill)
    return image


def question(kind: str, colour: str, shape: str, rng: random.Random) -> tuple[str, str]:
    """Return a question of a kind about a shape, and its answer."""
    if kind == "present":
        asked = rng.choice([*SHAPES, shape])
        return QUESTIONS[kind].format(asked), "yes" if asked == shape else "no"
    return QUESTIONS[kind], colour if kind == "color" else shape


def row(asked: str, answer: str, images: list[str], kind: str) -> dict[str, Any]:
    """Return a row in the ShareGPT form of LLaVA's data; ``images`` are paths below LLaMA-Factory's media_dir."""
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": images, "kind": kind}


def image_rows(folder: Path, name: str, count: int, kinds: list[str]) -> list[dict[str, Any]]:
    """Draw images to ``folder/name`` and return a row for each, with a question of each kind in turn."""
    rng = random.Random(name)
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        colour, shape, kind = rng.choice(list(COLOURS)), rng.choice(SHAPES), kinds[number % len(kinds)]
        path = f"{name}/{number}.png"
        draw(colour, shape, rng).save(folder / path)
        asked, answer = question(kind, colour, shape, rng)
        rows.append(row(f"<image> {asked}", answer, [path], kind))
    return rows


def entry(name: str) -> dict[str, Any]:
    """Return the entry of a data set in dataset_info.json."""
    return {
        "file_name": f"{name}.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }


def main(folder: Path = FOLDER) -> None:
    """Write the model and the data sets ``shapes`` and ``colors`` to a folder."""
    data = folder / "data"
    entries = {}
    for name, count, kinds in (("shapes", 240, list(QUESTIONS)), ("colors", 12, ["color"])):
        rows = image_rows(data, name, count, kinds)
        (data / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        entries[name] = entry(name)
    (data / "dataset_info.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    texts = [*(text.format("") for text in QUESTIONS.values()), *COLOURS, *SHAPES, "yes no"]
    print(make_model(folder / "model", texts), data)


if __name__ == "__main__":
    main()
