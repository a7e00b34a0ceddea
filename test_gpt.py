"""What gpt.py promises, in the order of the file, after three promises that people come for.

Each name is a promise, each body its proof. A few words on pytest, which runs them: an argument of a test is
something made ready for it, by the function of that name marked as a fixture (`folder`) or by pytest itself:
`tmp_path` is an empty folder, `capsys` what was printed, and what `monkeypatch` changes is put back at the
end. `parametrize` runs a test once for each row of a table. A *hook* is a function that PyTorch calls each
time a part of a model has computed something: with the part, its arguments and its result. A *mock* stands
in for a function: it counts its calls, and returns or raises what it was told to.
"""

import copy
import doctest
import functools
import io
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock, Mock

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
SMALL = gpt.Config(2, 2, 16, 16, batch_size=4, steps=20, eval_every=10, vocab_size=V)
FLAGS = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --length 40".split()
BATCH = TOKENS[:64].view(4, 16).long()


def trained(config, model=None, fast=None, validation=VALIDATION[:2000]):
    """A model after a run of `train`, and what the run has yielded. fast: another way to compute with it."""
    model = model or gpt.GPT(config)
    network, optimizer = model if fast is None else fast, gpt.make_optimizer(model, config)
    run = gpt.train(network, optimizer, config, TRAINING, validation)
    return model, [(step, loss.item(), val_loss) for step, loss, val_loss in run]


def written(model, prompt="", length=50, tokenizer=TOKENIZER, **settings):
    """What the model writes after the prompt, as one string."""
    return "".join(gpt.generate(model, tokenizer, prompt, length=length, **settings))


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


def test_each_size_has_its_parameters_and_computes_on_any_device():
    parameters = {"tiny": 421_504, "small": 1_396_608, "medium": 10_770_816, "gpt2": 85_892_352}
    for size, settings in gpt.SIZES.items():
        # The meta device has shapes but no numbers, and refuses to compute with tensors of another device.
        model = gpt.GPT(gpt.Config(**settings)).to("meta")
        inputs, targets = gpt.get_batch(TOKENS.to("meta"), 2, 8)
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        assert sum(parameter.grad.numel() for parameter in model.parameters()) == parameters[size]


def test_the_loss_falls_from_an_even_guess_to_below_counting_pairs():
    config = gpt.Config(block_size=64, steps=150, eval_every=150, vocab_size=V)
    model, (_, pairs) = gpt.GPT(config), gpt.counting(TRAINING, VALIDATION[:20_000], V, longest=1)
    gpt.head_start(model)
    _, results = trained(config, model, validation=VALIDATION[:20_000])
    assert abs(results[0][1] - math.log(V)) < 0.8  # an untrained model knows next to nothing
    assert results[-1][2] < pairs - 0.17


def test_one_seed_gives_one_result_to_the_bit():
    config, other_seed = replace(SMALL, dropout=0.1), replace(SMALL, dropout=0.1, seed=2)
    (model, results), (again, results_again) = trained(config), trained(config)
    assert results == results_again and same(model.state_dict(), again.state_dict())
    assert results != trained(other_seed, gpt.GPT(config))[1]  # other batches and dropout
    assert not same(gpt.GPT(config).state_dict(), gpt.GPT(other_seed).state_dict())
    assert written(model, "HAMLET:") == written(again, "HAMLET:") != written(model, "HAMLET:", seed=5)


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


def test_every_setting_has_a_range_and_a_flag_whose_default_is_told_by_help(capsys):
    with pytest.raises(SystemExit):
        gpt.main(["--help"])
    options = " ".join(capsys.readouterr().out.split()).split("options:")[1]
    for row in fields(gpt.Config)[:-1]:  # all but vocab_size, which is counted
        flag = "--" + row.name.replace("_", "-")
        assert re.search(rf" {flag}\b.*?default: (.*?)\)", options)[1] == str(row.default), flag
        for value in (-1, math.nan):
            with pytest.raises(ValueError, match=flag):
                gpt.Config(**{row.name: value})


def test_the_validation_part_is_the_last_tenth_and_at_most_a_million():
    assert [len(part) for part in gpt.split(torch.arange(50))] == [45, 5]
    assert len(gpt.split(torch.zeros(20_000_000, dtype=torch.int8))[1]) == 1_000_000


def kneser_ney(training, validation, longest):
    """The loss of guessing by interpolated Kneser-Ney, after `longest` tokens: with plain dictionaries."""
    tokens, tables, loss = training + validation, [], 0
    groups = [tuple(tokens[i - longest : i + 1]) for i in range(longest, len(training))]
    for _ in range(longest + 1):
        kinds = Counter(group[:-1] for group in set(groups))
        tables.insert(0, (Counter(groups), Counter(group[:-1] for group in groups), kinds))
        groups = [group[1:] for group in set(groups)]  # shorter: after how many different tokens
    for i in range(len(training), len(tokens)):
        p = 1 / V
        for length, (times, came, kinds) in enumerate(tables):
            group = tuple(tokens[i - length : i + 1])
            rest = 0.75 * kinds[group[:-1]] + 1
            p = (max(times[group] - 0.75, 0) + rest * p) / (came[group[:-1]] + 1)
        loss -= math.log(p) / len(validation)
    return loss


def test_counting_is_what_plain_dictionaries_give_and_copes_with_sixty_thousand_characters():
    training, validation = TOKENS[:5000], TOKENS[5000:6000]
    expected = [kneser_ney(training.tolist(), validation.tolist(), longest) for longest in range(4)]
    assert gpt.counting(training, validation, V, longest=3) == pytest.approx(expected, abs=0.002)
    again = torch.arange(60_000).repeat(3)  # after a character comes always the same one
    even, pairs = gpt.counting(again[:120_000], again[120_000:], 60_000, longest=1)
    assert even == pytest.approx(math.log(60_000), abs=0.01) and pairs < 5


# ---------------------------------------------------------------- 2 to 5: the model


def test_attention_by_hand_is_what_pytorch_computes():
    q, k, v = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1))
    theirs = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    assert torch.allclose(gpt.attention_by_hand(q, k, v), theirs, atol=1e-5)


def test_a_token_never_sees_the_future_and_always_the_past():
    model, changed = randomized(SMALL), BATCH.clone()
    changed[:, 9] = (changed[:, 9] + 1) % V
    difference = (model(BATCH) - model(changed)).abs().amax(-1)
    assert not difference[:, :9].any() and (difference[:, 9:] > 1e-6).all()


def test_several_new_tokens_behind_a_cache_are_an_error_and_not_a_wrong_result():
    model, cache = randomized(SMALL), {}
    model(BATCH[:, :8], cache)
    with pytest.raises(AssertionError, match="one new character at a time"):
        model(BATCH[:, 8:10], cache, 8)


def test_dropout_zeroes_its_share_of_three_outputs_in_training_and_none_otherwise():
    model, outputs = randomized(replace(SMALL, n_layer=1, dropout=0.5)), []
    for part in (model.dropout, model.h[0].attn, model.h[0].mlp):
        part.register_forward_hook(lambda part, arguments, output: outputs.append(output))
    model.train()(TOKENS[:480].view(30, 16))
    model.eval()(TOKENS[:480].view(30, 16))
    shares = [(output == 0).float().mean().item() for output in outputs]
    assert shares == pytest.approx([0.5, 0.5, 0.5, 0, 0, 0], abs=0.05)


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
    for name, writers in [("wte", 1), ("wpe", 1), ("h.0.mlp.c_fc", 1), ("h.0.mlp.c_proj", 4)]:
        assert abs(weights[f"{name}.weight"].std() - (128 * writers) ** -0.5) < 0.002


# ---------------------------------------------------------------- 6 and 7: batches, training


def test_every_place_of_the_text_can_be_drawn_and_none_beyond():
    draws = [gpt.get_batch(torch.arange(12), 4, 8)[0] for _ in range(50)]
    assert set(torch.cat(draws)[:, 0].tolist()) == {0, 1, 2, 3}  # 3 + 8 + 1 tokens end at the 12th


def test_the_optimizer_follows_the_schedule_and_long_gradients_are_cut_to_length():
    model, config = gpt.GPT(SMALL), replace(SMALL, grad_clip=1e-3)
    optimizer = gpt.make_optimizer(model, config)
    for step, _, _ in gpt.train(model, optimizer, config, TRAINING, VALIDATION[:100]):
        assert {group["lr"] for group in optimizer.param_groups} == {gpt.learning_rate(step - 1, config)}
        length = math.hypot(*(parameter.grad.norm().item() for parameter in model.parameters()))
        assert length == pytest.approx(1e-3, rel=0.01)


def test_decay_is_for_all_matrices_and_nothing_else():
    model = gpt.GPT(SMALL)
    for group in gpt.make_optimizer(model, replace(SMALL, weight_decay=0.5)).param_groups:
        dim = 2 if group["weight_decay"] == 0.5 else 1
        assert len(group["params"]) == sum(parameter.dim() == dim for parameter in model.parameters())
        assert all(parameter.dim() == dim for parameter in group["params"])


def test_the_validation_loss_is_the_mean_over_the_whole_text_in_batches_of_one_shape():
    model, total, shapes = randomized(replace(SMALL, dropout=0.5)), 0.0, set()
    tokens = VALIDATION[: 16 * 70 + 6].long()  # the last batch is half full, its last sequence too
    for inputs, targets in zip(tokens[:-1].split(16), tokens[1:].split(16)):
        total += F.cross_entropy(model(inputs[None])[0], targets, reduction="sum").item()
    model.wte.register_forward_pre_hook(lambda part, arguments: shapes.add(tuple(arguments[0].shape)))
    loss = gpt.evaluate(model.train(), SMALL, tokens)
    assert loss == pytest.approx(total / (len(tokens) - 1), rel=1e-5)
    assert shapes == {(4, 16)}  # so that memory has a bound, and compiling happens once


def test_each_process_draws_a_dropout_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", Mock())
    model, chances = gpt.GPT(SMALL), []
    model.register_forward_pre_hook(lambda model, inputs: chances.append(torch.rand(9).tolist()))
    for rank in (0, 1):
        monkeypatch.setattr(gpt, "RANK", rank)
        next(gpt.train(model, gpt.make_optimizer(model, SMALL), SMALL, TRAINING, VALIDATION))
    assert len(chances) == 2 and chances[0] != chances[1]


# ---------------------------------------------------------------- 8: writing


def write_without_cache(model, prompt, length, temperature, top_k, seed):
    """The plainest loop that writes: the whole context through the model for each token."""
    T, rng = model.config.block_size, torch.Generator().manual_seed(seed)
    context = TOKENIZER.encode(prompt)[-T:]
    for _ in range(length):
        context = context if len(context) <= T else context[-(T // 2) :]
        probs = gpt.probabilities(model(context[None])[0, -1], temperature, top_k)
        context = torch.cat([context, torch.multinomial(probs, 1, generator=rng)])


@pytest.mark.parametrize("prompt_length", [1, 5, 16, 50])
@pytest.mark.parametrize("temperature, top_k", [(0, 0), (0.8, 5), (1.5, 1000)])
def test_the_cache_changes_nothing_and_saves_all_positions_but_one(prompt_length, temperature, top_k):
    model, prompt, logits, widths = randomized(SMALL), TEXT[100 : 100 + prompt_length], [], []
    model.register_forward_hook(lambda model, arguments, output: logits.append(output[0, -1]))
    model.wte.register_forward_hook(lambda part, arguments, output: widths.append(output.size(1)))
    written(model, prompt, 60, temperature=temperature, top_k=top_k, seed=3)
    assert widths[0] == min(prompt_length, 16) and set(widths[1:]) == {1, 8}  # 8: when the context is full
    write_without_cache(model, prompt, 60, temperature, top_k, seed=3)
    assert torch.allclose(torch.stack(logits[:60]), torch.stack(logits[60:]), atol=1e-5)


def test_writing_uses_randomness_of_its_own_and_learns_nothing():
    model, before = randomized(replace(SMALL, dropout=0.5)).train(), torch.random.get_rng_state()
    assert written(model, seed=1, temperature=0) == written(model, seed=2, temperature=0)  # the likeliest
    assert written(model, seed=1) != written(model, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters()) and torch.is_grad_enabled()


def test_without_a_prompt_it_begins_after_a_blank_line_or_else_after_token_0():
    model, dna = randomized(SMALL), gpt.CharTokenizer("ACGT")
    assert written(model, "") == written(model, "\n\n") != written(model, "A")
    model = randomized(replace(SMALL, vocab_size=4))
    assert written(model, "", tokenizer=dna) == written(model, "A", tokenizer=dna)


# ---------------------------------------------------------------- 10 and 11: rewards, the head start


def test_what_is_rewarded_becomes_likelier_and_a_leash_holds_it_back():
    model, _ = trained(replace(SMALL, steps=200, eval_every=200))

    def reinforced(kl):
        learner, reward = copy.deepcopy(model), lambda text: text.count("e")
        results = list(gpt.reinforce(learner, TOKENIZER, TRAINING, reward, steps=40, kl=kl, lr=3e-3))
        assert learner.config == model.config
        return results

    free, held = reinforced(kl=0), reinforced(kl=10)
    assert free[0] == held[0] and free[0][1] == pytest.approx(0, abs=1e-6)  # at first it is what it was
    assert free[-1][0] > 3 * free[0][0] and held[-1][1] < free[-1][1] / 10
    assert reinforced(kl=0) == free  # one seed, one result


def test_each_head_starts_by_looking_back_its_number_of_characters():
    model, seen = gpt.GPT(gpt.Config(block_size=64, vocab_size=V)), []
    gpt.head_start(model)
    model.h[0].attn.c_attn.register_forward_hook(lambda part, arguments, output: seen.append(output[0]))
    model(TOKENS[None, :64])
    queries, keys, _ = seen[0].view(64, 3, 4, 32).permute(1, 2, 0, 3)  # (heads, positions, head size) each
    scores = queries @ keys.transpose(1, 2) / math.sqrt(32)
    weights = scores.masked_fill(torch.ones(64, 64).triu(1).bool(), -math.inf).softmax(-1)[:, 4:]
    assert (torch.arange(4, 64) - weights.argmax(-1) == torch.arange(1, 5)[:, None]).all()
    assert weights.amax(-1).mean() > 0.95


# ---------------------------------------------------------------- 12: files and devices


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a short text."""
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(TEXT[:20_000], encoding="utf-8")
    return tmp_path


def files():
    return " ".join(sorted(os.listdir()))


def refused(argv, capsys):
    """The one line that gpt.py prints when it refuses these arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        gpt.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("gpt.py: ") and err[:-1].isprintable() and err[-1] == "\n"
    return err


def test_line_ends_become_newlines_and_a_byte_order_mark_is_left_out(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffAnna\r\nOtto\r日本語 🎭\n".encode())
    assert gpt.read_text(tmp_path / "text") == "Anna\nOtto\n日本語 🎭\n"
    assert gpt.parse(["--prompt", "Anna\r\nOtto"])[0].prompt == "Anna\nOtto"


def test_a_text_is_found_beside_the_program_or_fetched_or_missed(folder, monkeypatch, capsys):
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    monkeypatch.setattr(gpt, "__file__", str(folder / "gpt.py"))
    assert gpt.find_text(Path("input.txt")) == folder / "input.txt"
    (folder / "input.txt").unlink()
    monkeypatch.setattr(gpt, "TEXT_URL", (folder / "nowhere").as_uri())
    assert "can't be fetched" in refused([], capsys) and files() == ""


def test_a_file_is_written_whole_where_a_link_leads_whatever_other_programs_do(folder, monkeypatch):
    def other_program(_):
        monkeypatch.setattr(os, "fsync", Mock())
        monkeypatch.setattr(os, "getpid", lambda: 1)
        gpt.write("link.pt", b"theirs")

    Path("link.pt").symlink_to(folder / "drive.pt")
    monkeypatch.setattr(os, "fsync", other_program)  # while ours is not yet renamed, it writes the same file
    gpt.write("link.pt", b"ours")
    monkeypatch.setattr(time, "sleep", Mock())
    monkeypatch.setattr(os, "replace", Mock(side_effect=PermissionError))  # as Windows, while one reads it
    with pytest.raises(PermissionError):
        gpt.write("link.pt", b"too late")
    assert os.replace.call_count > 10 and files() == "drive.pt input.txt link.pt"
    assert Path("link.pt").is_symlink() and Path("drive.pt").read_bytes() == b"ours"


class Hostile:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return (open, ("hacked", "w"))


def test_a_saved_model_comes_back_whole_and_what_is_not_one_is_refused_and_runs_nothing(folder):
    gpt.save("gpt.pt", randomized(SMALL), TOKENIZER)
    model, tokenizer = gpt.load("gpt.pt")
    assert same(model.state_dict(), randomized(SMALL).state_dict())
    assert tokenizer.vocabulary == TOKENIZER.vocabulary
    found, whole = torch.load("gpt.pt", weights_only=True), Path("gpt.pt").read_bytes()
    unlike = found | {"model": found["model"] | {"wpe.weight": torch.zeros(16, 17)}}
    setting = found | {"config": found["config"] | {"init_std": 0.02}}
    for content in [b"", whole[:-1], b"To be, or not to be\n", Hostile(), nn.Linear(2, 2), setting, unlike]:
        if isinstance(content, bytes):
            Path("bad.pt").write_bytes(content)
        else:
            torch.save(content, "bad.pt")
        with pytest.raises(ValueError, match="no whole checkpoint of this gpt.py in bad.pt") as error:
            gpt.load("bad.pt")
        assert str(error.value).isprintable() and not Path("hacked").exists()
    assert "wpe.weight" in str(error.value)


def test_auto_is_a_gpu_only_if_it_works_and_apples_only_for_one_process(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert gpt.pick_device("auto").type == "cpu" and "cuda:0 can't be used" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="memory is full"):
        patch.setattr(torch, "zeros", Mock(side_effect=torch.OutOfMemoryError("memory is full")))
        gpt.pick_device("auto")
    monkeypatch.setattr(gpt, "WORLD_SIZE", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="cuda:1"):
        gpt.pick_device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert gpt.pick_device("auto").type == "cpu" and "mps" not in capsys.readouterr().out


def test_what_is_faster_trains_nearly_the_same_in_float32_weights(monkeypatch):
    original, (_, plain) = torch.compile, trained(replace(SMALL, steps=4))
    # The C++ compiler takes half a minute: all but the last stage (.ci/run does it all).
    monkeypatch.setattr(torch, "compile", lambda model: original(model, backend="aot_eager"))
    for dtype, compile in [("bfloat16", False), ("auto", True)]:
        model = gpt.GPT(replace(SMALL, dtype=dtype, compile=compile))
        _, results = trained(replace(SMALL, steps=4), model, gpt.speed_up(model, BATCH))
        for (_, loss, _), (_, expected, _) in zip(results, plain):
            assert loss == pytest.approx(expected, abs=0.02)
        assert (results != plain) or compile
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_auto_takes_bfloat16_only_on_gpus_that_have_it_in_hardware(monkeypatch):
    monkeypatch.setattr(gpt, "sees_ahead", lambda network, tokens: False)
    for capability, kind in [((7, 5), gpt.GPT), ((8, 0), gpt.BFloat16), ((9, 0), gpt.BFloat16)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert type(gpt.speed_up(gpt.GPT(SMALL), MagicMock(device=torch.device("cuda")))) is kind
    assert type(gpt.speed_up(gpt.GPT(SMALL), BATCH)) is gpt.GPT


def test_a_compiler_may_fail_but_attention_may_not_see_ahead(folder, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError("no compiler")))
    gpt.main([*FLAGS, "--steps", "2", "--compile"])
    assert "without it (no compiler)" in capsys.readouterr().out
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, is_causal: attention(q, k, v))
    with pytest.raises(SystemExit, match="see later ones"):  # such a text is printed; the status is 1
        gpt.main([*FLAGS, "--steps", "2", "--out", "new.pt"])
    assert files() == "gpt.pt input.txt"


# ---------------------------------------------------------------- 13: the command line


def saved(path="gpt.pt"):
    """What is in a checkpoint, in a form that can be compared."""
    found = torch.load(path, weights_only=True)
    return found | {"model": {name: weight.tolist() for name, weight in found["model"].items()}}


def test_what_is_typed_beats_a_size_and_a_checkpoint_that_is_trained_on(folder):
    def model(*flags):
        return gpt.Run(*gpt.parse(flags)).model

    medium = model("--size", "medium", "--steps", "7").config
    assert (medium.n_layer, medium.dropout, medium.steps, medium.lr) == (6, 0.2, 7, 0.256 / 384)
    gpt.save("gpt.pt", randomized(SMALL), TOKENIZER)
    tuned = model("--init-from", "gpt.pt", "--eval-every", "7")
    assert same(tuned.state_dict(), randomized(SMALL).state_dict())
    assert tuned.config == replace(SMALL, steps=300, eval_every=7, lr=0.064 / 16)
    # A head start leaves the first channels to tokens.
    assert not model().wpe.weight[:, :96].any() and model("--no-head-start").wpe.weight[:, :96].all()
    # A run that passes over its text more than a hundred times is evaluated at least ten times.
    assert model().config.eval_every == 290 and model("--steps", "50").config.eval_every == 500


def test_only_text_goes_to_standard_output_when_writing(folder, capsys):
    gpt.main([*FLAGS, "--steps", "2"])
    model, tokenizer = gpt.load()
    for seed in (1337, 5):
        capsys.readouterr()
        gpt.main(["--generate", "--length", "50", "--prompt", TEXT[:30], "--seed", str(seed)])
        text = TEXT[:30] + written(model, TEXT[:30], tokenizer=tokenizer, seed=seed) + "\n"
        assert capsys.readouterr() == (text, "")


# Each of these gets one line on standard error that contains the words, status 2, and changes no file.
BAD_INPUT = f"""
--data nowhere.txt                        | nowhere.txt --data
--data binary.dat                         | binary.dat UTF-8
--data short.txt                          | short.txt --block-size
--n-embd 130 --n-head 4                   | --n-head 130
--st 5                                    | --st
--device cuda:99 --plot early.png         | cuda:99 auto cpu
--plot nowhere/loss.png                   | nowhere
--plot loss.xyz                           | xyz
--out folder.pt                           | folder.pt
--out input.txt/gpt.pt                    | input.txt/gpt
--out {"a" * 250}.pt                      | aaa
--out gpt.run.pt                          | --out .run.pt
--prompt -HAMLET:                         | --prompt=-
--resume --out done.pt                    | done.run.pt --init-from
--resume --out open.pt --data chinese.txt | 中
--resume --out open.pt --steps 3          | 3 4
--resume --out open.pt --n-head 1         | n_head
--init-from open.pt                       | open.pt
--init-from done.pt --no-head-start       | head_start
--generate --out done.pt --prompt ß       | ß
--generate --out done.pt --n-head 4       | --generate
"""


@pytest.fixture(scope="module")
def folder_of_traps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traps")
    (folder / "folder.pt").mkdir()
    (folder / "binary.dat").write_bytes(bytes(range(256)) * 50)
    for name, text in [("input", TEXT[:20_000]), ("short", TEXT[:1280]), ("chinese", "中" * 1500)]:
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    run = [*FLAGS, "--eval-every", "2", "--data", f"{folder}/input.txt", "--out"]
    gpt.main([*run, f"{folder}/done.pt", "--steps", "2"])
    power_cut([*run, f"{folder}/open.pt", "--steps", "9"], after=5)
    return folder


@pytest.mark.parametrize("line", BAD_INPUT.strip().splitlines())
def test_bad_input_gets_one_line_and_changes_nothing(line, folder_of_traps, monkeypatch, capsys):
    def contents():
        return {path: path.read_bytes() for path in folder_of_traps.rglob("*") if path.is_file()}

    command, words = line.split("|")
    monkeypatch.chdir(folder_of_traps)
    before, told = contents(), refused(command.split(), capsys)
    assert all(word in told for word in words.split()) and contents() == before


def test_what_a_device_or_a_cluster_cannot_do_is_told_at_once(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "pick_device", lambda name: torch.device("mps"))
        assert "--compile" in refused(["--compile"], capsys)
    monkeypatch.setattr(gpt, "WORLD_SIZE", 2)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        assert f"no {name}" in refused([], capsys)
        monkeypatch.setenv(name, "0")
    assert "2 processes" in refused(["--batch-size", "3"], capsys) and files() == "input.txt"


def test_a_picture_is_drawn_in_training_and_again_from_the_finished_model(folder, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    gpt.main([*FLAGS, "--steps", "2", "--plot", "loss.png"])
    gpt.main(["--generate", "--plot", "again.png"])
    gpt.draw("empty.png", {"train_losses": [], "val_losses": []})
    loss, again, empty = (Path(f"{name}.png").read_bytes() for name in ("loss", "again", "empty"))
    assert loss.startswith(b"\x89PNG") and loss == again != empty
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert "matplotlib" in refused(["--plot", "loss.png"], capsys)


def test_what_is_printed_cannot_end_a_run(folder, monkeypatch):
    Path("input.txt").write_text(TEXT[:9000] + "🎭" * 9000, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    gpt.main([*FLAGS, "--steps", "40", "--prompt", "🎭", "--out", "a.pt"])
    for flags in ([*FLAGS, "--steps", "2", "--out", "b.pt"], "--generate --out b.pt --length 9999".split()):
        reader, writer = os.pipe()
        os.close(reader)  # as in `python gpt.py | head`
        monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
        gpt.main(flags)
    assert files() == "a.pt b.pt input.txt"


# ---------------------------------------------------------------- what a run leaves behind


class PowerCut(Exception):
    """What ends a run at once."""


def during(argv, after, event):
    """Do what gpt.main does with these arguments; after so many steps, something happens."""

    def train(*arguments, original=gpt.train):
        for step, loss, val_loss in original(*arguments):
            yield step, loss, val_loss
            if step == after:
                event()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "train", train)
        return gpt.main(argv)


def power_cut(argv, after):
    with pytest.raises(PowerCut):
        during(argv, after, Mock(side_effect=PowerCut))


RUN = [*FLAGS, "--steps", "300", "--eval-every", "60", "--dropout", "0.1", "--seed", "5"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What is in the file of a run that was left alone, in a thread of its own, where a run can be, too."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "input.txt").write_text(TEXT[:20_000], encoding="utf-8")
    argv = [*RUN, "--data", str(folder / "input.txt"), "--out", str(folder / "gpt.pt")]
    thread = threading.Thread(target=gpt.main, args=[argv])
    thread.start()
    thread.join(60)
    return saved(folder / "gpt.pt")


def test_a_run_is_saved_at_evaluations_and_every_minute_and_can_be_moved(folder, monkeypatch, uninterrupted):
    Path("before").mkdir()
    Path("input.txt").rename("before/plays.txt")
    monkeypatch.chdir("before")
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", Mock(side_effect=range(0, 10_000, 61)))
        power_cut([*RUN, "--data", "plays.txt"], after=5)
    assert saved("gpt.run.pt")["run"]["step"] == 5
    monkeypatch.chdir(Path.cwd().rename(folder / "after"))
    power_cut(["--resume"], after=130)
    assert saved("gpt.run.pt")["run"]["step"] == 120
    gpt.main(["--resume"])
    assert saved() == uninterrupted and files() == "gpt.pt plays.txt"


def test_a_run_that_has_not_ended_never_displaces_a_finished_model(folder, uninterrupted, capsys):
    def write_and_be_killed(path, content, write=gpt.write):
        write(path, content)
        if Path(path).name == "gpt.pt":
            raise PowerCut

    gpt.main([*FLAGS, "--steps", "2"])
    finished = Path("gpt.pt").read_bytes()
    power_cut(RUN, after=70)
    unfinished = Path("gpt.run.pt").read_bytes()
    power_cut(RUN, after=130)
    assert "gpt.run.pt.old" in capsys.readouterr().out and Path("gpt.pt").read_bytes() == finished
    assert Path("gpt.run.pt.old").read_bytes() == unfinished  # kept once, and not at each save
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(gpt, "write", write_and_be_killed)  # when it has all but ended
        gpt.main(["--resume"])
    assert saved() == uninterrupted and Path("gpt.run.pt").exists()
    gpt.main(["--resume"])
    assert "Counting gets 1.5" in capsys.readouterr().out and Path("gpt.pt.old").read_bytes() == finished
    assert saved() == uninterrupted and files() == "gpt.pt gpt.pt.old gpt.run.pt.old input.txt"


def test_a_full_disk_or_a_loss_that_is_not_finite_leaves_the_last_good_save(folder, uninterrupted):
    full, cross_entropy = Mock(side_effect=OSError("no space left")), F.cross_entropy
    nan = Mock(side_effect=lambda *inputs, **how: cross_entropy(*inputs, **how) * math.nan)
    rows = [(RUN, os, "fsync", full, "no space left.* 60"), (["--resume"], F, "cross_entropy", nan, "--lr")]
    for flags, place, name, fault, words in rows:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match=words) as stop:
            during(flags, after=110, event=lambda: patch.setattr(place, name, fault))
        assert stop.value.code.isprintable() and files() == "gpt.run.pt input.txt"
        assert saved("gpt.run.pt")["run"]["step"] == 60
    gpt.main(["--resume"])
    assert saved() == uninterrupted


def test_a_run_trains_on_nine_tenths_and_a_resumed_one_takes_new_settings_and_keeps_them(folder, monkeypatch):
    power_cut([*FLAGS, "--steps", "9", "--eval-every", "2"], after=5)
    power_cut(["--resume", "--weight-decay", "0.7", "--lr", "0.1", "--steps", "8"], after=7)
    monkeypatch.setattr(gpt, "train", Mock(side_effect=gpt.train))
    gpt.main(["--resume"])
    _, optimizer, config, training, validation, start = gpt.train.call_args.args
    assert (len(training), len(validation), start, config.lr, config.steps) == (18_000, 2_000, 6, 0.1, 8)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.7, 0.0]


def test_ctrl_c_in_python_gives_back_the_best_model_and_says_how_to_go_on(folder, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "evaluate", Mock(side_effect=[2.0, 3.0, 2.5]))
    run = [*FLAGS, "--steps", "30", "--eval-every", "10"]
    best, _ = during(run, after=22, event=lambda: signal.raise_signal(signal.SIGINT))
    found = torch.load("gpt.run.pt", weights_only=True)
    assert found["run"]["step"] == 23 and not same(found["run"]["weights"], best.state_dict())
    resume, write = re.findall(r"main\(.*\)", capsys.readouterr().out)
    for line in (write, resume):
        model, _ = eval(line, vars(gpt))
        assert same(model.state_dict(), best.state_dict())
    finished = {"config", "vocabulary", "model", "train_losses", "val_losses"}  # small enough to share
    assert saved().keys() == finished and saved()["val_losses"] == [[10, 2.0], [20, 3.0], [30, 2.5]]
    assert same(gpt.load()[0].state_dict(), best.state_dict())


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError("no space left")])
def test_what_stops_a_finished_model_while_it_writes_does_not_speak_of_going_on(
    fault, folder, monkeypatch, capsys
):
    generate = gpt.generate

    def interrupted_in_the_end(*arguments, **length):
        if not length:  # the samples during the run are given one
            raise fault
        return generate(*arguments, **length)

    monkeypatch.setattr(gpt, "generate", interrupted_in_the_end)
    try:
        gpt.main([*FLAGS, "--steps", "2"])
    except SystemExit as stop:
        print(stop)
    told = capsys.readouterr().out
    assert "is in gpt.pt" in told and "--resume" not in told
    assert "Stopped." in told or "no space left" in told


def test_ctrl_c_before_a_run_begins_ends_the_program_quietly(folder, monkeypatch):
    monkeypatch.setattr(gpt, "read_text", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        gpt.main(FLAGS)
    assert stop.value.code == 130 and files() == "input.txt"


def test_a_second_ctrl_c_does_not_wait_and_promises_nothing(folder, capsys):
    model, _ = during(RUN, after=3, event=Mock(side_effect=KeyboardInterrupt))
    out = capsys.readouterr().out
    assert "Stopped." in out and "--resume" not in out and files() == "input.txt" and written(model)


# ---------------------------------------------------------------- programs killed and started again


only_linux = pytest.mark.skipif(sys.platform != "linux", reason="not all systems have such processes")


def program(*flags, **environment):
    """Start gpt.py as a user would. It is killed after two minutes, lest a test wait for ever."""
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    run = subprocess.Popen([sys.executable, HERE / "gpt.py", *flags], env=os.environ | environment, **how)
    limit = threading.Timer(120, run.kill)
    limit.daemon = True  # does not keep pytest from ending
    limit.start()
    return run


def end(run):
    """Wait until a program ends -> exit status (-9 if it was killed), output and errors."""
    out, err = run.communicate(timeout=150)
    return run.returncode, out, err


@only_linux
def test_a_run_killed_or_stopped_by_ctrl_c_and_resumed_ends_the_same(folder, uninterrupted):
    killed = program(*RUN, "--out", "my model.pt", RANK="1")  # RANK: left over from a cluster
    assert any("step 100" in line for line in killed.stdout)
    killed.kill()
    assert end(killed)[0] == -signal.SIGKILL
    stopped = program("--resume", "--out", "my model.pt")
    assert any("val loss" in line for line in stopped.stdout)
    stopped.send_signal(signal.SIGINT)
    status, out, err = end(stopped)
    assert (status, err) == (130, "")  # no warning either
    resume, write = [shlex.split(line) for line in out.splitlines() if "--out" in line]  # as a shell does
    assert resume[:2] == write[:2] == [sys.executable, str(HERE / "gpt.py")]
    gpt.main(write[2:])
    gpt.main(resume[2:])
    assert saved("my model.pt") == uninterrupted


@only_linux
def test_two_processes_do_what_one_does_and_speak_with_one_voice(folder):
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{20_000 + os.getpid() % 10_000}"}
    flags = [*FLAGS, "--steps", "50", "--eval-every", "25", "--device", "cpu", "--out"]
    first, second = [program(*flags, "two.pt", RANK=rank, **place) for rank in ("0", "1")]
    gpt.main([*flags, "one.pt"])
    status, out, err = end(first)
    assert (status, err) == (0, "") and "val loss" in out and end(second) == (0, "", "")
    one, two = saved("one.pt"), saved("two.pt")
    assert two["train_losses"] == pytest.approx(one["train_losses"], abs=1e-4)
    assert dict(two["val_losses"]) == pytest.approx(dict(one["val_losses"]), abs=1e-4)


# ---------------------------------------------------------------- notebooks


def test_the_file_runs_in_one_notebook_cell_and_fetches_its_text(folder):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    source = (HERE / "gpt.py").read_text(encoding="utf-8")
    # The defaults would take minutes: a smaller model, and a short text from this folder.
    source = source.replace("main([] if", f"main({FLAGS + ['--steps', '4']} if")
    source = source.replace(gpt.TEXT_URL, Path("input.txt").rename("short.txt").absolute().as_uri())
    cells = [source, "print('more' + ''.join(generate(model, tokenizer, length=7)))"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    first, second = ["".join(output.get("text", "") for output in cell.outputs) for cell in book.cells]
    assert "fetching Tiny Shakespeare" in first and "val loss" in first and "Warning" not in first
    assert second.startswith("more") and Path("input.txt").read_text(encoding="utf-8") == TEXT[:20_000]


# ---------------------------------------------------------------- what the README offers: forks, code alone


README = (HERE / "README.md").read_text(encoding="utf-8")
# Title -> change. Its lines that begin with - are old, those with + new; after @@ comes another place.
FORKS = dict(re.findall(r"<summary>([^<]*) \(\+\d+ -\d+\)</summary>.*?```diff\n(.*?)```", README, re.S))
NEEDS = {"SGD with momentum": "--lr 0.3", "A folder of texts": "--data ."}


def forked(titles):
    """The source of gpt.py after these changes."""
    source = (HERE / "gpt.py").read_text(encoding="utf-8")
    for place in "@@\n".join(FORKS[title] for title in titles.split(", ")).split("@@\n"):
        # Leave out the other sign's lines, and of the rest the first column.
        old, new = (re.sub(rf"^[{other}].*\n|^.", "", place, flags=re.M) for other in "+-")
        assert source.count("\n" + old) == 1, f"this is not once in gpt.py:\n{old}"
        source = source.replace("\n" + old, "\n" + new)
    return source


@pytest.mark.parametrize("titles", [*FORKS, "Rotary positions, RMSNorm, SwiGLU, Muon"])
def test_a_fork_learns_and_writes_alike_with_a_cache_and_can_be_resumed(titles, tmp_path, monkeypatch):
    if "Muon" in titles and not hasattr(torch.optim, "Muon"):
        pytest.skip("Muon came with PyTorch 2.9")
    fork, text = ModuleType("fork"), TEXT[:20_000].replace("KING", "KÖNIG 日本")
    exec(forked(titles), vars(fork))
    monkeypatch.chdir(tmp_path)
    for name, part in zip(["text", "a.txt", "b.txt"], [text, *text.split("\n\n", 1)]):
        Path(name).write_text(part, encoding="utf-8")
    run = "--data text --n-embd 32 --block-size 32 --steps 100 --eval-every 60 --length 9 "
    run = (run + NEEDS.get(titles, "")).split()
    model, tokenizer = fork.main([*run, "--out", "whole.pt"])

    # Its tokens become the text again, also one by one.
    tokens = tokenizer.encode(fork.read_text(Path("." if "folder" in titles else "text"))).tolist()
    assert text == tokenizer.decode(tokens) == "".join(tokenizer.decode([token]) for token in tokens)

    # It learns more than how common each character is: in nats a character, not a token.
    loss = torch.load("whole.pt", weights_only=True)["val_losses"][-1][1] * len(tokens) / len(text)
    assert loss < -sum(n / len(text) * math.log(n / len(text)) for n in Counter(text).values()) - 0.1

    # With the cache it comes to the same logits as without.
    logits, prompt = [], tokenizer.encode("To be 日本").long()
    model.register_forward_hook(lambda model, arguments, output: logits.append(output[0, -1]))
    list(fork.generate(model, tokenizer, "To be 日本", length=15, temperature=0))
    written = torch.cat([prompt, torch.stack(logits).argmax(1)])
    assert torch.allclose(torch.stack(logits), model(written[None, :-1])[0, -15:], atol=1e-4)

    # A run that ends early and goes on comes to the same file.
    rate = fork.learning_rate
    fork.learning_rate = lambda step, config: rate(step, config) if step < 70 else sys.exit()
    pytest.raises(SystemExit, fork.main, run)
    fork.learning_rate = rate
    fork.main(["--resume"])
    assert Path("gpt.pt").read_bytes() == Path("whole.pt").read_bytes()


def test_the_code_alone_as_the_readme_prints_it_runs(tmp_path):
    command = re.search(r'^    python -c "(.*unparse.*)" > code.py$', README, re.M)[1]
    how = dict(stdout=subprocess.PIPE, text=True, encoding="utf-8", timeout=120, check=True)
    code = subprocess.run([sys.executable, "-c", command], cwd=HERE, **how).stdout
    (tmp_path / "code.py").write_text(code, encoding="utf-8")
    (tmp_path / "input.txt").write_text(TEXT[:20_000], encoding="utf-8")
    run = subprocess.run([sys.executable, "code.py", *FLAGS, "--steps", "2"], cwd=tmp_path, **how)
    assert "It writes" in run.stdout and not re.search("^ *#", code, re.M)


def test_the_cells_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = TEXT.index("I marvel your ladyship")
    Path("input.txt").write_text(TEXT[place - 3000 : place + 1000], encoding="utf-8")  # so they are quick
    gpt.save("gpt.pt", gpt.GPT(gpt.Config()), TOKENIZER)
    monkeypatch.setattr(gpt, "reinforce", functools.partial(gpt.reinforce, steps=20))
    cells = [cell for cell in re.findall("```python\n(.*?)```", README, re.S) if "transformers" not in cell]
    for cell in cells:
        exec(cell.replace("500", "2").replace("100", "1"), {})
    told = capsys.readouterr().out
    assert len(cells) == 5 and "block 2, head 4" in told and "kind words" in told and "10 " in told
    assert Path("kind.pt").exists()
