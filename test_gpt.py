"""What gpt.py promises, in the order of the file, after three promises that people come for.

Each name is a promise, each body its proof. A few words on pytest, which runs them: an argument of a test is
something made ready for it, by the function of that name marked as a fixture (`in_folder`) or by pytest
itself: `tmp_path` is an empty folder, `capsys` what was printed, and what `monkeypatch` changes is put back
at the end. `parametrize` runs a test once for each row of a table. A *hook* is a function that PyTorch calls
each time a part of a model has computed something: with the part, its arguments and its result.
"""

import contextlib
import doctest
import hashlib
import http.server
import io
import math
import multiprocessing.forkserver
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # promises to the bit are for one device: here, the CPU
os.environ["OMP_NUM_THREADS"] = "1"  # more threads gain nothing here, and on a busy machine they wait
import torch
from torch import nn
from torch.nn import functional as F

import gpt

HERE = Path(__file__).parent
TEXT = gpt.read_text(HERE / "input.txt")
TOKENIZER = gpt.CharTokenizer.from_text(TEXT)
TOKENS = TOKENIZER.encode(TEXT)
CUT = len(TOKENS) * 9 // 10
TRAINING, HELD_OUT = TOKENS[:CUT], TOKENS[CUT:]
INPUT_SHA256 = "7fc14190e10d28e26533f84528bd13188edf2ed16180a17e4e83638bd5254a7c"  # of input.txt's bytes
SHORT = HELD_OUT[:2000]  # a held-out text for tests that don't measure anything

# A model of eight thousand parameters: for promises that do not depend on size, it is quick.
SMALL = gpt.Config(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, steps=20, eval_every=10)
SMALL_FLAGS = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --length 40".split()


def trained(config, held_out=SHORT, **how):
    """A model trained as `config` says, and the reports of its training."""
    model = gpt.GPT(config)
    return model, list(gpt.train(model, TRAINING, held_out, **how))


def written(model, prompt="", length=50, **how):
    """What the model writes after the prompt, as one string."""
    return "".join(gpt.generate(model, TOKENIZER, prompt, length, **how))


def same(a, b):
    """Two dicts of tensors, equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def randomized(config, seed=0):
    """A model whose biases and scales are random too, so that a test would notice a missing one."""
    model, chance = gpt.GPT(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=chance) * 0.1)
    return model


def shapes_inside(model, inputs):
    """Run the model -> the shape of what each of its parts gives out, by the part's name; "" is the whole."""
    names, shapes = {part: name for name, part in model.named_modules()}, {}

    def note(part, arguments, output):
        shapes[names[part]] = tuple(output.shape)

    for part in names:
        part.register_forward_hook(note)
    model(inputs)
    return shapes


# ---------------------------------------------------------------- the three promises that people come for


PARAMETERS = {"tiny": 421_504, "small": 3_208_960, "medium": 10_770_816, "gpt2": 85_892_352}


@pytest.mark.parametrize("size", PARAMETERS)
def test_each_part_of_each_size_gives_out_the_shape_that_the_lesson_says(size):
    config = gpt.Config(**gpt.SIZES[size])
    model, (B, T, C, V) = gpt.GPT(config), (2, 8, config.n_embd, config.vocab_size)
    inputs, targets = gpt.get_batch(TOKENS, B, T, seed=1, step=1)
    assert inputs.shape == targets.shape == (B, T)
    shapes = shapes_inside(model, inputs)
    assert shapes["wte"] == (B, T, C) and model.wpe.weight.shape == (config.block_size, C)
    for layer in range(config.n_layer):
        assert shapes[f"h.{layer}.attn.c_attn"] == (B, T, 3 * C)
        assert shapes[f"h.{layer}.mlp.c_fc"] == (B, T, 4 * C)
        for part in ("", ".ln_1", ".attn", ".attn.c_proj", ".ln_2", ".mlp", ".mlp.c_proj"):
            assert shapes[f"h.{layer}{part}"] == (B, T, C)
    assert shapes["ln_f"] == (B, T, C) and shapes[""] == (B, T, V)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[size]


def test_the_loss_decreases_from_an_even_guess_to_below_counting_letter_pairs():
    # Three seeds end at 2.28 to 2.31; without GELU it would be 2.41, without the head start 2.57.
    model = gpt.GPT(gpt.Config(block_size=64, steps=150, eval_every=150))
    marks = gpt.yardsticks(TRAINING, HELD_OUT, 65)
    reports = list(gpt.train(model, TRAINING, HELD_OUT))
    assert abs(reports[0].loss - marks["guessing evenly"]) < 0.8  # an untrained model knows next to nothing
    assert reports[-1].held_out < marks["letter pairs"] - 0.17


def test_one_seed_gives_one_result_to_the_bit():
    config = replace(SMALL, dropout=0.1)
    (model, reports), (again, reports_again) = trained(config), trained(config)
    other, _ = trained(replace(config, seed=2))
    assert [(r.loss, r.held_out) for r in reports] == [(r.loss, r.held_out) for r in reports_again]
    assert same(model.state_dict(), again.state_dict())
    assert written(model, "HAMLET:", 100) == written(again, "HAMLET:", 100)
    assert not same(model.state_dict(), other.state_dict())


# ---------------------------------------------------------------- the examples in the comments


def test_every_example_in_the_file_gives_what_stands_below_it():
    source = (HERE / "gpt.py").read_text(encoding="utf-8")
    comments = "\n".join(line[2:] if line.startswith("# ") else "" for line in source.splitlines())
    examples = doctest.DocTestParser().get_doctest(comments, vars(gpt).copy(), "comments", "gpt.py", 0)
    runner = doctest.DocTestRunner()
    for found in [examples, *doctest.DocTestFinder().find(gpt)]:
        runner.run(found)
    assert runner.tries > 20 and runner.failures == 0


# ---------------------------------------------------------------- 0 and 1: settings, text to numbers


def test_every_setting_has_a_flag_whose_default_is_told_by_help(capsys):
    gpt.main("--help")
    options = " ".join(capsys.readouterr().out.split()).split("options:")[1]
    for row in fields(gpt.Config)[:-1]:  # all but vocab_size, which is counted
        flag = "--" + row.name.replace("_", "-")
        default = re.search(rf" {flag}\b.*?default: (.*?)\)", options)[1]  # the first one after the flag
        assert default == str(row.default) or row.default is None, flag


def test_settings_that_make_no_sense_are_a_value_error():
    with pytest.raises(ValueError, match="--n-head"):
        gpt.Config(n_embd=10, n_head=3)
    with pytest.raises(ValueError, match="--lr"):
        replace(SMALL, lr=-1.0)
    with pytest.raises(ValueError, match="--n-layer must be of Python's type int, not 2.5"):
        gpt.Config(n_layer=2.5)


def test_the_smallest_settings_work():
    model, reports = trained(gpt.Config(n_layer=1, n_head=1, n_embd=1, block_size=1, batch_size=1, steps=1))
    assert math.isfinite(reports[0].held_out) and len(written(model)) == 50


def test_text_becomes_numbers_and_comes_back_unchanged():
    assert TOKENIZER.decode(TOKENS) == TEXT and TOKENIZER.encode("").tolist() == []
    assert TOKENIZER.vocab_size == len(set(TEXT)) == 65
    strange = gpt.CharTokenizer.from_text("日本語 🎭 é\n")
    assert strange.decode(strange.encode("🎭é日")) == "🎭é日"
    with pytest.raises(ValueError, match="'ß'"):
        TOKENIZER.encode("Straße")


def test_the_shipped_text_is_the_one_that_the_numbers_are_about():
    content = (HERE / "input.txt").read_bytes()
    assert hashlib.sha256(content).hexdigest() == INPUT_SHA256


def test_every_pair_of_the_text_is_counted():  # more than a million, so in several pieces
    counts, pairs = gpt.count_pairs(TOKENS, 65), Counter(zip(TOKENS.tolist(), TOKENS[1:].tolist()))
    assert all(counts[a, b] == number for (a, b), number in pairs.items())
    assert counts.sum() == len(TOKENS) - 1 and counts.count_nonzero() == len(pairs) == 1535


def test_the_yardsticks_are_what_plain_counting_gives():
    text, rest = TEXT[:3000], TEXT[3000:4000]
    marks = gpt.yardsticks(TOKENIZER.encode(text), TOKENIZER.encode(rest), 65)
    pairs = list(zip(text, text[1:]))
    total = 0.0
    for a, b in zip(rest, rest[1:]):
        total -= math.log((pairs.count((a, b)) + 1) / (text.count(a) + 65))
    assert math.isclose(marks["letter pairs"], total / 999, rel_tol=1e-4)
    whole = gpt.yardsticks(TRAINING, HELD_OUT, 65)
    assert [round(loss, 2) for loss in whole.values()] == [4.17, 3.37, 2.53]


# ---------------------------------------------------------------- 2 to 5: the model


def test_attention_by_hand_is_what_pytorch_computes():
    q, k, v = torch.randn(3, 2, 4, 7, 5, generator=torch.Generator().manual_seed(1))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(gpt.attention_by_hand(q, k, v), theirs, atol=1e-5)


def test_a_large_layer_computes_what_pytorchs_own_does():
    layer, x = gpt.Linear(512, 512), torch.randn(1, 1, 512, generator=torch.Generator().manual_seed(1))
    assert layer.large and torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)


def test_a_token_never_sees_the_future():
    model, tokens = randomized(SMALL), TOKENS[None, :16].long()
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 65
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :9], after[0, :9])


def test_an_earlier_token_changes_the_guess_at_every_later_position():
    model, tokens = randomized(SMALL), TOKENS[None, :16].long()
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 65
    difference = (model(tokens) - model(changed))[0].abs().amax(-1)
    assert (difference > 1e-6).all()


def test_the_order_of_the_text_matters_to_the_model():
    # One block: in a second, the mask alone would give some order away.
    model, tokens = randomized(replace(SMALL, n_layer=1)), torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]])
    first, second = model(tokens)[:, -1]
    assert (first - second).abs().max() > 1e-3


def test_dropout_zeroes_its_share_of_three_outputs_in_training_and_none_otherwise():
    model, seen = randomized(replace(SMALL, dropout=0.5)), {}
    block = model.h[0]
    block.register_forward_pre_hook(lambda part, arguments: seen.update(embeddings=arguments[0]))
    block.attn.register_forward_hook(lambda part, arguments, output: seen.update(attention=output))
    block.mlp.register_forward_hook(lambda part, arguments, output: seen.update(mlp=output))
    for mode, share in [(True, 0.5), (False, 0)]:
        model.train(mode)(TOKENS[:480].view(30, 16).long())
        for output in seen.values():
            assert (output == 0).float().mean() == pytest.approx(share, abs=0.05)
    assert len(seen) == 3


PYTORCH_NAMES = {
    "ln_1.": "norm1.",
    "attn.c_attn.": "self_attn.in_proj_",
    "attn.c_proj.": "self_attn.out_proj.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "linear1.",
    "mlp.c_proj.": "linear2.",
}


def test_the_model_is_gpt2_as_pytorch_itself_would_build_it():
    model, tokens = randomized(replace(SMALL, n_layer=3, n_head=4, n_embd=32)), TOKENS[:48].view(3, 16).long()
    weights, ahead = model.state_dict(), nn.Transformer.generate_square_subsequent_mask(16)
    x = weights["wte.weight"][tokens] + weights["wpe.weight"]
    for layer in range(3):
        block = nn.TransformerEncoderLayer(32, 4, 128, 0.0, F.gelu, 1e-5, batch_first=True, norm_first=True)
        for ours, theirs in PYTORCH_NAMES.items():
            for kind in ("weight", "bias"):
                block.state_dict()[theirs + kind].copy_(weights[f"h.{layer}.{ours}{kind}"])
        x = block.eval()(x, src_mask=ahead, is_causal=True)
    x = F.layer_norm(x, (32,), weights["ln_f.weight"], weights["ln_f.bias"])
    assert torch.allclose(model(tokens), x @ weights["wte.weight"].T, atol=1e-5)


def test_a_text_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="17 characters don't fit a context of 16"):
        gpt.GPT(SMALL)(TOKENS[None, :17])


def test_weights_start_at_the_spread_that_suits_the_width():
    weights = gpt.GPT(gpt.Config()).state_dict()
    assert abs(weights["h.0.mlp.c_fc.weight"].std() - 128**-0.5) < 0.002
    assert abs(weights["h.0.mlp.c_proj.weight"].std() - 128**-0.5 / 2) < 0.002  # sqrt(2 * n_layer) is 2
    assert not weights["h.1.mlp.c_fc.bias"].any() and (weights["ln_f.weight"] == 1).all()
    usual = gpt.GPT(gpt.Config(init_std=0.02, head_start=False)).state_dict()
    other = gpt.GPT(gpt.Config(init_std=0.02, head_start=False, seed=1)).state_dict()
    assert not torch.equal(usual["wte.weight"], other["wte.weight"])
    assert all(abs(usual[name].std() - 0.02) < 0.001 for name in ("wpe.weight", "wte.weight"))


def test_tokens_and_positions_start_in_channels_of_their_own():
    weights, where = gpt.GPT(gpt.Config()).state_dict(), 96  # three quarters of 128
    assert not weights["wpe.weight"][:, :where].any() and not weights["wte.weight"][:, where:].any()
    assert torch.allclose(weights["wpe.weight"].norm(dim=1), torch.ones(128))
    assert abs(weights["wte.weight"].norm(dim=1).mean() - 1) < 0.05
    products = weights["wpe.weight"][:32] @ weights["wpe.weight"][:32].T  # of positions less than C / 4 apart
    assert torch.allclose(products, torch.eye(32), atol=1e-5)


def test_each_head_starts_by_looking_back_its_number_of_characters():
    model, seen = gpt.GPT(gpt.Config(block_size=64)), []
    model.h[0].attn.c_attn.register_forward_hook(lambda part, arguments, output: seen.append(output[0]))
    model(TOKENS[None, :64].long())
    queries, keys, _ = seen[0].split(128, dim=1)
    for head in range(4):
        part = slice(head * 32, (head + 1) * 32)
        favourite = (queries[:, part] @ keys[:, part].T).tril().argmax(1)
        back = torch.arange(64) - favourite
        assert (back[4:] == head + 1).all()  # whatever characters stand there
        scores = queries[:, part] @ keys[:, part].T / math.sqrt(32)
        shares = scores.masked_fill(torch.ones(64, 64).triu(1).bool(), -math.inf).softmax(1)
        assert shares[4:].amax(1).mean() > 0.95  # nearly all goes there


# ---------------------------------------------------------------- 6: batches


def test_targets_are_the_inputs_moved_on_by_one():
    inputs, targets = gpt.get_batch(TOKENS, 8, 32, seed=5, step=7)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text, stretch = TOKENIZER.decode(TOKENS), TOKENIZER.decode([*inputs[3], targets[3, -1]])
    assert stretch in text


def test_a_batch_depends_on_seed_and_step_and_nothing_else():
    def draw(seed, step):
        return gpt.get_batch(TOKENS, 8, 32, seed, step)[0].tolist()

    first = draw(1, 2)
    torch.rand(100)  # chance used for something else
    assert draw(1, 2) == first
    assert first != draw(1, 3) != draw(2, 2) != first  # with seed + step, the middle two would be the same
    assert draw(2**31, 2) != draw(2**31 + 1, 2)  # and no seed is too large to count


def test_every_place_of_the_text_can_be_drawn_and_none_beyond():
    draws = [gpt.get_batch(torch.arange(12), 4, 8, seed=1, step=step)[0] for step in range(50)]
    assert set(torch.cat(draws)[:, 0].tolist()) == {0, 1, 2, 3}  # 3 + 8 + 1 characters end at the 12th


# ---------------------------------------------------------------- 7: training


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine():
    config = gpt.Config(steps=1100, warmup=100, lr=2e-3, final_lr=0.1)
    rate = [gpt.learning_rate(step, config) for step in range(1100)]
    assert math.isclose(rate[0], 2e-5) and math.isclose(rate[49], 1e-3) and math.isclose(max(rate), 2e-3)
    assert rate.index(max(rate)) in (99, 100) and math.isclose(rate[599], 1.1e-3, rel_tol=0.01)
    assert math.isclose(rate[-1], 2e-4) and rate[100:] == sorted(rate[100:], reverse=True)
    assert math.isclose(gpt.learning_rate(0, replace(config, warmup=0)), 2e-3)
    tenth = replace(config, warmup=None)  # by default, a tenth of all steps
    assert gpt.learning_rate(108, tenth) < gpt.learning_rate(109, tenth) == 2e-3


def test_the_optimizer_follows_the_schedule_and_the_settings(monkeypatch):
    config, made = replace(SMALL, beta2=0.95), []
    make = gpt.make_optimizer
    monkeypatch.setattr(gpt, "make_optimizer", lambda *arguments: made.append(make(*arguments)) or made[0])
    for report in gpt.train(gpt.GPT(config), TRAINING, SHORT):
        for group in made[0].param_groups:
            assert group["lr"] == gpt.learning_rate(report.step - 1, config)
            assert group["betas"] == (0.9, 0.95)


def test_decay_is_for_matrices_only():
    model = gpt.GPT(SMALL)
    decayed, spared = gpt.make_optimizer(model, SMALL).param_groups
    vectors = {id(p) for name, p in model.named_parameters() if name.endswith("bias") or "ln_" in name}
    assert decayed["weight_decay"] == SMALL.weight_decay and spared["weight_decay"] == 0
    assert {id(p) for p in spared["params"]} == vectors
    assert len(decayed["params"]) + len(vectors) == len(list(model.parameters()))


def test_long_gradients_are_cut_to_length():
    def length_after_a_step(grad_clip):
        model = gpt.GPT(replace(SMALL, grad_clip=grad_clip))
        next(gpt.train(model, TRAINING, SHORT))
        return math.sqrt(sum(parameter.grad.square().sum() for parameter in model.parameters()))

    assert length_after_a_step(1e-3) == pytest.approx(1e-3, rel=0.01)
    assert length_after_a_step(0) > 1  # 0 allows any length


def test_auto_takes_16_bits_only_where_they_are_fast(monkeypatch):
    def auto(device, capability=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return gpt.number_format("auto", torch.device(device))

    assert auto("cpu") == auto("mps") == torch.float32
    assert auto("cuda", (7, 5)) == torch.float16  # a T4
    assert auto("cuda", (8, 0)) == auto("cuda", (9, 0)) == torch.bfloat16  # an A100, an H100
    with pytest.raises(ValueError, match="float16"):
        gpt.number_format("float16", torch.device("cpu"))


def test_half_precision_computes_nearly_the_same_and_keeps_the_weights_whole():
    (model, half), (_, full) = trained(replace(SMALL, dtype="bfloat16")), trained(SMALL)
    assert half[0].loss != full[0].loss == pytest.approx(half[0].loss, abs=0.02)
    assert half[-1].held_out == pytest.approx(full[-1].held_out, abs=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_float16_with_its_scaler_trains_alike_and_resumes_to_the_bit(monkeypatch):
    monkeypatch.setattr(gpt, "number_format", lambda *arguments: torch.float16)  # CPUs can, but slowly
    config = replace(SMALL, lr=0.01, grad_clip=0.1)
    model, half = trained(config)
    monkeypatch.undo()
    _, full = trained(config)
    assert half[0].loss != full[0].loss
    assert [r.loss for r in half] == pytest.approx([r.loss for r in full], abs=0.02)
    monkeypatch.setattr(gpt, "number_format", lambda *arguments: torch.float16)
    run = gpt.train(gpt.GPT(config), TRAINING, SHORT)
    state = next(report for report in run if report.step == 7).state()
    assert state["scaler"]["scale"] > 1000
    state = pickle.loads(pickle.dumps(state))
    state["scaler"]["scale"] /= 4  # as if it had been found too large
    _, rest = trained(config, state=state)
    assert [r.loss for r in rest] == pytest.approx([r.loss for r in full[7:]], abs=0.02)
    assert rest[-1].state()["scaler"]["scale"] == half[-1].state()["scaler"]["scale"] / 4


def test_the_held_out_loss_is_the_mean_over_every_character():
    model = randomized(replace(SMALL, dropout=0.5))
    text = HELD_OUT[: 16 * 600 + 6].long()  # 600 windows, more than go through at once, and a shorter one
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(text) - 1, 16):
            window = text[start : start + 17]
            total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    assert math.isclose(gpt.evaluate(model.train(), text), total / (len(text) - 1), rel_tol=1e-5)
    assert model.training  # as it was before


def test_the_model_can_learn_one_batch_by_heart():
    text = TOKENS[:17]
    model = gpt.GPT(replace(SMALL, n_embd=32, steps=150, lr=5e-3, weight_decay=0.0, eval_every=1000))
    assert [report.loss for report in gpt.train(model, text, text)][-1] < 0.05


def test_a_resumed_run_ends_where_the_uninterrupted_one_ends():
    config = replace(SMALL, dropout=0.2)
    whole, reports = trained(config)
    half = gpt.train(gpt.GPT(config), TRAINING, SHORT)
    state = next(report for report in half if report.step == 7).state()
    state = pickle.loads(pickle.dumps(state))  # as if it had been in a file
    for group in state["optimizer"]["param_groups"]:
        group |= {"fused": False, "betas": (0.5, 0.5)}  # as on another device: what counts is the config
    resumed, rest = trained(config, state=state)
    assert same(whole.state_dict(), resumed.state_dict())
    assert [r.loss for r in reports[7:]] == [r.loss for r in rest] and rest[0].step == 8


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step():
    model = gpt.GPT(SMALL)
    run = gpt.train(model, TRAINING, SHORT)
    next(run)
    with torch.no_grad():
        model.wte.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 2.*--lr"):
        next(run)


def test_a_compiled_model_computes_the_same(monkeypatch):
    compile, compiled = torch.compile, []

    def all_but_the_last_stage(model):  # the C++ compiler takes half a minute (.ci/run waits for it)
        compiled.append(model)
        return compile(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", all_but_the_last_stage)
    config = replace(SMALL, n_layer=1, steps=4)
    plain, fast = trained(config)[1], trained(replace(config, compile=True))[1]
    assert [r.loss for r in fast] == pytest.approx([r.loss for r in plain], abs=1e-4) and len(compiled) == 1


# ---------------------------------------------------------------- 8: writing


def write_without_cache(model, prompt, length, temperature, top_k, seed):
    """The plainest loop that writes: the whole context through the model for each character."""
    T, chance = model.config.block_size, random.Random(seed)
    context, text = TOKENIZER.encode(prompt).tolist()[-T:], ""
    for _ in range(length):
        if len(context) > T:
            context = context[-(T // 2) :]
        with torch.no_grad():
            logits = model(torch.tensor([context]))[0, -1]
        chances = gpt.probabilities(logits, temperature, top_k).tolist()
        context.append(chance.choices(range(65), chances)[0])
        text += TOKENIZER.characters[context[-1]]
    return text


@pytest.mark.parametrize("prompt_length", [1, 5, 16, 50])
@pytest.mark.parametrize("temperature, top_k", [(0, 0), (0.8, 0), (1.5, 5)])
def test_the_cache_changes_nothing_but_the_time(prompt_length, temperature, top_k):
    model, prompt, logits = randomized(SMALL), TEXT[100 : 100 + prompt_length], []
    model.register_forward_hook(lambda model, arguments, output: logits.append(output[0, -1]))
    fast = written(model, prompt, 60, temperature=temperature, top_k=top_k, seed=3)
    slow = write_without_cache(model, prompt, 60, temperature, top_k, seed=3)
    assert fast == slow and len(fast) == 60
    assert torch.allclose(torch.stack(logits[:60]), torch.stack(logits[60:]), atol=1e-5)


def test_each_character_costs_one_position_however_long_the_text():
    model, widths = randomized(SMALL), []
    model.wte.register_forward_hook(lambda part, arguments, output: widths.append(output.size(1)))
    written(model, "To be", 200)
    assert widths[0] == 5 and set(widths[1:]) == {1, 8}  # 8: half the context, afresh when it is full
    assert widths.count(8) == len(range(12, 200, 9))  # for the first time after 12, then after every 9


def test_temperature_0_is_the_likeliest_and_top_k_leaves_k():
    logits = torch.randn(65, generator=torch.Generator().manual_seed(1))
    assert gpt.probabilities(logits, 0)[logits.argmax()] == gpt.probabilities(logits, 1e-30).max() == 1
    seven = gpt.probabilities(logits, 2.0, 7)
    assert seven.count_nonzero() == seven[logits.topk(7).indices].count_nonzero() == 7
    assert torch.allclose(gpt.probabilities(logits, 1.0, 65), logits.softmax(0))
    model = randomized(SMALL)
    assert written(model, "A", temperature=0, seed=1) == written(model, "A", temperature=0, seed=2)


def test_writing_leaves_everything_as_it_was():
    model = randomized(SMALL).train()
    before, chance = torch.random.get_rng_state(), random.getstate()
    characters = gpt.generate(model, TOKENIZER, "", 30)
    next(characters)  # between two characters, the rest of the program goes on as usual
    assert torch.is_grad_enabled() and torch.backends.mkldnn.enabled
    assert all(part.training for part in model.modules())
    assert torch.equal(before, torch.random.get_rng_state()) and chance == random.getstate()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_texts_can_be_written_in_turn_while_the_model_is_trained():
    config = replace(SMALL, dropout=0.5)
    (alone, reports), model, losses = trained(config), gpt.GPT(config), []
    first, second = (gpt.generate(model, TOKENIZER, "A", length) for length in (5, 30))
    for report in gpt.train(model, TRAINING, SHORT):
        losses.append(report.loss)
        next(first, None), next(second)
        model.eval()
    assert losses == [report.loss for report in reports] and same(model.state_dict(), alone.state_dict())
    assert written(model, "A") == written(alone, "A")
    texts = [gpt.generate(model.train(), TOKENIZER, "A", length, seed=length) for length in (5, 50)]
    for _ in range(6):
        next(texts[0], None), next(texts[1])
    assert "".join(texts[1]) == written(model.eval(), "A", seed=50)[6:]


def test_a_model_in_another_number_format_writes():
    assert len(written(randomized(SMALL).double())) == len(written(randomized(SMALL).bfloat16())) == 50


def test_an_empty_prompt_begins_as_after_an_empty_line():
    model = randomized(SMALL)
    assert written(model, "") == written(model, "\n\n")
    tokenizer = gpt.CharTokenizer.from_text("abc")  # here there are no lines
    assert len(list(gpt.generate(gpt.GPT(replace(SMALL, vocab_size=3)), tokenizer, "", 5))) == 5


# ---------------------------------------------------------------- 9: files, texts, devices


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_model(tmp_path, monkeypatch, step):
    path, model = tmp_path / "gpt.pt", randomized(SMALL)
    gpt.save(path, model, TOKENIZER)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(OSError, match="No space left"):
            gpt.save(path, randomized(SMALL, seed=1), TOKENIZER)
    assert same(gpt.load(path)[0].state_dict(), model.state_dict()) and os.listdir(tmp_path) == ["gpt.pt"]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def web_server():
    """The address of a server that answers with our text."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(TEXT.encode())

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_missing_text_is_fetched_whole_or_not_at_all(tmp_path, monkeypatch, capsys, web_server):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt, "__file__", str(tmp_path / "elsewhere" / "gpt.py"))
    monkeypatch.setattr(gpt, "TEXT_URL", web_server)
    assert gpt.main(["--steps", "1"]) == 2  # the wrong sum: this is not Tiny Shakespeare
    assert "not Tiny Shakespeare" in capsys.readouterr().err and os.listdir(tmp_path) == []
    monkeypatch.setattr(gpt, "TEXT_SHA256", INPUT_SHA256)
    assert gpt.find_text().read_text(encoding="utf-8") == TEXT
    assert "fetching" in capsys.readouterr().out
    (tmp_path / "input.txt").unlink()
    monkeypatch.setattr(gpt, "TEXT_URL", f"http://127.0.0.1:{free_port()}/")  # nobody answers there
    assert gpt.main([]) == 2 and "--data" in capsys.readouterr().err and os.listdir(tmp_path) == []


def test_line_ends_become_newlines_and_a_byte_order_mark_is_left_out(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffAnna\r\nOtto\r日本語 🎭\n".encode())
    assert gpt.read_text(tmp_path / "text") == "Anna\nOtto\n日本語 🎭\n"


def test_a_saved_model_comes_back_whole(tmp_path):
    model = randomized(SMALL)
    gpt.save(tmp_path / "gpt.pt", model, TOKENIZER)
    again, tokenizer = gpt.load(tmp_path / "gpt.pt")
    assert same(model.state_dict(), again.state_dict())
    assert again.config == model.config and tokenizer.characters == TOKENIZER.characters
    assert os.listdir(tmp_path) == ["gpt.pt"]


def test_a_file_that_is_not_a_whole_model_is_refused(tmp_path, recwarn):
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    gpt.save(good, gpt.GPT(SMALL), TOKENIZER)
    content = good.read_bytes()
    cuts = [content[: len(content) * i // 20] for i in range(20)] + [content[:-1]]
    torch.save({"model": {"weight": torch.zeros(3)}}, bad)
    others = [bad.read_bytes(), b"To be, or not to be\n", pickle.dumps({"config": {}}), b"\x89PNG\r\n"]
    found = torch.load(good, weights_only=True)
    wrong = [
        found | {"config": found["config"] | {"n_layer": 10**9}},
        found | {"config": found["config"] | {"n_embd": "16"}},
        found | {"characters": "abc"},
        found | {"model": found["model"] | {"wpe.weight": torch.zeros(16, 17)}},
        found | {"model": {name.replace("wte", "xyz"): weight for name, weight in found["model"].items()}},
        found | {"model": found["model"] | {"wpe.weight": torch.full((16, 16), math.nan)}},
        torch.zeros(3),
    ]
    for broken in wrong:
        torch.save(broken, bad)
        others.append(bad.read_bytes())
    weights = bytes(gpt.GPT(SMALL).h[1].mlp.c_fc.weight.detach().view(torch.uint8).flatten().tolist())
    place = content.index(weights) + 1000
    flipped = bytes([content[place] ^ 1])  # a single bit
    others.append(content[:place] + flipped + content[place + 1 :])
    for content in cuts + others:
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad.pt is not a whole model") as error:
            gpt.load(bad)
        assert "\n" not in str(error.value)
    assert not recwarn.list


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_model_with_other_weights_than_ours_is_saved_and_loaded(tmp_path, monkeypatch):
    class TwoTables(gpt.GPT):
        """What a reader might try: a table of its own for the way out."""

        def __init__(self, config):
            super().__init__(config)
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    monkeypatch.setattr(gpt, "GPT", TwoTables)
    model = randomized(SMALL)
    gpt.save(tmp_path / "gpt.pt", model, TOKENIZER)
    assert same(gpt.load(tmp_path / "gpt.pt")[0].state_dict(), model.state_dict())


def test_a_hostile_file_runs_nothing(tmp_path):
    torch.save({"config": Hostile(tmp_path / "hacked")}, tmp_path / "new.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "hacked")))
    for name in ("new.pt", "old.pt"):
        with pytest.raises(ValueError, match="is not a whole model"):
            gpt.load(tmp_path / name)
    assert not (tmp_path / "hacked").exists()


def test_the_picture_shows_both_losses_and_three_yardsticks(tmp_path):
    pytest.importorskip("matplotlib")
    history = {"training": [4.0, 3.0, 2.0], "held_out": [[3, 2.5]]}
    figure = gpt.draw(tmp_path / "loss.PNG", history, {"even": 4.17, "letters": 3.4, "pairs": 2.5})
    assert len(figure.axes[0].lines) == 5 and (tmp_path / "loss.PNG").read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_drawn_at_the_start_and_at_each_look(in_folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(gpt, "draw", lambda path, history, marks: drawn.append(len(history["held_out"])))
    gpt.main([*SMALL_FLAGS, "--steps", "4", "--eval-every", "2", "--plot", "loss.png"])
    assert drawn == [0, 1, 2]


# ---------------------------------------------------------------- 10: the command line


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a short text."""
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(TEXT[:20_000], encoding="utf-8")
    return tmp_path


def python(*arguments, folder, **how):
    """Start `python` on these arguments in a folder, as a user would."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=folder, **{**pipes, **how})


def test_the_command_line_trains_and_writes(tmp_path):
    run = python(HERE / "gpt.py", *SMALL_FLAGS, "--steps", "6", "--eval-every", "3", folder=tmp_path)
    out, err = run.communicate()
    assert run.returncode == 0 and err == ""  # no warning either
    assert "1,266,726 characters, 65 different" in out and "1,535 of the 4,225" in out
    assert out.count("held-out loss") == 3  # two looks, and the line that names the best
    assert out.count("\n    | ") >= 2  # with what the model writes by then
    assert len(out.split("It writes:\n\n")[1]) == 40 + 1  # the scene and a line end
    assert sorted(os.listdir(tmp_path)) == ["gpt.pt", "gpt.resume.pt"]


def test_a_run_learns_from_nine_tenths_of_the_text_and_is_judged_by_the_last(in_folder, monkeypatch):
    train, parts = gpt.train, []

    def note(model, training, held_out, state):
        parts.extend([training, held_out])
        return train(model, training, held_out, state)

    monkeypatch.setattr(gpt, "train", note)
    gpt.main([*SMALL_FLAGS, "--steps", "2"])
    tokens = gpt.CharTokenizer.from_text(TEXT[:20_000]).encode(TEXT[:20_000])
    assert torch.equal(parts[0], tokens[:18_000]) and torch.equal(parts[1], tokens[18_000:])


def test_a_flag_beats_the_size():
    config, start = gpt.settings_for({"size": "medium", "steps": 7}, "unfinished")
    assert (config.n_layer, config.dropout, config.steps, start) == (6, 0.2, 7, None)


def test_help_tells_the_defaults_of_writing():
    length, temperature, top_k = gpt.generate.__defaults__[1:4]
    told = [gpt.FLAGS[name][1] for name in ("length", "temperature", "top_k")]
    assert all(f"(default: {value})" in text for value, text in zip((length, temperature, top_k), told))


def test_only_text_goes_to_standard_output_when_writing(in_folder, capsys):
    gpt.main([*SMALL_FLAGS, "--steps", "2"])
    capsys.readouterr()
    gpt.main(["--generate", "--length", "50", "--prompt", TEXT[:30]])
    out, err = capsys.readouterr()
    assert len(out) == 80 and out.startswith(TEXT[:30]) and "last 16 characters" in err


def test_the_same_seed_writes_the_same_text(in_folder, capsys):
    gpt.main([*SMALL_FLAGS, "--steps", "2"])
    texts = []
    for seed in ("5", "5", "6"):
        capsys.readouterr()
        gpt.main(["--generate", "--length", "50", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 50


def test_a_prompt_can_come_from_standard_input(in_folder, capsys, monkeypatch):
    gpt.main([*SMALL_FLAGS, "--steps", "2"])
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffHAMLET:\r\n"))  # as Windows may write it
    gpt.main(["--generate", "--length", "50", "--prompt", "-"])
    out, err = capsys.readouterr()
    assert out.startswith("HAMLET:\n") and len(out) == 58 and err == ""


def test_fine_tuning_starts_from_the_trained_model(in_folder):
    gpt.main([*SMALL_FLAGS, "--steps", "200", "--out", "first.pt"])
    Path("new.txt").write_text(TEXT[5000:12_000], encoding="utf-8")
    gpt.main("--init-from first.pt --data new.txt --out new.pt --steps 20 --length 5")
    tuned, first = (torch.load(name, weights_only=True) for name in ("new.pt", "first.pt"))
    assert tuned["characters"] == first["characters"]
    assert tuned["history"]["training"][0] < 3.2  # from nothing, it would be above 4


def test_fine_tuning_is_gentler_by_default_and_can_be_done_again(tmp_path):
    model, found = gpt.GPT(gpt.Config()), tmp_path / "gpt.pt"
    for _ in range(2):
        gpt.save(found, model, TOKENIZER)
        model.config, _ = gpt.settings_for({"init_from": found}, "unfinished")
        assert (model.config.lr, model.config.steps, model.config.eval_every) == (5e-4, 313, 63)


# Each of these gets one line on standard error that contains the words, status 2, and changes no file.
BAD_INPUT = """
--data nowhere.txt                                  | nowhere.txt
--data folder                                       | folder
--data empty.txt                                    | 0 characters
--data binary.dat                                   | not UTF-8
--data short.txt                                    | needs 1281
--data input.txt --block-size 5000                  | needs 50001
--n-embd 130 --n-head 4                             | shared out
--n-layer 0                                         | --n-layer
--n-head -1                                         | --n-head
--n-embd 0                                          | --n-embd
--block-size 0                                      | --block-size
--batch-size 0                                      | --batch-size
--steps 0                                           | --steps
--steps many                                        | many
--eval-every 0                                      | --eval-every
--lr -0.1                                           | --lr
--lr nan                                            | --lr
--warmup 50 --steps 20                              | --warmup
--dropout 1                                         | --dropout
--beta2 1.5                                         | --beta2
--weight-decay -1                                   | --weight-decay
--grad-clip -1                                      | --grad-clip
--seed -1                                           | --seed
--size huge                                         | tiny, small, medium, gpt2
--device gpu                                        | auto, cpu, cuda
--device cuda:99                                    | cuda:99
--device cpu --dtype float16                        | float16
--dtype int8                                        | --dtype
--out nowhere/gpt.pt --plot loss.png                | no directory nowhere
--plot nowhere/loss.png                             | no directory nowhere
--out folder                                        | folder
--out .                                             | directory
--out ''                                            | directory
--out input.txt                                     | overwrite
--out device                                        | a device
--plot device                                       | a device
--plot input.txt                                    | overwrite
--plot a.png --out a.png                            | overwrite
--plot small.pt --init-from small.pt                | overwrite
--data ''                                           | directory
--frobnicate                                        | --frobnicate
--size                                              | --size
--length 0                                          | --length
--prompt ß                                          | 'ß'
--top-k 100                                         | --top-k
--resume                                            | no run to resume
--resume --out small.pt --lr 0.1                    | --lr
--resume --out small.pt --data other.txt            | not the text
--resume --out small.pt --steps 1                   | --steps
--resume --out stopped.pt --steps 1                 | give more
--resume --out cut.pt                               | cut.resume.pt
--resume --out odd.pt                               | wrong shapes of the optimizer
--resume --out done.pt                              | not a run to resume
--resume --out lost.pt                              | there is no lost.pt
--generate                                          | train a model first
--generate --out cut.pt                             | cut.pt
--generate --out input.txt                          | input.txt
--generate --out small.pt --prompt ß                | 'ß'
--generate --out small.pt --prompt don't            | No closing quotation
--generate --out small.pt --length 0                | --length
--generate --out small.pt --length -5               | --length
--generate --out small.pt --temperature -1          | --temperature
--generate --out small.pt --temperature nan         | --temperature
--generate --out small.pt --top-k 1000              | --top-k
--generate --out small.pt --top-k -1                | --top-k
--generate --out small.pt --steps 5                 | --steps
--init-from small.pt --n-layer 3                    | --n-layer
--init-from small.pt --no-head-start                | --head-start
--init-from small.pt --data chinese.txt             | '中' (1500 times)
--init-from nowhere.pt                              | nowhere.pt
--plot loss.xyz --n-embd 16 --steps 2               | .png or matplotlib
"""


@pytest.fixture(scope="module")
def folder_of_traps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traps")
    (folder / "folder").mkdir()
    (folder / "input.txt").write_text(TEXT[:20_000], encoding="utf-8")
    (folder / "other.txt").write_text(TEXT[1000:9000], encoding="utf-8")
    (folder / "chinese.txt").write_text("中" * 1500, encoding="utf-8")
    (folder / "empty.txt").write_text("")
    (folder / "binary.dat").write_bytes(bytes(range(256)) * 50)
    (folder / "short.txt").write_text(TEXT[:1280], encoding="utf-8")
    where = ["--data", str(folder / "input.txt"), "--out", str(folder / "small.pt")]
    gpt.main([*SMALL_FLAGS, *where, "--steps", "2"])
    for name in ("pt", "resume.pt"):
        (folder / f"cut.{name}").write_bytes((folder / f"small.{name}").read_bytes()[:5000])
    (folder / "device").symlink_to(os.devnull)
    stopped = torch.load(folder / "small.resume.pt", weights_only=True)
    torch.save(stopped | {"step": 1}, folder / "stopped.resume.pt")
    (folder / "stopped.pt").write_bytes((folder / "small.pt").read_bytes())
    (folder / "done.resume.pt").write_bytes((folder / "small.pt").read_bytes())
    (folder / "lost.resume.pt").write_bytes((folder / "small.resume.pt").read_bytes())
    state = torch.load(folder / "small.resume.pt", weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, folder / "odd.resume.pt")
    return folder


@pytest.mark.parametrize("line", BAD_INPUT.strip().splitlines())
def test_bad_input_gets_one_line_and_changes_nothing(line, folder_of_traps, monkeypatch, capsys):
    def contents():
        return {path: path.read_bytes() for path in folder_of_traps.rglob("*") if path.is_file()}

    command, words = (half.strip() for half in line.split("|"))
    monkeypatch.chdir(folder_of_traps)
    before = contents()
    assert gpt.main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("gpt.py: ") and err.count("\n") == 1
    assert any(word in err for word in words.split(" or "))
    assert contents() == before


def test_without_matplotlib_a_picture_is_refused_before_anything_is_written(in_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert gpt.main([*SMALL_FLAGS, "--steps", "2", "--plot", "loss.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err and os.listdir() == ["input.txt"]


def test_processes_that_have_no_gpu_of_their_own_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes need as many GPUs: here are 2"):
        gpt.pick_device("cuda")


def test_a_batch_that_the_processes_cannot_share_is_refused(in_folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert gpt.main([*SMALL_FLAGS, "--steps", "2"]) == 2
    assert "among 3 processes" in capsys.readouterr().err and os.listdir() == ["input.txt"]


class Pairs(gpt.CharTokenizer):
    """A tokenizer of another kind: two characters make a token."""

    @classmethod
    def from_text(cls, text):
        return cls(sorted({text[i : i + 2] for i in range(0, len(text), 2)} | set(text)))

    def encode(self, text):
        return torch.tensor(
            [self.token_of[text[i : i + 2]] for i in range(0, len(text), 2)], dtype=torch.int32
        )


def test_another_tokenizer_and_another_optimizer_can_take_their_place(in_folder, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "CharTokenizer", Pairs)
    monkeypatch.setattr(
        gpt, "make_optimizer", lambda model, config: torch.optim.SGD(model.parameters(), config.lr)
    )
    assert gpt.main([*SMALL_FLAGS, "--steps", "3"]) is None
    assert gpt.main(["--resume", "--steps", "6"]) is None
    assert "The last 1,000 are held out" in capsys.readouterr().out  # of 10,000 tokens
    assert gpt.main("--generate --prompt HAMLET: --length 20") is None
    assert len(capsys.readouterr().out) > 7 + 20


@pytest.mark.parametrize("mistake", [ValueError("a wrong shape"), RuntimeError("a wrong shape")])
def test_a_mistake_in_the_program_itself_is_not_taken_for_bad_input(mistake, in_folder, monkeypatch):
    def experiment(*arguments):
        raise mistake

    monkeypatch.setattr(gpt, "learning_rate", experiment)
    with pytest.raises(type(mistake), match="a wrong shape"):  # with all that Python says about it
        gpt.main([*SMALL_FLAGS, "--steps", "2", "--compile"])


def test_every_older_model_is_kept(in_folder, capsys):
    models = []
    for seed in ("1", "2", "3"):
        gpt.main([*SMALL_FLAGS, "--steps", "2", "--seed", seed])
        models.append(Path("gpt.pt").read_bytes())
    assert [Path(f"gpt.pt{end}").read_bytes() for end in (".old", ".old2", "")] == models
    assert models[0] != models[1] and "gpt.pt.old2" in capsys.readouterr().out


def test_until_its_first_look_a_new_run_has_no_model(in_folder, monkeypatch, capsys):
    gpt.main([*SMALL_FLAGS, "--steps", "2"])
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "noting_signals", lambda: contextlib.nullcontext([signal.SIGTERM]))
        gpt.main([*SMALL_FLAGS, "--steps", "9"])  # stopped at once
    assert gpt.main("--generate") == 2 and "no file gpt.pt" in capsys.readouterr().err
    assert gpt.main("--resume") is None and gpt.main("--generate") is None


def test_starting_anew_says_that_an_unfinished_run_was_there(in_folder, capsys):
    gpt.main([*SMALL_FLAGS, "--steps", "3"])
    state = torch.load("gpt.resume.pt", weights_only=True)
    # As if it had been stopped at the third of nine steps.
    torch.save(state | {"config": state["config"] | {"steps": 9}}, "gpt.resume.pt")
    capsys.readouterr()
    gpt.main([*SMALL_FLAGS, "--steps", "3"])
    assert "step 3 of 9" in capsys.readouterr().out and Path("gpt.resume.pt.old").exists()
    Path("gpt.resume.pt").write_bytes(Path("gpt.pt").read_bytes())  # a model, and no run
    assert gpt.main([*SMALL_FLAGS, "--steps", "3"]) is None


def test_a_yardstick_is_named_once_when_the_mean_of_twenty_losses_passes_it(capsys):
    ahead, losses = {"guessing evenly": 4.17, "letter pairs": 2.53}, []
    for step in range(1, 23):
        losses.append(4.0)
        report = gpt.Report(step, losses[-1], held_out=None, seconds=float(step), state=None)
        gpt.tell(report, replace(SMALL, steps=50), losses, 0, ahead)
    told = capsys.readouterr().out
    assert told.startswith("step 20 of 50") and told.count("better than guessing evenly") == 1
    assert "letter pairs" not in told and list(ahead) == ["letter pairs"]


def test_a_resumed_run_does_not_repeat_the_yardsticks(in_folder, capsys):
    for flags in ([*SMALL_FLAGS, "--lr", "0.01"], ["--resume"]):
        gpt.main([*flags, "--steps", "100" if "--lr" in flags else "130"])
    assert capsys.readouterr().out.count("better than guessing evenly") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_second_acts_as_ever(number):
    usual = []
    before = signal.signal(number, lambda *arguments: usual.append(number))
    with gpt.noting_signals() as noted:
        signal.raise_signal(number)
        signal.raise_signal(number)
    signal.raise_signal(number)
    signal.signal(number, before)
    assert noted == [number] and usual == [number, number]


RUN = [*SMALL_FLAGS, "--steps", "300", "--eval-every", "60", "--dropout", "0.1", "--seed", "5"]


def outcome(folder):
    """All that a run leaves behind, in a form that can be compared."""
    files = [torch.load(folder / name, weights_only=True) for name in ("gpt.resume.pt", "gpt.pt")]
    weights = [{name: weight.tolist() for name, weight in found["model"].items()} for found in files]
    return files[0]["step"], files[0]["history"], weights


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A finished run: its folder's outcome and the scene that it wrote."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "input.txt").write_text(TEXT[:20_000], encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        gpt.main([*RUN, "--data", str(folder / "input.txt"), "--out", str(folder / "gpt.pt")])
    return outcome(folder), out.getvalue().split("It writes:")[1]


class Cut(BaseException):
    """The power fails."""


@pytest.mark.parametrize("writes", [1, 2, 3])  # before the first look, between its two files, after both
def test_a_run_cut_off_between_two_files_ends_the_same(writes, in_folder, uninterrupted, monkeypatch):
    write, written_files = gpt.write_whole, []

    def write_until_cut(path, content):
        if len(written_files) == writes:
            raise Cut
        written_files.append(path)
        write(path, content)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(gpt, "write_whole", write_until_cut)
        gpt.main(RUN)
    gpt.main(["--resume", "--length", "40"])
    assert outcome(in_folder) == uninterrupted[0]


def test_a_finished_run_goes_on_when_given_more_steps(in_folder):
    gpt.main([*SMALL_FLAGS, "--steps", "3"])
    assert gpt.main(["--resume", "--steps", "6"]) is None
    state = torch.load("gpt.resume.pt", weights_only=True)
    assert state["step"] == 6 and len(state["history"]["training"]) == 6


def test_a_new_number_of_steps_is_not_forgotten(in_folder, monkeypatch):
    gpt.main([*SMALL_FLAGS, "--steps", "3"])

    def train(*arguments):
        raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(gpt, "train", train)
        gpt.main(["--resume", "--steps", "6"])
    assert gpt.main("--resume") is None
    assert torch.load("gpt.resume.pt", weights_only=True)["step"] == 6


def test_the_best_model_is_kept_and_not_the_last(in_folder, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 2.5])
    monkeypatch.setattr(gpt, "evaluate", lambda model, tokens: next(losses))
    gpt.main([*SMALL_FLAGS, "--steps", "30", "--eval-every", "10"])
    best, last = (torch.load(name, weights_only=True) for name in ("gpt.pt", "gpt.resume.pt"))
    assert set(best) == {"config", "characters", "model", "history"}
    assert best["history"]["held_out"] == [[10, 3.0], [20, 2.0]] and len(best["history"]["training"]) == 20
    assert last["history"]["held_out"][-1] == [30, 2.5] and not same(best["model"], last["model"])
    scene = capsys.readouterr().out.split("It writes:\n\n")[1]  # by the best, too
    assert scene.strip() == "".join(gpt.generate(*gpt.load("gpt.pt"), length=40)).strip()


def test_a_run_that_is_stopped_tells_the_command_that_goes_on(in_folder, monkeypatch, capsys):
    at_once = contextlib.nullcontext([signal.SIGTERM])
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "noting_signals", lambda: at_once)
        assert gpt.main([*SMALL_FLAGS, "--out", "my model.pt", "--device", "cpu"]) == 143
        command = re.search(r"To go on: python gpt.py (.*)", capsys.readouterr().out)[1]
        assert gpt.main(command + " --steps 2") is None  # at the last step there is nothing to go on with


def test_a_run_whose_loss_explodes_says_so_and_keeps_its_last_good_model(in_folder, monkeypatch, capsys):
    rate = gpt.learning_rate
    monkeypatch.setattr(gpt, "learning_rate", lambda step, config: rate(step, config) if step < 12 else 1e38)
    assert gpt.main([*SMALL_FLAGS, "--steps", "20", "--eval-every", "10"]) == 1
    err = capsys.readouterr().err
    assert "no longer a finite number at step" in err and "--lr" in err and err.count("\n") == 1
    gpt.load("gpt.pt")  # raises unless it is whole and every number finite


@pytest.mark.parametrize(
    "error, flags, advice",
    [
        (MemoryError(), [], "lower --batch-size"),
        (RuntimeError("CUDA out of memory. Tried to allocate 8 GiB"), [], "lower --batch-size"),
        (torch._dynamo.exc.TorchDynamoException("No C++ compiler"), ["--compile"], "--no-compile"),
        (RuntimeError("gloo: connection closed by peer"), [], "start all again with --resume"),
    ],
)
def test_a_failure_that_a_flag_can_mend_names_the_flag(error, flags, advice, in_folder, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(gpt, "get_batch", fail)
    assert gpt.main([*SMALL_FLAGS, *flags, "--steps", "2"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("gpt.py: ") and advice in err and err.count("\n") == 1


def test_importing_the_file_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import gpt; print(gpt.Config().n_layer)"
    run = python("-c", code, folder=tmp_path)
    assert run.communicate() == ("2\n", "") and os.listdir(tmp_path) == []


# ---------------------------------------------------------------- programs stopped, killed and started again


# To import PyTorch takes seconds. So these processes are forked from one that has done so. Such a process
# prints nowhere that we could read; it is given two *named pipes* instead, files that one writes while the
# other reads.

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="not all systems have such processes")


def enter(folder, argv, environment):
    """What a process started by `Program` does."""
    os.chdir(folder)
    os.environ.update(environment)
    if "RANK" in environment:  # two at a time must not get in each other's way
        torch.set_num_threads(1)
    sys.stdout, sys.stderr = (open(f"{folder}.{name}", "w") for name in ("out", "err"))
    sys.exit(gpt.main(argv))


@cache
def forkserver():
    """A process that has imported PyTorch and this file already, and from which others are forked at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # PyTorch's optimizers import that as well
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        multiprocessing.forkserver.ensure_running()
    return context


class Program:
    """gpt.py started in a process of its own, which can be watched and killed."""

    def __init__(self, *argv, folder, **environment):
        for name in ("out", "err"):
            os.mkfifo(f"{folder}.{name}")
        self.process = forkserver().Process(target=enter, args=(str(folder), list(argv), environment))
        self.process.start()
        self.out, self.err = (open(f"{folder}.{name}", encoding="utf-8") for name in ("out", "err"))
        for name in ("out", "err"):
            os.remove(f"{folder}.{name}")

    def wait_for(self, word):
        """Read on until a line has this word."""
        while word not in self.out.readline():
            assert self.process.is_alive(), self.err.read()

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):  # on a fast machine it may have ended already
            os.kill(self.process.pid, number)

    def end(self):
        """Wait until it ends -> exit status (-9 if it was killed), and what is left of output and errors."""
        out, err = "" if self.out.closed else self.out.read(), self.err.read()
        self.process.join()
        return self.process.exitcode, out, err


@only_linux
def test_a_run_killed_without_warning_and_resumed_ends_the_same(in_folder, uninterrupted):
    dice, flags, kills = random.Random(1), RUN, 0
    for _ in range(3):
        run = Program(*flags, folder=in_folder)
        run.wait_for("step")
        time.sleep(dice.uniform(0, 0.2))
        run.signal(signal.SIGKILL)
        kills += run.end()[0] == -signal.SIGKILL
        flags = ["--resume"]
    status, out, err = Program("--resume", "--length", "40", folder=in_folder).end()
    assert kills >= 1 and (status, err) == (0, "")
    assert (outcome(in_folder), out.split("It writes:")[1]) == uninterrupted


@only_linux
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(in_folder, uninterrupted, number, code):
    run = Program(*RUN, folder=in_folder)
    run.wait_for("step")
    run.signal(number)
    status, out, err = run.end()
    assert status == code and "python gpt.py --resume" in out and err == ""
    assert 0 < torch.load("gpt.resume.pt", weights_only=True)["step"] < 300
    assert gpt.main(["--resume", "--length", "40"]) is None
    assert outcome(in_folder) == uninterrupted[0]


@only_linux
def test_a_closed_pipe_ends_writing_quietly(in_folder):
    gpt.main([*SMALL_FLAGS, "--steps", "2"])
    run = Program("--generate", "--length", "200000", folder=in_folder)
    run.out.read(10)
    run.out.close()
    assert run.end() == (0, "", "")


@only_linux
def test_a_closed_pipe_ends_training_with_all_of_it_saved(in_folder, uninterrupted):
    run = Program(*RUN, "--device", "cpu", folder=in_folder)
    run.wait_for("step")
    run.out.close()
    status, _, err = run.end()
    assert status == 1 and "python gpt.py --resume --device cpu" in err and err.count("\n") == 1
    assert torch.load("gpt.resume.pt", weights_only=True)["step"] >= 60  # the look that could not be told
    gpt.main(["--resume", "--length", "40"])
    assert outcome(in_folder) == uninterrupted[0]


# ---------------------------------------------------------------- notebooks and several processes


def run_notebook(cells, folder):
    """Run the cells in a real kernel -> what each printed, and of a picture its kind."""
    pytest.importorskip("matplotlib")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3", resources=where).execute()
    shown = [[out.get("text") or "".join(out.get("data", {})) for out in cell.outputs] for cell in book.cells]
    return ["".join(parts) for parts in shown]


def test_the_file_runs_in_one_notebook_cell_and_cell_by_cell(tmp_path, web_server):
    source = (HERE / "gpt.py").read_text(encoding="utf-8")
    # The defaults would take minutes: a smaller model, and the text from a server of our own.
    source = source.replace('if started else ""', f"if started else {SMALL_FLAGS + ['--steps', '4']}")
    source = source.replace(gpt.TEXT_URL, web_server).replace(gpt.TEXT_SHA256, INPUT_SHA256)
    markers = re.split(r"(?m)^(?=# %%)", source)
    assert len(markers) == 12  # eleven sections, and what stands before them
    more = [
        "print(len(list(generate(model, tokenizer, length=7))))",
        'main("--steps 0")',
        'main("--steps 2 --n-embd 8 --plot loss.png")',
    ]
    told = run_notebook([source, *more, *markers], tmp_path)
    assert told[0].startswith("There is no input.txt here: fetching Tiny Shakespeare from " + web_server)
    assert "held-out loss" in told[0] and told[1] == "7\n" and "held-out loss" in told[-1]
    assert told[2].startswith("gpt.py: --steps must be") and "held-out" in told[3] and "image/png" in told[3]
    assert not any("SystemExit" in text or "Warning" in text for text in told)
    assert (tmp_path / "input.txt").read_text(encoding="utf-8") == TEXT


def test_of_several_processes_only_the_first_saves(tmp_path, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        gpt.save(tmp_path / f"{rank}.pt", gpt.GPT(SMALL), TOKENIZER)
    assert os.listdir(tmp_path) == ["0.pt"]


def test_each_process_has_dice_of_its_own(monkeypatch):
    thrown = []
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model: model)  # nobody to talk with
    monkeypatch.setattr(gpt, "sum_over_processes", lambda number, device: number)
    monkeypatch.setattr(torch, "manual_seed", thrown.append)
    for rank in (0, 1):
        monkeypatch.setattr(gpt, "place_among_processes", lambda: (rank, 2))
        trained(replace(SMALL, steps=5))
    assert len(set(thrown)) == len(thrown) == 10


@only_linux
def test_two_processes_do_what_one_does(in_folder):
    flags = [*SMALL_FLAGS, "--steps", "50", "--eval-every", "25"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [*torchrun, HERE / "gpt.py", "--device", "cpu", *flags, "--out", "two.pt"]
    out, err = python(*command, folder=in_folder, env=os.environ | {"OMP_NUM_THREADS": "1"}).communicate()
    gpt.main([*flags, "--out", "one.pt"])
    one, two = (torch.load(f"{name}.resume.pt", weights_only=True)["history"] for name in ("one", "two"))
    assert two["training"] == pytest.approx(one["training"], abs=1e-4)
    assert dict(two["held_out"]) == pytest.approx(dict(one["held_out"]), abs=1e-4)
    scene = out.split("It writes:\n\n")[1]
    assert len(scene) == 40 + 1  # only the first process writes it: 40 characters and a line end
    assert "gpt.py" not in err  # no line of trouble


@only_linux
def test_when_one_of_two_processes_dies_the_other_says_so_and_both_can_go_on(tmp_path):
    def start_two(folder, *flags):
        folder.mkdir(exist_ok=True)
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        common = ["--device", "cpu", *flags]
        return [Program(*common, folder=folder, RANK=r, LOCAL_RANK=r, **place) for r in ("0", "1")]

    Path(tmp_path / "text").write_text(TEXT[:20_000], encoding="utf-8")
    run = [*RUN, "--data", str(tmp_path / "text"), "--steps", "150"]
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    assert [process.end()[0] for process in start_two(undisturbed, *run)] == [0, 0]
    first, second = start_two(disturbed, *run)
    first.wait_for("step")
    second.signal(signal.SIGKILL)
    status, out, err = first.end()
    assert status == 1 and "another process of this run has ended" in err.splitlines()[-1]
    assert [process.end()[0] for process in start_two(disturbed, "--resume")] == [0, 0]
    assert outcome(undisturbed) == outcome(disturbed)
