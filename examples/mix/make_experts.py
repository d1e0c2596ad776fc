"""Makes the model of moe_balance.yaml: a small Mixtral of random weights with the tokenizer of the demo's model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from dataflex.assets import resolve

FOLDER = Path("saves/examples/mix/experts")


def main() -> None:
    """Write the model and its tokenizer to FOLDER."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("asset:smollm2-135m-instruct"))
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    MixtralForCausalLM(config).save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    print(FOLDER)


if __name__ == "__main__":
    main()
