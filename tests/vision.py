"""A tiny vision-language model and data sets of drawn images, for runs through LLaMA-Factory in seconds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiny

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 30),
    "blue": (30, 30, 220),
    "black": (10, 10, 10),
    "yellow": (230, 220, 40),
}
SHAPES = ("circle", "rectangle", "triangle")
QUESTIONS = {
    "color": "what color is the shape",
    "shape": "what shape is in the image",
    "present": "is there a {} in the image",
}
"""Question of each type."""
_WORDS = sorted({*COLOURS, *SHAPES, *" ".join(QUESTIONS.values()).split(), "yes", "no", "USER", "ASSISTANT"} - {"{}"})
IMAGE_SIZE, PATCH_SIZE = 16, 8
"""Sizes in pixels. An image has (16 / 8)^2 = 4 patches and as many tokens."""
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2


def make_tokenizer() -> Any:
    """Return a word tokenizer with the special token ``<image>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>", "<image>"]
    characters = [chr(code) for code in range(32, 127)]
    vocab = {
        token: number for number, token in enumerate(dict.fromkeys([*specials, *characters, *tiny.WORDS, *_WORDS]))
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<image>"],
    )


def make_llava(folder: Path, *, hidden: int = 32, seed: int = 0) -> Path:
    """Write a random LLaVA with its processor: a CLIP tower of two layers, a projector, and a Llama of two layers."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = make_tokenizer()
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    tower = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=language,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def draw(colour: str, shape: str, rng: random.Random) -> Image:
    """Return an image of one shape at a random place."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (2 * IMAGE_SIZE, 2 * IMAGE_SIZE), (250, 250, 250))
    left, top, side = rng.randint(1, 8), rng.randint(1, 8), rng.randint(14, 20)
    box = (left, top, left + side, top + side)
    pen, fill = ImageDraw.Draw(image), COLOURS[colour]
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "rectangle":
        pen.rectangle(box, fill=fill)
    else:
        pen.polygon([(left, top + side), (left + side, top + side), (left + side / 2, top)], fill=fill)
    return image


def question(kind: str, colour: str, shape: str, rng: random.Random) -> tuple[str, str]:
    """Return a question of a type about an image, and its answer."""
    if kind == "present":
        asked = rng.choice([*SHAPES, shape])
        return QUESTIONS[kind].format(asked), "yes" if asked == shape else "no"
    return QUESTIONS[kind], colour if kind == "color" else shape


def image_rows(folder: Path, name: str, size: int, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """Draw ``size`` images below ``folder`` and return a row of each, in ShareGPT's form, with its question's type."""
    rng = random.Random(name)
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(size):
        colour, shape, kind = rng.choice(list(COLOURS)), rng.choice(SHAPES), kinds[number % len(kinds)]
        path = f"{name}/{number}.png"
        draw(colour, shape, rng).save(folder / path)
        asked, answer = question(kind, colour, shape, rng)
        rows.append(row(f"<image> {asked}", answer, [path], kind))
    return rows


def row(asked: str, answer: str, images: list[str], kind: str = "text") -> dict[str, Any]:
    """Return a row in ShareGPT's form."""
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": images, "kind": kind}


def add_images(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Add a data set of rows with images, in ShareGPT's form, to dataset_info.json."""
    tiny.add_data(
        folder,
        name,
        rows,
        formatting="sharegpt",
        columns={"messages": "messages", "images": "images"},
        tags={"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    )


def make_data(folder: Path, sizes: dict[str, tuple[int, tuple[str, ...]]] | None = None) -> Path:
    """Write data sets of images, one of mixed samples and their dataset_info.json.

    The samples of ``mixed`` have one image, two images and none, in turn.

    Args:
        folder: LLaMA-Factory's ``dataset_dir`` and ``media_dir``.
        sizes: size and types of questions of each data set of samples with one image.
    """
    tiny.make_data(folder, {"alpha": 16})
    kinds = tuple(QUESTIONS)
    for name, (size, of) in (sizes or {"shapes": (24, kinds), "held": (6, ("color",))}).items():
        add_images(folder, name, image_rows(folder, name, size, of))
    drawn = image_rows(folder, "mixed", 24, kinds)
    rng = random.Random("words")
    for number, each in enumerate(drawn):
        if number % 3 == 1:
            other = drawn[(number + 1) % len(drawn)]["images"]
            drawn[number] = row(
                "<image> <image> " + tiny.sentence(rng), each["messages"][1]["content"], [*each["images"], *other]
            )
        elif number % 3 == 2:
            drawn[number] = row(tiny.sentence(rng, 6, 12), tiny.sentence(rng, 1, 4), [])
    add_images(folder, "mixed", drawn)
    return folder


def changes(data: Path, template: str = "llava", **more: Any) -> dict[str, Any]:
    """Return the arguments of a short sft run on images that differ from those of ``tiny.arguments``.

    Args:
        data: folder that ``make_data`` wrote.
        template: LLaMA-Factory's template of the model, ``llava`` or ``qwen2_vl``.
        more: further arguments.
    """
    return {
        "finetuning_type": "full",
        "dataset": "mixed",
        "template": template,
        "media_dir": str(data),
        "freeze_multi_modal_projector": False,
        **more,
    }


def arguments(model: Path, data: Path, output: Path, **more: Any) -> dict[str, Any]:
    """Return LLaMA-Factory arguments of a short sft run on the tiny vision-language model."""
    return tiny.arguments(model, data, output, **changes(data, **more))


def make_qwen2_vl(folder: Path, *, hidden: int = 32, seed: int = 0) -> Path:
    """Write a random Qwen2-VL with its processor: a tower of two layers with its merger, and two layers of text."""
    import torch
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = make_tokenizer()
    marks = [f"<|{name}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end", "im_start", "im_end")]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    pixels = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=pixels, **sizes),
        tokenizer,
        Qwen2VLVideoProcessor(size=pixels, **sizes),
        chat_template="{{ messages }}",
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    image, video, begin, end = tokenizer.convert_tokens_to_ids(marks[:4])
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
        vision_config={
            "depth": 2,
            "embed_dim": hidden,
            "hidden_size": hidden,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=begin,
        vision_end_token_id=end,
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return folder
