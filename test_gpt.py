"""What gpt.py promises, in the order of the file, after three promises that people come for.

Each name is a promise, each body its proof. A few words on pytest, which runs them: an argument of a test is
something made ready for it, by the function of that name marked as a fixture (`folder`) or by pytest itself:
`tmp_path` is an empty folder, `capsys` what was printed, and what `monkeypatch` changes is put back at the
end. `parametrize` runs a test once for each row of a table. A *hook* is a function that PyTorch calls each
time a part of a model has computed something: with the part, its arguments and its result.
"""

import codecs
import contextlib
import doctest
import io
import math
import multiprocessing.forkserver
import os
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
from unittest.mock import Mock

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
TRAINING, VALIDATION = gpt.split(TOKENS)
V = TOKENIZER.vocab_size

# A model of eight thousand parameters: for promises that do not depend on size, it is quick.
SMALL = gpt.Config(
    n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, steps=20, eval_every=10, vocab_size=V
)
FLAGS = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --length 40".split()


def trained(config, model=None, fast=None, validation=VALIDATION[:2000]):
    """A model after a run of `train`, and what the run has yielded. fast: another way to compute with it."""
    model = model or gpt.GPT(config)
    optimizer = gpt.make_optimizer(model, config)
    return model, list(gpt.train(model if fast is None else fast, optimizer, config, TRAINING, validation))


def written(model, prompt="", length=50, **settings):
    """What the model writes after the prompt, as one string."""
    return "".join(gpt.generate(model, TOKENIZER, prompt, length=length, **settings))


def same(a, b):
    """Two dicts of tensors, equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def randomized(config, seed=0):
    """A model whose biases and scales are random too, so that a test would notice a missing one."""
    model, rng = gpt.GPT(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.1)
    return model


# ---------------------------------------------------------------- the three promises that people come for


PARAMETERS = {"tiny": 421_504, "small": 1_396_608, "medium": 10_770_816, "gpt2": 85_892_352}


@pytest.mark.parametrize("size", PARAMETERS)
def test_each_size_has_its_shapes_on_any_device(size):
    # The meta device has shapes but no numbers, and refuses to compute with tensors of another device.
    config = gpt.Config(**gpt.SIZES[size])
    model, (B, T, C), shapes = gpt.GPT(config).to("meta"), (2, 8, config.n_embd), {}
    for name, part in model.named_modules():
        part.register_forward_hook(lambda part, _, output, name=name: shapes.update({name: output.shape}))
    inputs, targets = gpt.get_batch(TOKENS.to("meta"), B, T)
    F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    assert shapes["wte"] == shapes["ln_f"] == (B, T, C) and shapes[""] == (B, T, config.vocab_size)
    for layer in range(config.n_layer):
        assert shapes[f"h.{layer}.attn.c_attn"] == (B, T, 3 * C)
        assert shapes[f"h.{layer}.attn"] == shapes[f"h.{layer}.mlp"] == shapes[f"h.{layer}"] == (B, T, C)
    assert sum(parameter.grad.numel() for parameter in model.parameters()) == PARAMETERS[size]


def test_the_loss_falls_from_uniform_to_below_bigram():
    config = gpt.Config(block_size=64, steps=150, eval_every=150, vocab_size=V)
    model = gpt.GPT(config)
    gpt.head_start(model)
    baselines = gpt.baselines(TRAINING, VALIDATION[:20_000], V)
    _, results = trained(config, model, validation=VALIDATION[:20_000])
    assert abs(results[0][1] - baselines["uniform"]) < 0.8  # an untrained model knows next to nothing
    assert results[-1][2] < baselines["bigram"] - 0.17


def test_one_seed_gives_one_result_to_the_bit():
    config = replace(SMALL, dropout=0.1)
    (model, results), (again, results_again) = trained(config), trained(config)
    other_seed = replace(config, seed=2)
    other, _ = trained(other_seed, gpt.GPT(config))
    assert results == results_again and same(model.state_dict(), again.state_dict())
    assert written(model, "HAMLET:") == written(again, "HAMLET:") != written(model, "HAMLET:", seed=5)
    assert not same(model.state_dict(), other.state_dict())
    assert not same(gpt.GPT(config).state_dict(), gpt.GPT(other_seed).state_dict())


# ---------------------------------------------------------------- the examples in the comments


def test_every_example_in_the_file_gives_what_stands_below_it(monkeypatch):
    monkeypatch.chdir(HERE)
    source = Path("gpt.py").read_text(encoding="utf-8")
    comments = "\n".join(line[2:] if line.startswith("# ") else "" for line in source.splitlines())
    examples = doctest.DocTestParser().get_doctest(comments, vars(gpt).copy(), "comments", "gpt.py", 0)
    runner = doctest.DocTestRunner()
    for found in [examples, *doctest.DocTestFinder().find(gpt)]:
        runner.run(found)
    assert runner.tries >= 20 and runner.failures == 0


# ---------------------------------------------------------------- 0 and 1: settings, text to numbers


def test_every_setting_has_a_flag_whose_default_is_told_by_help(capsys):
    with pytest.raises(SystemExit):
        gpt.main(["--help"])
    options = " ".join(capsys.readouterr().out.split()).split("options:")[1]
    for row in fields(gpt.Config)[:-1]:  # all but vocab_size, which is counted
        flag = "--" + row.name.replace("_", "-")
        assert re.search(rf" {flag}\b.*?default: (.*?)\)", options)[1] == str(row.default), flag


def test_text_becomes_tokens_and_comes_back_unchanged():
    assert TOKENIZER.decode(TOKENS.tolist()) == TEXT and TOKENIZER.encode("").tolist() == []
    strange = gpt.CharTokenizer.from_text("日本語 🎭 é\n")
    assert strange.decode(strange.encode("🎭é日")) == "🎭é日"


def test_the_baselines_are_what_plain_counting_gives():
    tokens, rest, total = TOKENS[:3000].tolist(), TOKENS[3000:4000].tolist(), 0
    pairs = Counter(zip(tokens, tokens[1:]))
    for a, b in zip(rest, rest[1:]):
        total -= math.log((pairs[a, b] + 1) / (tokens[:-1].count(a) + V))
    found = gpt.baselines(TOKENS[:3000], TOKENS[3000:4000], V)
    assert found["bigram"] == pytest.approx(total / 999, rel=1e-4)
    assert found["uniform"] == math.log(V)


# ---------------------------------------------------------------- 2 to 5: the model


def test_attention_by_hand_is_what_pytorch_computes():
    q, k, v = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1))
    theirs = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    assert torch.allclose(gpt.attention_by_hand(q, k, v), theirs, atol=1e-5)


def test_a_token_never_sees_the_future_and_always_the_past():
    model, tokens = randomized(SMALL), TOKENS[None, :16].long()
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % V
    difference = (model(tokens) - model(changed))[0].abs().amax(-1)
    assert not difference[:9].any() and (difference[9:] > 1e-6).all()


def test_dropout_zeroes_its_share_of_three_outputs_in_training_and_none_otherwise():
    model, seen = randomized(replace(SMALL, dropout=0.5)), {}
    block = model.h[0]
    block.register_forward_pre_hook(lambda part, arguments: seen.update(embeddings=arguments[0]))
    block.attn.register_forward_hook(lambda part, arguments, output: seen.update(attention=output))
    block.mlp.register_forward_hook(lambda part, arguments, output: seen.update(mlp=output))
    for mode, share in [(True, 0.5), (False, 0)]:
        model.train(mode)(TOKENS[:480].view(30, 16))
        for output in seen.values():
            assert (output == 0).float().mean().item() == pytest.approx(share, abs=0.05)
    assert len(seen) == 3


OURS = ["ln_1.", "attn.c_attn.", "attn.c_proj.", "ln_2.", "mlp.c_fc.", "mlp.c_proj."]
THEIRS = ["norm1.", "self_attn.in_proj_", "self_attn.out_proj.", "norm2.", "linear1.", "linear2."]


def test_the_model_is_gpt2_as_pytorch_itself_would_build_it():
    model, tokens = randomized(replace(SMALL, n_layer=3, n_head=4, n_embd=32)), TOKENS[:48].view(3, 16)
    weights, ahead = model.state_dict(), nn.Transformer.generate_square_subsequent_mask(16)
    x = weights["wte.weight"][tokens] + weights["wpe.weight"]
    for layer in range(3):
        block = nn.TransformerEncoderLayer(32, 4, 128, 0.0, F.gelu, 1e-5, batch_first=True, norm_first=True)
        for ours, theirs in zip(OURS, THEIRS):
            for kind in ("weight", "bias"):
                block.state_dict()[theirs + kind].copy_(weights[f"h.{layer}.{ours}{kind}"])
        x = block.eval()(x, src_mask=ahead, is_causal=True)
    x = F.layer_norm(x, (32,), weights["ln_f.weight"], weights["ln_f.bias"])
    assert torch.allclose(model(tokens), x @ weights["wte.weight"].T, atol=1e-5)


def test_weights_start_at_the_size_that_suits_the_width():
    weights = gpt.GPT(gpt.Config()).state_dict()
    for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
        assert abs(weights[name].std() - 128**-0.5) < 0.002
    assert abs(weights["h.0.mlp.c_proj.weight"].std() - 128**-0.5 / 2) < 0.002  # sqrt(2 * n_layer) is 2


# ---------------------------------------------------------------- 6: batches


def test_targets_are_the_inputs_moved_on_by_one():
    inputs, targets = gpt.get_batch(TOKENS, 8, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert TOKENIZER.decode([*inputs[3].tolist(), targets[3, -1].item()]) in TEXT


def test_every_place_of_the_text_can_be_drawn_and_none_beyond():
    draws = [gpt.get_batch(torch.arange(12), 4, 8)[0] for _ in range(50)]
    assert set(torch.cat(draws)[:, 0].tolist()) == {0, 1, 2, 3}  # 3 + 8 + 1 tokens end at the 12th


# ---------------------------------------------------------------- 7: training


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine():
    config = gpt.Config(steps=1000, warmup=0.1, lr=2e-3, final_lr=0.1)
    rate = [gpt.learning_rate(step, config) for step in range(1000)]
    assert math.isclose(rate[0], 2e-5) and math.isclose(rate[49], 1e-3) and math.isclose(max(rate), 2e-3)
    assert rate.index(max(rate)) in (99, 100) and math.isclose(rate[549], 1.1e-3, rel_tol=0.01)
    assert math.isclose(rate[-1], 2e-4) and rate[100:] == sorted(rate[100:], reverse=True)


def test_the_optimizer_follows_the_schedule():
    model = gpt.GPT(SMALL)
    optimizer = gpt.make_optimizer(model, SMALL)
    for step, _, _ in gpt.train(model, optimizer, SMALL, TRAINING, VALIDATION[:100]):
        for group in optimizer.param_groups:
            assert group["lr"] == gpt.learning_rate(step - 1, SMALL)


def test_decay_is_for_matrices_only():
    model, config = randomized(SMALL), replace(SMALL, lr=0.1, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that nothing but decay can move it
    gpt.make_optimizer(model, config).step()
    for name, parameter in model.named_parameters():
        kept = 0.95 if parameter.dim() == 2 else 1.0
        assert torch.allclose(parameter, kept * before[name]), name


def test_long_gradients_are_cut_to_length():
    model, _ = trained(replace(SMALL, grad_clip=1e-3, steps=1))
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert gradients.norm().item() == pytest.approx(1e-3, rel=0.01)


def test_the_validation_loss_is_the_mean_over_the_whole_text():
    config = replace(SMALL, dropout=0.5)
    model = randomized(config)
    tokens, total = VALIDATION[: 16 * 70 + 6].long(), 0.0  # more than one batch, and a part of a sequence
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            window = tokens[start : start + 17]
            total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    assert math.isclose(gpt.evaluate(model.train(), config, tokens), total / (len(tokens) - 1), rel_tol=1e-5)


# ---------------------------------------------------------------- 8: writing


def write_without_cache(model, prompt, length, temperature, top_k, seed):
    """The plainest loop that writes: the whole context through the model for each token."""
    T, rng = model.config.block_size, torch.Generator().manual_seed(seed)
    context = TOKENIZER.encode(prompt).long()[-T:]
    for _ in range(length):
        if len(context) > T:
            context = context[-(T // 2) :]
        with torch.no_grad():
            logits = model(context[None])[0, -1]
        token = torch.multinomial(gpt.probabilities(logits, temperature, top_k), 1, generator=rng)
        context = torch.cat([context, token])


@pytest.mark.parametrize("prompt_length", [1, 5, 16, 50])
@pytest.mark.parametrize("temperature, top_k", [(0, 0), (0.8, 0), (1.5, 5)])
def test_the_cache_changes_nothing_and_saves_all_positions_but_one(prompt_length, temperature, top_k):
    model, prompt, logits, widths = randomized(SMALL), TEXT[100 : 100 + prompt_length], [], []
    model.register_forward_hook(lambda model, arguments, output: logits.append(output[0, -1]))
    model.wte.register_forward_hook(lambda part, arguments, output: widths.append(output.size(1)))
    written(model, prompt, 60, temperature=temperature, top_k=top_k, seed=3)
    assert widths[0] == min(prompt_length, 16) and set(widths[1:]) == {1, 8}  # 8: when the context is full
    write_without_cache(model, prompt, 60, temperature, top_k, seed=3)
    assert torch.allclose(torch.stack(logits[:60]), torch.stack(logits[60:]), atol=1e-5)


def test_temperature_0_is_the_likeliest_and_top_k_leaves_k():
    logits = torch.randn(65, generator=torch.Generator().manual_seed(1))
    assert gpt.probabilities(logits, 0)[logits.argmax()] == 1
    seven = gpt.probabilities(logits, 2.0, 7)
    assert seven.count_nonzero() == seven[logits.topk(7).indices].count_nonzero() == 7
    assert torch.allclose(gpt.probabilities(logits, 1.0, 1000), logits.softmax(0))


def test_writing_uses_randomness_of_its_own_and_learns_nothing():
    model, before = randomized(replace(SMALL, dropout=0.5)).train(), torch.random.get_rng_state()
    assert written(model, "", 30) and torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters()) and torch.is_grad_enabled()


class Bytes(gpt.CharTokenizer):
    """A tokenizer of another kind, as a fork might have it: the 256 bytes are the tokens."""

    def __init__(self, characters):
        self.characters, self.vocab_size = characters, 256
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps the bytes of half a character

    def encode(self, text):
        return torch.tensor(list(text.encode()), dtype=torch.int32)

    def decode(self, tokens):
        return self.decoder.decode(bytes(tokens))


def test_characters_of_several_tokens_are_written_whole(monkeypatch):
    tokens = iter("日本é!".encode())
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: torch.tensor([next(tokens)]))
    model = gpt.GPT(replace(SMALL, vocab_size=256))
    assert "".join(gpt.generate(model, Bytes(""), "ü", length=9)) == "日本é!"


# ---------------------------------------------------------------- 9: the head start


def test_each_head_starts_by_looking_back_its_number_of_characters():
    model, seen = gpt.GPT(gpt.Config(block_size=64, vocab_size=V)), []
    gpt.head_start(model)
    model.h[0].attn.c_attn.register_forward_hook(lambda part, arguments, output: seen.append(output[0]))
    model(TOKENS[None, :64])
    queries, keys, _ = seen[0].split(128, dim=1)
    for head in range(4):
        part = slice(head * 32, (head + 1) * 32)
        scores = queries[:, part] @ keys[:, part].T / math.sqrt(32)
        weights = scores.masked_fill(torch.ones(64, 64).triu(1).bool(), -math.inf).softmax(1)
        back = torch.arange(64) - weights.argmax(1)
        assert (back[4:] == head + 1).all() and weights[4:].amax(1).mean() > 0.95


# ---------------------------------------------------------------- 10: files and devices


def test_line_ends_become_newlines_and_a_byte_order_mark_is_left_out(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffAnna\r\nOtto\r日本語 🎭\n".encode())
    assert gpt.read_text(tmp_path / "text") == "Anna\nOtto\n日本語 🎭\n"


def test_a_text_that_cannot_be_fetched_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt, "TEXT_URL", (tmp_path / "nowhere").as_uri())
    with pytest.raises(SystemExit):
        gpt.main([])
    assert "--data" in capsys.readouterr().err and os.listdir() == []


def test_a_saved_model_comes_back_whole(tmp_path):
    model = randomized(SMALL)
    gpt.save(tmp_path / "gpt.pt", model, TOKENIZER)
    again, tokenizer = gpt.load(tmp_path / "gpt.pt")
    assert same(model.state_dict(), again.state_dict()) and os.listdir(tmp_path) == ["gpt.pt"]
    assert again.config == model.config and tokenizer.characters == TOKENIZER.characters


class Hostile:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return (open, ("hacked", "w"))


def test_what_is_not_a_whole_checkpoint_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, bad = Path("good.pt"), Path("bad.pt")
    gpt.save(good, gpt.GPT(SMALL), TOKENIZER)
    content, found = good.read_bytes(), torch.load(good, weights_only=True)
    contents = [content[: len(content) * i // 5] for i in range(5)] + [content[:-1], b"To be, or not to be\n"]
    others = [
        Hostile(),
        nn.Linear(2, 2),
        found | {"config": found["config"] | {"init_std": 0.02}},
        found | {"model": found["model"] | {"wpe.weight": torch.zeros(16, 17)}},
    ]
    for other in others:
        torch.save(other, bad)
        contents.append(bad.read_bytes())
    for content in contents:
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="no whole checkpoint of this gpt.py in .*bad.pt") as error:
            gpt.load(bad)
        assert str(error.value).isprintable()
    assert "wpe.weight" in str(error.value) and not Path("hacked").exists()


def test_a_full_disk_leaves_the_earlier_model(tmp_path, monkeypatch):
    gpt.save(tmp_path / "gpt.pt", gpt.GPT(SMALL), TOKENIZER)
    earlier = (tmp_path / "gpt.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpt.save(tmp_path / "gpt.pt", randomized(SMALL), TOKENIZER, keep_old=True)
    assert (tmp_path / "gpt.pt").read_bytes() == earlier


@pytest.mark.parametrize("dtype, compile", [("bfloat16", False), ("auto", True), ("bfloat16", True)])
def test_what_is_faster_trains_nearly_the_same_in_float32_weights(dtype, compile, monkeypatch):
    original = torch.compile
    # The C++ compiler takes half a minute: all but the last stage (.ci/run does it all).
    monkeypatch.setattr(torch, "compile", lambda model: original(model, backend="aot_eager"))
    config = replace(SMALL, n_layer=1, steps=4, eval_every=2)
    _, plain = trained(config)
    model = gpt.GPT(replace(config, dtype=dtype, compile=compile))
    fast = gpt.speed_up(model, torch.device("cpu"))
    _, results = trained(config, model, fast)
    assert [loss for _, loss, _ in results] == pytest.approx([loss for _, loss, _ in plain], abs=0.02)
    assert type(fast) is not gpt.GPT and (dtype == "auto" or results != plain)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_auto_takes_bfloat16_only_on_gpus_that_have_it_in_hardware(monkeypatch):
    model = gpt.GPT(SMALL)
    for capability, kind in [((7, 5), gpt.GPT), ((8, 0), gpt.BFloat16), ((9, 0), gpt.BFloat16)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert type(gpt.speed_up(model, torch.device("cuda"))) is kind
    assert gpt.speed_up(model, torch.device("cpu")) is model


# ---------------------------------------------------------------- 11: the command line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a short text."""
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(TEXT[:20_000], encoding="utf-8")
    return tmp_path


def python(*arguments, folder, **how):
    """Start `python` on these arguments in a folder, as a user would."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=folder, **pipes, **how)


def saved(path="gpt.pt"):
    """What is in a checkpoint, in a form that can be compared."""
    found = torch.load(path, weights_only=True)
    return found | {"model": {name: weight.tolist() for name, weight in found["model"].items()}}


def test_the_program_trains_and_writes_the_same_in_every_start_of_python(tmp_path):
    runs, told = [], []
    for name in ("a", "b"):  # PYTHONHASHSEED: what differs from one start to the next
        (tmp_path / name).mkdir()
        (tmp_path / name / "input.txt").write_text(TEXT, encoding="utf-8")
        flags = [*FLAGS, "--steps", "6", "--eval-every", "3"]
        environment = os.environ | {"PYTHONHASHSEED": str(len(runs))}
        runs.append(python(HERE / "gpt.py", *flags, folder=tmp_path / name, env=environment))
    for run in runs:
        out, err = run.communicate()
        assert run.returncode == 0 and err == ""  # no warning either
        told.append(re.sub(r"\d+ seconds left", "", out))
    assert told[0] == told[1] and saved(tmp_path / "a" / "gpt.pt") == saved(tmp_path / "b" / "gpt.pt")
    assert "1,266,726 characters" in out and out.count("val loss") == 2 and out.count("\n    | ") >= 2
    assert len(out.split("It writes:\n\n")[1]) > 20  # the scene
    assert sorted(os.listdir(tmp_path / "a")) == ["gpt.pt", "input.txt"]


def test_what_is_typed_beats_a_size_and_a_checkpoint(folder):
    _, config, _ = gpt.parse(["--size", "medium", "--steps", "7"])
    assert (config.n_layer, config.dropout, config.steps, config.lr) == (6, 0.2, 7, 7e-4)
    gpt.save("gpt.pt", gpt.GPT(replace(SMALL, temperature=0.5, top_k=3)), TOKENIZER)
    _, config, _ = gpt.parse(["--generate", "--top-k", "9"])
    assert (config.n_embd, config.temperature, config.top_k) == (16, 0.5, 9)
    _, config, _ = gpt.parse(["--init-from", "gpt.pt", "--eval-every", "7"])
    assert (config.lr, config.steps, config.eval_every) == (0.064 / 16, 300, 7)


@pytest.mark.parametrize("flag, begun", [("--head-start", True), ("--no-head-start", False)])
def test_a_new_model_gets_its_head_start_unless_told_not_to(folder, flag, begun):
    model, *_ = gpt.build(*gpt.parse([*FLAGS, flag]))
    assert model.wpe.weight[:, :12].any() != begun  # the channels that a head start leaves to tokens


def test_only_text_goes_to_standard_output_when_writing(folder, capsys):
    gpt.main([*FLAGS, "--steps", "2"])
    texts = []
    for seed in ("5", "5", "6"):
        capsys.readouterr()
        gpt.main(["--generate", "--length", "50", "--prompt", TEXT[:30], "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert (
        texts[0] == texts[1] != texts[2] and texts[0].startswith(TEXT[:30]) and texts[0] != TEXT[:30] + "\n"
    )


def test_fine_tuning_starts_from_the_trained_model(folder):
    gpt.main([*FLAGS, "--steps", "2", "--out", "first.pt"])
    Path("new.txt").write_text(TEXT[5000:12_000], encoding="utf-8")
    gpt.main("--init-from first.pt --data new.txt --out new.pt --steps 1 --lr 1e-6 --length 5".split())
    first, new = (gpt.load(f"{name}.pt") for name in ("first", "new"))
    assert first[1].characters == new[1].characters
    for before, after in zip(first[0].parameters(), new[0].parameters()):
        assert torch.allclose(before, after, atol=1e-4)


# Each of these gets one line on standard error that contains the words, status 2, and changes no file.
BAD_INPUT = """
--data nowhere.txt                      | nowhere.txt --data
--data folder                           | folder --data
--data binary.dat                       | binary.dat UTF-8
--data short.txt                        | short.txt --block-size
--n-embd 130 --n-head 4                 | --n-head 130
--steps 0                               | --steps
--lr nan                                | --lr
--warmup 100                            | --warmup
--grad-clip 0                           | --grad-clip
--seed 99999999999999                   | --seed
--size huge                             | huge tiny small medium gpt2
--device gpu --plot early.png           | gpu auto cpu cuda
--device cuda:99                        | cuda:99
--dtype float16                         | --dtype float16
--out nowhere/gpt.pt                    | nowhere
--out input.txt                         | --out .pt
--length 0                              | --length
--generate --out done.pt --prompt ß     | ß
--resume                                | gpt.pt
--resume --out done.pt                  | ended --init-from
--resume --out open.pt --data other.txt | other.txt open.pt
--generate --out done.pt --n-head 4     | n_head
--init-from done.pt --data chinese.txt  | 中
"""


@pytest.fixture(scope="module")
def folder_of_traps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traps")
    (folder / "folder").mkdir()
    (folder / "input.txt").write_text(TEXT[:20_000], encoding="utf-8")
    (folder / "other.txt").write_text(TEXT[1000:9000], encoding="utf-8")
    (folder / "chinese.txt").write_text("中" * 1500, encoding="utf-8")
    (folder / "binary.dat").write_bytes(bytes(range(256)) * 50)
    (folder / "short.txt").write_text(TEXT[:1280], encoding="utf-8")
    gpt.main([*FLAGS, "--steps", "2", "--data", f"{folder}/input.txt", "--out", f"{folder}/done.pt"])
    run = [*FLAGS, "--steps", "9", "--eval-every", "2"]
    interrupt([*run, "--data", f"{folder}/input.txt", "--out", f"{folder}/open.pt"], after=5)
    return folder


@pytest.mark.parametrize("line", BAD_INPUT.strip().splitlines())
def test_bad_input_gets_one_line_and_changes_nothing(line, folder_of_traps, monkeypatch, capsys):
    def contents():
        return {path: path.read_bytes() for path in folder_of_traps.rglob("*") if path.is_file()}

    command, words = line.split("|")
    monkeypatch.chdir(folder_of_traps)
    before = contents()
    with pytest.raises(SystemExit) as stop:
        gpt.main(command.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("gpt.py: ") and err[:-1].isprintable() and err[-1] == "\n"
    assert all(word in err for word in words.split())
    assert contents() == before


def test_a_picture_is_drawn_or_refused_at_once(folder, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    gpt.main([*FLAGS, "--steps", "2", "--plot", "loss.png"])
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")
    for plot, word in [("nowhere/loss.png", "nowhere"), ("loss.xyz", "xyz"), ("other.png", "matplotlib")]:
        monkeypatch.setitem(sys.modules, word + ".figure", None)  # in the end, as if it were not installed
        with pytest.raises(SystemExit):
            gpt.main([*FLAGS, "--steps", "2", "--plot", plot, "--out", "other.pt"])
        assert word in capsys.readouterr().err and not Path("other.pt").exists()


# ---------------------------------------------------------------- what a run leaves behind


def interrupt(argv, after, error=InterruptedError):
    """Start gpt.main and let an error end it, or what main makes of it, when it has done so many steps."""
    train = gpt.train

    def train_until_cut(*arguments):
        for result in train(*arguments):
            yield result
            if result[0] == after:
                raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises((error, SystemExit)):
        patch.setattr(gpt, "train", train_until_cut)
        gpt.main(argv)


RUN = [*FLAGS, "--steps", "300", "--eval-every", "60", "--dropout", "0.1", "--seed", "5"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a finished run leaves: its file and the scene that it wrote."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "input.txt").write_text(TEXT[:20_000], encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        gpt.main([*RUN, "--data", str(folder / "input.txt"), "--out", str(folder / "gpt.pt")])
    return saved(folder / "gpt.pt"), out.getvalue().split("It writes:")[1]


def test_a_run_is_saved_at_each_evaluation_and_after_the_first_every_minute(
    folder, monkeypatch, uninterrupted
):
    interrupt(RUN, after=59)
    assert os.listdir() == ["input.txt"]
    interrupt(RUN, after=125)
    assert saved()["step"] == 120
    clock = iter(range(0, 10**6, 61))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    interrupt(["--resume"], after=130)
    assert saved()["step"] == 130
    gpt.main(["--resume"])
    assert saved() == uninterrupted[0]


def test_an_earlier_model_stays_until_there_is_a_better_one_and_then_becomes_old(folder, monkeypatch, capsys):
    gpt.main([*FLAGS, "--steps", "2"])
    earlier = Path("gpt.pt").read_bytes()
    interrupt(RUN, after=59)
    monkeypatch.setattr(torch, "compile", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpt.main([*RUN, "--compile"])
    with pytest.raises(SystemExit, match="not a finite number at step 2.*lower --lr"):
        gpt.main([*FLAGS, "--steps", "9", "--lr", "1e30"])
    assert Path("gpt.pt").read_bytes() == earlier and sorted(os.listdir()) == ["gpt.pt", "input.txt"]
    capsys.readouterr()
    gpt.main([*FLAGS, "--steps", "4", "--eval-every", "2"])
    assert "gpt.pt.old" in capsys.readouterr().out and Path("gpt.pt.old").read_bytes() == earlier


def test_the_best_model_is_kept_and_not_the_last(folder, monkeypatch):
    losses = iter([2.0, 3.0, 2.5])
    monkeypatch.setattr(gpt, "evaluate", lambda *arguments: next(losses))
    interrupt([*FLAGS, "--steps", "30", "--eval-every", "10"], after=21)
    found = torch.load("gpt.pt", weights_only=True)
    assert same(gpt.load()[0].state_dict(), found["best"]) and not same(found["best"], found["model"])
    model, _ = gpt.main(["--resume"])
    assert same(model.state_dict(), found["best"]) and same(gpt.load()[0].state_dict(), found["best"])
    finished = {"config", "characters", "model", "train_losses", "val_losses"}  # small enough to share
    assert saved().keys() == finished and saved()["val_losses"] == [[10, 2.0], [20, 3.0], [30, 2.5]]


def test_a_run_trains_on_nine_tenths_and_a_resumed_one_takes_new_settings(folder, monkeypatch):
    train, seen = gpt.train, []

    def note(model, optimizer, config, training, validation, start):
        seen.extend([len(training), len(validation), start, config.lr, config.steps])
        seen.extend(group["weight_decay"] for group in optimizer.param_groups)
        return train(model, optimizer, config, training, validation, start)

    interrupt([*FLAGS, "--steps", "9", "--eval-every", "2"], after=5)
    monkeypatch.setattr(gpt, "train", note)
    gpt.main(["--resume", "--weight-decay", "0.7", "--lr", "0.1", "--steps", "6"])
    assert seen == [18_000, 2_000, 4, 0.1, 6, 0.7, 0.0]


class Momentum(torch.optim.SGD):
    """An optimizer as a fork might have it, whose state has a form of its own."""

    def __init__(self, model, config):
        super().__init__(model.parameters(), lr=config.lr, momentum=0.9)

    def state_dict(self):
        return {"mine": super().state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state["mine"])


def test_any_optimizer_and_any_tokenizer_can_take_their_place_and_be_resumed(folder, monkeypatch):
    Path("input.txt").write_text("Fünf Äpfel für 日本 🎭\n" * 100, encoding="utf-8")
    run = [*FLAGS, "--steps", "30", "--eval-every", "10"]
    monkeypatch.setattr(gpt, "CharTokenizer", Bytes)
    monkeypatch.setattr(gpt, "make_optimizer", Momentum)
    gpt.main([*run, "--out", "whole.pt"])
    interrupt(run, after=25)
    gpt.main(["--resume"])
    assert saved() == saved("whole.pt")


def test_a_run_can_be_started_in_a_thread(folder):
    thread = threading.Thread(target=gpt.main, args=([*FLAGS, "--steps", "2"],))
    thread.start()
    thread.join()
    gpt.load("gpt.pt")


# ---------------------------------------------------------------- programs killed and started again


# To import PyTorch takes seconds: so these processes, which print to files, are forked from one that has.

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="not all systems have such processes")


def enter(argv, environment, name):
    """What a process started by `Program` does."""
    os.environ.update(environment)
    gpt.RANK, gpt.WORLD_SIZE = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = open(f"{name}.out", "w"), open(f"{name}.err", "w")
    gpt.main(argv)


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
    """gpt.py started in a process of its own, in this folder, which can be watched and killed."""

    def __init__(self, *argv, **environment):
        self.name = f"../{random.getrandbits(64)}"
        self.process = forkserver().Process(target=enter, args=(list(argv), environment, self.name))
        self.process.start()

    def kill_after(self, word, seconds, number):
        """Wait until it has printed this word and for some time more, then send the signal."""
        while self.process.is_alive() and not (
            os.path.exists(f"{self.name}.out") and word in self.told("out")
        ):
            time.sleep(0.01)
        time.sleep(seconds)
        if self.process.is_alive():  # on a fast machine it may have ended already
            os.kill(self.process.pid, number)

    def told(self, end):
        return Path(f"{self.name}.{end}").read_text(encoding="utf-8")

    def end(self):
        """Wait until it ends -> exit status (-9 if it was killed), output and errors."""
        self.process.join()
        return self.process.exitcode, self.told("out"), self.told("err")


@only_linux
def test_a_run_killed_at_any_moment_and_resumed_ends_the_same(folder, uninterrupted):
    rng, flags, kills = random.Random(1), RUN, 0
    for word in ("parameters", "val loss", "val loss"):
        run = Program(*flags)
        run.kill_after(word, rng.uniform(0, 0.1), signal.SIGKILL)
        kills += run.end()[0] == -signal.SIGKILL
        flags = ["--resume"] if Path("gpt.pt").exists() else RUN
    status, out, err = Program("--resume").end()
    assert kills >= 2 and (status, err) == (0, "")
    assert (saved(), out.split("It writes:")[1]) == uninterrupted


def test_ctrl_c_says_how_to_go_on(folder, uninterrupted, capsys):
    interrupt(RUN, after=61, error=KeyboardInterrupt)
    assert "python gpt.py --resume --out gpt.pt" in capsys.readouterr().out
    gpt.main(["--resume"])
    assert saved() == uninterrupted[0]


def test_ctrl_c_before_the_first_save_is_done_promises_nothing(folder, monkeypatch, capsys):
    monkeypatch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit):
        gpt.main(RUN)
    assert "Stopped." in capsys.readouterr().out.splitlines()


@only_linux
def test_a_closed_pipe_ends_writing_quietly(folder):
    gpt.main([*FLAGS, "--steps", "2"])
    run = python(HERE / "gpt.py", "--generate", "--length", "200000", folder=folder)
    run.stdout.read(10)
    run.stdout.close()
    assert (run.wait(), run.stderr.read()) == (0, "")


@only_linux
def test_two_processes_do_what_one_does_and_speak_with_one_voice(folder):
    def start_two(*flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        both = [Program(*flags, "--device", "cpu", RANK=rank, **place) for rank in ("0", "1")]
        return [one.end() for one in both]

    flags = [*FLAGS, "--steps", "50", "--eval-every", "25"]
    gpt.main([*flags, "--out", "one.pt"])
    first, second = start_two(*flags, "--out", "two.pt")
    assert (first[0], first[2]) == (0, "") and second == (0, "", "")
    assert dict(saved("two.pt")["val_losses"]) == pytest.approx(dict(saved("one.pt")["val_losses"]), abs=1e-4)
    first, second = start_two("--generate", "--out", "two.pt")
    assert len(first[1]) > 20 and second == (0, "", "")
    first, second = start_two(*flags, "--batch-size", "3")
    assert first[2].count("\n") == 1 and "2 processes" in first[2] and second == (2, "", "")


# ---------------------------------------------------------------- notebooks


def test_the_file_runs_in_one_notebook_cell_and_fetches_its_text(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    source = (HERE / "gpt.py").read_text(encoding="utf-8")
    # The defaults would take minutes: a smaller model, and the text from this folder.
    source = source.replace("main([] if", f"main({FLAGS + ['--steps', '4']} if")
    source = source.replace(gpt.TEXT_URL, (HERE / "input.txt").as_uri())
    more = [
        "print('more' + ''.join(generate(model, tokenizer, length=7)))",
        'main("--steps 2 --n-embd 8".split());',
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in [source, *more]])
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3", resources=where).execute()
    told = ["".join(output.get("text", "") for output in cell.outputs) for cell in book.cells]
    assert "fetching Tiny Shakespeare" in told[0] and "val loss" in told[0]
    assert (
        told[1].startswith("more") and "val loss" in told[2] and not any("Warning" in text for text in told)
    )
    assert (tmp_path / "input.txt").read_text(encoding="utf-8") == TEXT
