# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6"]
# ///
"""
A GPT-2 in one file, trained from nothing on the characters of a text until it writes such texts itself.
"""

# %% 0. Settings
# TODO prose

import argparse
import hashlib
import math
import os
import sys
import time
import urllib.request
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch looks for numpy; we do without
import torch
from torch import nn
from torch.nn import functional as F


def setting(default, help):
    """One row of the table: the default, and what --help says of it."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """All settings of a model, its training and its writing."""

    # The shape of the model (sections 2 to 5).
    n_layer: int = setting(2, "blocks, one on top of the other")
    n_head: int = setting(4, "attention heads in a block; must divide n_embd")
    n_embd: int = setting(128, "numbers that stand for one character")
    block_size: int = setting(128, "context: how many characters the model looks back on")
    # Its training (sections 6, 7 and 9).
    batch_size: int = setting(8, "sequences in a step")
    steps: int = setting(2500, "steps of training")
    lr: float = setting(2e-3, "learning rate at its peak")
    warmup: float = setting(0.1, "share of the steps until that peak is reached")
    final_lr: float = setting(0.0, "learning rate at the end, as a share of the peak")
    weight_decay: float = setting(0.3, "pull of the weight matrices towards zero")
    beta2: float = setting(0.99, "how long AdamW remembers the size of the gradients")
    grad_clip: float = setting(1.0, "longest gradient allowed")
    dropout: float = setting(0.0, "share of outputs set to 0 in training")
    head_start: bool = setting(True, "start with heads that look back")
    eval_every: int = setting(500, "steps between two evaluations")
    seed: int = setting(1337, "where all randomness comes from")
    # Its writing (section 8).
    length: int = setting(500, "characters to write")
    temperature: float = setting(0.8, "0: always the likeliest character; 1: by the model's probabilities")
    top_k: int = setting(0, "choose among the k likeliest characters only; 0: among all")
    # Its arithmetic (section 10).
    dtype: str = setting("auto", "auto, float32 or bfloat16")
    compile: bool = setting(False, "let torch.compile make the model faster first")
    # Counted in the text, and so no flag (section 1).
    vocab_size: int = setting(65, "different characters")


SIZES = {
    "tiny": {},
    "small": {"n_layer": 4, "n_embd": 256, "steps": 8000, "lr": 1e-3, "weight_decay": 0.6},
    "medium": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16}
    | {"steps": 6000, "lr": 7e-4, "weight_decay": 0.9, "dropout": 0.2},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "steps": 20_000, "lr": 3e-4},
}


# %% 1. Text to numbers


class CharTokenizer:
    """Turns text into tokens and back.

    >>> tokenizer = CharTokenizer.from_text("to be or not to be")
    >>> tokenizer.characters
    ' benort'
    >>> tokenizer.encode("not")
    tensor([3, 4, 6], dtype=torch.int32)
    >>> tokenizer.decode([1, 2, 2])
    'bee'
    """

    def __init__(self, characters):
        self.characters = characters
        self.vocab_size = len(characters)
        self.token_of = {character: token for token, character in enumerate(characters)}

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
        return "".join(self.characters[token] for token in tokens)


def split(tokens):
    """Tokens (N,) -> the training part and the validation part: the last tenth, but at most a million.

    >>> training, validation = split(torch.arange(20))
    >>> validation
    tensor([18, 19])
    """
    cut = max(len(tokens) * 9 // 10, len(tokens) - 1_000_000)
    return tokens[:cut], tokens[cut:]


def count_pairs(tokens, vocab_size):
    """Row a, column b: how often token b follows token a. (N,) -> (V, V)

    >>> count_pairs(torch.tensor([0, 1, 1, 0, 1]), 2)
    tensor([[0, 2],
            [1, 1]])
    """
    pairs = tokens[:-1] * vocab_size + tokens[1:]  # (N - 1,) two tokens as one number
    return torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size)


def baselines(training, validation, vocab_size):
    """Validation losses, in nats per character, of models that only count. (N,), (M,) -> name -> loss"""
    V = vocab_size
    pairs = count_pairs(training, V)  # (V, V)
    counts = pairs.sum(1)  # (V,) how often each token occurs
    before, after = validation[:-1], validation[1:]  # (M - 1,) each
    unigram = (counts[after] + 1) / (counts.sum() + V)  # (M - 1,) the probability of each next token
    bigram = (pairs[before, after] + 1) / (counts[before] + V)  # (M - 1,) the same, knowing the one before
    losses = [math.log(V), -unigram.log().mean().item(), -bigram.log().mean().item()]
    return dict(zip(["uniform", "unigram", "bigram"], losses))


# %% 2. Attention


def attention_by_hand(query, key, value):
    """Causal attention over T positions, step by step: (T, head_size) three times -> (T, head_size).

    >>> query, key = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[0.0], [0.0], [math.log(2)]])
    >>> value = torch.tensor([[8.0], [4.0], [0.0]])
    >>> attention_by_hand(query, key, value).flatten()
    tensor([8., 6., 3.])
    >>> F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True).flatten()
    tensor([8., 6., 3.])
    """
    scores = query @ key.T  # (T, head_size) @ (head_size, T) -> (T, T)
    scores = scores / math.sqrt(query.size(-1))  # (T, T)
    ahead = torch.ones_like(scores).triu(1).bool()  # (T, T) true where the column is later than the row
    weights = scores.masked_fill(ahead, -math.inf).softmax(-1)  # (T, T) each row adds up to 1
    return weights @ value  # (T, T) @ (T, head_size) -> (T, head_size)


class Attention(nn.Module):
    """Each position gathers from itself and from those before it. (B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # cut into 3, and into heads
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, head_size) each
        if cache is not None:  # only for writing; section 8 explains it
            if self in cache:
                k = torch.cat([cache[self][0], k], dim=2)  # (B, n_head, earlier positions + T, head_size)
                v = torch.cat([cache[self][1], v], dim=2)
            cache[self] = k, v
        # A single new position may see all keys, so it needs no mask.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # (B, n_head, T, head_size)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.dropout(self.c_proj(y))  # (B, T, C)


# %% 3. The MLP


class MLP(nn.Module):
    """Two linear layers with an activation between them, at each position alone. (B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x))  # (B, T, C) -> (B, T, 4 * C)
        return self.dropout(self.c_proj(x))  # (B, T, 4 * C) -> (B, T, C)


# %% 4. The block


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


class GPT(nn.Module):
    """The whole model: tokens (B, T) -> logits (B, T, V), at each position for the token after it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # "weights of the token embedding"
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # "weights of the position embedding"
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))  # "hidden layers"
        self.ln_f = nn.LayerNorm(config.n_embd)  # "final"

        rng = torch.Generator().manual_seed(config.seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writers = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=1 / math.sqrt(config.n_embd * writers), generator=rng)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, cache=None, start=0):
        """cache and start belong to writing (section 8): the first of the tokens stands at position start."""
        end = start + tokens.size(1)
        assert end <= self.config.block_size, f"{end} tokens don't fit block_size {self.config.block_size}"
        x = self.dropout(self.wte(tokens) + self.wpe.weight[start:end])  # (B, T, C) + (T, C) -> (B, T, C)
        for block in self.h:
            x = block(x, cache)  # (B, T, C)
        return F.linear(self.ln_f(x), self.wte.weight)  # dot products: (B, T, C) -> (B, T, V)


# %% 6. Batches

RANK = int(os.environ.get("RANK", 0))  # this process's number, from 0
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many there are


def get_batch(tokens, batch_size, block_size):
    """A random batch from tokens (N,): inputs and targets, (B, T) each.

    >>> inputs, targets = get_batch(torch.arange(100), batch_size=2, block_size=4)
    >>> torch.equal(targets, inputs + 1)  # this text is 0, 1, 2, ..., so what comes next is one more
    True
    """
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1))[RANK::WORLD_SIZE]  # (B, 1)
    places = starts + torch.arange(block_size + 1)  # (B, 1) + (T + 1,) -> (B, T + 1)
    sequences = tokens[places.to(tokens.device)].long()  # (B, T + 1)
    return sequences[:, :-1], sequences[:, 1:]


# %% 7. Training


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


def make_optimizer(model, config):
    """AdamW over all parameters of the model, with weight decay on the matrices alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


@torch.no_grad()
def evaluate(model, config, tokens):
    """Mean loss in nats per token over tokens (N,), read once, in sequences of block_size."""
    model.eval()  # dropout off
    T, n = config.block_size, len(tokens) - 1
    padding = (0, -n % T)  # what the last sequence lacks; cross_entropy leaves out targets of -100
    inputs = F.pad(tokens[:-1], padding).long().view(-1, T)  # (N / T, T)
    targets = F.pad(tokens[1:], padding, value=-100).long().view(-1, T)  # (N / T, T)
    total = 0.0
    for x, y in zip(inputs.split(32), targets.split(32)):  # (32, T) each
        logits = model(x)  # (32, T) -> (32, T, V)
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / n


def train(model, optimizer, config, training, validation, start=0):
    """Train the model in place. Yields after each step: steps done, loss, validation loss (mostly None).

    model: anything that maps tokens (B, T) to logits (B, T, V). training, validation: tokens (N,) and (M,).
    """
    for step in range(start, config.steps):
        model.train()  # dropout on
        torch.manual_seed(config.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)

        inputs, targets = get_batch(training, config.batch_size, config.block_size)  # (B, T) each
        logits = model(inputs)  # (B, T) -> (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # one number
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()

        val_loss = None
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            val_loss = evaluate(model, config, validation)
        yield step + 1, loss.item(), val_loss


# %% 8. Writing


def probabilities(logits, temperature=1.0, top_k=0):
    """Logits (V,) -> the probabilities (V,) to choose by. top_k = 0 keeps all.

    >>> logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    >>> probabilities(logits).round(decimals=2)
    tensor([0.6400, 0.2400, 0.0900, 0.0300])
    >>> probabilities(logits, temperature=0.5).round(decimals=2)
    tensor([0.8600, 0.1200, 0.0200, 0.0000])
    >>> probabilities(logits, top_k=2).round(decimals=2)
    tensor([0.7300, 0.2700, 0.0000, 0.0000])
    >>> probabilities(logits, temperature=0)
    tensor([1., 0., 0., 0.])
    """
    if top_k:
        kth = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < kth, -math.inf)
    return (logits / max(temperature, 1e-9)).softmax(0)  # 1e-9 is as good as 0, and can divide


@torch.no_grad()
def generate(model, tokenizer, prompt="", **settings):
    """Continue the prompt: an iterator over characters, each as soon as it is made.

    settings: length, temperature, top_k and seed, where they should differ from the model's config. An empty
    prompt counts as twice the first character of the vocabulary: in most texts, as an empty line.
    """
    config, device = replace(model.config, **settings), model.wte.weight.device
    rng = torch.Generator().manual_seed(config.seed)
    model.eval()  # dropout off
    context = tokenizer.encode(prompt) if prompt else torch.zeros(2)
    context = context[-config.block_size :].long()  # (up to block_size,)
    cache, start = {}, 0  # start: how many positions are in the cache
    new = []  # tokens that are not yet a whole character
    for _ in range(config.length):
        if len(context) > config.block_size:
            context = context[-max(1, config.block_size // 2) :]
            cache, start = {}, 0
        logits = model(context[None, start:].to(device), cache, start)[0, -1]  # (1, T) -> (V,)
        start = len(context)
        weights = probabilities(logits.cpu(), config.temperature, config.top_k)  # (V,)
        token = torch.multinomial(weights, 1, generator=rng)  # (1,)
        context = torch.cat([context, token])
        new.append(token.item())
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd") or len(new) == 4:
            yield text
            new = []


# %% 9. The recipe


def shift(waves, angles):
    """Move each wave on by its angle, exactly. (..., 2 n), sines first, then cosines; (n,) -> (..., 2 n)"""
    sin, cos = waves.chunk(2, dim=-1)  # (..., n) each
    c, s = angles.cos(), angles.sin()
    return torch.cat([sin * c + cos * s, cos * c - sin * s], dim=-1)


@torch.no_grad()
def head_start(model):
    """Let head d of a new model's first block begin by looking d characters back. Changes initial weights."""
    C, T, n_head = model.config.n_embd, model.config.block_size, model.config.n_head
    n = C // 8  # waves
    where = C - 2 * n  # channels from here on are for the position, those before for the character
    pace = math.pi * (torch.arange(n) + 0.5) / n  # (n,) by what angle a wave moves on from place to place
    angles = torch.arange(T)[:, None] * pace  # (T, 1) * (n,) -> (T, n)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (T, 2 n)
    model.wpe.weight[:, :where] = 0
    model.wpe.weight[:, where:] = waves / math.sqrt(n)  # rows of length 1
    model.wte.weight[:, where:] = 0
    model.wte.weight *= math.sqrt(C / where)  # rows as long as before

    queries, keys, values = model.h[0].attn.c_attn.weight.split(C)  # (C, C) each
    queries[:, :where] = 0
    keys[:, :where] = 0
    values[:, where:] = 0
    keys *= 3
    heads = zip(queries.chunk(n_head), keys.chunk(n_head))  # (head_size, C) each
    for d, (query, key) in enumerate(heads, start=1):
        query[:, where:] = shift(key[:, where:], d * pace)


# %% 10. Files and devices

TEXT_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def read_text(path):
    """The text in a UTF-8 file, with line ends of any system as \\n. Raises OSError."""
    try:
        if path == Path("input.txt") and not path.exists():
            print(f"There is no input.txt here: fetching Tiny Shakespeare from {TEXT_URL}")
            path.write_bytes(urllib.request.urlopen(TEXT_URL, timeout=30).read())
        return path.read_text(encoding="utf-8-sig")  # "sig": without a byte-order mark
    except (OSError, UnicodeError) as error:
        raise OSError(f"can't read {path} as UTF-8 ({error}): name a text with --data") from None


def save(path, model, tokenizer, progress=None, keep_old=False):
    """Write a checkpoint, a dict, to a file, whole or not at all. Raises OSError.

        config, characters, model    settings, vocabulary, weights: all that a finished model needs
        train_losses, val_losses     the loss of each step; [step, validation loss] of each evaluation
        step, optimizer              of an unfinished run: steps done, and the optimizer's state after them
        best                         the weights with the lowest validation loss ("model" has the newest)
        data, sha256                 where the text is, and its fingerprint

    progress: all but the first three. Of several processes only the first writes.
    """
    model = getattr(model, "_orig_mod", model)  # the model inside what torch.compile gives
    content = dict(progress or {}, config=asdict(model.config), characters=tokenizer.characters)
    content["model"] = model.state_dict()
    if RANK == 0:
        with open(f"{path}.part", "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # wait until it is on the disk
        if keep_old and os.path.exists(path):
            print(f"The earlier {path} is kept as {path}.old.", flush=True)
            os.replace(path, f"{path}.old")
        os.replace(f"{path}.part", path)


def read_checkpoint(path):
    """The dict that `save` wrote, and the model with its best weights. Raises ValueError."""
    try:
        # Python's own format, pickle, may run any code when it is read. With weights_only it may not.
        found = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT(Config(**found["config"]))
        model.load_state_dict(found.get("best", found["model"]))
        return found, model
    except Exception as error:  # there are many ways not to be a checkpoint
        misfit = str(error).partition("state_dict for GPT:")[2].strip().partition("\n")[0]
        reason = f"no whole checkpoint of this gpt.py in {path}: train one, or name another. {misfit:.100}"
        raise ValueError(reason) from None


def load(path="gpt.pt", device="cpu"):
    """The model and the tokenizer in a file, ready to write. Raises OSError or ValueError."""
    found, model = read_checkpoint(Path(path))
    return model.to(device).eval(), CharTokenizer(found["characters"])


def pick_device(name):
    """The torch.device of this name; auto is a GPU if there is one. Raises ValueError."""
    if name == "auto" and torch.accelerator.is_available():
        name = torch.accelerator.current_accelerator().type  # cuda, mps and the like
    if name == "cuda":  # each of a machine's processes takes the GPU of its number
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(1, device=name.replace("auto", "cpu")).device
    except Exception:
        raise ValueError(f"--device {name} is not there: try auto, cpu, cuda, cuda:1 or mps") from None


class BFloat16(nn.Module):
    """The same model, computing in 16 bits where that is safe: tokens (B, T) -> logits (B, T, V)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        with torch.autocast(tokens.device.type, torch.bfloat16):
            return self.model(tokens).float()


def speed_up(model, device):
    """A faster way to compute with the same parameters: tokens (B, T) -> logits (B, T, V)."""
    dtype, compile = model.config.dtype, model.config.compile
    new_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # from 2020 on
    if dtype == "bfloat16" or (dtype == "auto" and new_gpu):
        model = BFloat16(model)
    if WORLD_SIZE > 1:  # each process has the whole model, and all average their gradients
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        model = nn.parallel.DistributedDataParallel(model)
    return torch.compile(model) if compile else model


def draw(path, progress):
    """Draw the losses of a run into an image file."""
    from matplotlib.figure import Figure  # the one thing here that needs another library

    axes = Figure().add_subplot(xlabel="step", ylabel="loss (nats per character)")
    axes.plot(progress["train_losses"], linewidth=0.5, label="train")
    axes.plot(*zip(*progress["val_losses"]), marker="o", label="validation")
    axes.legend()
    axes.figure.savefig(path)


# %% 11. The command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parse(argv):
    """The command line -> flags, config, and the checkpoint to start from or None. Raises ValueError."""
    parser = Parser("gpt.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--size", choices=SIZES, default="tiny", help="start anew, with this size's defaults")
    start.add_argument("--resume", action="store_true", help="go on with the run in --out where it was saved")
    start.add_argument("--init-from", type=Path, help="fine-tune: start with the model in this file")
    start.add_argument("--generate", action="store_true", help="don't train: write with the model in --out")
    parser.add_argument("--data", type=Path, default="input.txt", help="the text to train on, in UTF-8")
    parser.add_argument("--out", type=Path, default="gpt.pt", help="the file of the model")
    parser.add_argument("--plot", type=Path, help="draw the loss into this image (needs matplotlib)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--prompt", default="", help="the text to continue")
    for row in fields(Config)[:-1]:  # all but vocab_size
        options = {"action": argparse.BooleanOptionalAction} if row.type is bool else {"type": row.type}
        flag = "--" + row.name.replace("_", "-")
        parser.add_argument(flag, default=row.default, help=row.metadata["help"], **options)

    args = parser.parse_args(argv)
    found, defaults = None, SIZES[args.size]
    if args.resume or args.init_from or args.generate:
        found, _ = read_checkpoint(args.init_from or args.out)
        defaults = {"data": found.get("data", "input.txt")} | found["config"]
    if args.init_from:  # a quarter of the learning rate that is right for its width, lest it forget
        defaults = defaults | {"steps": 300, "eval_every": 60, "lr": 0.064 / defaults["n_embd"]}
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)  # once more: what is typed beats these defaults
    config = Config(**{row.name: getattr(args, row.name, row.default) for row in fields(Config)})
    return args, config, found


MAY_BE_0 = ("warmup", "final_lr", "weight_decay", "beta2", "dropout", "seed", "temperature", "top_k")
SHAPE = ("n_layer", "n_head", "n_embd", "block_size")


def check(args, config, found):
    """Raise ValueError for the first thing that is wrong with what was typed."""
    for name, value in vars(config).items():
        least = 0 if name in MAY_BE_0 else 1e-9
        if type(value) in (int, float) and not value >= least:
            raise ValueError(f"--{name.replace('_', '-')} can't be {value}")
    old = Config(**found["config"]) if found else config
    changed = [name for name in SHAPE if getattr(old, name) != getattr(config, name)]
    mistakes = [
        (max(config.warmup, config.final_lr) > 1, "--warmup and --final-lr are shares, from 0 to 1"),
        (max(config.dropout, config.beta2) >= 1, "--dropout and --beta2 must be less than 1"),
        (config.n_embd % config.n_head, f"--n-head {config.n_head} does not divide --n-embd {config.n_embd}"),
        (config.dtype not in ("auto", "float32", "bfloat16"), f"--dtype can't be {config.dtype}"),
        (config.batch_size % WORLD_SIZE, f"--batch-size must be a multiple of the {WORLD_SIZE} processes"),
        (changed, f"a trained model keeps its shape: {', '.join(changed)} can't be changed"),
        (args.resume and "step" not in found, f"this run has ended; --init-from {args.out} trains on"),
        (not args.generate and args.out.suffix != ".pt", f"--out {args.out} must end in .pt"),
        (not os.access(args.out.parent, os.W_OK), f"can't write --out {args.out}: is there such a folder?"),
    ]
    for wrong, message in mistakes:
        if wrong:
            raise ValueError(message)


def build(args, config, found):
    """All that a run needs: model, tokenizer, tokens (N,) and progress (see `save`). Writes nothing.

    found: the checkpoint to start from, or None. Raises OSError or ValueError for what a user can put right.
    """
    text = "" if args.generate else read_text(args.data)
    tokenizer = CharTokenizer(found["characters"]) if found else CharTokenizer.from_text(text)
    tokens = tokenizer.encode(text)
    tokenizer.encode(args.prompt)  # raises if there are characters that the model does not know
    if not args.generate and len(split(tokens)[1]) <= config.block_size:
        raise ValueError(f"{args.data} is too short: a tenth of it must be longer than --block-size")
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    progress = found if args.resume else {"step": 0, "train_losses": [], "val_losses": [], "sha256": sha256}
    if progress["sha256"] != sha256:
        raise ValueError(f"{args.data} is not the text that the run in {args.out} began with")

    config.vocab_size = tokenizer.vocab_size
    model = GPT(config)
    if found:
        model.load_state_dict(found["model"] if args.resume else found.get("best", found["model"]))
    elif config.head_start and config.n_embd >= 8:
        head_start(model)
    progress["data"] = str(args.data.resolve())
    if args.plot:
        draw(args.plot, progress)  # raises without matplotlib, or if it can't draw such a file
    return model.to(pick_device(args.device)), tokenizer, tokens, progress


def run(args, model, tokenizer, tokens, progress):
    """Train as the flags say. In the end, model and file have the weights with the lowest validation loss."""
    config, device, start = model.config, model.wte.weight.device, progress["step"]
    training, validation = (part.to(device) for part in split(tokens))
    print(f"{args.data}: {len(tokens):,} characters, {config.vocab_size:,} different ones. Baselines:")
    for name, loss in baselines(training, validation, config.vocab_size).items():
        print(f"    {name} {loss:.2f} nats per character")
    print(f"The model has {sum(p.numel() for p in model.parameters()):,} parameters and is on {device}.")
    optimizer = make_optimizer(model, config)
    if args.resume:  # the state as it was, the settings as the flags say
        optimizer.load_state_dict(progress["optimizer"])
        for group, settings in zip(optimizer.param_groups, make_optimizer(model, config).param_groups):
            group.update(settings)

    began = saved = time.monotonic()
    network = speed_up(model, device)  # the same parameters
    for step, loss, val_loss in train(network, optimizer, config, training, validation, start):
        if not math.isfinite(loss + (val_loss or 0)):
            sys.exit(f"gpt.py: the loss is {loss} at step {step}: start again with a lower --lr")
        progress["train_losses"].append(loss)
        now = time.monotonic()
        if val_loss is not None or step % 100 == 0:
            recent = progress["train_losses"][-20:]  # one batch is easy or hard by chance
            line = f"step {step:,} of {config.steps:,}  train loss {sum(recent) / len(recent):.3f}"
            line += "" if val_loss is None else f"  val loss {val_loss:.4f}"
            left = (now - began) / (step - start) * (config.steps - step)
            print(line + f"  {left:.0f} seconds left", flush=True)
        if val_loss is not None:
            progress["val_losses"].append([step, val_loss])
            if val_loss == min(loss for _, loss in progress["val_losses"]):
                progress["best"] = {name: weight.clone() for name, weight in model.state_dict().items()}
            sample = "".join(generate(model, tokenizer, length=120))
            print("    | " + sample.replace("\n", "\n    | "), flush=True)
            if args.plot:
                draw(args.plot, progress)
        # A run is saved at its first evaluation, and from then on at each, and every minute.
        if val_loss is not None or (progress["val_losses"] and now - saved > 60):
            first = progress["step"] == 0
            progress |= {"step": step, "optimizer": optimizer.state_dict()}
            save(args.out, model, tokenizer, progress, keep_old=first)
            saved = now

    if WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()
    model.load_state_dict(progress["best"])
    save(args.out, model, tokenizer, {name: progress[name] for name in ("train_losses", "val_losses")})
    best = min(loss for _, loss in progress["val_losses"])
    print(f"The model with the lowest validation loss, {best:.4f}, is in {args.out}. It writes:\n")


def main(argv=None):
    """Train, unless told not to; then write. Returns model and tokenizer, for the next cell of a notebook."""
    if RANK > 0:  # of several processes only the first speaks
        sys.stdout = open(os.devnull, "w")
    try:
        args, config, found = parse(argv)
        check(args, config, found)
        model, tokenizer, tokens, progress = build(args, config, found)
    except (OSError, ValueError, ImportError) as error:
        if RANK == 0 or "--device" in str(error):  # each process has a device of its own
            print("gpt.py:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    try:
        if not args.generate:
            run(args, model, tokenizer, tokens, progress)
        print(args.prompt, end="")
        for text in generate(model, tokenizer, args.prompt):
            print(text, end="", flush=sys.stdout.isatty())
        print(flush=True)
    except KeyboardInterrupt:
        saved = progress["step"] > 0
        print(f"\nStopped. To go on: python gpt.py --resume --out {args.out}" if saved else "\nStopped.")
        sys.exit(130)
    except BrokenPipeError:  # whoever read this has gone, as in `python gpt.py --generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return model, tokenizer


if __name__ == "__main__":
    # In a notebook, the command line is Jupyter's own.
    model, tokenizer = main([] if "kernel_launcher" in sys.argv[0] else None)
