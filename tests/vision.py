"""Tiny vision-language models and data sets of drawn images, for runs through LLaMA-Factory in seconds.

The images, the questions and the LLaVA are those of the example ``examples/vision/make_inputs.py``.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import example_files
import tiny

inputs = example_files.vision_inputs()
"""The example's module."""
KINDS = list(inputs.QUESTIONS)
TEXTS = [*(text.format("") for text in inputs.QUESTIONS.values()), *inputs.COLOURS, *inputs.SHAPES, "yes no"]


def make_llava(folder: Path, *, hidden: int = 32) -> Path:
    """Write a random LLaVA with its processor: a CLIP tower of two layers, a projector, and a Llama of two layers."""
    return inputs.make_model(folder, [*TEXTS, *tiny.WORDS], hidden=hidden)


def add_images(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Add a data set of rows with images, in ShareGPT's form, to dataset_info.json."""
    tiny.add_data(folder, name, rows, **{key: value for key, value in inputs.entry(name).items() if key != "file_name"})


def make_data(folder: Path) -> Path:
    """Write data sets for a ``dataset_dir`` that is also the ``media_dir``.

    The samples of ``shapes`` have one image each, with questions of all kinds; those of ``held`` have questions for the
    colour. A set with the name of a kind has questions of this kind. The samples of ``mixed`` have one image, two
    images and none, in turn.
    """
    tiny.make_data(folder, {"alpha": 16})
    of_one = [(kind, 100, [kind]) for kind in KINDS]
    for name, size, kinds in (("shapes", 24, KINDS), ("held", 6, ["color"]), *of_one):
        add_images(folder, name, inputs.image_rows(folder, name, size, kinds))
    drawn = inputs.image_rows(folder, "mixed", 24, KINDS)
    rng = random.Random("words")
    for number, each in enumerate(drawn):
        answer = each["messages"][1]["content"]
        if number % 3 == 1:
            images = [*each["images"], *drawn[(number + 2) % len(drawn)]["images"]]
            drawn[number] = inputs.row(f"<image> <image> {tiny.sentence(rng)}", answer, images, "two")
        elif number % 3 == 2:
            drawn[number] = inputs.row(tiny.sentence(rng, 6, 12), tiny.sentence(rng, 1, 4), [], "text")
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
        "cutoff_len": 128,
        "freeze_multi_modal_projector": False,
        **more,
    }


def make_qwen2_vl(folder: Path) -> Path:
    """Write a random Qwen2-VL with its processor: a tower of two layers with its merger, and two layers of text."""
    import torch
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = inputs.make_tokenizer([*TEXTS, *tiny.WORDS])
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
    torch.manual_seed(0)
    image, video, begin, end = tokenizer.convert_tokens_to_ids(marks[:4])
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 2 * 32,
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
            "embed_dim": 32,
            "hidden_size": 32,
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
