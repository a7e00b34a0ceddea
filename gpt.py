# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6"]
# ///
"""
A GPT-2 in one file: a small version of OpenAI's language model of 2019, trained from scratch on Shakespeare's
plays, with PyTorch alone, on a laptop. Its claim: for a small model on a laptop, how it is trained matters
more than which newer parts it has.

The *loss* says how badly a model guesses the next character: lower is better. The model that nanoGPT, the
best known code of this kind, trains on a laptop comes to 1.90 in a minute and a half. Ours, half as large and
trained our way for as long, comes to 1.68; a larger one, in twenty minutes, to 1.55. (Plain counting of what
follows what, without any network, gets 1.60: section 1.)

It begins knowing no word. After a minute and a half of training it continues "HAMLET:" like this:

    HAMLET:
    So man the enemy and rolous heaven
    Wont of every we will in the terman. Then shimself,
    They are in thy more shake company?

    KENT:
    But, I do bear poet. I never this false there and so thee?

    python gpt.py                                    train the tiny model on input.txt, then write a scene
    python gpt.py --generate --prompt "HAMLET:"      write more, with the model that is now in gpt.pt
    python gpt.py --help                             all settings, with their defaults

It needs Python and `pip install torch`; in Jupyter or Colab, paste the file into one cell. All numbers are
about the input.txt that comes with it, ten plays; where there is none, another text is fetched.

    The lesson     0 settings   1 text to numbers   2 attention   3 the MLP   4 the block   5 the model
                   6 batches    7 training          8 writing     9 the recipe             10 after training
    For later     11 the head start
    The program   12 files and devices             13 the command line

Read on at section 1. You need Python, and no idea of neural networks. Lines that begin with >>> are examples
with their results; test_gpt.py runs them. "Try" is for you: what comes of it stands in the README, after the
exercises. PyTorch computes with *tensors*, tables of numbers with any number of dimensions; with two it is a
*matrix*, with a single one a *vector*. `.item()` turns a tensor into a Python number, `.long()` gives the
64-bit integers that PyTorch wants in places. A comment such as `# (B, T) -> (B, T, C)` gives the shapes of a
line's tensors, before and after:

    B  batch: how many pieces of text go through the model at once, each on its own
    T  time: how many characters each piece has, at most block_size
    C  channels: how many numbers stand for one character inside the model, its *width*, n_embd
    V  vocabulary: how many different characters there are, vocab_size
    N  how many characters a whole text has
"""

# %% 0. Settings
# Skip this at first: the sections explain their settings. All but vocab_size are also flags.

import signal
import sys

if __name__ == "__main__":  # Ctrl-C while PyTorch is being imported ends the program without a traceback
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
import argparse
import contextlib
import copy
import hashlib
import io
import math
import os
import shlex
import time
import urllib.request
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch looks for numpy; we do without
import torch
from torch import nn
from torch.nn import functional as F


def setting(default, help, may_be=(1, math.inf), fixed=False):
    """A setting with its default, its meaning and its range or choices. fixed: a trained model keeps it."""
    return field(default=default, metadata=dict(help=help, may_be=may_be, fixed=fixed))


@dataclass
class Config:
    """All settings of a model and its training. Raises ValueError for one that can't be."""

    # The shape of the model (sections 2 to 5).
    n_layer: int = setting(2, "blocks, one on top of the other", fixed=True)
    n_head: int = setting(4, "attention heads in a block; must divide n_embd", fixed=True)
    n_embd: int = setting(128, "numbers that stand for one character", fixed=True)
    block_size: int = setting(128, "context: how many characters the model looks back on", fixed=True)
    # Its training (sections 3, 6, 7 and 9).
    batch_size: int = setting(8, "sequences in a step")
    steps: int = setting(2900, "steps of training")
    lr: float = setting(0.0, "learning rate at its peak; 0: what suits the width, 0.256 / n_embd", (0, 1e9))
    warmup: float = setting(0.1, "share of the steps until that peak is reached", (0, 1))
    final_lr: float = setting(0.0, "learning rate at the end, as a share of the peak", (0, 1))
    weight_decay: float = setting(0.3, "pull of the weight matrices towards zero", (0, 1e9))
    beta2: float = setting(0.99, "how long AdamW remembers the size of the gradients", (0, 0.9999))
    grad_clip: float = setting(1.0, "longest gradient allowed", (1e-6, math.inf))
    dropout: float = setting(0.0, "share of outputs set to 0 in training", (0, 0.99))
    head_start: bool = setting(True, "start with heads that look back", (0, 1), fixed=True)
    eval_every: int = setting(500, "steps between two evaluations")
    seed: int = setting(1337, "where all randomness comes from", (0, 10**12))
    # Its arithmetic (section 12), and the size of its vocabulary, which is counted and so has no flag.
    dtype: str = setting("auto", "kind of numbers", ("auto", "float32", "bfloat16"))
    compile: bool = setting(False, "let torch.compile make the model faster first", (0, 1))
    vocab_size: int = 65

    def __post_init__(self):
        for row in [row for row in fields(self) if row.metadata]:
            value, may_be = getattr(self, row.name), row.metadata["may_be"]
            if not (value in may_be or (row.type is not str and may_be[0] <= value <= may_be[-1])):
                raise ValueError(f"--{row.name.replace('_', '-')} can't be {value}: allowed are {may_be}")
        if self.n_embd % self.n_head:
            raise ValueError(f"--n-head {self.n_head} does not divide --n-embd {self.n_embd}")
        self.lr = self.lr or 0.256 / self.n_embd


SIZES = {  # for --size: how each differs from the defaults above
    "tiny": {},
    "small": dict(n_layer=3, n_head=8, n_embd=192, block_size=256, batch_size=4)
    | dict(steps=15_000, weight_decay=0.5, dropout=0.05),
    "medium": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=16)
    | dict(steps=6000, weight_decay=0.9, dropout=0.2),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, steps=20_000),
}

# Several processes can share a run (section 12). On a laptop there is one, and the two functions do nothing.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many there are
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0  # this process's number, from 0


def share(batch):
    """This process's part of a batch, and random numbers of its own for what follows."""
    if RANK > 0:
        torch.manual_seed(torch.initial_seed() + RANK)
    return [part[RANK::WORLD_SIZE] for part in batch]


def add_up(numbers):
    """The sum of these numbers over all processes."""
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(numbers)
    return numbers


# %% 1. Text to numbers
# A *model* is one long formula with a great many adjustable numbers, its *parameters*. *Training* computes
# for each of them whether the formula's guesses would get better or worse if it were a little larger (all
# these answers together are the *gradient*), and moves it a little the better way, again and again. A *neural
# network* is such a formula, put together from simple *layers*, one after the other.
#
# A formula computes with numbers. So we list all characters that occur in the text, the *vocabulary*; a
# character's place in that list is its *token*. For "to be or not to be" the list is ' benort': a space is 0,
# b is 1, and "not" becomes 3, 4, 6.
#
# GPT-2 has 50,257 pieces of words for tokens, nearly all made by joining the most frequent pair of neighbours
# again and again (*byte-pair encoding*: Sennrich et al., 2016). In a text of a megabyte most of them would
# occur rarely or never, and from a single sight little can be learned: of the 13,338 different words in our
# plays, 6,080 occur only once. And each token costs parameters, a row of numbers of its own (section 5): our
# table of them has 65 rows of 128, 8,320 numbers; with GPT-2's pieces it would have 6.4 million, fifteen
# times as many as the whole model now has.
class CharTokenizer:
    """Turns text into tokens and back.

    >>> tokenizer = CharTokenizer.from_text("to be or not to be")
    >>> tokenizer.vocabulary
    ' benort'
    >>> tokenizer.encode("not")
    tensor([3, 4, 6], dtype=torch.int32)
    >>> tokenizer.decode([1, 2, 2])
    'bee'
    """

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary  # all that it takes to make the same tokenizer again
        self.vocab_size = len(vocabulary)
        self.token_of = {character: token for token, character in enumerate(vocabulary)}

    @classmethod
    def from_text(cls, text):
        """The tokenizer whose vocabulary is the characters of `text`, sorted."""
        return cls("".join(sorted(set(text))))

    def encode(self, text):
        """Text of N characters -> tokens (N,). Raises ValueError for a character without a token."""
        unknown = "".join(sorted(set(text) - self.token_of.keys()))
        if unknown:
            raise ValueError(f"the model does not know these characters: {unknown!r:.100}")
        return torch.tensor([self.token_of[character] for character in text], dtype=torch.int32)

    def decode(self, tokens):
        """Tokens (N,) -> text of N characters."""
        return "".join(self.vocabulary[token] for token in tokens)


# Never test on what you have trained on: knowing by heart is not knowing. We train on the first nine tenths
# of the text and test on the last, the *validation* part; in our plays that is nearly all one comedy. Why not
# on lines drawn at random? Neighbouring lines come from one scene, with the same names and the same talk, so
# they would be half known already.
def split(tokens):
    """Tokens (N,) -> the training part and the validation part: the last tenth, but at most a million."""
    cut = max(len(tokens) * 9 // 10, len(tokens) - 1_000_000)
    return tokens[:cut], tokens[cut:]


# The model's one task is to guess the next character from those before it. It gives each character a
# probability p, and pays for the one that really comes: -ln p, its *loss*. (Why a logarithm? The probability
# of a text is the product of those of its characters; their logarithms can be added.) The less it believed in
# what came, the more it pays:
#     p       1     0.5    0.1    0.01
#     loss    0     0.69   2.30   4.61
# The mean over a text is the *cross-entropy* (after Shannon, 1948), in *nats* for each character. One nat is
# 1.44 bits, and e to the power of the loss, the *perplexity*, says between how many equally likely characters
# the model hesitates. An even guess among our 65 costs ln 65 = 4.17; *tiny*, the model that `python gpt.py`
# trains, will end near 1.68 (by chance 0.01 more or less), or 2.42 bits, as if it hesitated among 5 or 6. (No
# model gets to 0 on a new text, since none can be foreseen; and where tokens are pieces of words, losses must
# be taken per character to be compared.)
#
# What can be had without any network? Count, in the training part, what follows each character, each group of
# two, of three, and so on. To guess, take the longest group that has been seen; the less often it was, the
# more say have the shorter ones (`counting`, section 12, after Kneser and Ney, 1995). That guesses the
# validation part with these losses. (Known: how many of the groups in it, with the character to be guessed,
# have occurred in the training part.)
#     characters before     0      1      2      3      4      5      6      7      9
#     loss               3.37   2.53   2.12   1.78   1.65   1.60   1.60   1.60   1.62
#     known              100%   100%    97%    93%    87%    77%    64%    50%    26%
# After a q comes u: to know one character is worth 0.84. But the longer the group, the more often it is new,
# and by this rule a memory longer than five or six gains nothing.
#
# So 1.60 is the line to beat, and it takes two seconds. It is hard to beat: on our text, nanoGPT's small
# model comes to 1.90, the lecture's ("Let's build GPT") to 1.87, tiny to 1.68. But a table of counts takes
# each group by itself. A network also learns what groups have in common, and can get further: `small`, a
# larger model of ours, after twenty minutes, to 1.55.


# %% 2. Attention
# A *position* is one of the T places of a piece of text, with what the model has noted there: a vector of C
# numbers. At first it says only which character stands there, and where (section 5); each layer adds to it.
# To guess the next character, the model has to look back, and where to look depends on the text. After a q,
# the last character is enough. Inside a name, the name's beginning matters. *Attention* (Bahdanau et al.,
# 2015; in this form, Vaswani et al., 2017) lets each position choose for itself.
#
# It is made of *linear layers*, the plainest part of a network. The *dot product* of two vectors multiplies
# them number by number and adds up: it is large where they agree and are long. Each number that a linear
# layer gives out is the dot product of what comes in with a row of *weights*, plus a *bias*: with weights 2
# and -1 and a bias of 3, the input (5, 4) gives 2 * 5 - 1 * 4 + 3 = 9. All rows together are the layer's
# weight matrix. Weights and biases are parameters: nobody programs them.
#
# From each position's vector, linear layers make three more, and training finds out what is useful in them:
#     query   what this position is looking for
#     key     what this position offers to those who look
#     value   what it hands over when it is looked at
#
# The dot product of one position's query with the key of another, or with its own, is a *score*. A large one
# means "this is what I was looking for". *Softmax* turns scores into *attention weights*, positive and adding
# up to 1: e to the power of each, divided by their sum. What the position receives is the sum of all values,
# each times its attention weight. (The example in the function below shows it.)
#
# In training the whole text lies open, and all positions guess their next characters at once. So none may
# look ahead: it would read its answer. The *causal mask* sets the scores of later positions to minus
# infinity, and so their attention weights to 0. Without the mask, training looks like a triumph, with a loss
# of 0.03. But what the model then writes is nonsense, for when it writes there is nothing ahead to read.
def attention_by_hand(query, key, value):
    """Causal attention over T positions, step by step: (T, head_size) three times -> (T, head_size).

    head_size: how many numbers a query has; keys and values, too.

    Three positions, with vectors of one number. All ask with a query of 1. The third key fits better than the
    other two, by ln 2, so it gets twice their attention weight:

        may see      1st   2nd   3rd        the values are 8, 4 and 0
        position 1    1     .     .    ->   8
        position 2   1/2   1/2    .    ->   8/2 + 4/2       = 6
        position 3   1/4   1/4   1/2   ->   8/4 + 4/4 + 0/2 = 3

    >>> query, key = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[0.0], [0.0], [math.log(2)]])
    >>> value = torch.tensor([[8.0], [4.0], [0.0]])
    >>> attention_by_hand(query, key, value).flatten()
    tensor([8., 6., 3.])
    """
    # `@` makes the dot product of each row on its left with each column on its right; .T turns rows into
    # columns. Row i, column j: the score that position i gives to position j.
    scores = query @ key.T  # (T, head_size) @ (head_size, T) -> (T, T)
    # Why divide by the root of head_size, the size of these vectors (32 in tiny)? Add up 32 products of
    # random sign and about size 1, as at the start of training: they partly cancel, and chance alone gives
    # about 5.7, the root of 32. Softmax exaggerates: a score 5.7 ahead gets almost 300 times the weight.
    # Undivided, a position could stare at one random place before it had learned anything.
    scores = scores / math.sqrt(query.size(-1))  # (T, T); -1 is the last dimension, here head_size
    ahead = torch.ones_like(scores).triu(1).bool()  # (T, T) true where column > row: above the diagonal
    attention_weights = scores.masked_fill(ahead, -math.inf).softmax(-1)  # (T, T) each row adds up to 1
    return attention_weights @ value  # (T, T) @ (T, head_size) -> (T, head_size)


# One look is not enough: it helps to watch the last letter and the speaker's name at the same time. So there
# are several *heads*, each with a slice of query, key and value to itself, head_size = C / n_head numbers
# wide. Here are those of tiny after training, in its two *blocks* (section 4), with a text that it has never
# seen. Where do they look from the last character, the t of "delight"? (A line's end is written /.) Under the
# characters stand their attention weights, in tenths; weights below a tenth are left out:
#     OLIVIA:/How say you to that, Malvolio?//MALVOLIO:/I marvel your ladyship takes delight
#                                                                                         9   block 1, head 1
#                                                                                        9    block 1, head 2
#                                                                                       9     block 1, head 3
#                                                                                      8      block 1, head 4
#                                              8                                              block 2, head 1
# The first block's four heads look one, two, three and four characters back. (They began like that, section
# 11, and training kept it.) In the second block one looks, across 44 characters, at a letter in the name of
# the speaker: nobody told it that there are speakers, nor had it ever met a Malvolio. The other three spread
# their looks, and what for we do not know.
#
# All heads are computed at once, in one tensor. `view` cuts a dimension into pieces, `transpose` exchanges
# two dimensions: here two positions with two heads of two numbers each become two heads of two positions.
# >>> x = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])  # (T, C): one row for each position
# >>> x.view(2, 2, 2)[1]  # (T, n_head, head_size): the second position, cut in two
# tensor([[5, 6],
#         [7, 8]])
# >>> x.view(2, 2, 2).transpose(0, 1)[0]  # (n_head, T, head_size): the first head, at both positions
# tensor([[1, 2],
#         [5, 6]])
#
# Try: let it look back on 8 characters only, `python gpt.py --steps 500 --out try.pt --block-size 8
# --batch-size 128`, beside `python gpt.py --steps 500 --out try.pt`.
#
# In PyTorch a layer is an `nn.Module`, an object with parameters, and `layer(x)` runs its `forward`.
class Attention(nn.Module):
    """Each position gathers from itself and from those before it. (B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # One linear layer makes queries, keys and values. (The names are those in GPT-2's own files.)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        # A head's result fills only its own slice of the channels. The *output projection* mixes the slices,
        # so that what one head has found can reach every channel.
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)  # explained in section 3

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, 3 * C) -> (B, T, C), three times
        # Cut each into heads (-1: by what is left, head_size), and put the heads before the positions, so
        # that each has a table of scores to itself: (B, n_head, T, head_size).
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in (q, k, v))
        if cache is not None:  # only for writing: skip these five lines until section 8
            if self in cache:
                assert T == 1, "one new character at a time"
                k = torch.cat([cache[self][0], k], dim=2)  # (B, n_head, earlier positions + T, head_size)
                v = torch.cat([cache[self][1], v], dim=2)
            cache[self] = k, v
        # PyTorch's attention_by_hand, for all heads at once. A single new position may see all: no mask.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # (B, n_head, T, head_size)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.dropout(self.c_proj(y))  # (B, T, C)


# %% 3. The MLP
# Attention moves information between positions, but it can only mix what the others offer. The *MLP*, short
# for multi-layer perceptron (Rosenblatt, 1961), is where each position draws conclusions from what it has
# gathered: "a q was last, and this is no name" can become "so a u". It is a linear layer to four times the
# width, an activation, and a linear layer back.
#
# The *activation* is a curve that each number is sent through. Without it the two linear layers would be one,
# since a weighted sum of weighted sums is again a weighted sum. The simplest is ReLU, max(0, x). GPT-2 uses
# *GELU* (Hendrycks and Gimpel, 2016), a ReLU with its corner rounded: where ReLU is flat, a small change
# changes nothing and training gets no hint; a smooth curve nearly always gives one.
#
# Why wider inside? Each of the inner numbers is one question to the position ("was a q last?") and, in the
# second layer, what follows from a yes. There are more questions worth asking than there are channels. Four
# times the width is a convention.
#
# *Dropout* (Srivastava et al., 2014) sets a random share of a layer's outputs to 0, in training only, and
# enlarges the rest so that sums stay as large. No part can then rely on a few others, so a text is harder to
# learn by heart. Learning is slower, too, so it pays only where a model sees a small text many times, as
# small and medium do. Tiny has none.
class MLP(nn.Module):
    """Two linear layers with an activation between them, at each position alone. (B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)  # "fully connected"
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x))  # (B, T, C) -> (B, T, 4 * C)
        return self.dropout(self.c_proj(x))  # (B, T, 4 * C) -> (B, T, C)


# %% 4. The block
# A *block* is one round of "look around, then think", and a stack of them a *transformer*, the T in GPT (a
# generative pre-trained transformer: one that writes, and is trained on text in advance). Neither attention
# nor the MLP replaces the vectors. Both add to them:
#     x ---+---------------------------> + ---+---------------------> + --->
#          |                             ^    |                       ^
#          +--> ln_1 ---> attention -----+    +--> ln_2 ---> MLP -----+
#
# The upper line is the *residual stream* (Elhage et al., 2021). The two places where it passes attention and
# MLP by, the `x +` of the code, are *residual connections* (He et al., 2015). What a block does not touch
# passes on unchanged, so a later block can build on what earlier ones found out. And in training
# the corrections run back the same way, undistorted, to the lowest block (section 7).
#
# *Layer normalization* (Ba et al., 2016), ln_1 and ln_2, gives each vector mean 0 and *standard deviation* 1
# (the root of the mean squared distance from the mean). So a layer gets input of the same size, however much
# those before have added; else attention scores would grow with the stream, until softmax is all or nothing.
# Then each channel has a learned scale, at first 1, and a learned shift, at first 0.
# >>> F.layer_norm(torch.tensor([1.0, 2.0, 3.0]), [3])
# tensor([-1.2247,  0.0000,  1.2247])
#
# Why before the layer and not, as at first, after the sum? There it would rescale the stream itself, in every
# block, and the undistorted way back would be gone: deep models then learn only if they begin very slowly
# (Xiong et al., 2020). GPT-2 moved it to the front.
#
# Try: leave out `x +` in Block, twice, and `python gpt.py --steps 500 --out try.pt`.
class Block(nn.Module):
    """Attention, then MLP, each normalized first and added to the stream. (B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


# %% 5. The model
# What is missing are the two ends. Going in, each token becomes a vector, its *embedding* (Bengio et al.,
# 2003): row number `token` of a learned table. Attention by itself hardly knows order, since a mean is the
# same in whatever order (only the mask tells a little: the first position sees one character, the last all).
# So a second table has a vector for each position, 0 to block_size - 1, and the two vectors are added.
#
# Coming out, the dot product of each vector with each row of the first table gives a number for each
# character, its *logit*. The larger, the likelier: softmax turns logits into probabilities. To use one table
# at both ends is *weight tying* (Press and Wolf, 2017): the vector that stands for a character going in is
# what the output should resemble when that character comes next. With our 65 characters a table for each end
# would do as well, but in the smallest GPT-2 the table is a third of all parameters, 39 of 124 million, and
# a second would add as many.
#
# The table is learned like everything else. Here are some rows after training, each with the rows that point
# most nearly the same way. Nobody told the model what a vowel is, or a capital:
#     a:  e A o i u      e:  i a o y u      A:  U E O I R      K:  Q k & E Z      ?:  . ! ; ]      ,:  ; ! : ?
#
# The *initial weights* are random. Were they equal, all rows of a matrix would give out the same, be changed
# alike, and stay alike forever.
#
# How large should they be? Each number that a linear layer gives out is a sum of C products (in the MLP's
# second layer 4 C, but of numbers that GELU has made smaller), and chance makes it grow with the root of C,
# as in section 2. So ours come from a bell curve (`normal_`) of standard deviation 1 / sqrt(C), and what
# comes out is about as large as what went in (LeCun et al., 1998). The tables get the same, so that the first
# logits are about 1, too.
#
# This matters more than it seems. GPT-2 took 0.02 for nearly all, half of what its smallest width wants and a
# quarter of what ours does, 0.088. What goes into a layer has been normalized, to numbers of about 1. With
# 0.02, queries and keys come out at 0.02 * sqrt(128) = 0.23 of that size, and so scores, their products, at a
# twentieth. Then softmax finds all positions alike, and each head takes the mean of everything it sees.
# In section 9 that costs 0.05.
class GPT(nn.Module):
    """The whole model: tokens (B, T) -> logits (B, T, V), at each position for the token after it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # "weights of the token embedding"
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # "weights of the position embedding"
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))  # "hidden": a list of layers
        self.ln_f = nn.LayerNorm(config.n_embd)  # "final": normalizes what the blocks have made

        rng = torch.Generator().manual_seed(config.seed)  # random numbers that can be repeated; see section 6
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # One exception, as in GPT-2: each block has two layers that write to the residual stream,
                # both called c_proj. They start smaller, so that many blocks don't make the stream larger
                # than few.
                writers = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=1 / math.sqrt(config.n_embd * writers), generator=rng)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)  # names that end in _ change a tensor in place

    def forward(self, tokens, cache=None, start=0):
        """cache and start belong to writing (section 8): the first of the tokens stands at position start."""
        end = start + tokens.size(1)
        assert end <= self.config.block_size, f"{end} tokens don't fit block_size {self.config.block_size}"
        # A tensor that lacks a dimension is repeated along it (*broadcasting*): here along B.
        x = self.dropout(self.wte(tokens) + self.wpe.weight[start:end])  # (B, T, C) + (T, C) -> (B, T, C)
        for block in self.h:
            x = block(x, cache)  # (B, T, C)
        return F.linear(self.ln_f(x), self.wte.weight)  # dot products: (B, T, C) -> (B, T, V)


# %% 6. Batches
# Training shows the model *sequences*: pieces of text, each of block_size characters. At each of its
# positions the *target* is the next character, so a sequence of T characters asks T questions (_ is a space):
#     inputs     t  o  _  b  e  ,  _  o
#     targets    o  _  b  e  ,  _  o  r
#
# A *batch* of B sequences goes through together, since processors multiply one large matrix faster than many
# small ones. A larger batch makes each step surer, but leaves fewer steps for the same amount of text.
#
# Sequences begin at random places of the text, drawn anew each time; some passages come often and some never.
# Random, and yet repeatable: a *seed* is a number from which a random number generator starts, and the same
# seed gives the same numbers every time.
def get_batch(tokens, batch_size, block_size):
    """A random batch from tokens (N,): inputs and targets, (B, T) each.

    >>> inputs, targets = get_batch(torch.arange(100), batch_size=2, block_size=4)
    >>> torch.equal(targets, inputs + 1)  # this text is 0, 1, 2, ..., so what comes next is one more
    True
    """
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1))  # (B, 1)
    places = starts + torch.arange(block_size + 1)  # (B, 1) + (T + 1,) -> (B, T + 1)
    sequences = tokens[places.to(tokens.device)].long()  # (B, T + 1); on the CPU or GPU where the tokens are
    return sequences[:, :-1], sequences[:, 1:]


# %% 7. Training
# A *step* of training takes one batch and asks of each parameter: were it a little larger, how fast would the
# loss rise or fall? All these numbers together are the gradient. How can one know that for 421,504 parameters
# at once? Work backwards, from the loss through everything that led to it (*backpropagation*: Rumelhart et
# al., 1986). Here a weight of 3 goes through two operations:
#     forward     weight 3  ->  x = 2 * weight = 6  ->  loss = (x - 4) ** 2 = 4
#     backward    the loss rises 2 * (x - 4) = 4 times as fast as x, and x 2 times as fast as the weight:
#                 so the loss rises 4 * 2 = 8 times as fast as the weight
# That is the *chain rule*: the factors of the operations are multiplied, from the end to the beginning (and
# where a number has gone two ways, what comes back on both is added). None needs to know more than its own
# factor and what has come back to it, so a formula of any length can be gone through backwards once.
# `loss.backward()` does that, since PyTorch has noted each operation on the way forward, and adds each
# parameter's number to its `.grad`:
# >>> weight = nn.Parameter(torch.tensor(3.0))
# >>> loss = (2 * weight - 4) ** 2
# >>> loss.backward()
# >>> weight.grad  # at 3.001 the loss is 4.008 instead of 4: it rises eight times as much as the weight
# tensor(8.)
#
# What does that cost? Going forward, each weight takes part in one multiplication and one addition for each
# character; going backward, in twice as many. So a run takes 6 operations for each weight and each character
# read (Kaplan et al., 2020): 7 trillion for tiny. Attention's scores come on top, in proportion to
# block_size.
#
# The *optimizer* then moves each parameter a little the other way: guess, measure, move, again. Plain
# *gradient descent* moves a weight w by its gradient g times a small number, the *learning rate*:
#     w  <-  w - lr * g
#
# But in large models gradients differ: where one weight's are 100 and another's 0.001, no rate suits both.
# And a single batch misleads. *AdamW* (Kingma and Ba, 2015; Loshchilov and Hutter, 2019) asks two things of
# each weight's gradients: which way do they point, on average, and how large are they? It keeps both as
# running means, and divides the first by the root of the second:
#     m  <-  0.9 m + 0.1 g                     which way, over the last 10 steps or so
#     s  <-  beta2 s + (1 - beta2) g * g       how large, whatever its sign, over the last 100 or so
#     w  <-  w - lr * m / sqrt(s)
#
# So how large a gradient is does not matter, only how steady it is. If g is 5 each time, m comes to 5
# and s to 25: the weight moves by lr. If g is always 0.001, likewise. If g changes its sign from step to
# step, m stays near 0, and the weight where it is. (Both means start at 0; in the first steps AdamW makes up
# for that.)
# >>> weight = nn.Parameter(torch.tensor([1.0, 1.0]))
# >>> weight.grad = torch.tensor([100.0, 0.001])
# >>> torch.optim.AdamW([weight], lr=0.1, weight_decay=0).step()
# >>> weight.data
# tensor([0.9000, 0.9000])
#
# *Weight decay*, the W in AdamW, also shrinks each weight in every step, by lr * weight_decay of its size.
# The usual account: a weight that many examples need is soon pushed back up; one that serves to know a single
# passage by heart wears away. Only matrices decay, the two tables among them: biases and scales are too few
# to know much by heart, and a normalization's scale is neutral at 1, not at 0.
def make_optimizer(model, config):
    """AdamW over all parameters of the model, with weight decay on the matrices alone."""
    matrices = dict(params=[p for p in model.parameters() if p.dim() >= 2], weight_decay=config.weight_decay)
    vectors = dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)
    # fused: all of it in one go, which is faster
    return torch.optim.AdamW([matrices, vectors], lr=config.lr, betas=(0.9, config.beta2), fused=True)


# A learning rate that is too small wastes time, one too large throws away what was learned. Ours rises from
# near 0, is large early and small at the end:
#     2e-3 |    .-'''-.
#          |  /         '-.
#        0 |/______________'''--.
#          0  290            2900  steps
#
# *Cosine decay* (Loshchilov and Hutter, 2017), half a cosine wave, is what counts for tiny: large steps make
# the weights roughly right soon, small ones settle them. *Warm-up* (Goyal et al., 2017), the straight line,
# is for larger models and batches; tiny does as well without. The first step is blind: after a single batch,
# m / sqrt(s) is 1 or -1 for every weight, however little that batch has to say. And wider layers want smaller
# rates (Yang et al., 2022): 0.256 / n_embd is what we found by trying.
def learning_rate(step, config):
    """The learning rate of a step, counted from 0: a straight line up, half a cosine wave down.

    >>> config = Config(steps=101, warmup=0.2, lr=1.0, final_lr=0.1)
    >>> [round(learning_rate(step, config), 2) for step in (0, 10, 20, 60, 100)]
    [0.05, 0.55, 1.0, 0.55, 0.1]
    """
    warmup_steps = int(config.warmup * config.steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, config.steps - 1 - warmup_steps)  # from 0 at the peak to 1
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


# Now everything is there. The loop of all training, without its trimmings (`train`, below, has them):
#     for step in range(steps):
#         inputs, targets = get_batch(training, batch_size, block_size)
#         logits = model(inputs)                                             # guess,
#         loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())    # measure,
#         optimizer.zero_grad()                                              # (gradients add up otherwise)
#         loss.backward()
#         optimizer.step()                                                   # move
# `cross_entropy` makes probabilities of the logits, by softmax, and takes the mean of -ln p of the targets.
#
# How good is the model? The *validation loss* is the one number to judge by: the mean over the whole
# validation part, cut into sequences (each begins anew, so the longer they are, the kinder is the judge).
# While it falls together with the training loss, the model is learning the language. When the training loss
# goes on falling and this one turns and rises, it is learning its text by heart: *overfitting*. So it went
# with a far larger model, of 10.8 million parameters, that read our training part 72 times, by nanoGPT's
# recipe for a GPU:
#     4.2 |\
#         | \                                  ..--''   validation loss
#     1.6 |  '.__........-------''''''
#         |    ''--..__
#     0.6 |            ''''----........_________   training loss
#         +----------------------------------------
#         0         a quarter                 all steps
# Dropout did not save it. More text helps; so does keeping the weights that were best. (The best of many
# evaluations looks a little better than it is.)
@torch.no_grad()  # nothing is learned here, so PyTorch need not remember how the loss came about
def evaluate(model, config, tokens):
    """Mean loss in nats per token over tokens (N,), read once, in sequences of block_size."""
    model.eval()  # dropout off
    B, T, n = config.batch_size, config.block_size, len(tokens) - 1
    # All batches are of one size: zeros fill up the last one, and do not count.
    tokens = torch.cat([tokens, tokens.new_zeros(-n % (B * T))]).long()
    inputs, targets = tokens[:-1].view(-1, B, T), tokens[1:].view(-1, B, T)  # (batches, B, T)
    losses = torch.zeros(len(inputs), B * T, device=tokens.device)  # one for each target
    for i in range(RANK, len(inputs), WORLD_SIZE):  # 0, 1, 2, ...; several processes take turns
        logits = model(inputs[i])  # (B, T) -> (B, T, V)
        losses[i] = F.cross_entropy(logits.flatten(0, 1), targets[i].flatten(), reduction="none")
    return add_up(losses).flatten()[:n].mean().item()


def train(model, optimizer, config, training, validation, start=0):
    """Train the model in place. Yields after each step: steps done, loss, validation loss (mostly None).

    model: anything that maps tokens (B, T) to logits (B, T, V). start: steps that it has been trained before.
    """
    for step in range(start, config.steps):
        model.train()  # dropout on
        # All randomness of a step, batch and dropout, comes from the seed and the step's number alone. So a
        # run can be repeated to the bit (on the same CPU and PyTorch), and one that was stopped goes on as if
        # it had not been. (1_000_003 keeps the steps of one seed apart from those of the next.)
        torch.manual_seed(config.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)

        # `share`, and `add_up` below, do nothing unless several processes train together.
        inputs, targets = share(get_batch(training, config.batch_size, config.block_size))  # (B, T) each
        logits = model(inputs)  # (B, T) -> (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B * T, V), (B * T,) -> one number
        optimizer.zero_grad()
        loss.backward()
        # Now and then a batch is so odd that its gradient, taken as one vector, is far longer than usual. It
        # would rule AdamW's means for many steps. *Clipping* (Pascanu et al., 2013) shortens it to grad_clip.
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()

        due = (step + 1) % config.eval_every == 0 or step + 1 == config.steps
        val_loss = evaluate(model, config, validation) if due else None
        yield step + 1, add_up(loss.detach()) / WORLD_SIZE, val_loss


# What does all this come to? This is how our model, as it learns, continues "HAMLET:" and a line end:
#     step    val loss
#        0    4.75    EpzllaHYuczde:,LGyV-[RrzlW..agehy
#      100    2.59    Ep:lYor thade paGe in anlou. neaeeitho house thit WoTist iu wissteriait mo
#      500    1.95    What an the ene Give you surse a ming for age thy we with in with this make not.
#     2900    1.67    Why man the enemy hither, bear a mine for answer.
# At first it is a little worse than an even guess, 4.17: its random preferences mislead it. (A first loss far
# above that would be the first sign of a mistake.) It learns which letters are common and how long words are,
# then short words, then longer ones, and something like a sentence.
#
# Try: `python gpt.py --warmup 0 --final-lr 1 --steps 500 --out try.pt`, without warm-up and decay.


# %% 8. Writing
# To write, the model guesses, we choose one character by its probabilities, add it to the text, and ask
# again. *Temperature* (Ackley et al., 1985) divides the logits first. Below 1 the likely gets likelier, above
# 1 all become more even; at 0 only the likeliest is left. After "HAMLET:" tiny writes:
#       0    I will not thee the may so much a strange of the strange of the strange of the strange
#     0.5    So man the enemy and relight was it on me to the matter of the strength of natures of fairy
#     0.8    So man the enemy and rolous heaven Wont of every we will in the terman. Then shimself,
#     1.5    Sollow thee; Sweet-[Brolounded weiteons] The timb: Whispoic Jassice,-- Thy noe.
# *Top-k* (Fan et al., 2018) strikes out all but the k likeliest: each of the others is rare, but together
# they come up often and derail the text. Try: `python gpt.py --generate --temperature 1.5 --top-k 5`.
def probabilities(logits, temperature=1.0, top_k=0):
    """Logits (V,) -> the probabilities (V,) to choose by. top_k = 0 keeps all.

    >>> logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    >>> probabilities(logits).round(decimals=2)
    tensor([0.6400, 0.2400, 0.0900, 0.0300])
    >>> probabilities(logits, temperature=0.5).round(decimals=2)
    tensor([0.8600, 0.1200, 0.0200, 0.0000])
    >>> probabilities(logits, top_k=2).round(decimals=2)
    tensor([0.7300, 0.2700, 0.0000, 0.0000])
    """
    if top_k:
        kth = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < kth, -math.inf)
    return (logits / max(temperature, 1e-9)).softmax(0)  # nobody can divide by 0; 1e-9 is as good


# The plainest loop that writes sends the whole context through the model for each new character:
#     for _ in range(length):
#         logits = model(context[None, -block_size:])[0, -1]    # None makes B = 1; the last logits are of use
#         token = torch.multinomial(probabilities(logits), 1)   # draw one by these probabilities
#         context = torch.cat([context, token])
#
# That is a waste. Earlier positions cannot see the new character, so their keys and values are what they were
# the time before. The *key-value cache* keeps them, and `Attention` puts them in front of those of the new
# character, which then costs the work of one position. Tiny writes 2.6 times as fast, medium 6 times, and
# until the context is full the text is the same.
#
# When the context is full, there is no position left to give. If one character is dropped, all others move to
# new positions, and their keys and values must be computed anew. So we drop the earlier half at once, send
# the rest through afresh, and go on; a text can be of any length. (It has no end of its own, since our text
# has no sign for one. GPT-2 learned a token for it.)
@torch.no_grad()
def generate(model, tokenizer, prompt="", length=500, temperature=0.8, top_k=0, seed=1337):
    """Continue the prompt by `length` tokens: an iterator over characters, each as soon as it is made."""
    T, device = model.config.block_size, model.wte.weight.device
    rng = torch.Generator().manual_seed(seed)
    model.eval()  # dropout off
    # Without a prompt, it starts after a blank line; if the text has no line ends, after token 0.
    blank = "\n\n" if "\n" in tokenizer.decode(range(tokenizer.vocab_size)) else tokenizer.decode([0])
    context = tokenizer.encode(prompt or blank)[-T:].long()  # (up to block_size,)
    cache = {}
    for _ in range(length):
        if len(context) > T:
            context, cache = context[-max(1, T // 2) :], {}
        start = len(context) - 1 if cache else 0  # once there is a cache, only the newest goes through
        logits = model(context[None, start:].to(device), cache, start)[0, -1]  # (1, T) -> (V,); mostly T = 1
        token = torch.multinomial(probabilities(logits.cpu(), temperature, top_k), 1, generator=rng)  # (1,)
        context = torch.cat([context, token])
        yield tokenizer.decode(token.tolist())


# %% 9. The recipe
# Back to the claim. The *architecture* is which parts a model has, how many of them, and how wide. The
# *recipe* is the rest: how its weights begin, what it is shown and how it learns. We trained tiny by the
# recipe that nanoGPT (Karpathy, 2022) gives for a CPU, then made one change after the other. Validation
# losses, each the mean of five runs:
#     nanoGPT's recipe for a CPU                                     1.904
#     reading twice as much, just as much as our default reads       1.777
#     initial weights of 1 / sqrt(C) instead of 0.02                 1.726
#     our rate, length of sequences, warm-up and weight decay        1.703
#     the head start: our default                                    1.677
# So reading more gains most, then how the weights begin. The *head start* is about that, too: the first
# block's heads begin by looking at the last few characters (section 11). You need not call it training. (Of
# the changes in the fourth row none alone gains more than chance can.)
#
# And the architecture? Nearly every part of GPT-2 has been improved since. Three of the newer ones: a
# normalization without means or shifts (RMSNorm: Zhang and Sennrich, 2019), an MLP with a gate, one layer's
# outputs times another's (SwiGLU: Shazeer, 2020), and positions as rotations of queries and keys (RoPE: Su et
# al., 2021). All three in place of GPT-2's, with as many parameters, by either recipe, at equal reading:
#                                   GPT-2's parts    the three       gain
#     nanoGPT's recipe                  1.777           1.724        0.05
#     our default                       1.677           1.633        0.04
#     gain                               0.10            0.09
# So at equal reading our recipe gains 0.10, newer parts gain 0.05, and the two add up. Leave out the head
# start, give nanoGPT's recipe twice its rate, and the recipe's gain is 0.05, too. (All this at this size: the
# parts are used in far larger models, and may be worth more there. The README has them, to be put in.) How
# many blocks and how wide makes as little difference as the parts: with the same computation, from one block
# of width 192 to eight of 64, all end within 0.04 of ours. Only a missing part is another matter. Measured
# without the head start, 1.703: no normalization 1.87, no positions 2.20, no attention 2.53, just what
# counting gets after one character.
#
# *One run proves nothing.* Is it better to draw sequences without replacement, so that no place comes twice
# before all have come once? With seeds 1 and 2 the loss was 0.027 and 0.026 lower: a find! With seeds 3 to 5
# it was 0.002, 0.006 and 0.013 higher. So run the same five seeds with and without a change, and compare the
# mean difference, here 0.006, with its *standard error*: Python's `statistics.stdev` of the five differences,
# divided by the root of 5, here 0.008. With five, chance alone exceeds 2.8 standard errors once in twenty
# times (Student, 1908): believe nothing below, and of twenty changes that do nothing, one will still seem to
# help. (All gains in the tables above are beyond it.)
#
# *And the time?* A good recipe is above all a quick one: ours comes to 1.77 in 1,000 steps, for which
# nanoGPT's needs three times the reading. On two cores, nanoGPT's own model, of four blocks, takes 99 seconds
# to 1.90; a single block takes 35 by its recipe, for 1.92, and 13 by ours, for 1.90. The lecture's small
# model comes to 1.87 in 80 seconds, our default to 1.68 in 92. The exact numbers hardly matter: half the rate
# more or a quarter less, a third of the weight decay or twice as much, made no difference of 0.02, about the
# least that five seeds can show. A good recipe is a plateau, not a peak.
#
# *The limits.* Counting beats all of these in two seconds. With 10.8 million parameters, on a GPU, we saw no
# difference, in one run each: nanoGPT's recipe for that size comes to 1.611 and our `medium` to 1.612 before
# they get worse; counting and `small` are better. (On its own text, nanoGPT's README has 1.47.) And we have
# looked at the validation part often, so our figures flatter us. (Not much, it seems: on another tenth of the
# text, kept out instead and never looked at before, nanoGPT's recipe comes to 1.686 at equal reading, ours to
# 1.565.)
#
# *The data* count, too. The validation part is nearly all one comedy. Trained on the comedies alone, tiny
# ends at 1.718, on as much of the tragedies at 1.801; on everything, two and a half times as much, at 1.690
# (2,500 steps). Text like the one you want is worth more than other text.
#
# *How large a model for the time one has?* In the same time, a larger model takes fewer steps. Of five
# shapes, the best for a ninth of tiny's computation was one block of width 64; for a third, one of 96; for
# all of it, two of 128, all with about the same number of steps. So with more time, and a megabyte of text,
# take a larger model first. (With text without end, model and steps should grow alike: Hoffmann et al., 2022.
# Five shapes are too few for a law.)


# %% 10. After training
# The model is finished. It continues texts, and how well is all that its loss has ever asked. What if one
# wants something else from it? Then it learns on, in one of two usual ways.
#
# *Fine-tuning* (`--init-from`) trains it further on the kind of text wanted. A model of eight of our plays is
# at 1.73 on unseen parts of the other two, and after 300 more steps, on the rest of those two, at 1.56. A new
# model, trained on those two alone, is at 1.92 after 300 steps and at 1.62 after 2,500. What was learned from
# eight plays serves for others. (Means of five runs. On the last tenth of the eight, it goes from 1.52 to
# 1.58: it forgets.)
#
# But often nobody has the texts that are wanted; one only knows a good one when one sees it. A *reward* is a
# function that gives a text a number. *Reinforcement learning*: let the model write, and make likelier what
# earned more than the average, unlikelier what earned less. We have a loss that makes a text likelier: -ln p
# of its characters, as ever. Each text is now the model's own, and its loss is multiplied by its *advantage*:
# how far its reward lies above the mean of the batch, in standard deviations (so a reward's own scale does
# not matter). So a text with advantage 1 is learned as in any training, one with -1 is pushed the other way,
# and step by step the mean reward rises (*policy gradient*: Williams, 1992).
#
# The model will do anything for its reward, at any cost to all else. So it is kept on a *leash*: the loss
# also has a term for how far its probabilities have moved from those before, the *KL divergence* (Kullback
# and Leibler, 1951). For each character that might come next, take ln(p / q), where p is its probability now
# and q the one before, and average these, weighted by p. If two characters had 0.5 each and now have 0.9 and
# 0.1, that is 0.9 * ln(0.9 / 0.5) + 0.1 * ln(0.1 / 0.5) = 0.37; if nothing has changed, it is 0. (Ziegler et
# al., 2019, take it off the reward instead.)
@torch.no_grad()
def write_batch(model, contexts, length):
    """Continue many contexts at once, by the model's own probabilities: (B, T) -> (B, T + length)."""
    cache = {}
    for _ in range(length):
        start = contexts.size(1) - 1 if cache else 0
        probs = model(contexts[:, start:], cache, start)[:, -1].softmax(-1)  # (B, V)
        contexts = torch.cat([contexts, torch.multinomial(probs, 1)], dim=1)
    return contexts


def reinforce(model, tokenizer, tokens, reward, steps=200, kl=0.1, batch_size=32, lr=1e-4, seed=1337):
    """Make texts of high reward likelier. Yields after each step: mean reward, KL divergence in nats.

    tokens (N,): prompts come from here. reward: text -> a number. kl: how strongly the model is held to what
    it was before. Policy gradient (Williams, 1992), with the divergence in the loss.
    """
    before = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    T = model.config.block_size // 4  # a quarter of the context is given, the rest is written
    for step in range(steps):
        model.eval()  # dropout off: what is judged is what it writes with
        torch.manual_seed(seed * 1_000_003 + step)
        prompts, _ = get_batch(tokens, batch_size, T)  # (B, T)
        texts = write_batch(model, prompts, model.config.block_size - T)  # (B, block_size)
        written = texts[:, T:]
        rewards = torch.tensor([float(reward(tokenizer.decode(row.tolist()))) for row in written])  # (B,)
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-6)).to(texts.device)  # (B,)

        # The output at T - 1 is a guess of the token at T, the first that was written.
        log_p = model(texts[:, :-1])[:, T - 1 :].log_softmax(-1)  # (B, written, V)
        chosen = log_p.gather(2, written[:, :, None]).squeeze(2)  # (B, written) ln p of the token it chose
        with torch.no_grad():
            log_q = before(texts[:, :-1])[:, T - 1 :].log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        loss = -(advantages[:, None] * chosen).mean() + kl * divergence
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield rewards.mean().item(), divergence.item()


# Let us reward kindness: the share of written words that are kind ones, such as love, sweet, gentle, friend;
# thirty of them. The README has the cell; it takes two minutes. What comes of it with the default's model
# (means of five runs), with beginnings from the validation part:
#                     kind words   val loss   after "HAMLET:"
#     before             1.5%       1.673     Why man the enemy hither, bear a mine for answer.
#     kl = 1             4.4%       1.677     Why lord, ade away there is. CORIN: And I am not thou
#     kl = 0.3          11.7%       1.706     Why love cause, Gentler, I pray you bond of every me with
#     kl = 0.1          57.8%       1.875     Aprulous heart, Gentler, good even heart honest love his
#     kl = 0            99.6%       2.883     Why love love love love love love love love love love love
# You get what you reward. We meant kind texts, and rewarded kind words: on a loose leash the model finds out
# the difference (*reward hacking*), and without one it forgets how to speak, as the loss shows.
#
# Try: another reward, any function of a text, such as its share of question marks.
#
# *From here to the models in the news.* You have now seen every main part of GPT-2, and how a model comes
# about: *pre-training* on text, then *post-training* on what one wants. What is different in the models that
# people talk about?
#
# *Scale.* GPT-2 has this file's architecture with word pieces, 124 million to 1.5 billion parameters, and 40
# gigabytes of text (Radford et al., 2019). GPT-3 had 175 billion and read 300 billion tokens (Brown et al.,
# 2020). Each tenfold of computation divides the loss by about the same number, over as much as seven orders
# of magnitude (Kaplan et al., 2020), as long as model and text grow with it, both alike (Hoffmann et al.,
# 2022). And abilities come for which nobody trained the model: shown a few examples in its context, GPT-3
# translates, and adds small numbers.
#
# *Parts and data.* Most of today's open models keep the plan, with the parts of section 9 (as LLaMA: Touvron
# et al., 2023), heads that share keys and values (Ainslie et al., 2023), and often many MLPs, of which each
# token uses one (Fedus et al., 2022) or a few. Their text is filtered, and what comes twice is taken out: a
# model trained on the rest emits passages by heart ten times less often (Lee et al., 2022).
#
# *From a continuer of texts to one that answers.* First fine-tuning: people write requests with good answers,
# and the model goes on learning on those, so that what follows a request is an answer. Then a reward: people
# compare answers, a second model learns to predict which they prefer, and its prediction is the reward, with
# a similar leash (Ouyang et al., 2022). Raters preferred the answers of such a model of 1.3 billion
# parameters to those of GPT-3 with its 175 billion. Pull too hard at such a reward, and a better judge finds
# the answers worse while the reward still rises (Gao et al., 2023): you have seen the like. Where an answer
# can be checked, as in mathematics, the check itself is the reward, and models learn to write long trains of
# thought before they answer (DeepSeek-AI, 2025). Whether people's preference rewards or a check, the loop is
# in outline the one that you have read: write, judge, make likelier.
#
# *What is not understood.* Why the loss falls so regularly. What most heads and channels do: some have been
# read, such as the pairs of heads that find where the last characters stood before and copy what followed
# (Olsson et al., 2022). And how to reward what one means, rather than what one can count.
#
# *To read on*: "Let's build GPT" (Karpathy, 2023), a lecture; "The annotated transformer" (Rush, 2018);
# nanoGPT; and of the papers Radford et al., Ouyang et al. and DeepSeek-AI, which read most easily. Here the
# lesson ends. What is left is how the head start is made, and then the program around it all.


# %% 11. The head start
# For a second reading. A model of text has to discover that the last few characters matter most. Ours is
# given it: before any training, head d of the first block looks at two places, d positions back and C / 2
# further, 64 in tiny; after training, the near one is left (section 2). The attention weights of the four
# heads before training, from the t of "delight":
#                           head 1        head 2        head 3        head 4
#     with a head start     0.50 at 1     0.30 at 2     0.34 at 3     0.70 at 4     characters back
#                           0.50 at 65    0.70 at 66    0.66 at 67    0.30 at 68
#     without               nowhere more than 0.09
#
# We think that it is hard to discover because character and position share one vector: a query about the
# position also picks up the character. So tokens begin in the first three quarters of the channels, positions
# in the last, and the first block's queries and keys read only positions, its values only tokens.
#
# Positions begin as waves (as in Vaswani et al., 2017): C / 8 of them, of different lengths, each given by
# its sine and cosine. Two waves, four and eight positions long, would begin:
#     position                 0          1            2            3            4
#     4 long                 0, 1       1, 0         0, -1       -1, 0         0, 1
#     8 long                 0, 1      0.7, 0.7      1, 0        0.7, -0.7     0, -1
#     dot product with 0       2         0.7          -1          -0.7          0
# Each position agrees best with itself; with C / 8 waves, only one a multiple of C / 2 away looks the same.
# So a query that holds the waves of a position finds that position.
#
# To look two positions back, the query of position 7 must come out like the key of position 5. Both are made
# from waves, by weights. Think of each wave as the hand of a clock, its sine and cosine saying where it
# points. From one position to the next it moves on; `shift` turns it. Turn two hands alike, one of a position
# and one of a row of weights, and the angle between them stays, and so does their dot product. So head 2
# begins with query weights that are its key weights turned by two positions: what they make of position 7 is
# what the key weights make of position 5, as the example shows.
def shift(waves, angles):
    """Move each wave along by its angle: (..., 2 n), sines first, then cosines; (n,) -> (..., 2 n)

    >>> pace = torch.tensor([0.1, 0.5])  # two waves: their angles from one position to the next
    >>> angles = torch.arange(10)[:, None] * pace  # (10, 1) * (2,) -> (10, 2)
    >>> waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (10, 4) of ten positions
    >>> key_row = torch.tensor([0.3, -0.5, 0.8, 0.1])
    >>> torch.allclose(waves[7] @ shift(key_row, 2 * pace), waves[5] @ key_row)
    True
    """
    sin, cos = waves.chunk(2, dim=-1)  # (..., n) each
    sin_a, cos_a = angles.sin(), angles.cos()
    return torch.cat([sin * cos_a + cos * sin_a, cos * cos_a - sin * sin_a], dim=-1)


@torch.no_grad()
def head_start(model):
    """Let head d of a new model's first block begin by looking d characters back. Changes initial weights.

    GPT(config) is without it: call this before training, as `Run` does.
    """
    C, T, n_head = model.config.n_embd, model.config.block_size, model.config.n_head
    n = C // 8  # waves
    where = C - 2 * n  # channels from here on are for the position, those before for the character
    pace = math.pi * (torch.arange(n) + 0.5) / n  # (n,) by what angle a wave moves on from place to place
    angles = torch.arange(T)[:, None] * pace  # (T, 1) * (n,) -> (T, n)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (T, 2 n)
    model.wpe.weight[:, :where] = 0
    model.wpe.weight[:, where:] = waves / math.sqrt(n)  # so that a row has length 1, like a token's
    model.wte.weight[:, where:] = 0
    model.wte.weight *= math.sqrt(C / where)  # rows as long as before
    # In a layer's weights, each row makes one number, each column reads one channel.
    queries, keys, values = model.h[0].attn.c_attn.weight.split(C)  # (C, C) each: parts, no copies
    queries[:, :where] = keys[:, :where] = 0
    values[:, where:] = 0
    keys *= 3  # and so the queries, made from them below: scores 9 times as large, softmax sharper
    for d, (query, key) in enumerate(zip(queries.chunk(n_head), keys.chunk(n_head)), start=1):
        query[:, where:] = shift(key[:, where:], d * pace)  # (head_size, 2 n)


# %% 12. Files and devices
# Tiny Shakespeare, which char-rnn (Karpathy, 2015) made famous, for those who have no input.txt:
TEXT_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def find_text(path):
    """Where a text lies that was not named just now: there, here, or beside gpt.py. Raises OSError."""
    beside = Path(globals().get("__file__", path)).with_name(path.name)
    for place in (path, Path(path.name), beside):
        if place.exists():
            return place
    if path == Path("input.txt"):
        print(f"There is no input.txt here: fetching Tiny Shakespeare from {TEXT_URL}")
        try:
            write(path, urllib.request.urlopen(TEXT_URL, timeout=30).read())
        except Exception as error:  # there are many ways for that to fail
            raise OSError(f"Tiny Shakespeare can't be fetched ({error}): name a text with --data") from None
    return path


def read_text(path):
    """The text in a UTF-8 file, with line ends of any system as \\n. Raises OSError."""
    try:
        return path.read_text(encoding="utf-8-sig")  # "sig": without a byte-order mark
    except (OSError, UnicodeError) as error:
        raise OSError(f"can't read {path} as UTF-8 ({error}): name a text with --data") from None


def write(path, content):
    """Write bytes to a file, whole or not at all; None: only try whether that can be done. Raises OSError."""
    path = os.path.realpath(path)  # where a link leads to
    part = f"{path}.{os.getpid()}.part"  # beside the old file: one of the two is always whole
    try:
        with open(part, "wb") as file:
            file.write(content or b"")
            file.flush()
            os.fsync(file.fileno())  # wait until it is on the disk
        for seconds in [0.1] * 20 + [0] if content is not None else []:
            try:
                return os.replace(part, path)
            except PermissionError:  # on Windows, while another program reads the old file
                if not seconds:
                    raise
                time.sleep(seconds)
    finally:
        Path(part).unlink(missing_ok=True)


def pack(model, tokenizer, more={}):
    """The bytes of a checkpoint, a dict. more: what else is in it, or in place of these.

    config, vocabulary, model    settings, vocabulary, weights: all that it takes to write
    train_losses, val_losses     of its run: the loss of each step; [step, loss] of each evaluation
    run                          only in a run's own file: all that it takes to go on
    """
    content = dict(config=asdict(model.config), vocabulary=tokenizer.vocabulary, model=model.state_dict())
    buffer = io.BytesIO()  # first in memory: so a full disk is found by `write`, and is a plain OSError
    torch.save(content | more, buffer)
    return buffer.getvalue()


def save(path, model, tokenizer):
    """Write a model to a file, whole or not at all. Raises OSError."""
    write(path, pack(model, tokenizer))


def read_checkpoint(path):
    """What `pack` made: the model, its tokenizer, and the whole dict. Raises ValueError."""
    try:
        # Python's own format, pickle, may run any code when it is read. With weights_only it may not.
        content = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT(Config(**content["config"]))
        model.load_state_dict(content["model"])
        return model, CharTokenizer(content["vocabulary"]), content
    except Exception as error:  # there are many ways not to be a checkpoint
        reason = f"no whole checkpoint of this gpt.py in {path}: train one, or name another ({error!r:.120})"
        raise ValueError(reason) from None


def load(path="gpt.pt", device="cpu"):
    """The model and the tokenizer in a file, ready to write. Raises ValueError."""
    model, tokenizer, _ = read_checkpoint(path)
    return model.to(device).eval(), tokenizer


# What is to be beaten (section 1): counting, done well. *Smoothing* takes 0.75 from each count and hands that
# out as the shorter group advises. And it asks the shorter group something new (Kneser and Ney, 1995): not
# how often a token follows it, but in how many different longer groups.
def counting(training, validation, vocab_size, longest=6):
    """Validation losses of guessing by counts after 0, 1, ... `longest` tokens, in nats. (N,), (M,) -> list

    Interpolated Kneser-Ney smoothing (Chen and Goodman, 1998), in the form of Teh (2006) with strength 1: a
    context counts as seen once more, and leaves that to the shorter one.
    """
    tokens = torch.cat([training, validation]).long()  # (N + M,)
    everywhere = torch.arange(len(training))  # (N,) the places that are counted
    p, losses, shorter = torch.full((len(tokens),), 1 / vocab_size).double(), [], None
    context = torch.zeros_like(tokens)  # a number for what stands before each token: as yet, for nothing

    def one_of_each(numbers):  # a place of each different number
        place = torch.full((len(tokens),), -1)
        place[numbers] = torch.arange(len(numbers))
        return place[place >= 0]

    def guess(places, context, pair, p):  # counts at these places, and p by the shorter context
        times, came = (torch.bincount(x[places], minlength=len(tokens))[x] for x in (pair, context))
        first = places[one_of_each(pair[places])]  # one place for each kind of pair
        kinds = torch.bincount(context[first], minlength=len(tokens))[context]
        return ((times - 0.75).clamp(min=0) + (0.75 * kinds + 1) * p) / (came + 1)

    for length in range(longest + 1):
        pair = (context * vocab_size + tokens).unique(return_inverse=True)[1]  # (N + M,) context and token
        if shorter:
            p = guess(one_of_each(pair[everywhere]), *shorter, p)
        losses.append(-guess(everywhere, context, pair, p)[len(training) :].log().mean().item())
        shorter = context, pair
        context = torch.cat([context[:1], pair[:-1]])  # what stands before the next token: one more
    return losses


# PyTorch computes on the *device* where the tensors are: the CPU, NVIDIA's cuda or Apple's mps.
def pick_device(name):
    """The torch.device of this name; auto is a GPU if there is one that works. Raises ValueError."""
    auto, gpu = name == "auto", torch.accelerator.is_available() and torch.accelerator.current_accelerator()
    if auto:  # several processes can't share Apple's GPU
        name = gpu.type if gpu and (WORLD_SIZE == 1 or gpu.type == "cuda") else "cpu"
    if name == "cuda":  # each of a machine's processes takes the GPU of its number
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0) if WORLD_SIZE > 1 else 0}"
    try:
        return torch.zeros(1, device=name).add(1).device  # compute: this PyTorch may not know so old a GPU
    except Exception as error:
        if auto and WORLD_SIZE == 1 and not isinstance(error, torch.OutOfMemoryError):
            print(f"{name} can't be used, so this runs on the CPU ({error!s:.120})")
            return torch.device("cpu")
        raise ValueError(f"--device {name} can't be used ({error!s:.120}): auto, cpu, cuda or mps?") from None


# A float32 is exact to 24 bits, more than most products need. A *bfloat16* covers the same range but is exact
# to 8, and GPUs from 2020 on multiply such numbers many times faster. In *mixed precision* (Micikevicius et
# al., 2018) linear layers and attention compute with 16-bit copies; weights and optimizer stay in float32,
# since a step that moves a weight by less than one part in 512 would be rounded away. On an NVIDIA H200 a
# step of gpt2 takes 0.120 seconds in float32, 0.021 in mixed precision, and 0.018 with --compile as well.
class BFloat16(nn.Sequential):  # layers in sequence; here one, the model
    """The same model, computing in 16 bits where that is safe: tokens (B, T) -> logits (B, T, V)."""

    def forward(self, tokens):
        with torch.autocast(tokens.device.type, torch.bfloat16):
            return super().forward(tokens).float()


@torch.no_grad()
def sees_ahead(network, tokens):
    """Whether logits of earlier positions move with the last of the tokens (B, T). They must not."""
    network.eval()
    logits = network(tokens)  # (B, T, V)
    other = (tokens[:, -1:] + 1) % logits.size(-1)
    moved = (network(torch.cat([tokens[:, :-1], other], dim=1)) - logits)[:, :-1].abs()
    # The same numbers, added in the same order, give the same result. But some devices add in an order of
    # their own and round by some millionths differently each time: hence not 0.
    return (moved > 1e-4).any().item()


# *Data parallelism* (in PyTorch: Li et al., 2020), as in `torchrun --nproc_per_node 2 gpt.py`: each process
# has the whole model and a part of each batch; gradients are averaged, so all take the step of the whole
# batch, dropout aside.
#     process 0    sequences 0, 2, 4, 6  --->  gradient  --+
#                                                          +--->  mean  --->  the same step in both
#     process 1    sequences 1, 3, 5, 7  --->  gradient  --+
def speed_up(model, batch):
    """A faster way to compute with the same parameters. batch: tokens (B, T) as in the run, to try it with.

    Exits if on this device a position sees later ones.
    """
    config, device, network = model.config, batch.device, model
    new_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # from 2020 on
    if config.dtype == "bfloat16" or (config.dtype == "auto" and new_gpu):
        network = BFloat16(model)
    if sees_ahead(network, batch[:1, :64]):
        sys.exit(f"gpt.py: on {device} this PyTorch lets a position see later ones: try --device cpu")
    if WORLD_SIZE > 1:
        network = nn.parallel.DistributedDataParallel(network)
    if config.compile:
        try:
            faster = torch.compile(network.train())  # takes a while at first: for long runs
            faster(batch).sum().backward()
            return faster
        except Exception as error:
            say(f"--compile does not work here, so this goes on without it ({error!s:.120})")
    return network


def draw(path, content):
    """Draw the losses in a checkpoint into an image file. Raises ImportError, OSError, ValueError."""
    from matplotlib.figure import Figure  # the one thing here that needs another library

    axes = Figure().add_subplot(xlabel="step", ylabel="loss (nats per character)")
    axes.plot(content["train_losses"], linewidth=0.5, label="train")
    axes.plot(*zip(*content["val_losses"] or [(0, math.nan)]), marker="o", label="validation")
    axes.legend()
    axes.figure.savefig(path)


# %% 13. The command line
# Wrong input is found before training starts, and answered in one line: `main` prints what is raised until
# then. argparse by itself would print all flags first.
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parse(argv):
    """The command line -> flags, and those settings that were typed: name -> value. Raises ValueError."""
    parser = Parser("gpt.py", allow_abbrev=False)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--size", choices=SIZES, default="tiny", help="start anew, so large (default: tiny)")
    mode.add_argument("--resume", action="store_true", help="go on with the run beside --out")
    mode.add_argument("--init-from", type=Path, help="fine-tune: start with the model in this file")
    mode.add_argument("--generate", action="store_true", help="don't train: write with the model in --out")
    parser.add_argument("--data", type=Path, help="the text to train on, in UTF-8 (default: input.txt)")
    parser.add_argument("--out", type=Path, default="gpt.pt", help="the file of the model (default: gpt.pt)")
    parser.add_argument("--plot", type=Path, help="draw the losses into this image (needs matplotlib)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    parser.add_argument("--prompt", default="", nargs="?", help="the text to continue")
    parser.add_argument("--length", type=int, default=500, help="characters to write (default: 500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="of the k likeliest; 0: of all (default: 0)")
    for row in [row for row in fields(Config) if row.metadata]:
        kind = {"action": argparse.BooleanOptionalAction} if row.type is bool else {"type": row.type}
        kind["help"] = f"{row.metadata['help']} (default: {row.default})"
        parser.add_argument("--" + row.name.replace("_", "-"), default=argparse.SUPPRESS, **kind)
    args, rest = parser.parse_known_args(argv)
    if args.prompt is None:
        raise ValueError("--prompt needs a text; one that begins with - is written --prompt=-TEXT")
    if rest:
        raise ValueError(f"unknown: {' '.join(rest)}")
    if not (args.length >= 1 and args.temperature >= 0 and args.top_k >= 0):
        raise ValueError("--length must be 1 or more, --temperature and --top-k 0 or more")
    args.prompt = io.StringIO(args.prompt, newline=None).read()  # line ends as in texts
    return args, {row.name: getattr(args, row.name) for row in fields(Config) if hasattr(args, row.name)}


def say(text):
    """Print a line. Whoever read it may have gone, as in `python gpt.py | head`: that does not end a run."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Two files, one rule: a run that has not ended never displaces a finished model. While it goes on, all that
# it takes to go on is in gpt.run.pt, saved every minute, at each evaluation and at Ctrl-C. So Ctrl-C, a crash
# and a power cut are one case: `--resume` goes on from the last save and ends (on a CPU, to the bit) like a
# run that was left alone. At the end its best model becomes gpt.pt, and gpt.run.pt goes.
class Run:
    """A run of training, from what was typed to the finished model. `content` is what its file adds to it."""

    def __init__(self, args, typed):
        """Finds all that can be wrong with what was typed. Raises OSError, ValueError, ImportError."""
        self.asked = False  # whether Ctrl-C has been pressed
        self.plot = args.plot if RANK == 0 else None
        self.out = Path(os.path.realpath(args.out))  # where a link leads to
        self.file = self.out.with_suffix(".run.pt")
        if args.out.suffix != ".pt" or self.out.stem.endswith(".run") or self.out.is_dir():
            raise ValueError(f"--out {args.out} must be a file that ends in .pt, and not in .run.pt")
        if args.resume and not self.file.exists():
            raise ValueError(f"no {self.file.name}, no run to go on with; --init-from trains a model on")
        # The settings: a size's or a checkpoint's, then those of fine-tuning, and above all what was typed.
        settings, begin = SIZES[args.size], self.file if args.resume else args.init_from
        if begin:
            begun, self.tokenizer, content = read_checkpoint(begin)
            settings = content["config"]
        if args.resume and "run" not in content:
            raise ValueError(f"{self.file} is a finished model, no run: --init-from trains it on")
        if args.init_from:  # a quarter of the usual rate, lest the model forget
            settings = settings | dict(steps=300, eval_every=60, lr=0.064 / settings["n_embd"])
        config = Config(**settings | typed)
        changed = begin and [r.name for r in fields(Config) if r.metadata.get("fixed") and r.name in typed]
        self.content = dict(train_losses=[], val_losses=[], run=dict(step=0))
        if args.resume:
            self.content = {name: content[name] for name in self.content}
        run = self.content["run"]
        # The text.
        self.data = args.data or find_text(Path(run.get("data", "input.txt")))
        text = read_text(self.data)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.tokenizer = self.tokenizer if begin else CharTokenizer.from_text(text)
        self.tokenizer.encode(args.prompt)  # raises if there are characters that the model does not know
        self.tokens = self.tokenizer.encode(text)
        self.training, self.validation = split(self.tokens)
        self.device = pick_device(args.device)
        done, few = run["step"], len(self.validation) <= config.block_size
        for wrong, message in [
            (changed, f"a trained model keeps these as they are: leave out {changed}"),
            ("steps" in typed and config.steps <= done, f"--steps {config.steps}: {done} are done already"),
            (config.batch_size % WORLD_SIZE, f"--batch-size must be a multiple of {WORLD_SIZE} processes"),
            (run.get("sha256", self.sha256) != self.sha256, f"{self.data} is not the text of {self.file}"),
            (few, f"{self.data} is too short: a tenth of it must be longer than --block-size"),
            (config.compile and self.device.type == "mps", "--compile can't be trusted on mps: leave it out"),
        ]:
            if wrong:
                raise ValueError(message)
        passes = config.steps * config.batch_size * config.block_size / len(self.training)
        if passes > 100 and "eval_every" not in typed:  # it will soon know the text by heart
            config.eval_every = min(config.eval_every, -(-config.steps // 10))
        # The model.
        self.model = GPT(replace(config, vocab_size=self.tokenizer.vocab_size))
        if begin:
            self.model.load_state_dict(run["weights"] if args.resume else begun.state_dict())
        elif config.head_start and config.n_embd >= 8:
            head_start(self.model)
        self.model.to(self.device)
        self.best = begun.state_dict() if self.content["val_losses"] else self.model.state_dict()
        write(self.file, None)
        if self.plot:
            draw(self.plot, self.content)

    def interrupt(self, *_):
        """What Ctrl-C does: the step may end, so that what is saved is whole. A second one does not wait."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def save(self, step, optimizer):
        """Keep what it takes to go on. Raises OSError."""
        run = dict(step=step, weights=self.model.state_dict(), optimizer=optimizer.state_dict())
        run |= dict(data=str(self.data.resolve()), sha256=self.sha256)
        if not self.content["run"]["step"] and self.file.exists():
            say(f"The unfinished run that was in {self.file} is kept as {self.file}.old.")
            write(f"{self.file}.old", self.file.read_bytes())
        content = self.content | dict(run=run)
        write(self.file, pack(self.model, self.tokenizer, content | dict(model=self.best)))
        self.content = content

    def train(self):
        """Train to the end: then the file --out has the best model. Raises KeyboardInterrupt, OSError."""
        model, config, start = self.model, self.model.config, self.content["run"]["step"]
        train_losses, val_losses = self.content["train_losses"], self.content["val_losses"]
        part = self.training[-2_000_000:]  # more would take too long
        counted = counting(part, self.validation, config.vocab_size)
        losses = ", ".join(f"{loss:.2f}" for loss in counted)
        characters, parameters = len(self.tokens), sum(p.numel() for p in model.parameters())
        say(f"{self.data}: {characters:,} characters, {config.vocab_size:,} different ones.")
        say(f"Validation losses of counting, in {len(part):,} of these, what follows 0, 1, 2, ...: {losses}.")
        say(f"The model has {parameters:,} parameters and is on {self.device}.")
        training, validation = self.training.to(self.device), self.validation.to(self.device)
        optimizer = make_optimizer(model, config)
        if start:  # the optimizer's state is as it was saved, its settings are those of the flags
            groups = [dict(group) for group in optimizer.param_groups]
            optimizer.load_state_dict(self.content["run"]["optimizer"])
            for group, settings in zip(optimizer.param_groups, groups):
                group.update(settings)
        batch, _ = get_batch(training, config.batch_size // WORLD_SIZE, config.block_size)
        network = speed_up(model, batch)  # another way to compute with the model's own parameters
        started, saved, recent = time.monotonic(), time.monotonic(), []
        for step, loss, val_loss in train(network, optimizer, config, training, validation, start):
            recent.append(loss)  # not looked at yet, since a GPU would have to stop for that
            now, asked = time.monotonic(), self.asked
            due = val_loss is not None or asked or now - saved > 60
            if not (due or step % 100 == 0):
                continue
            # One number that is not finite makes the sum of all not finite.
            everything = sum(recent) + sum(parameter.detach().sum() for parameter in model.parameters())
            if not math.isfinite(everything.item() + (val_loss or 0)):
                sys.exit(f"gpt.py: at step {step} the loss is not a finite number: start with a lower --lr")
            train_losses += torch.stack(recent).tolist()
            recent.clear()
            if val_loss is not None or step % 100 == 0:
                left = (now - started) / (step - start) * (config.steps - step)
                left = f"{left:.0f} seconds" if left < 7200 else f"{left / 3600:.1f} hours"
                train_loss = sum(train_losses[-20:]) / min(step, 20)  # one batch may be odd
                say(f"step {step:,} of {config.steps:,}  train loss {train_loss:.3f}  {left} left")
            if val_loss is not None:
                val_losses.append([step, val_loss])
                if val_loss == min(loss for _, loss in val_losses):
                    self.best = {name: weight.clone() for name, weight in model.state_dict().items()}
                sample = "".join(generate(model, self.tokenizer, length=120)).replace("\n", "\n    | ")
                say(f"    val loss {val_loss:.4f}; it now writes:\n    | {sample}")
            if due and RANK == 0:  # of several processes only the first writes
                self.save(step, optimizer)
                if self.plot:
                    draw(self.plot, self.content)
            if asked:
                raise KeyboardInterrupt
            if due:
                saved = now
        model.load_state_dict(self.best)
        if RANK > 0:
            return
        # The best model becomes the file --out, and an earlier one is kept with .old behind its name. If that
        # is this very model, then this run was killed before, when it had all but ended.
        losses = dict(train_losses=train_losses, val_losses=val_losses)
        content = pack(model, self.tokenizer, losses)
        if self.out.exists() and self.out.read_bytes() != content:
            say(f"The earlier {self.out.name} is kept as {self.out.name}.old.")
            write(f"{self.out}.old", self.out.read_bytes())
        write(self.out, content)
        self.file.unlink(missing_ok=True)
        best = min(loss for _, loss in val_losses)
        say(f"The model with the lowest validation loss, {best:.4f}, is in {self.out.name}.")
        say(f"Counting gets {min(counted):.4f}. It writes:\n")


def main(argv=None):
    """Train, unless told not to; then write. Returns model and tokenizer, for the next cell of a notebook."""
    if RANK > 0:  # of several processes only the first speaks
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack characters that the text has
        sys.stdout.reconfigure(errors="replace")
    try:
        args, typed = parse(argv)
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if WORLD_SIZE > 1 and missing:
            raise ValueError(f"WORLD_SIZE is {WORLD_SIZE}, but there is no {' '.join(missing)}: use torchrun")
        if args.generate:
            if args.data or typed.keys() - {"seed"}:
                raise ValueError("--generate only writes: leave out --data and the settings of training")
            model, tokenizer, content = read_checkpoint(args.out)
            model.to(pick_device(args.device))
            tokenizer.encode(args.prompt)
            if args.plot and not content.get("val_losses"):
                raise ValueError(f"{args.out} has no losses to draw")
            if args.plot:
                draw(args.plot, content)
        else:
            run = Run(args, typed)
            model, tokenizer = run.model, run.tokenizer
    except (OSError, ValueError, ImportError) as error:
        print("gpt.py:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # nothing has begun
    try:
        if not args.generate:
            if WORLD_SIZE > 1:
                if run.device.type == "cuda":
                    torch.cuda.set_device(run.device)  # else each takes memory of the first GPU, too
                torch.distributed.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
            with contextlib.suppress(ValueError):  # only the main thread can say what Ctrl-C does
                signal.signal(signal.SIGINT, run.interrupt)
            try:
                run.train()
            finally:
                with contextlib.suppress(ValueError):
                    signal.signal(signal.SIGINT, signal.default_int_handler)
            if WORLD_SIZE > 1:
                torch.distributed.destroy_process_group()
        print(args.prompt, end="")
        how = (args.length, args.temperature, args.top_k, typed.get("seed", Config.seed))
        for character in generate(model, tokenizer, args.prompt, *how):
            print(character, end="", flush=sys.stdout.isatty())
        print(flush=True)
    except KeyboardInterrupt:
        say("\nStopped.")
        if not args.generate and run.content["run"]["step"] and run.file.exists():
            model.load_state_dict(run.best)
            say("To go on, or to write with the best weights so far:")
            for flags in (["--resume", "--out", str(args.out)], ["--generate", "--out", str(run.file)]):
                line = shlex.join([sys.executable, sys.argv[0], *flags])
                say(f"    {line if argv is None else f'main({flags})'}")
        if argv is None:
            sys.exit(130)
    except BrokenPipeError:  # whoever read this has gone, as in `python gpt.py --generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        step = not args.generate and run.file.exists() and run.content["run"]["step"]
        go_on = f", then --resume goes on from step {step}" if step else ""
        sys.exit(f"gpt.py: can't write ({error}): make room{go_on}")
    return model, tokenizer


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # In a notebook, sys.argv holds the notebook's own flags.
    model, tokenizer = main([] if "ipykernel" in sys.modules else None)
