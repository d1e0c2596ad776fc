"""Track B: which mixture of seven domains trains the better small Llama from random weights?

``--data`` names a folder that has ``pretrain/NAME_train.jsonl`` and ``pretrain/NAME_val.jsonl``, rows with a ``text``,
for each name of ``DOMAINS``: 24 MB of training text. The tokenizer is a byte-level BPE, trained on the training files.
Models are compared by bits per byte: perplexity is for each token, so that a smaller vocabulary lowers it by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boards import filled

from dataflex.files import write_atomically

Keys = dict[str, Any]

DOMAINS = ("arxiv", "book", "c4", "commoncrawl", "github", "stackexchange", "wikipedia")
SPECIALS = ("<s>", "</s>", "<pad>")
BY_SIZE = {"method": "proportional", "size": "tokens"}
METRIC = "token_weighted_bits_per_byte"
"""The metric that decides. Further ones would cost power, because p values are corrected for their number."""


@dataclass(frozen=True)
class Size:
    """A model, its data and its training.

    Attributes:
        vocabulary: tokens of the BPE, the special ones and the 256 bytes among them.
        width: width of the residual stream; the standard deviation of the first weights is 1 / sqrt(width).
        inner: width inside of a feed-forward layer.
        layers: layers, each of attention and feed-forward.
        heads: attention heads.
        block: tokens of a packed sample.
        batch: samples of an optimizer step.
        learning_rate: highest learning rate; it falls to 0 as a cosine.
        tokens: tokens that each model is trained on.
        validation: documents of a domain's validation set at most, and characters of them all. None: everything.
        device: keys of LLaMA-Factory for the machine.
    """

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    block: int
    batch: int
    learning_rate: float
    tokens: int
    validation: tuple[int, int] | None
    device: Keys


# Small: 0.5 million parameters. 1.2 million tokens are an eighth of the corpus, so hardly a text comes twice. A run
# of shares by size ends at 2.61 bits per byte on the cut validation texts, or a perplexity of 66. A bigram model with
# Kneser-Ney smoothing has 2.80 after as many tokens and 2.75 after the whole corpus, and token frequencies have 3.81.
# Large: 24 million parameters. 20 million tokens are three passes over the corpus; with equal shares they are 22 passes
# over commoncrawl, the smallest domain. More passes would measure overfitting. A run has 3.2e15 floating-point
# operations (6 for each weight and token, and the attention): a minute at 55 TFLOP/s. This is counted, not measured.
SIZES = {
    "small": Size(
        vocabulary=1024,
        width=128,
        inner=352,
        layers=2,
        heads=4,
        block=128,
        batch=8,
        learning_rate=5.0e-3,
        tokens=1_200_000,
        validation=(16, 32_000),
        device={"use_cpu": True},
    ),
    "large": Size(
        vocabulary=8192,
        width=384,
        inner=1024,
        layers=12,
        heads=6,
        block=512,
        batch=32,
        learning_rate=2.0e-3,
        tokens=20_000_000,
        validation=None,
        device={"bf16": True},
    ),
}


def files() -> list[str]:
    """Return the files that are read, relative to the data folder."""
    return [f"pretrain/{name}_{kind}.jsonl" for name in DOMAINS for kind in ("train", "val")]


def prepare(source: Path, folder: Path, size: str) -> None:
    """Write the data sets, the tokenizer and the model's configuration of a size below a folder.

    Args:
        source: the data folder, with ``pretrain/``.
        folder: gets the folders ``data`` and ``model``.
        size: one of ``SIZES``.
    """
    write_data(source / "pretrain", folder / "data", SIZES[size])
    texts = (text for name in DOMAINS for text in read_texts(source / "pretrain" / f"{name}_train.jsonl"))
    write_model(texts, folder / "model", SIZES[size])


def read_texts(file: Path) -> Iterator[str]:
    """Yield the texts of a file of JSON lines."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def write_data(source: Path, folder: Path, size: Size) -> None:
    """Write a training and a validation set of each domain, and ``dataset_info.json``.

    The files are copies of the texts. So the runs have the same inputs, and the same keys, wherever the source lies.
    """
    info: dict[str, Keys] = {}
    for name in DOMAINS:
        held_out = list(read_texts(source / f"{name}_val.jsonl"))
        sets = {
            name: list(read_texts(source / f"{name}_train.jsonl")),
            f"{name}_val": cut(held_out, *size.validation) if size.validation else held_out,
        }
        for each, texts in sets.items():
            rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            _write(folder / f"{each}.jsonl", rows)
            info[each] = {"file_name": f"{each}.jsonl", "columns": {"prompt": "text"}}
    _write(folder / "dataset_info.json", json.dumps(info, indent=2) + "\n")


def cut(texts: Sequence[str], documents: int, characters: int) -> list[str]:
    """Return the beginnings of documents at equal distances, the same number of characters of each.

    Args:
        texts: the documents.
        documents: most documents that are taken.
        characters: most characters of all documents together. A short document does not give its rest to the others.
    """
    count = min(documents, len(texts))
    return [texts[number * len(texts) // count][: characters // count] for number in range(count)]


def write_model(texts: Iterable[str], folder: Path, size: Size) -> None:
    """Train the tokenizer on texts, and write it with the configuration of the model. There are no weights.

    A first standard deviation of 1 / sqrt(width) takes the models off the plateau of word frequencies much earlier than
    0.02, the default of the configuration: 3.23 bits per byte and not 3.46 after 200,000 tokens of the small size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos, pad = SPECIALS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.save_pretrained(folder)
    LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.block,
        initializer_range=round(size.width**-0.5, 4),
        tie_word_embeddings=True,
        bos_token_id=SPECIALS.index(bos),
        eos_token_id=SPECIALS.index(eos),
        pad_token_id=SPECIALS.index(pad),
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def base_settings(folder: Path, size: str) -> Keys:
    """Return what all trainings have in common, without their length.

    Both sizes have about 1,200 steps. ODM's paper has a warm-up of 1 % of the steps, here ten. It decides before every
    step. Here a decision holds for ten steps, because one step has few samples of each domain, and shares are realised
    by whole samples. Gradient checkpointing, which LLaMA-Factory sets otherwise, would compute every layer twice.

    Args:
        folder: the folder that ``prepare`` filled.
        size: one of ``SIZES``.
    """
    settings = SIZES[size]
    return {
        "model_name_or_path": str(_relative(folder / "model")),
        "train_from_scratch": True,
        "stage": "pt",
        "do_train": True,
        "do_eval": True,
        "finetuning_type": "full",
        "dataset": ",".join(DOMAINS),
        "eval_dataset": ",".join(f"{name}_val" for name in DOMAINS),
        "dataset_dir": str(_relative(folder / "data")),
        "packing": True,
        "cutoff_len": settings.block,
        "per_device_train_batch_size": settings.batch,
        "per_device_eval_batch_size": 2 * settings.batch,
        "disable_gradient_checkpointing": True,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        **settings.device,
        "dataflex": {"warmup_steps": 10, "update_steps": 10},
    }


def doremi_settings(folder: Path, size: str) -> Keys:
    """Return the file of ``dataflex-cli doremi``: reference and proxy of the models' own size, on as many tokens.

    The paper has a step size of 1, with 200,000 steps of 512 samples. In a thousand steps of a few samples the excess
    losses are large and noisy, hence 0.1, which the authors advise if weights collapse. The final model is one of the
    compared variants, so the command's own final training has a single step.
    """
    base = base_settings(folder, size)
    base["seed"] = 1
    base["dataflex"]["train_tokens"] = SIZES[size].tokens
    return {
        "base": base,
        "output_dir": str(_relative(folder / "doremi")),
        "reference": {"dataflex.mix": BY_SIZE},
        "proxy": {"dataflex.mix": {"reweight_eta": 0.1}},
        "final": {"dataflex.train_tokens": None, "dataflex.train_steps": 1, "dataflex.warmup_steps": None},
    }


def doge_settings(folder: Path, size: str) -> Keys:
    """Return the configuration of DoGE's proxy, for ``dataflex-cli train``, with the method's defaults."""
    settings = base_settings(folder, size)
    settings["dataflex"] |= {"train_tokens": SIZES[size].tokens, "mix": {"method": "doge"}}
    return {**settings, "seed": 1, "output_dir": str(_relative(folder / "doge"))}


def regmix_settings(folder: Path, size: str) -> Keys:
    """Return the file of ``dataflex-cli regmix``: 128 models of 2 layers, each on a tenth of the tokens.

    With 64 models the trees rank unseen mixtures less well than a plane (0.83 and 0.86), with 128 better (0.96 and
    0.91), and the best mixture of a plane is a corner.
    """
    model = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4}
    model |= {"num_key_value_heads": 4, "initializer_range": round(128**-0.5, 4)}
    settings = SIZES[size]
    return {
        "base": base_settings(folder, size),
        "output_dir": str(_relative(folder / "regmix")),
        "proxies": {
            "count": 128,
            "seed": 1,
            "model_config": model,
            "learning_rate": SIZES["small"].learning_rate,
            "per_device_train_batch_size": 4,
            "dataflex.train_tokens": settings.tokens // 10,
            "budget": settings.tokens,
        },
        "final": {"dataflex.train_tokens": settings.tokens},
    }


def words(folder: Path) -> dict[str, str]:
    """Return the files that stand for the words of the board's mixers: weights and tables that proxies find."""
    found = {
        "doremi": folder / "doremi" / "proxy" / "dataflex" / "domain_weights.json",
        "doge": folder / "doge" / "dataflex" / "domain_weights.json",
        "regmix_mixtures": folder / "regmix" / "mixtures.csv",
        "regmix_losses": folder / "regmix" / "losses.csv",
    }
    return {word: str(_relative(file)) for word, file in found.items()}


def experiment_settings(
    folder: Path, output: Path, size: str, seeds: Sequence[int], mixers: Mapping[str, Keys], baseline: str
) -> Keys:
    """Return the file of ``dataflex-cli compare``.

    Args:
        folder: the folder that ``prepare`` filled, and in which the weights of DoReMi and others were found.
        output: folder of the comparison.
        size: one of ``SIZES``.
        seeds: seeds of each variant.
        mixers: name -> ``mix`` section of each variant, as the board has it.
        baseline: one of the variants.
    """
    return {
        "base": base_settings(folder, size),
        "output_dir": str(_relative(output)),
        "baseline": baseline,
        "seeds": list(seeds),
        "equal": {"tokens": SIZES[size].tokens},
        "metrics": [METRIC],
        "variants": {name: {"dataflex.mix": filled(mixer, words(folder))} for name, mixer in mixers.items()},
    }


def sentences(size: str, seeds: Sequence[int]) -> Iterator[str]:
    """Yield plain sentences about the model, the data and the budget."""
    settings = SIZES[size]
    yield (
        f"Model: a Llama of {settings.layers} layers of width {settings.width} from random weights, with a byte-level "
        f"BPE of {settings.vocabulary:,} tokens that is trained on the training texts."
    )
    yield f"Data: {', '.join(DOMAINS)}, in packed blocks of {settings.block} tokens."
    if settings.validation is not None:
        yield (
            f"Validation: {settings.validation[1]:,} characters of at most {settings.validation[0]} documents of each "
            "domain. arxiv has 2 documents and commoncrawl has 3, so these two values say little about their domains."
        )
    yield (
        f"Budget: {settings.tokens:,} trained tokens in each run, {settings.batch} blocks in a step, seeds "
        f"{', '.join(map(str, seeds))}. Perplexity is for each token of this vocabulary: compare models of different "
        "vocabularies by bits per byte."
    )
    yield (
        "The metric weights domains by their validation tokens"
        + (", of which all have about equally many here. " if settings.validation is not None else ". ")
        + "Shares that a proxy finds, as DoReMi's, are found once and used with every seed: the intervals leave out "
        "how much they would vary, and the equal budget leaves out their cost, which the table of costs has."
    )


def _relative(path: Path) -> Path:
    """Return a path relative to the working directory, if it is below it. Then other machines have the same keys."""
    absolute, here = path.resolve(), Path.cwd().resolve()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else absolute


def _write(path: Path, text: str) -> None:
    """Write a file, unless it has this content already."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode())
