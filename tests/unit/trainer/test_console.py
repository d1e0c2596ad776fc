"""The terminal: decisions, logs, and lines that progress bars do not spoil."""

from __future__ import annotations

import io

import pytest
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from dataflex.api.schedule import RoundSlot
from dataflex.integrations.llamafactory import launch
from dataflex.trainer import console, terminal

LOGS = {"loss": 2.34567, "grad_norm": 1.25, "learning_rate": 9.5e-5, "epoch": 1.5, "total_flos": 1e12}
OURS = {"dataflex/loss/chat": 2.5, "dataflex/round": 3, "dataflex/proportion/chat": 0.5}
EVALUATION = {
    "eval_loss": 2.0, "eval_chat_loss": 1.5, "eval_math_loss": 2.5, "eval_token_weighted_loss": 1.9,
    "eval_unweighted_loss": 2.0, "eval_chat_perplexity": 4.5, "eval_token_weighted_bits_per_byte": 0.9,
    "eval_runtime": 3.2, "eval_samples_per_second": 12.0, "eval_steps_per_second": 3.0, "dataflex/tokens": 300,
    "epoch": 1.5,
}  # fmt: skip


def test_a_decision_is_printed_in_one_line() -> None:
    planned = {"chat": 15, "math": 19, "code": 6}
    assert console.decision(RoundSlot(1, 10, 10, 1), planned, 300, 6.12) == (
        "round 1, steps 11-20: 40 of 300: chat 15, math 19, code 6; 6.1 s"
    )
    assert console.decision(RoundSlot(0, 0, 10, None), {"chat": 40}, 300, 0.04) == (
        "round 0 (warm-up), steps 1-10: 40 of 300 samples; 0.0 s"
    )
    weights = {"chat": 0.25, "math": 0.5, "code": 0.25}
    assert console.decision(RoundSlot(7, 2, 1, 7), planned, 300, 1, scored=120, loss_weights=weights) == (
        "round 7, step 3: 40 of 300: chat 15, math 19, code 6; "
        "loss weights at its start chat 0.25, math 0.5, code 0.25; 120 scored within max_overhead; 1.0 s"
    )


def test_of_many_domains_the_largest_are_listed() -> None:
    planned = {f"d{number}": number for number in range(23)}
    assert console.largest(planned) == "d22 22, d21 21, d20 20, d19 19, d18 18 and 18 more"
    assert console.largest({f"d{number}": number for number in range(6)}) == "d0 0, d1 1, d2 2, d3 3, d4 4, d5 5"


def test_a_log_is_printed_in_one_short_line() -> None:
    assert console.log({**LOGS, **OURS}, 20, 300) == "step 20 of 300: loss 2.346, learning rate 9.5e-05, epoch 1.50"
    assert console.log({**LOGS, **OURS}, 20, None) == "step 20: loss 2.346, learning rate 9.5e-05, epoch 1.50"
    assert console.log(EVALUATION, 20, 300) == "step 20 of 300: evaluation loss 2: chat 1.5, math 2.5"
    each = {"eval_chat_loss": 1.5, "eval_chat_runtime": 1.0, "eval_chat_bits_per_byte": 0.5, "epoch": 1.0}
    assert console.log(each, 20, 300) == "step 20 of 300: evaluation loss chat 1.5"
    means = {"eval_token_weighted_loss": 1.9, "eval_unweighted_loss": 2.0, "epoch": 1.0}
    assert console.log(means, 20, 300) == "step 20 of 300: evaluation loss 1.9"
    responses = {"eval_rouge-1": 34.25, "eval_runtime": 1.0, "eval_model_preparation_time": 0.1}
    assert console.log(responses, 20, 300) == "step 20 of 300: evaluation rouge-1 34.25"
    pairs = {"eval_loss": 0.5, "eval_chat_loss": 0.4, "eval_math_loss": 0.7, "eval_token_weighted_loss": 0.52}
    pairs |= {"eval_token_weighted_accuracy": 0.8, "eval_chat_accuracy": 0.9, "eval_math_accuracy": 0.6}
    pairs |= {"eval_unweighted_accuracy": 0.75, "eval_chat_margin": 0.3, "eval_rewards/accuracies": 0.79}
    pairs |= {"eval_rewards/chosen": 1.0, "eval_logps/chosen": -3.0, "eval_rewards/margins": 0.25}
    assert console.log(pairs, 20, 300) == (
        "step 20 of 300: evaluation loss 0.5: chat 0.4, math 0.7; accuracy 0.8: chat 0.9, math 0.6; margin chat 0.3"
    )
    feedback = {"eval_loss": 0.5, "eval_held_loss": 0.4, "eval_rewards/margins": 0.25}  # stage kto
    assert console.log(feedback, 20, 300) == "step 20 of 300: evaluation loss 0.5; rewards/margins 0.25"
    assert console.log({"eval_chat_loss": 0.4, "eval_chat_accuracy": 0.9}, 20, 300) == (
        "step 20 of 300: evaluation loss chat 0.4; accuracy chat 0.9"
    )
    assert console.log({"eval_loss": 0.4, "eval_accuracy": 0.9}, 20, 300) == (
        "step 20 of 300: evaluation loss 0.4; accuracy 0.9"
    )
    assert console.log({**OURS, "epoch": 1.0}, 20, 300) is None  # of a round's beginning
    assert console.log({"train_runtime": 1.0, "train_loss": 2.0}, 20, 300) is None  # LLaMA-Factory prints it whole


def test_the_metrics_at_the_end_are_short_too() -> None:
    assert console.without_details({**EVALUATION, "eval_my-set_perplexity": 3.0, "perplexity": 7.0}) == {
        key: value
        for key, value in {**EVALUATION, "perplexity": 7.0}.items()  # the last is LLaMA-Factory's own, of stage pt
        if key not in ("eval_chat_perplexity", "eval_token_weighted_bits_per_byte", "dataflex/tokens")
    }


def make_handler(kind: type) -> CallbackHandler:
    return CallbackHandler([kind()], None, None, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [ProgressCallback, PrinterCallback])
def test_the_terminal_gets_a_line_and_others_get_everything(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    handler = make_handler(kind)
    terminal.shorten(handler, knows_end=True)
    args = TrainingArguments(output_dir="unused", report_to="none")
    state, control = TrainerState(max_steps=300, global_step=20, is_local_process_zero=True), TrainerControl()
    handler.on_train_begin(args, state, control)
    logs = {**LOGS, **OURS}
    handler.on_log(args, state, control, logs)
    assert logs == {**LOGS, **OURS}  # the next callback sees what it would have seen
    handler.on_train_end(args, state, control)
    assert capsys.readouterr().out == "step 20 of 300: loss 2.346, learning rate 9.5e-05, epoch 1.50\n"
    state.is_world_process_zero = False
    handler.on_log(args, state, control, logs)
    assert capsys.readouterr().out == ""


def test_another_printing_callback_is_kept() -> None:
    class Own(ProgressCallback):
        pass

    handler = make_handler(Own)
    terminal.shorten(handler, knows_end=True)
    assert [type(callback) for callback in handler.callbacks] == [Own]


def test_an_error_begins_on_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    bar = tqdm(total=10, file=stream, mininterval=0)
    bar.update(3)
    launch.report_error("dataflex: the reason")
    assert stream.getvalue().replace("\r", "\n").splitlines()[-1] == "dataflex: the reason"
    assert "\ndataflex: the reason\n" in stream.getvalue()  # the bar has ended its line
    bar.close()
    assert stream.getvalue().endswith("dataflex: the reason\n")
