# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6"]
# ///
"""
This file is a complete language model: GPT-2's architecture, trained from nothing on the characters of
Shakespeare, until it writes plays of its own. PyTorch does the arithmetic, the gradients and the optimizer's
steps, all explained below; the rest is on this page.

The same architecture can be trained badly or well, and most of what makes a model of this size good is how
it is trained. On a CPU, this one becomes as good as the usual tutorial's (nanoGPT's) in a fraction of the
time, and section 7 says why.

    python gpt.py                                    train the tiny model on input.txt, then write a scene
    python gpt.py --generate --prompt "HAMLET:"      write more, with the model that is now in gpt.pt
    python gpt.py --help                             every setting, with its default

It needs Python and `pip install torch`, and a laptop will do. (With uv, `uv run gpt.py` alone: it reads in
the first four lines what to install.) In a notebook, paste the file into one cell.

The lesson     0 Settings   1 Text to numbers   2 Attention   3 The MLP   4 The block   5 The model
               6 Batches    7 Training          8 Writing
The program    9 Around the lesson (files, devices, pictures)   10 The command line

Read from the top. Section 0 is a table of settings, full of words that come later; from section 1 on, each
word is explained where it first matters. Lines that begin with >>> are examples, with their results below;
the tests run them, so they are true. A *tensor* is a table of numbers with any number of dimensions; a
comment such as `# (B, T) -> (B, T, C)` at the end of a line gives the shapes of that line's tensors, before
and after, and the letters always mean the same:

    B  batch: how many stretches of text go through the model at once, each on its own
    T  time: how many characters each stretch has, at most the context, `block_size`
    C  channels: how many numbers stand for one character inside the model, `n_embd`
    V  vocabulary: how many different characters there are, `vocab_size`
    ...  any further dimensions

Two habits of PyTorch save many loops. A tensor of numbers can be an index: `table[tokens]` looks up a row
for each of them. And where a tensor has length 1 in some dimension, or lacks it, its numbers are repeated to
fit the other tensor's: (B, T, C) + (T, C) adds the same (T, C) to each of the B (*broadcasting*). `view`,
`permute`, `split`, `[None]` and their like only arrange numbers anew, as the shapes beside them tell; the
dimension -1 is the last; and a name that ends in _, such as `zero_`, changes its tensor in place.
"""

# %% 0. Settings
# This table has everything that can be set about a model and its training: the value, the meaning, and the
# limits within which it makes sense. On a first reading, look at the names and go on; the section named with
# each group explains it. On the command line the same names, all but the last, are flags (`--n-layer 4`),
# and in Python they are arguments (`Config(n_layer=4)`).

import argparse
import atexit
import builtins
import contextlib
import functools
import gc
import hashlib
import io
import logging
import math
import os
import random
import shlex
import shutil
import signal
import sys
import time
import urllib.request
import warnings
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch looks for numpy; we do without
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F


class Mistake(ValueError):
    """Something that the user can put right, as the message says."""


def require(condition, message):
    """Stop with a Mistake, which is a ValueError, unless the condition holds."""
    if not condition:
        raise Mistake(message)


def setting(default, meaning, least=None, most=None):
    """One row of the table below: the default, what it means, the smallest and the largest value allowed."""
    return field(default=default, metadata={"meaning": meaning, "least": least, "most": most})


@dataclass
class Config:
    """All settings of a model and its training. Raises ValueError for a value that makes no sense."""

    # The shape of the model: what a trained model can no longer change.
    n_layer: int = setting(2, "blocks, one on top of the other (section 4)", least=1)
    n_head: int = setting(4, "attention heads in a block; must divide n_embd (section 2)", least=1)
    n_embd: int = setting(128, "width: the numbers that stand for one character (section 5)", least=1)
    block_size: int = setting(128, "context: characters that the model looks back on (section 2)", least=1)
    # Where training starts from (section 5).
    init_std: float = setting(None, "spread of the initial weights (default: 1/sqrt(n_embd))", least=0)
    head_start: bool = setting(True, "start with the first block's heads looking a few characters back")
    # What one step of training learns from (section 6).
    batch_size: int = setting(8, "stretches of text in a step", least=1)
    # How many steps, and how far each goes (section 7).
    steps: int = setting(2500, "steps of training", least=1)
    lr: float = setting(2e-3, "learning rate at its peak", least=0)
    warmup: int = setting(None, "steps until that peak is reached (default: a tenth of all)", least=0)
    final_lr: float = setting(0.0, "learning rate at the end, as a share of the peak", least=0, most=1)
    weight_decay: float = setting(0.3, "pull of the weight matrices towards zero", least=0)
    beta2: float = setting(0.99, "how long AdamW remembers the size of the gradients", least=0, most=0.99999)
    grad_clip: float = setting(1.0, "longest gradient allowed; 0 allows any", least=0)
    dropout: float = setting(0.0, "share of outputs set to 0 in training (section 2)", least=0, most=0.9)
    # Around the mathematics (section 7).
    eval_every: int = setting(500, "steps between two looks at the held-out text", least=1)
    seed: int = setting(1337, "where all chance comes from (section 6)", least=0, most=2**32 - 1)
    dtype: str = setting("auto", "number format: auto, float32, bfloat16 or float16")
    compile: bool = setting(False, "let torch.compile turn the model into faster code first")
    # Counted, not chosen: how many different characters the text has (section 1).
    vocab_size: int = setting(65, "different characters", least=1)

    def __post_init__(self):
        for row in fields(self):
            value, least, most = getattr(self, row.name), row.metadata["least"], row.metadata["most"]
            flag, kind = "--" + row.name.replace("_", "-"), row.type.__name__
            right = isinstance(value, (row.type, int)) or value is row.default
            require(right, f"{flag} must be of Python's type {kind}, not {value!r}")
            if value is not None and least is not None:
                right = least <= value < math.inf and (most is None or value <= most)
                most = "up" if most is None else f"to {most}"
                require(right, f"{flag} must be a number from {least} {most}, not {value}")
        shared = f"--n-embd {self.n_embd} can't be shared out evenly among --n-head {self.n_head}"
        require(self.n_embd % self.n_head == 0, shared)
        too_long = f"--warmup {self.warmup} is longer than the whole run of --steps {self.steps}"
        require((self.warmup or 0) <= self.steps, too_long)
        formats = ("auto", "float32", "bfloat16", "float16")
        require(self.dtype in formats, f"--dtype must be one of {', '.join(formats)}, not {self.dtype!r}")


# Named sizes, for `--size`; each line says how it differs from the table. The end of section 7 tells how the
# learning rates, decay and dropout follow from tiny's. (gpt2 is GPT-2's own shape, meant for a text a hundred
# times as long, which it can't learn by heart: so it has tiny's decay and no dropout.)
SIZES = {
    "tiny": dict(),
    "small": dict(n_layer=4, n_embd=256, steps=8000, lr=1e-3, weight_decay=0.6),
    "medium": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=16, steps=6000,
                   lr=7e-4, weight_decay=0.9, dropout=0.2),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, steps=20_000, lr=3e-4),
}  # fmt: skip


# %% 1. Text to numbers
# A *model* here is one long formula with a great many adjustable numbers, its *parameters*, and *training*
# means changing them, little by little, until its guesses are good. A *neural network* is such a formula,
# put together from simple *layers*, one after another. Formulas compute with numbers, so the text must
# become numbers. The plainest way: make a list of all characters that occur (the *vocabulary*) and write
# down, for each character, its place in that list. That place is its *token*. Today's large models take
# frequent pieces of words instead (Sennrich et al., 2016); GPT-2 has 50,257 of them. Characters make the
# text longer but the vocabulary tiny, and the vocabulary has its price: the model keeps a row of `n_embd`
# numbers for each entry. With rows of 384 numbers:
#
# >>> print(f"{65 * 384:,} numbers for our characters, {50_257 * 384:,} for GPT-2's pieces")
# 24,960 numbers for our characters, 19,298,688 for GPT-2's pieces
#
# The second alone is 1.8 times the whole of our medium model, 10.8 million numbers.


class CharTokenizer:
    """Turns text into tokens and back.

    >>> tokenizer = CharTokenizer.from_text("to be or not to be")
    >>> tokenizer.characters, tokenizer.vocab_size
    (' benort', 7)
    >>> tokenizer.encode("not")
    tensor([3, 4, 6], dtype=torch.int32)
    >>> tokenizer.decode([1, 2, 2])
    'bee'
    """

    def __init__(self, characters):
        self.characters = characters
        self.token_of = {character: token for token, character in enumerate(characters)}

    @classmethod
    def from_text(cls, text):
        """The tokenizer whose vocabulary is what occurs in `text`, sorted."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self):
        return len(self.characters)

    def encode(self, text):
        """Text of N characters -> tensor of N tokens. Raises ValueError for a character that has no token."""
        try:
            tokens = array("i", map(self.token_of.__getitem__, text))
        except KeyError as unknown:
            known = f"{self.characters!r:.200}"
            raise Mistake(f"the model has never seen the character {unknown}; it knows {known}") from None
        return torch.frombuffer(tokens, dtype=torch.int32) if text else torch.empty(0, dtype=torch.int32)

    def decode(self, tokens):
        """Tokens -> text, the inverse of `encode`."""
        return "".join(self.characters[token] for token in torch.as_tensor(tokens).tolist())


# What is there to learn? The model's one task will be to guess the next character, over and over, from those
# before it. It does not name one character but gives each a probability p, and pays -ln p for the one that
# really came: its *loss*. (Why a logarithm? A text is as probable as all its characters' probabilities
# multiplied; logarithms turn the product into a sum. And why not count right guesses? A small improvement
# would not show.) The mean over a text is the *cross-entropy* (Shannon, 1948), and its unit is the *nat*,
# 1.44 bits: certain and right costs 0, and each nat more means a probability 2.7 times smaller. Knowing
# nothing, an even guess among 65 characters costs, in nats for each:
#
# >>> round(-math.log(1 / 65), 2)
# 4.17
#
# Counting alone does better. Score the text by the frequency of each character (spaces and e are cheap, q is
# costly), then by the frequency of each pair (after q comes u). These three losses, 4.17, 3.37 and 2.53 on
# `input.txt`, are the *yardsticks* by which we see whether the model is learning at all; tiny ends near
# 1.69, as if it gave the right character a probability of 0.18 each time. (`input.txt` is ten plays of
# Shakespeare, 1.3 million characters, and all numbers in this file are about it. Where there is no such
# file, the program fetches another text, Tiny Shakespeare.)
#
# One rule matters: never test on what you have trained on, since knowing by heart is not knowing. We count,
# and later train, on the first nine tenths of the text only; the last tenth is *held out*, for measuring.
# (Only the list of characters is taken from all of it.)


def count_pairs(tokens, vocab_size):
    """Row a, column b: how often token b follows token a. (N,) -> (V, V)

    >>> count_pairs(torch.tensor([0, 1, 1, 0, 1]), 2)
    tensor([[0, 2],
            [1, 1]], dtype=torch.int32)
    """
    counts = torch.zeros(vocab_size * vocab_size, dtype=torch.int32)  # (V * V,)
    for start in range(0, len(tokens) - 1, 2**20):  # a million at a time, to save memory
        piece = tokens[start : start + 2**20 + 1].long()  # 64-bit integers, the usual kind for an index
        pairs = piece[:-1] * vocab_size + piece[1:]  # two tokens as one number
        counts.scatter_add_(0, pairs, torch.ones_like(pairs, dtype=torch.int32))  # counts[pair] += 1
    return counts.view(vocab_size, vocab_size)


def yardsticks(training, held_out, vocab_size):
    """What counting alone can tell: name -> loss on the held-out text, in nats per character.

    training and held_out: tokens (N,) and (M,). One is added to each count (Laplace, 1814), so that what
    never occurred in training is costly but not impossible.
    """
    V = vocab_size
    letters, pairs = torch.bincount(training, minlength=V), count_pairs(training, V)  # (V,), (V, V)
    before, after = held_out[:-1].long(), held_out[1:].long()  # (M - 1,) each
    letter = (letters[after] + 1) / (len(training) + V)  # (M - 1,) the probability of each, by its frequency
    pair = (pairs[before, after] + 1) / (letters[before] + V)  # (M - 1,) the same, knowing the one before
    return {
        "guessing evenly": math.log(V),
        "letter frequencies": -letter.log().mean().item(),
        "letter pairs": -pair.log().mean().item(),
    }


# %% 2. Attention
# To guess the next character the model must look at those before it, and which of them matter depends on
# the text: after `q` the last one is enough; inside a name it needs the name's beginning; and whether a
# line is verse shows only further back. *Attention* (Vaswani et al., "Attention Is All You Need", 2017)
# lets every position choose for itself where to look, among at most the last `block_size` characters: the
# *context*. Inside the model each position in the text is a row of numbers, a *vector*; section 5 shows how
# a character becomes one. From it a layer (below) makes three more:
#
#     query  what this position is looking for
#     key    what this position has to offer those who look
#     value  what it hands over when it is looked at
#
# A position's query is multiplied by the key of another, number by number, and the products are summed (the
# *dot product*): that is the *score* which the first gives the second, large where the two fit. *Softmax*
# (Bridle, 1990) turns the scores that a position gives into shares: e to the power of each, divided by their
# sum, so that all are positive and add up to 1. The result is the mean of the values, weighted by these
# shares. (With one vector for all three, a position would fit itself best, and look mostly there.) One thing
# more: a dot product is a sum, of as many products as the vectors have numbers (`head_size`, 32 in tiny),
# some positive and some negative, and by chance alone such a sum, of terms near 1 or -1, is about as large
# as the square root of their number: of a hundred tosses of a coin, one side leads by about ten. Softmax
# would give nearly all of the share to whichever score chance has made the largest, before anything has been
# learned; so scores are first divided by that root. (In the code `@` multiplies tables, *matrices*: it makes
# the dot product of each row of the first with each column of the second. Hence the `transpose`; and `shares
# @ value` makes the weighted means.)
#
# A text also imposes a restriction. In training, every position of a text guesses the character after it,
# all of them at once; so a position may look back, never ahead, or it would read its answer instead of
# guessing. The *causal mask* sets the scores of later positions to minus infinity, so that softmax makes
# their shares 0. Without it the loss falls to 0.03, and what the model writes is nonsense, because when it
# writes there is nothing ahead to read. (This and all such losses, up to the recipe in section 7, are
# tiny's on the held-out text after 500 steps, without the part or with the change in question; one run each,
# give or take 0.03. With all parts it is 1.87; without attention 2.54, no better than counting pairs.)


def attention_by_hand(query, key, value):
    """Attention as its formula says it. Arguments and result: T vectors each, (..., T, head_size).

    Three positions, vectors of one number. All ask with the query 1. The third key fits better than the
    others, by ln 2, so it gets twice their share: 1/4, 1/4, 1/2. The first sees only itself, the second two.

    >>> query, key = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[0.0], [0.0], [math.log(2)]])
    >>> value = torch.tensor([[8.0], [4.0], [0.0]])
    >>> attention_by_hand(query, key, value).flatten()  # 8, (8 + 4) / 2, 8/4 + 4/4 + 0/2
    tensor([8., 6., 3.])

    The model below uses PyTorch's, which does the same in one call, with two dimensions more (see below),
    and is faster because it never writes down the whole table of shares:

    >>> query, key, value = query[None, None], key[None, None], value[None, None]  # (1, 1, 3, 1) each
    >>> F.scaled_dot_product_attention(query, key, value, is_causal=True).flatten()
    tensor([8., 6., 3.])

    What has the mask hidden from the first two? The values after theirs. Without it, all get 8/4 + 4/4 + 0/2:

    >>> F.scaled_dot_product_attention(query, key, value).flatten()
    tensor([3., 3., 3.])
    """
    # In row i, column j of these scores: what position i gives to position j.
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))  # (..., T, head_size) -> (..., T, T)
    ahead = torch.ones_like(scores).triu(1).bool()  # (..., T, T) true where the column is later than the row
    shares = scores.masked_fill(ahead, -math.inf).softmax(-1)  # (..., T, T) each row adds up to 1
    return shares @ value  # (..., T, T) -> (..., T, head_size)


# A *linear layer* is the network's plainest part: each number that it gives out is the dot product of the
# vector that comes in with one row of a table, its *weights*, plus a number of its own, its *bias*. Both are
# parameters. (In PyTorch a layer is an `nn.Module`, an object that keeps its parameters; calling it,
# `layer(x)`, runs its `forward`. `.train()` and `.eval()` tell it whether it is being trained; `.training`
# remembers.) One linear layer makes query, key and value in one go. We do not attend once but `n_head` times
# side by side, each *head* with its own slice of query, key and value, so that one can watch the last letter
# while another watches the speaker's name: `head_size` is C / n_head. (With one head: 2.07.) A last linear
# layer mixes what the heads have found. The names, `c_` and all, are those of GPT-2's own files: `c_attn`
# makes query, key and value; `c_proj` ("projection") mixes the heads.
#
# *Dropout* (Srivastava et al., 2014) sets a random share of a layer's outputs to 0, in training only, and
# enlarges the rest to make up for it. Since no part can then rely on a few others, the text is harder to
# learn by heart. But learning is slower too, so dropout pays only where a large model sees a small text many
# times: a dropout of 0.1 costs tiny 0.06. (It comes after attention, after the MLP, and where the vectors are
# made; GPT-2 also drops shares of attention.)


class Linear(nn.Linear):
    """A linear layer: (..., in_features) -> (..., out_features). On a first reading, skip the rest of it.

    It computes what PyTorch's own does. But when a large matrix meets a single vector on a CPU, as in
    writing (section 8), splitting the matrix in two halves was 1.5 to 4 times faster on two machines that
    had nothing else to do.
    """

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.large = in_features * out_features > 2**17 and out_features % 2 == 0

    def forward(self, x):
        if not self.large or x.numel() != self.in_features or not x.is_cpu:
            return F.linear(x, self.weight, self.bias)
        halves = self.weight.view(2, -1, self.in_features)  # (2, out_features / 2, in_features)
        y = torch.bmm(halves, x.view(1, 1, -1).mT.expand(2, -1, 1))  # (2, out_features / 2, 1)
        return y.view(*x.shape[:-1], -1) + self.bias  # (..., out_features)


class Attention(nn.Module):
    """Each position looks at itself and those before it, with several heads. (B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, n_head, head_size)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, n_head, T, head_size)
        q, k, v = qkv.unbind()  # three times (B, n_head, T, head_size)
        if cache is not None:  # only when writing: section 8 explains it, and `start`
            cache[:, :, :, start : start + T] = qkv[1:]  # (2, B, n_head, T, head_size)
            k, v = cache[:, :, :, : start + T].unbind()  # (B, n_head, start + T, head_size) each
        # T = 1 is the newest position, which may see every key; the mask would take it for the first.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # (B, n_head, T, head_size)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, n_head, T, head_size) -> (B, T, C)
        y = self.c_proj(y)  # (B, T, C)
        return F.dropout(y, self.dropout) if self.training else y


# %% 3. The MLP
# Attention moves information between positions but only ever averages it. The *MLP* (multi-layer perceptron;
# the perceptron, Rosenblatt, 1958, was the first such layer that learned) is where each position, on its
# own, thinks about what it has gathered: a linear layer to four times the width, a bend (the *activation
# function*), a linear layer back. Without the bend two linear layers would be no more than one, since a
# weighted sum of weighted sums is again a weighted sum (loss without: 2.13). GPT-2 bends with *GELU*
# (Hendrycks and Gimpel, 2016; GPT-2's code approximated it): each number x is multiplied by the probability
# that a number drawn at random is smaller than x, from the bell curve whose mean is 0 and whose *standard
# deviation* (the typical distance from the mean) is 1. Large numbers pass, strongly negative ones become 0,
# and in between it is smooth (the simpler bend max(0, x) comes to 1.89):
#
# >>> F.gelu(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).round(decimals=2)
# tensor([-0.0000, -0.1600,  0.0000,  0.8400,  3.0000])
#
# With four times the width, MLPs hold two thirds of all weights, the tables of section 5 aside, and much of
# what a model knows by heart seems to be kept there (Geva et al., 2021).


class MLP(nn.Module):
    """Two linear layers with a bend between them, at each position alone. (B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)  # "fully connected"
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x))  # (B, T, C) -> (B, T, 4 * C)
        x = self.c_proj(x)  # (B, T, 4 * C) -> (B, T, C)
        return F.dropout(x, self.dropout) if self.training else x


# %% 4. The block
# A block is one round of "look around, then think". (Where layers are counted, as in `n_layer` or "a model
# of four layers", blocks are meant.) Neither half replaces the vectors, both add to them: this is a
# *residual connection* (He et al., 2015). So the vectors run through the whole model as a stream that each
# half reads from and writes to, the *residual stream* (Elhage et al., 2021), and what is not touched passes
# unchanged. In training, the signal of what should change (the gradient, section 7) flows back along the
# same stream and reaches the lowest block directly; else the weights of every layer on its way would
# multiply it, until it vanished or exploded. Without residual connections even two blocks learn badly
# (2.40), and deep models hardly at all. A stack of such blocks is a *transformer*: the T in GPT, "generative
# pre-trained transformer".
#
# *Layer normalization* (Ba et al., 2016) comes before each half: it shifts and scales every vector to mean 0
# and standard deviation 1 (`eps` saves it from dividing by 0 where all numbers are equal), then applies a
# learned scale and shift, one of each for every channel. So each half gets input of the same size whatever
# those below have piled up (without: 2.41). The first transformer normalized after each half, in the stream
# itself; GPT-2 does it before, on a copy, and so leaves the direct way back clear: deep models then train
# without special care (Xiong et al., 2020).


class Block(nn.Module):
    """Attention, then MLP, each normalized first and added to the stream. (B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), cache, start)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


# %% 5. The model
# What is still missing are the two ends. Going in, each token becomes a vector, its *embedding* (Bengio et
# al., 2003): row number `token` of a learned table. (The token itself is only a place in a list: that e is
# 43 and t is 58 says nothing about them.) Attention by itself ignores order (a weighted mean has none; the
# mask tells only before from after), so a second table has a vector for each position in the context, and
# the two are added. Without positions, what came before is little more than a bag of letters (2.40). Coming
# out, after a last layer normalization, the dot product of each vector with each row of the first table
# gives a number for each character, its *logit*: the higher, the likelier. A logit may be any number, as a
# dot product may; softmax turns all of them into probabilities. Using one table at both ends is *weight
# tying* (Press and Wolf, 2017): a character is read and written with the same vector, and learned once.
# (With two tables: 1.86. So here it gains nothing; but in the smallest GPT-2 the table is a third of all
# parameters.)
#
# Count the parameters: the two tables; in each block 12 C² weights, 9 C biases, and 4 C numbers in its two
# layer normalizations; and 2 C in the last one.
#
# >>> def count(V, T, C, n_layer): return V * C + T * C + n_layer * (12 * C * C + 13 * C) + 2 * C
# >>> configs = [Config(**size) for size in SIZES.values()]
# >>> [f"{count(65, c.block_size, c.n_embd, c.n_layer):,}" for c in configs]
# ['421,504', '3,208,960', '10,770,816', '85,892,352']
#
# The *initial weights* must be random: if all started equal, all rows of a matrix would be changed in the
# same way and stay alike forever. How large they are (their standard deviation; their mean is 0) matters
# more than it seems. What a layer gives out is a sum of C products, which grows with the root of C (section
# 2); weights of 1 / sqrt(C) cancel that (LeCun et al., 1998), so that what comes out is as large as what
# went in. (The second layer of an MLP sums 4 C, but GELU has made most of its inputs small.) At width 128,
# this is 0.088. GPT-2 drew its weights at 0.02, not far off at its widths of 768 to 1,600; in tiny, all
# layers would answer four times too faintly, and the first few hundred steps would go into making them
# louder (2.04). The tables get the same spread, which makes each of their rows a vector of length 1 (the
# square root of the sum of its squares): token and position weigh the same in their sum, and the first
# logits, dot products with such rows, are about as large as 1, so that no character is preferred by much.
# Layers that write to the residual stream start smaller, divided by the square root of twice `n_layer`, as
# in GPT-2: each block writes twice, and so the stream does not grow with the number of blocks.
#
# One more thing need not start at random. A character is best predicted by the few just before it, so a
# model of text must first learn to look there. That is hard to find: token and position are added, so
# whatever a query asks about a place picks up something of the character too; and in a random table nothing
# says which position comes just before which. So we give the heads a *head start*; training may change all
# of it. First, three preparations:
#
#     - *what* and *where* get channels of their own: a token's vector starts as 0 in the last quarter of the
#       channels, a position's in all others;
#     - in the first block, queries and keys read only that last quarter, values only the rest;
#     - positions start as C / 8 clock hands, each with a pace of its own: one channel holds the sine, another
#       the cosine of the hand's angle. (The first transformer had such waves, never trained.) Going back one
#       position then turns each hand by its own fixed angle, wherever one is.
#
# So a head's query at position p can be made the same vector (normalization aside) as its key at p - d: turn
# all hands back by d positions, then go on as for a key. A vector's dot product with itself is larger than
# with others of about its length, so the head's highest score goes to the character d back. And with keys,
# and so queries, three times as large, scores are nine times as large, and softmax puts nearly all of the
# share there. Head 1 of the first block starts by looking one character back like this, head 2 two, and so
# on. (Only half of the share, once a place C / 2 further back exists, where all hands stand the same again.
# Paces that avoid this gave no lower loss.) In higher blocks the channels have been mixed, and heads start
# at random. The loss without all this: 2.27.


class GPT(nn.Module):
    """The whole model: tokens (B, T) -> logits (B, T, V), at each position for the character after it."""

    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.n_embd
        self.wte = nn.Embedding(config.vocab_size, C)  # "weights of the token embedding"
        self.wpe = nn.Embedding(config.block_size, C)  # "weights of the position embedding"
        # "hidden layers"; a ModuleList, since in a plain list PyTorch would not find their parameters
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C, eps=1e-5)  # "final"
        self.set_initial_weights()

    @torch.no_grad()  # nothing is learned from this, so PyTorch need keep no record of it
    def set_initial_weights(self):
        """Random matrices of the right size, biases at 0; the scales of layer normalization stay at 1."""
        config, chance = self.config, torch.Generator().manual_seed(self.config.seed)  # see section 6
        std = 1 / math.sqrt(config.n_embd) if config.init_std is None else config.init_std
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # a matrix
                smaller = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                parameter.normal_(0, std / smaller, generator=chance)
            elif name.endswith("bias"):
                parameter.zero_()
        if config.head_start and config.n_embd >= 8:  # fewer channels can't be divided like this
            self.give_heads_a_start(std)

    @torch.no_grad()
    def give_heads_a_start(self, std):
        """Tokens and positions get channels of their own, and head d begins by looking d positions back."""
        C, n_head = self.config.n_embd, self.config.n_head
        hands = C // 8
        where = C - 2 * hands  # the position's channels begin here: sines first, then cosines
        # Each hand's turn in one position, from nearly nothing to nearly half a circle. Spread like this, the
        # dot product of two positions is 0, unless they are C / 4 apart, where all hands point the opposite
        # way, or C / 2, where all point the same way.
        pace = math.pi * (torch.arange(hands) + 0.5) / hands  # (hands,)
        angle = torch.arange(self.config.block_size)[:, None] * pace  # (T, 1) * (hands,) -> (T, hands)
        self.wte.weight[:, where:] = 0
        self.wte.weight *= math.sqrt(C / where)  # each row as long as before
        self.wpe.weight[:, :where] = 0
        # A hand's sine and cosine have length 1 together, a row of them sqrt(hands): back to the old length.
        self.wpe.weight[:, where:] = torch.cat([angle.sin(), angle.cos()], dim=1) * std * math.sqrt(C / hands)
        # Of a layer's weights, each row makes one number, and each column reads one channel. These are views:
        # to write to them is to change the layer. Rows of the same head stand together.
        queries, keys, values = self.h[0].attn.c_attn.weight.split(C)  # (C, C) each
        queries[:, :where] = keys[:, :where] = values[:, where:] = 0
        keys *= 3  # and so the queries, made from them below: scores are 9 times as large
        for d, (query, key) in enumerate(zip(queries.chunk(n_head), keys.chunk(n_head)), start=1):
            # With hands at angles x, key = s sin x + c cos x. The query at x is to be the key at x - y, and
            #     sin(x - y) = sin x cos y - cos x sin y        cos(x - y) = cos x cos y + sin x sin y
            s, c = key[:, where:].chunk(2, dim=1)  # (head_size, hands) each
            sin_y, cos_y = (pace * d).sin(), (pace * d).cos()  # (hands,) each
            query[:, where:] = torch.cat([s * cos_y + c * sin_y, c * cos_y - s * sin_y], dim=1)

    def forward(self, tokens, cache=None, start=0):
        """Raises ValueError if the tokens don't fit the context. `cache` and `start` belong to section 8."""
        T = tokens.size(1)
        assert start == 0 or T == 1, "after the first characters, the cache takes one at a time"
        room = self.config.block_size
        require(start + T <= room, f"{start + T} characters don't fit a context of {room}")
        x = self.wte(tokens) + self.wpe.weight[start : start + T]  # (B, T, C) + (T, C) -> (B, T, C)
        x = F.dropout(x, self.config.dropout) if self.training else x
        for layer, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[layer], start)  # (B, T, C)
        return F.linear(self.ln_f(x), self.wte.weight)  # dot products: (B, T, C) -> (B, T, V)


# %% 6. Batches
# Training shows the model stretches of text, and each of their characters asks what comes next: a stretch of
# T asks T questions. The answers, the *targets*, are the stretch moved on by one. A *batch* of B stretches
# is worked through together, since a processor multiplies one large matrix faster than many small ones, up
# to the size that keeps it busy. A still larger batch makes each gradient (section 7) a little surer, but
# for the same amount of text it leaves fewer steps to learn in (64 stretches, an eighth of the steps: 2.33).
#
# Where do the stretches begin? Anywhere, by chance. But chance that can be repeated: a *seed* is a number
# from which a generator of random numbers starts, and the same seed gives the same numbers every time. Step s
# of a run draws all its randomness from the run's seed and s, and from nothing that happened before. That
# is why a run of this file can be repeated to the last bit (on a CPU, with the same PyTorch and number of
# threads; GPUs add in an order of their own), and why one that was interrupted goes on as if it never had
# been: there are no dice to save. (Another seed is another run: held-out losses then differ by up to 0.03.)


def seed_of(seed, step):
    """One number below 2**32 for seed and step. With a plain sum, seed 2 would be seed 1 a step ahead."""
    return (seed * 1_000_003 + step) % 2**32


def get_batch(tokens, batch_size, block_size, seed, step):
    """The batch of this step: inputs and targets, (B, T) each, on the device (CPU or GPU) of `tokens` (N,).

    >>> inputs, targets = get_batch(torch.arange(100), batch_size=2, block_size=4, seed=1, step=0)
    >>> torch.equal(targets, inputs + 1)  # this text is 0, 1, 2, ..., so what comes next is one more
    True
    """
    chance = torch.Generator().manual_seed(seed_of(seed, step))
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=chance)  # (B, 1)
    windows = tokens[(starts + torch.arange(block_size + 1)).to(tokens.device)].long()  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


# %% 7. Training
# The model starts knowing nothing of the text. Each step of training takes one batch and asks of each
# parameter: if it were a little larger, how much would the loss rise or fall? These numbers are the
# *gradient*, and PyTorch works them out backwards, from the loss through everything that led to it (Rumelhart
# et al., 1986). Each layer is told how the loss depends on what it gave out; it works out how the loss then
# depends on its parameters, and on what it was given, and passes the latter on to the layer before.
# `loss.backward()` does all this and adds each number to its parameter's `.grad`. With one parameter of 3,
# and a loss that wants it to be 1:
#
# >>> weight = nn.Parameter(torch.tensor(3.0))
# >>> loss = (weight - 1) ** 2  # 4
# >>> loss.backward()
# >>> weight.grad  # where the weight is a little larger, the loss rises four times as much
# tensor(4.)
#
# The *optimizer* finds the gradient there and moves each parameter a little the other way. That is all; what
# remains is how far to move, in which direction exactly, and how to judge the result.
#
# *The learning rate* is how far. Too small wastes time, too large throws away what was learned; the best
# rate, after a short run-up, is large early and small at the end. *Warm-up* (Goyal et al., 2017): over the
# first steps it rises from almost 0, because the optimizer (below) goes by the mean of many gradients, and
# as long as it has seen one or two it would move everything the whole distance on their word. *Cosine decay*
# (Loshchilov and Hutter, 2017): from the peak it falls along half a cosine wave, first slowly, then fast,
# then gently to its end. Large steps find the region, small ones the lowest point in it; a run that stays at
# the peak keeps jumping about that point and ends higher (1.92).


def learning_rate(step, config):
    """The learning rate of a step, counted from 0.

    >>> config = Config(steps=101, warmup=20, lr=1.0, final_lr=0.1)
    >>> [round(learning_rate(step, config), 2) for step in (0, 10, 20, 60, 100)]
    [0.05, 0.55, 1.0, 0.55, 0.1]
    """
    warmup = config.steps // 10 if config.warmup is None else config.warmup
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)  # from 0 at the peak to 1 at the last step
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


# *AdamW* (Kingma and Ba, 2015; Loshchilov and Hutter, 2019) does not follow a gradient as it comes, since
# batches differ and single ones mislead. For each parameter it keeps two running means, of the gradient and
# of its square. In each step the first keeps 0.9 of its old value and takes a tenth of the new gradient, and
# so looks back on about 10 steps; the second keeps `beta2` = 0.99 and looks back on about 100 (PyTorch's
# default of 0.999 looks back on 1,000, which suits longer runs; here it is no better). Both means start at
# 0, so the first few would be too small, which is corrected. The parameter moves by the learning rate times
# the first divided by the square root of the second (plus a hundred-millionth, `eps`, lest it divide by 0).
# That quotient is near 1 or -1 while the gradients agree and near 0 while they cancel, whether they are
# large or tiny; plain gradient descent would need a rate of its own for each kind of layer (with one rate
# for all, the best of four tried, and without decay: 1.95). In its first step, a gradient of 100 and one of
# 0.001 move their parameters equally far:
#
# >>> weight = nn.Parameter(torch.tensor([1.0, 1.0]))
# >>> weight.grad = torch.tensor([100.0, 0.001])
# >>> torch.optim.AdamW([weight], lr=0.1, weight_decay=0).step()
# >>> weight.data
# tensor([0.9000, 0.9000])
#
# *Weight decay*, the W, shrinks each weight in every step by a small share of itself, the learning rate
# times `weight_decay`. What the data does not keep asking for fades, which keeps weights small and the
# model from learning the text by heart. Only the matrices decay: biases and scales are few, and there is
# little to be remembered in them.
#
# *Gradient clipping* (Pascanu et al., 2013): now and then a batch is so odd that its gradient, all its
# numbers taken as one long arrow, is much longer than usual; a gradient longer than `grad_clip` (1, as in
# GPT-3) is first shortened to that, so that one bad step does not undo many.
#
# Decay, clipping and warm-up are insurance: in 500 steps of tiny, leaving out any one of them changes the
# loss by 0.01 at most. Large models in long runs need them.


def make_optimizer(model, config):
    """AdamW over all parameters of the model, with weight decay on the matrices alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = matrices[0].device.type != "mps"  # all parameters in one go, but on Apple's GPUs one by one
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=fused)


# *Precision.* A float32 number has 24 bits of precision, more than training needs, and GPUs multiply 16-bit
# numbers several times faster (Colab's T4 eight times, by its maker's figures). There are two kinds.
# bfloat16 can hold numbers as large and as small as float32 can, but only to 8 bits of precision. float16
# has 11 bits, but below 0.00000006 everything is 0, small gradients too; so the loss is multiplied by a
# large number, which makes every gradient as many times larger, and the gradients are divided by it before
# they are used (`GradScaler`, which also finds the number). In *mixed precision* (`autocast`; Micikevicius
# et al., 2018) linear layers and attention compute with 16-bit copies, while weights, residual stream,
# normalization and optimizer stay in float32. `auto` takes bfloat16 on NVIDIA's GPUs that have it in
# hardware (2020 and later), float16 on their older ones such as Colab's T4 (which accepts bfloat16 but only
# imitates it, slowly), and float32 elsewhere.


def number_format(dtype, device):
    """The torch.dtype for this setting on this device. Raises ValueError for one that the device can't do."""
    if dtype == "auto" and device.type == "cuda":  # an NVIDIA GPU
        dtype = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    able = {"cpu": ("auto", "float32", "bfloat16"), "mps": ("auto", "float32")}.get(device.type)
    advice = f"--dtype {dtype} is not for --device {device.type}: choose {' or '.join(able or ())}"
    require(able is None or dtype in able, advice)
    return torch.float32 if dtype == "auto" else getattr(torch, dtype)


def mixed_precision(dtype, device):
    """A context for `with`, in which the model computes in this torch.dtype where it can."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


# *Several processes* (started by `torchrun`) can share one run: each has the whole model and its share of
# every batch, and their gradients are averaged before each step, so that together they do what one would do
# with the whole batch. This is *data parallelism* (Li et al., 2020); without it, one device does all the
# work. With one process, as on a laptop, the first function below returns (0, 1), and the second the number
# it was given.


def place_among_processes():
    """This process's number from 0, its *rank*, and how many there are, as `torchrun` tells it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def sum_over_processes(number, device):
    """The sum of every process's number, in each of them."""
    if place_among_processes()[1] == 1:
        return number
    total = torch.tensor(number, dtype=torch.float32, device=device)
    dist.all_reduce(total)
    return total.item()


# *The held-out loss* is the one number to judge by, so we do not estimate it from a few batches: we cut the
# whole held-out text into windows and take the mean over every character. (The first characters of a window
# have little to look back on, so the number is a little higher than what the model can do.) While it falls
# together with the training loss, the model is learning the language; when the training loss goes on falling
# and this one turns and rises, it is learning the text by heart: *overfitting*. (The small size ends with a
# training loss of 1.19 and a held-out loss of 1.57: much of what it knows, it knows by heart. What helps:
# more text, weight decay, dropout, and keeping the best model, not the last.)


@torch.inference_mode()  # no_grad in its quickest form, for results that are never learned from
def evaluate(model, tokens):
    """Mean loss in nats per character over all of `tokens` (N,), read once, in windows of the context."""
    config, device = model.config, tokens.device
    T, questions = config.block_size, len(tokens) - 1
    whole, n = questions // T * T, max(1, 8192 // T)  # characters in whole windows; windows at a time
    inputs, targets = tokens[:whole].view(-1, T), tokens[1 : whole + 1].view(-1, T)  # (windows, T) each
    batches = list(zip(inputs.split(n), targets.split(n)))  # (n, T) each
    if whole < questions:  # what is left makes a shorter window
        batches.append((tokens[None, whole:questions], tokens[None, whole + 1 :]))
    rank, processes = place_among_processes()
    dtype = number_format(config.dtype, device)
    was_training, total = model.training, 0.0
    model.eval()  # without dropout
    for inputs, targets in batches[rank::processes]:
        with mixed_precision(dtype, device):
            logits = model(inputs).float().flatten(0, 1)  # (n, T) -> (n * T, V)
        total += F.cross_entropy(logits, targets.flatten().long(), reduction="sum").item()
    model.train(was_training)
    return sum_over_processes(total, device) / questions


# The settings of training together are the *recipe*, and the recipe is what makes this file fast. Here is
# what each part of it is worth to tiny. We begin with the usual recipe, as nanoGPT (Karpathy, 2022) has it
# for a CPU (weights at 0.02, 2,000 steps of 12 stretches of 64 characters, a rate that climbs to 1e-3 in 100
# steps and falls to a tenth of it, weight decay 0.1), and change one thing a line, keeping those above. All
# lines but the last read 1.5 million characters. Held-out loss, median of three seeds: a difference of 0.01
# may be chance. The README has the commands.
#
#     the usual recipe                                              1.90
#     initial weights of 1 / sqrt(C)                                1.84
#     twice the learning rate, 2e-3                                 1.78
#     a tenth of all steps to warm up, then down to 0               1.79
#     weight decay 0.3                                              1.78
#     the head start                                                1.74
#     smaller batches, 8 stretches of 64, in 3,000 steps            1.74
#     longer contexts, 8 stretches of 128, in 1,500 steps           1.72
#     more text: 2,500 steps                                        1.69
#
# Three of these cost nothing but a thought and gain most: how large the weights start, how far the steps go,
# where the heads look first. (In a run of 500 steps the head start gains 0.40.) Our schedule gains nothing
# over the usual one, which also rises and falls, but it suits any number of steps; decay and smaller batches
# gain next to nothing, longer contexts a little, and the rest is patience. The same computation spent on a
# larger model, in fewer steps, gives less: with the usual recipe, four layers come to 2.10 in half the steps
# and a width of 256 to 2.05 in a quarter of them, against 1.90. Eight heads instead of four change nothing.
#
# As for time: nanoGPT's model for a CPU has four layers and trains for 2,000 steps, twice the work of the
# first line. Written as a plain script, it ended at 1.90 as well, after 75 seconds on two cores. Ours, given
# settings for haste, was at 1.89 after 10 seconds (`--block-size 64 --lr 3e-3 --steps 700`: short contexts
# make cheap steps, and in a short run the rate can be higher).
#
# The other sizes follow from tiny. The wider the model, the smaller its learning rate, about in inverse
# proportion: what a layer gives out is a sum over its width, in which random weights partly cancel; but a
# step changes all of them so as to move that sum one way, and such changes add up (Yang et al., 2022). So
# that learning by heart is held back as much as in tiny, the decay of small and medium rises as their rate
# falls (a step shrinks each weight by the product of the two). Medium, which reads our text some twenty
# times, gets dropout; tiny and small, which read it two and seven times, are better off without.


@dataclass
class Report:
    """What `train` says after each step."""

    step: int  # steps done so far
    loss: float  # of this step's batch, in nats per character
    held_out: float | None  # loss on the held-out text, when this step was followed by a look at it
    seconds: float  # spent on this call's steps, not counting looks at the held-out text
    state: Callable  # state() is all that it takes to go on from here, valid until the next step


def train(model, training, held_out, state=None):
    """Train the model, in place, as its config says; an iterator that yields a Report after each step.

    training, held_out: tokens (N,), on the model's device. Given a report's `state()`, it goes on from there.
    Raises FloatingPointError when the loss is no longer a number.
    """
    config, device, start, seconds = model.config, training.device, 0, 0.0
    dtype = number_format(config.dtype, device)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state is not None:
        start = state["step"]
        model.load_state_dict(state["model"])
        means = {"state": state["optimizer"]["state"]}  # its settings are the config's, not the state's
        optimizer.load_state_dict(optimizer.state_dict() | means)
        if state["scaler"]:  # empty unless in float16
            scaler.load_state_dict(state["scaler"])
    rank, processes = place_among_processes()
    network = nn.parallel.DistributedDataParallel(model) if processes > 1 else model  # averages the gradients
    network = torch.compile(network) if config.compile else network  # takes half a minute: for long runs

    def state_after(steps):
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        return {"step": steps} | {name: part.state_dict() for name, part in parts.items()}

    for step in range(start, config.steps):
        began = time.perf_counter()
        model.train()  # with dropout, whatever was done with the model since the last step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        torch.manual_seed(seed_of(config.seed, step * processes + rank))  # dropout's dice
        batch = get_batch(training, config.batch_size, config.block_size, config.seed, step)
        inputs, targets = (part.chunk(processes)[rank] for part in batch)  # our share of it, (B, T) each
        with mixed_precision(dtype, device):
            logits = network(inputs).float().flatten(0, 1)  # (B, T) -> (B * T, V)
            loss = F.cross_entropy(logits, targets.flatten())  # softmax, then the mean of -ln p: one number
        optimizer.zero_grad()  # gradients add up unless they are cleared
        scaler.scale(loss).backward()  # except in float16, the same as loss.backward()
        scaler.unscale_(optimizer)  # the gradients back to their true size
        if config.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)  # except in float16, the same as optimizer.step()
        scaler.update()
        mean_loss = sum_over_processes(loss.item(), device) / processes
        seconds += time.perf_counter() - began

        look = (step + 1) % config.eval_every == 0 or step + 1 == config.steps
        held_out_loss = evaluate(model, held_out) if look else None
        if not math.isfinite(mean_loss + (held_out_loss or 0)):
            advice = f"lower --lr, now {config.lr}"
            raise FloatingPointError(f"the loss is no longer a finite number at step {step + 1}: {advice}")
        yield Report(step + 1, mean_loss, held_out_loss, seconds, functools.partial(state_after, step + 1))


# %% 8. Writing
# To write, the model guesses, we choose one character by its probabilities, add it to the text, and ask
# again. There are several ways to choose. *Temperature* (Ackley et al., 1985) divides the logits before
# softmax: below 1 the likely becomes likelier (careful, repetitive), above 1 all becomes more even (bold,
# then nonsense), and at 0 only the likeliest is left. *Top-k* (Fan et al., 2018) strikes out all but the k
# likeliest: each of the others is rare, yet together they come up often and derail the text.


def probabilities(logits, temperature=1.0, top_k=0):
    """Logits (V,) -> the probabilities (V,) to choose by. top_k = 0 keeps all.

    >>> logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    >>> probabilities(logits).round(decimals=2)
    tensor([0.6400, 0.2400, 0.0900, 0.0300])
    >>> probabilities(logits, temperature=0.5).round(decimals=2)
    tensor([0.8600, 0.1200, 0.0200, 0.0000])
    >>> probabilities(logits, temperature=2.0).round(decimals=2)
    tensor([0.4600, 0.2800, 0.1700, 0.1000])
    >>> probabilities(logits, top_k=2).round(decimals=2)
    tensor([0.7300, 0.2700, 0.0000, 0.0000])
    >>> probabilities(logits, temperature=0)
    tensor([1., 0., 0., 0.])
    """
    if temperature < 1e-6:  # 0, or as good as 0
        return F.one_hot(logits.argmax(), len(logits)).float()
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    return logits.softmax(0)


# *The key-value cache.* The naive way sends the whole text through the model again for each new character,
# only to read the logits at its end. Yet nothing has changed for the earlier positions: none of them can see
# the new one, so their keys and values are what they were. So the attention of each block writes its keys
# and values down, and a new character costs the work of one position: it makes its own query, key and value
# and looks at those written down. The answer is the same, and tiny writes 3 times as fast, medium 14 times.
# The cache is one tensor, with room for a whole context in each block; `start` is how many positions it
# already holds.
#
# When the context is full there is no place left: positions are rows of a table, and the table has an end.
# Keys and values depend on their position, so to drop even one character is to work out all others anew.
# Hence we drop the earlier half at once, send the later through afresh as if the text had just begun, and go
# on; so the text can be of any length and the memory stays the same.


@contextlib.contextmanager
def ready_to_write(model):
    """In this `with`, the model has no dropout, and PyTorch does without oneDNN ("mkldnn").

    (That is its helper on CPUs, which wakes every core even for a single GELU.)
    """
    training, onednn = model.training, torch.backends.mkldnn.enabled
    if training:
        model.eval()
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = onednn
        if training:
            model.train()


def generate(model, tokenizer, prompt="", length=500, temperature=0.8, top_k=0, seed=1337):
    """Write on from `prompt`: an iterator over `length` characters, one at a time as they are made.

    An empty prompt counts as two line ends (where the text has none, as the first of the vocabulary); of a
    prompt longer than the context only the end counts. Leaves the model's training mode and PyTorch's
    own random numbers as they were. Raises ValueError for unknown characters in the prompt and for a length,
    temperature or top_k that makes no sense.
    """
    config = model.config
    require(length >= 1, f"--length must be at least 1, not {length}")
    require(0 <= temperature < math.inf, f"--temperature must be a number from 0 up, not {temperature}")
    require(0 <= top_k <= config.vocab_size, f"--top-k must be from 0 to {config.vocab_size}, not {top_k}")
    require(0 <= seed < 2**32, f"--seed must be from 0 to {2**32 - 1}, not {seed}")
    beginning = prompt or ("\n\n" if "\n" in tokenizer.characters else tokenizer.characters[0])
    text = tokenizer.encode(beginning).tolist()

    def characters():  # apart, so that what is wrong shows at the call and not at the first character
        chance = random.Random(seed)
        context, done = text[-config.block_size :], 0  # done: how much of the context is in the cache
        # In each block, keys and values (2) of one text (1): (n_layer, 2, 1, n_head, block_size, head_size)
        shape = config.n_layer, 2, 1, config.n_head, config.block_size, config.n_embd // config.n_head
        cache = model.wte.weight.new_zeros(shape)  # on the same device, in the same format
        for _ in range(length):
            if len(context) > config.block_size:
                context, done = context[-max(1, config.block_size // 2) :], 0
            with torch.inference_mode(), ready_to_write(model):
                new = torch.tensor([context[done:]], device=cache.device)  # (1, T): mostly T = 1
                logits = model(new, cache, done)[0, -1].float().cpu()  # (1, T) -> (V,)
            chances = probabilities(logits, temperature, top_k).tolist()  # (V,) -> V numbers
            token = chance.choices(range(len(chances)), chances)[0]
            done = len(context)
            context.append(token)
            yield tokenizer.characters[token]

    return characters()


# *From here to the models in the news.* That is all there is to it: whoever has come this far has seen every
# part of a language model. What separates it from those is, first of all, scale, and that can be reckoned:
# each parameter costs a multiplication and an addition for each character on the way forward, and twice that
# on the way back (for the gradients of the weights and for those of what went in), 6 operations in all
# (Kaplan et al., 2020; attention's dot products, about a tenth here, are left out). A step of tiny, which
# has 420,000 parameters and takes 8 * 128 characters, at 0.1 trillion operations a second (a laptop's CPU):
#
# >>> print(f"{6 * 420_000 * (8 * 128) / 0.1e12:.3f} seconds")
# 0.026 seconds
#
# (It took 0.028 on two cores.) And the whole training of medium, on that laptop, and at 22 and 330 trillion
# operations a second (a third of what Colab's T4 and an H100 can do at best):
#
# >>> operations = 6 * 10.8e6 * (16 * 256) * 6000  # parameters, characters a step, steps
# >>> [f"{operations / each_second / 60:,.1f} minutes" for each_second in (0.1e12, 22e12, 330e12)]
# ['265.4 minutes', '1.2 minutes', '0.1 minutes']
#
# (For GPUs that is too good to be true: with a model this small, starting an operation takes them longer than
# doing it.)
#
# GPT-2 itself (Radford et al., 2019) has this file's architecture, with pieces of words instead of
# characters, 124 million parameters (our gpt2 and a larger vocabulary) to 1.5 billion, and 40 gigabytes of
# text. Today's models keep its plan and change the parts: queries and keys rotated by their positions
# (rotary, Su et al., 2021) where we add a table; normalization by size alone (RMSNorm, Zhang and Sennrich,
# 2019); an MLP with a gate that lets through or holds back (SwiGLU, Shazeer, 2020); several query heads that
# share one key and value, for a smaller cache (grouped heads, Ainslie et al., 2023). Then comes
# *post-training*: the finished model goes on learning from conversations and from people's preferences
# (Ouyang et al., 2022), which turns a continuer of texts into an assistant.
#
# To read on: most papers named here are shorter than their fame suggests, and GPT-2's is a good first one;
# "The Annotated Transformer" (Rush, 2018) sets the first transformer's paper beside its code; and nanoGPT
# (Karpathy, 2022) trains GPT-2 itself on many GPUs, with a model and a loop of some 300 lines each.


# %% 9. Around the lesson
# The mathematics is done; what follows makes it a program that people can trust with a night of computing.
# First, the text: any UTF-8 file. What is fetched where there is none, Tiny Shakespeare (1.1 million
# characters that Andrej Karpathy's char-rnn made famous), is taken only if its fingerprint is the right one.

NOTEBOOK = hasattr(builtins, "__IPYTHON__")  # running in Jupyter or Colab
TEXT_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def say(line, end="\n"):
    """A line of news; of several processes only the first says it."""
    if place_among_processes()[0] == 0:
        print(line, end=end, flush=True)


def write_whole(path, content):
    """Write bytes to a file so that at every moment either the old content or the new is there, whole.

    The bytes go to a file beside it, are flushed to the disk, and only then take its name. Raises OSError.
    """
    beside = Path(f"{path}.{place_among_processes()[0]}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OSError(f"can't write {path}: {error.strerror}; what was there is untouched") from None
    finally:
        beside.unlink(missing_ok=True)  # debris of a failure, or of Ctrl-C; renamed, it is gone already


def fingerprint(content):
    """The SHA-256 of some bytes: the same for the same bytes, and in practice for no others."""
    return hashlib.sha256(content).hexdigest()


def find_text():
    """The path of input.txt, here or beside this file, or fetched if there is none. Raises OSError."""
    here = Path("input.txt")
    for path in (here, Path(globals().get("__file__", "")).parent / here):  # a notebook has no __file__
        if path.exists():
            return path
    say(f"There is no input.txt here: fetching Tiny Shakespeare from {TEXT_URL}")
    try:
        with urllib.request.urlopen(TEXT_URL, timeout=30) as answer:
            content = answer.read()
        require(fingerprint(content) == TEXT_SHA256, "what came is not Tiny Shakespeare")
    except Exception as error:  # no network, an answer that breaks off, or another text
        raise OSError(f"can't fetch a text ({error}): name one of yours with --data") from None
    write_whole(here, content)
    return here


def read_text(path):
    """The text in a UTF-8 file, with line ends of any system as \\n. Raises OSError or ValueError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # "sig": skips a byte-order mark
    except UnicodeDecodeError as error:
        raise Mistake(f"{path} is not UTF-8 text: see its byte number {error.start}") from None
    except OSError as error:
        raise OSError(f"can't read the text {path}: {error.strerror}") from None


# *Devices.* The same code runs on a CPU, on an NVIDIA GPU (`cuda`) and on an Apple one (`mps`): tensors live
# on a device, and what is computed from them is computed there. A GPU has thousands of small cores, and only
# the larger sizes have work for all of them. `auto` takes the first that is there of cuda, mps and cpu.


def pick_device(name="auto"):
    """The torch.device of this name. Raises ValueError if it is not there."""
    place, neighbours = (int(os.environ.get("LOCAL_" + key, 0)) for key in ("RANK", "WORLD_SIZE"))
    if name == "auto":
        mps = torch.backends.mps.is_available() and neighbours < 2  # it can't talk with other processes
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":  # each process of a machine takes the GPU of its number
        name, there = f"cuda:{place}", torch.cuda.device_count()
        require(neighbours <= max(1, there), f"{neighbours} processes need as many GPUs: here are {there}")
    try:
        torch.zeros(1, device=name).item()  # the proof of a device is that it works
    except Exception:
        raise Mistake(f"--device {name} is not available here: choose auto, cpu, cuda, cuda:1, mps") from None
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32: products of fewer bits, on GPUs that have it
    return device


# A *checkpoint* is a model in a file, and a run writes two. `gpt.pt` is the model with the lowest held-out
# loss so far, to be used and shared: settings, characters, weights, and the losses on the way.
# `gpt.resume.pt` is what it takes to go on: the weights as they are now, which may be worse than the best,
# the two running means that AdamW keeps for each of them, and the number of steps done (in float16 also
# how much the loss is scaled). Of chance nothing needs to be kept (section 6). So a run that is stopped or
# killed at any moment, and resumed, ends like one that was left in peace; the tests kill a few to prove it.
#
# A file from somebody else can't be trusted. Python's own format for such things, pickle, may run any code
# when it is opened. With `weights_only=True` PyTorch reads tensors and plain values and refuses the rest;
# then we check that they are a model of ours: every tensor there, of the right shape, and every number
# finite.


def save(path, model, tokenizer, more=None):
    """Save a model and its tokenizer to a file, with more entries if given (a dict). Raises OSError.

    Of several processes only the first saves.
    """
    if place_among_processes()[0] == 0:
        buffer, settings = io.BytesIO(), asdict(model.config)
        content = {"config": settings, "characters": tokenizer.characters, "model": model.state_dict()}
        torch.save((more or {}) | content, buffer)
        write_whole(path, buffer.getvalue())


def read_checkpoint(path, otherwise="train a model first, to its first look at least: python gpt.py"):
    """What `save` has written, checked: a dict, and its model. Raises OSError if not there, or ValueError."""
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}: {otherwise}")
    try:
        # The format is a zip archive, which has a checksum of each of its parts.
        require(zipfile.ZipFile(path).testzip() is None, "it was damaged")
        found = torch.load(path, map_location="cpu", weights_only=True)
        require(isinstance(found, dict), "something else")
        config, tensors = Config(**found["config"]), list(found["model"].values())
        require(len(tensors) > config.n_layer, "too few weights for its layers")
        require(len(set(found["characters"])) == config.vocab_size, "wrong number of characters")
        model = GPT(config)
        model.load_state_dict(found["model"])  # compares all names and shapes
        state = found.get("optimizer", {"state": {}})["state"]  # besides means, it has counts: lone numbers
        means = [t for entry in state.values() for t in entry.values() if torch.is_tensor(t) and t.dim()]
        require({t.shape for t in means} <= {t.shape for t in tensors}, "wrong shapes of the optimizer")
        require(all(t.isfinite().all() for t in tensors + means), "numbers that are not finite")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise Mistake(f"{path} is not a whole model of gpt.py ({reason}): take another file") from None
    return found, model


def load(path="gpt.pt", device="cpu"):
    """The model and the tokenizer saved in a file, ready to write. Raises OSError or ValueError."""
    found, model = read_checkpoint(path)
    return model.eval().to(device), CharTokenizer(found["characters"])


def draw(path, history, marks):
    """Draw training and held-out loss against the step, with the yardsticks `marks`, into an image file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Mistake("--plot needs a library: pip install matplotlib (uv run --with matplotlib)") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per character)")
    axes.plot(range(1, len(history["training"]) + 1), history["training"], linewidth=0.5, label="training")
    axes.plot(*zip(*history["held_out"]), marker="o", label="held out")
    for (name, loss), style in zip(marks.items(), (":", "-.", "--")):
        axes.axhline(loss, color="gray", linestyle=style, label=f"{name}: {loss:.2f}")
    axes.legend(framealpha=1)
    buffer, kind = io.BytesIO(), Path(path).suffix[1:].lower() or "png"
    kinds = figure.canvas.get_supported_filetypes()
    require(kind in kinds, f"--plot can't draw {path}: it can end in .{', .'.join(kinds)}")
    figure.savefig(buffer, format=kind)
    write_whole(path, buffer.getvalue())
    return figure


# %% 10. The command line
# What a user types becomes settings, and what goes wrong becomes one line that says what to do. A mistake in
# what was typed, or a file that can't be read or written, ends the program with status 2; a failure on the
# way, such as a loss that is no longer a number, with status 1; Ctrl-C with 130 and SIGTERM, by which a
# system asks a program to stop, with 143, as is the custom. The flags are those of `Config` without
# `vocab_size`, and these:

WRITING = {"prompt", "length", "temperature", "top_k"}
FLAGS = {
    "size": (str, "tiny, small, medium or gpt2: other defaults for the settings below (default: tiny)"),
    "device": (str, "auto, cpu, cuda, cuda:1 or mps (default: auto)"),
    "data": (str, "the text to train on, in UTF-8 (default: input.txt)"),
    "out": (str, "the file of the model (default: gpt.pt)"),
    "resume": (bool, "go on with the run of --out where it stopped"),
    "init_from": (str, "start from this trained model instead of from nothing"),
    "plot": (str, "draw the loss into this file, such as loss.png, and in a notebook (needs matplotlib)"),
    "generate": (bool, "don't train: write with the model in --out"),
    "prompt": (str, "what to write on from; - reads it from standard input (default: an empty line)"),
    "length": (int, "how many characters to write (default: 500)"),
    "temperature": (float, "0: always the likeliest character; 1: by the model's chances (default: 0.8)"),
    "top_k": (int, "choose among the k likeliest only; 0: among all (default: 0)"),
}


def read_flags(argv):
    """The command line, a string or a list of words -> the given flags, by name. Raises ValueError."""
    try:
        words = shlex.split(argv) if isinstance(argv, str) else argv
    except ValueError as error:
        raise Mistake(f"{error}: {argv}") from None
    parser = argparse.ArgumentParser("gpt.py", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.description = "Train a small GPT-2 on a text and let it write."
    # argparse answers a mistake with two lines and exits; ours says it in one, like all other mistakes.
    parser.error = lambda message: require(False, f"{message}; python gpt.py --help lists all flags")
    rows = [(name, *row, "store_true") for name, row in FLAGS.items()]
    for row in fields(Config)[:-1]:  # all but vocab_size
        default = "" if row.default is None else f" (default: {row.default})"
        rows.append((row.name, row.type, row.metadata["meaning"] + default, argparse.BooleanOptionalAction))
    for name, kind, meaning, switch in rows:
        how = {"action": switch} if kind is bool else {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + name.replace("_", "-"), help=meaning, **how)
    return vars(parser.parse_args(words))


def refuse(names, why):
    """Stop with a Mistake if any of these flags was given."""
    first = min(names, default="").replace("_", "-")
    require(not names, f"--{first} can't be given beside {why}")


def settings_for(given, unfinished):
    """The flags -> the config of the run, and the checkpoint that it starts from (None: from nothing)."""
    chosen = {row.name: given[row.name] for row in fields(Config) if row.name in given}
    if "resume" in given:  # only what can sensibly change; more --steps stretch the learning rate's curve
        harmless = {"resume", "out", "steps", "device", "data", "plot", "compile"} | WRITING
        refuse(given.keys() - harmless, "--resume: the run keeps the settings that it began with")
        start, begun = read_checkpoint(unfinished, "there is no run to resume")
        require("step" in start, f"{unfinished} is a model, not a run to resume")
        config = replace(begun.config, **chosen)
        done, finished = start["step"], start["step"] == begun.config.steps == config.steps
        require(finished or config.steps > done, f"the run has done {done} --steps already: give more")
        return config, start
    if "init_from" in given:
        fixed = {"size", "n_layer", "n_head", "n_embd", "block_size", "init_std", "head_start"}
        refuse(given.keys() & fixed, "--init-from: the trained model has its shape and its weights")
        start, trained = read_checkpoint(given["init_from"])
        config = trained.config
        # Gentler than from nothing, lest it forget: a quarter of the rate for its width, and an eighth of the
        # default's steps, and of the steps between two looks, both rounded up.
        gentle = {"lr": Config.lr / 4 * Config.n_embd / config.n_embd, "warmup": None}
        gentle |= {name: getattr(Config, name) // 8 + 1 for name in ("steps", "eval_every")}
        return replace(config, **(gentle | chosen)), start
    size = given.get("size", "tiny")
    require(size in SIZES, f"unknown --size {size!r}: choose {', '.join(SIZES)}")
    return Config(**{**SIZES[size], **chosen}), None


# *Before a run* writes anything, all that can be wrong is checked: a mistake that comes to light only after
# a night of training, or after the old model has been written over, is the worst kind.


def prepare(given, out, unfinished):
    """The flags -> config, checkpoint to start from (or None), path of the text, text, tokenizer.

    Raises ValueError or OSError where they don't fit together.
    """
    config, start = settings_for(given, unfinished)
    resumed = start if "resume" in given else {}
    path = Path(given["data"] if "data" in given else resumed.get("data") or find_text())
    text, T, processes = read_text(path), config.block_size, place_among_processes()[1]
    # With so many characters, the held-out tenth is one window and its targets.
    require(len(text) > 10 * T, f"{path} has {len(text)} characters: a context of {T} needs {10 * T + 1}")
    same = not resumed or resumed["text"] == fingerprint(text.encode())
    require(same, f"{path} is not the text that the run in {unfinished} began with")
    lost = resumed and resumed["history"]["held_out"] and not out.exists()
    require(not lost, f"there is no {out}, the best model so far of the run in {unfinished}: put it back")
    plot = [Path(given["plot"])] if "plot" in given else []
    for file in (out, unfinished, *plot):
        require(file.is_file() or not file.exists(), f"{file} is a directory or a device: name a file")
        require(file.parent.is_dir(), f"can't write {file}: there is no directory {file.parent}")
    in_use = [Path(name).resolve() for name in (path, out, unfinished, given.get("init_from", path))]
    require(in_use[0] not in in_use[1:3], f"--out {out} would overwrite the text")
    require(not plot or plot[0].resolve() not in in_use, "--plot would overwrite the text or a model")
    tokenizer = CharTokenizer(start["characters"]) if start else CharTokenizer.from_text(text)
    occurring = Counter(text if "init_from" in given else "").most_common()
    unseen = [f"{c!r} ({n} times)" for c, n in occurring if c not in tokenizer.characters]
    require(not unseen, f"{path} has {len(unseen)} characters new to the model: {', '.join(unseen[:20])}")
    uneven = f"--batch-size {config.batch_size} can't be shared out evenly among {processes} processes"
    require(config.batch_size % processes == 0, uneven)
    return replace(config, vocab_size=tokenizer.vocab_size), start, path, text, tokenizer


def describe(path, tokens, cut, model):
    """Tell what can be known before training: the size of the task. Returns the yardsticks of section 1."""
    config, marks = model.config, yardsticks(tokens[:cut], tokens[cut:], model.config.vocab_size)
    pairs = count_pairs(tokens, config.vocab_size).count_nonzero().item()
    say(f"{path}: {len(tokens):,} characters, {config.vocab_size:,} different ones;", end=" ")
    say(f"{pairs:,} of the {config.vocab_size**2:,} possible pairs occur.")
    say(f"The last {len(tokens) - cut:,} are held out. Their loss by counting alone, in nats per character:")
    say("    " + ", ".join(f"{name} {loss:.2f}" for name, loss in marks.items()))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    say(f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd},", end=" ")
    say(f"context {config.block_size}: {millions:.2f} million parameters, on {model.wte.weight.device}.")
    return marks


def set_aside(out, unfinished):
    """A new run keeps what it finds under another name, one that is still free."""
    with contextlib.suppress(OSError, ValueError, KeyError):  # there may be no earlier run
        earlier, begun = read_checkpoint(unfinished)
        done, steps = earlier["step"], begun.config.steps
        if done < steps:
            say(f"The run in {unfinished} stopped at step {done} of {steps}. To go on with it instead, press")
            say("Ctrl-C, give the files named below their old names back, and use --resume.")
    for older in (out, unfinished):
        if older.exists():
            names = (f"{older}.old{number}" for number in ("", *range(2, 1000)))
            aside = next(name for name in names if not Path(name).exists())
            older.rename(aside)
            say(f"{older} was there and is kept as {aside}.")


# *During a run*, whoever waits wants to know three things: does it learn, how fast, and how much longer
# (not counting looks at the held-out text)? A single batch is easy or hard by chance, so what is shown is the
# mean training loss of the last twenty; and each yardstick of section 1 is named when that mean passes it
# (only a hint: what counts is the held-out loss).


def tell(report, config, losses, begun, ahead):
    """Say how a run is going: a line for each piece of news and, on a terminal, one that is rewritten.

    losses: of every step so far. begun: the step at which this call began. ahead: the yardsticks still to be
    passed; those passed now are taken out of it.
    """
    recent, look, live = losses[-20:], report.held_out is not None, sys.stdout.isatty()
    mean, pace = sum(recent) / len(recent), report.seconds / (report.step - begun)
    minutes, seconds = divmod(round(pace * (config.steps - report.step)), 60)
    speed = config.batch_size * config.block_size / pace
    passed = [name for name, loss in ahead.items() if len(recent) == 20 and mean < loss]
    line = f"step {report.step:,} of {config.steps:,}  training loss {mean:.3f}"
    line += f"  held-out loss {report.held_out:.4f}" if look else ""
    line += f"  {speed:,.0f} characters a second  {minutes}:{seconds:02} left"
    for name in passed:
        line += f"  (better than {name})"
        del ahead[name]
    if look or passed:
        say(("\r" if live else "") + line)
    elif live:  # written over and over, it must not be wider than the terminal
        width = shutil.get_terminal_size().columns - 1
        say("\r" + line[:width].ljust(width), end="")


# *Stopping.* Ctrl-C, or SIGTERM from the system, may come at any moment, also in the middle of a step,
# when some weights have moved and others have not. So it is only noted; when the step is done, `run` sees
# the note, saves and ends. Whoever is in a hurry presses Ctrl-C again.


@contextlib.contextmanager
def noting_signals():
    """Inside this `with`, Ctrl-C and SIGTERM are only added to the list that it gives, the first time."""

    def note(number, frame):
        noted.append(number)
        signal.signal(number, before[number])

    noted, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, note)
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_command(given):
    """What to type to go on with the run of these flags."""
    same = (f" --{key} {shlex.quote(given[key])}" for key in ("out", "device") if key in given)
    return "python gpt.py --resume" + "".join(same)


def write(prompt, characters):
    """Print the prompt and the characters as they are made: on a terminal each at once, else line by line."""
    print(prompt, end="")
    for character in characters:
        print(character, end="", flush=character == "\n" or sys.stdout.isatty())
    print(end="\n" if sys.stdout.isatty() or NOTEBOOK else "", flush=True)


# *The run* itself puts together what you have read: it prepares, trains, looks at each report, saves what
# must survive, and in the end lets the best model, not the last, write a scene.


def run(given, how):
    """Train as the flags say, save on the way, write a scene (`how`) at the end.

    Returns the exit status of a run that was stopped, None of one that reached its end.
    """
    global model, tokenizer  # for the next cell of a notebook
    out = Path(given.get("out", "gpt.pt"))
    unfinished = Path("{}.resume{}".format(*os.path.splitext(out)))
    device = pick_device(given.get("device", "auto"))
    config, start, path, text, tokenizer = prepare(given, out, unfinished)
    number_format(config.dtype, device)  # raises if the device can't do it
    logging.getLogger("torch.utils.cpp_extension").setLevel("ERROR")  # --compile would warn of a missing CUDA
    model = GPT(config).to(device)
    how["seed"] = config.seed
    generate(model, tokenizer, **how)  # raises if the scene can't be written
    if start:
        model.load_state_dict(start["model"])
    tokens = tokenizer.encode(text)
    cut = len(tokens) * 9 // 10
    marks = describe(path, tokens, cut, model)

    # From here on, several processes work together. All of them train; only the first prints and saves.
    rank, processes = place_among_processes()
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")  # how GPUs talk, and how CPUs
        atexit.register(dist.destroy_process_group)
        atexit.register(gc.collect)  # which comes first, and frees what would keep the group's threads going
    resumed = start if "resume" in given else None
    # What the file of the unfinished run holds beside the model: from the beginning, or as it was found.
    state = {"step": 0, "optimizer": make_optimizer(model, config).state_dict(), "scaler": {}}
    state |= {"history": {"training": [], "held_out": []}, "text": fingerprint(text.encode())}
    state |= (resumed or {}) | {"data": str(path)}
    history = state["history"]
    if rank == 0 and "plot" in given:
        draw(given["plot"], history, marks)  # so that a mistake shows now and not after the training
    if rank == 0 and not resumed:
        set_aside(out, unfinished)
    # So the run can be resumed from its very first step, and a new number of --steps is not forgotten.
    save(unfinished, model, tokenizer, state)

    best = min((loss for _, loss in history["held_out"]), default=math.inf)
    begun, ahead = len(history["training"]), {name: loss for name, loss in marks.items() if loss < best}
    with noting_signals() as noted:
        for report in train(model, tokens[:cut].to(device), tokens[cut:].to(device), resumed):
            history["training"].append(report.loss)
            stopped = sum_over_processes(float(len(noted)), device)  # when one process stops, all do
            look = report.held_out is not None
            if look:
                history["held_out"].append([report.step, report.held_out])
            if look and report.held_out < best:
                best = report.held_out  # saved before the state: a kill in between loses nothing
                save(out, model, tokenizer, {"history": history})
            if look or stopped:
                save(unfinished, model, tokenizer, state | report.state())
            tell(report, config, history["training"], begun, ahead)
            if look and rank == 0:
                sample = "".join(generate(model, tokenizer, length=120, seed=config.seed)).strip()
                say("\n".join("    | " + line for line in sample.splitlines()[:3]))
                if "plot" in given:
                    draw(given["plot"], history, marks)
            if stopped and report.step < config.steps:
                say(f"\nStopped after step {report.step:,}, and saved. To go on: {resume_command(given)}")
                return 128 + (noted or [signal.SIGTERM])[0]

    if rank == 0:
        model, tokenizer = load(out, device)
        say(f"The model with the lowest held-out loss, {best:.4f}, is in {out}. It writes:\n")
        write(how["prompt"], generate(model, tokenizer, **how))
        say("")
        if NOTEBOOK and given.get("plot", "").endswith(".png"):
            from IPython.display import Image, display

            display(Image(filename=given["plot"]))


def remedy(error):
    """What to do about a failure on the way. One without a known cause is a mistake of ours: raised again."""
    reason, kind = (str(error).splitlines() or [""])[0][:150], type(error)
    if kind is FloatingPointError:
        return reason
    full = ("out of memory", "allocate memory", "not enough memory")
    if kind is MemoryError or any(words in reason for words in full):
        return "out of memory: lower --batch-size or --block-size, or take a smaller --size or vocabulary"
    if kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile does not work here ({reason}); give --no-compile instead"
    if kind.__name__.startswith("Dist") or "gloo" in reason:  # how PyTorch tells of a connection that broke
        return f"another process of this run has ended ({reason}); start all again with --resume"
    raise error


def main(argv=""):
    """Do what the command line says (one string, or a list of words). Returns the exit status, or None."""
    global model, tokenizer
    given = {}
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Windows may have another encoding than UTF-8
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        given = read_flags(argv)
        how = {"prompt": ""} | {name: given[name] for name in {"seed", *WRITING} & given.keys()}
        if how["prompt"] == "-":
            how["prompt"] = sys.stdin.read().removeprefix("\ufeff").replace("\r\n", "\n")
        if "generate" not in given:
            return run(given, how)
        allowed = {"generate", "out", "device", "seed"} | WRITING
        refuse(given.keys() - allowed, "--generate: nothing is trained")
        model, tokenizer = load(given.get("out", "gpt.pt"), pick_device(given.get("device", "auto")))
        characters, T = generate(model, tokenizer, **how), model.config.block_size
        if len(how["prompt"]) > T:
            print(f"Of the prompt, the last {T} characters count: the context.", file=sys.stderr)
        return write(how["prompt"], characters)
    except SystemExit:  # --help has been printed
        return None
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has gone, as in `python gpt.py --generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if "generate" in given:
            return None
        status, trouble = 1, f"nobody reads the output any more; to go on: {resume_command(given)}"
    except (Mistake, OSError) as error:
        status, trouble = 2, error
    except (FloatingPointError, RuntimeError, MemoryError) as error:
        status, trouble = 1, remedy(error)
    if status == 1 and sys.stdout.isatty():
        print()  # to leave the line that is rewritten
    if status == 1 or place_among_processes()[0] == 0:  # wrong input is the same in all processes
        print(f"gpt.py: {trouble}", file=sys.stderr)
    return status


if __name__ == "__main__":
    # In a notebook, the command line is Jupyter's own, unless the file was started by `%run gpt.py`.
    started = not NOTEBOOK or Path(sys.argv[0]).name == Path(globals().get("__file__", "")).name
    exit_status = main(sys.argv[1:] if started else "")
    if exit_status and not NOTEBOOK:  # in a notebook the line on standard error is enough
        sys.exit(exit_status)
