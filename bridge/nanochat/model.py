"""The transformer of all nanochat generations, from the first commit (G0) to G7, in one small module."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import relu, rms_norm

from bridge.nanochat.attention import attend
from bridge.nanochat.cache import Cache, KeyValues
from bridge.nanochat.config import EPS, GENERATIONS, SMEAR_CHANNELS, GPTConfig

__all__ = ["GENERATIONS", "GPT", "Cache", "GPTConfig"]

Rope = tuple[Tensor, Tensor]  # cos and sin, each (1, T, 1, head_dim / 2)


@runtime_checkable
class Runner(Protocol):
    """Calls the functions that a forward pass consists of; `bridge.nanochat.compiled` calls compiled programs."""

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(*arguments)`."""

    def mask(self, length: int, window: int | None, device: torch.device) -> Any:
        """Return the mask of the attention within a text, as `attend` takes it; None for plainly causal attention."""


def norm(x: Float[Tensor, "*axes C"], eps: float | None = None) -> Float[Tensor, "*axes C"]:
    """Divide x by its root mean square over the last axis; no weights.

    By default torch adds float32's eps, as upstream does. 1e-6 gives clearly different results for small embeddings.
    """
    return rms_norm(x, (x.size(-1),), eps=eps)


def norm_eps(config: GPTConfig) -> float | None:
    """Return the eps to call `norm` with: None, exactly upstream's call, if the config has torch's default."""
    return None if config.eps == EPS else config.eps


def rotate(x: Float[Tensor, "B T H D"], rope: Rope) -> Float[Tensor, "B T H D"]:
    """Rotate the pairs (d, d + D/2) by minus the angle: the transpose of Llama's rotation."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class Attention(nn.Module):
    """Causal attention with rotary embeddings, followed by normalised queries and keys; returns c_proj's output."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.window = config.window_sizes[layer]
        self.head_dim = config.head_dim
        self.qk_scale = config.qk_scale
        self.eps = norm_eps(config)
        self.gate_mult = config.ve_gate_mult
        kv_width = config.n_kv_head * config.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_width, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_width, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if config.has_value_embedding(layer):
            self.ve_gate = nn.Linear(config.ve_gate_channels, config.n_kv_head, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        ve: Float[Tensor, "B T kv"] | None,
        rope: Rope,
        cache: KeyValues | None,
        run: Runner | None = None,
    ) -> Float[Tensor, "B T C"]:
        """Return the output for x, the normalised residual stream, and ve, the value embeddings of the same tokens.

        `run`, if given and if no hook is within, calls `compute`.
        """
        if run is None or _has_hooks(self):
            return self.compute(x, ve, rope, cache)
        return run(Attention.compute, self, x, ve, rope, None, run.mask(x.size(1), self.window, x.device))

    def compute(
        self,
        x: Float[Tensor, "B T C"],
        ve: Float[Tensor, "B T kv"] | None,
        rope: Rope,
        cache: KeyValues | None,
        mask: Any = None,
    ) -> Float[Tensor, "B T C"]:
        """Return the output; `mask` is that of `attend`."""
        B, T, C = x.shape
        q, k = self.queries_and_keys(x, rope)
        v = self.values(x, ve, None if ve is None else self.value_gate(x))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
            mask = cache.mask(self.window)
        y = attend(q, k, v, self.window, mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

    def queries_and_keys(self, x: Float[Tensor, "B T C"], rope: Rope) -> tuple[Tensor, Tensor]:
        """Return queries (B, T, H, D) and keys (B, T, Hkv, D): projected, rotated, normalised and scaled."""
        q, k = (proj(x).view(*x.shape[:2], -1, self.head_dim) for proj in (self.c_q, self.c_k))
        q, k = norm(rotate(q, rope), self.eps), norm(rotate(k, rope), self.eps)
        if self.qk_scale != 1.0:
            q, k = q * self.qk_scale, k * self.qk_scale
        return q, k

    def value_gate(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T Hkv"]:
        """Return the factors on the value embeddings; only layers that have them have a gate."""
        return self.gate_mult * torch.sigmoid(self.ve_gate(x[..., : self.ve_gate.in_features]))

    def values(
        self, x: Float[Tensor, "B T C"], ve: Float[Tensor, "B T kv"] | None, gate: Float[Tensor, "B T Hkv"] | None
    ) -> Float[Tensor, "B T Hkv D"]:
        """Return the values, to which value embeddings are added through their gate; both are None without them."""
        v = self.c_v(x).view(*x.shape[:2], -1, self.head_dim)
        return v if ve is None else v + gate[..., None] * ve.view_as(v)


class MLP(nn.Module):
    """c_proj(relu(c_fc(x))^2)"""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Float[Tensor, "B T C"], run: Runner | None = None) -> Float[Tensor, "B T C"]:
        """Return the output for x, the normalised residual stream; see `Attention.forward` for `run`."""
        return self.compute(x) if run is None or _has_hooks(self) else run(MLP.compute, self, x)

    def compute(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Return the output."""
        return self.c_proj(relu(self.c_fc(x)).square())


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)). The lambdas are applied between blocks, in `GPT`."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.eps = norm_eps(config)
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        ve: Float[Tensor, "B T kv"] | None,
        rope: Rope,
        cache: KeyValues | None,
        run: Runner | None = None,
    ) -> Float[Tensor, "B T C"]:
        """Return the residual stream after both additions.

        `run`, if given, calls the whole block, or each half of a block with hooks inside, so that these see and may
        replace the activations between the calls.
        """
        if run is None:
            x = x + self.attn(norm(x, self.eps), ve, rope, cache)
            return x + self.mlp(norm(x, self.eps))
        if _has_hooks(self):
            x = x + self.attn(norm(x, self.eps), ve, rope, None, run=run)
            return x + self.mlp(norm(x, self.eps), run=run)
        return run(Block.compute, self, x, ve, rope, run.mask(x.size(1), self.attn.window, x.device))

    def compute(
        self, x: Float[Tensor, "B T C"], ve: Float[Tensor, "B T kv"] | None, rope: Rope, mask: Any
    ) -> Float[Tensor, "B T C"]:
        """Return the residual stream after both additions, without a call of a module that may have hooks."""
        x = x + self.attn.compute(norm(x, self.eps), ve, rope, None, mask)
        return x + self.mlp.compute(norm(x, self.eps))


def _has_hooks(module: nn.Module) -> bool:
    """Return whether a module within this one has hooks."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in module.modules() if m is not module)


def mix(x: Float[Tensor, "*n C"], x0: Float[Tensor, "*n C"], resid: Tensor, first: Tensor) -> Float[Tensor, "*n C"]:
    """Return resid x + first x0, the input of a block. Lambdas of 0 dimensions do not promote a bfloat16 stream."""
    return resid * x + first * x0


def embedding(rows: int, width: int) -> nn.Embedding:
    """Return an uninitialised embedding. nn.Embedding on the meta device makes torch load its compiler, for 0.7 s."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Bigram(nn.Module):
    """One embedding row per hashed pair (token, token before it); G4e only."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.embed = embedding(5 * config.vocab_size, config.n_embd)

    def forward(self, tokens: Int[Tensor, "B T"], before: Int[Tensor, "B 1"] | None) -> Float[Tensor, "B T C"]:
        """Return row ((36313 id_t) xor (27191 id_{t-1})) mod (5V-1); row 5V-1 is for the first token of a text.

        Args:
            tokens: token ids.
            before: the token before each row; None at the start of a text.
        """
        reserved = self.embed.num_embeddings - 1
        tokens = tokens.long()  # the products exceed int32
        shifted = torch.cat([tokens[:, :1] if before is None else before, tokens[:, :-1]], dim=1)
        rows = ((36313 * tokens) ^ (27191 * shifted)) % reserved
        if before is None:
            rows[:, 0] = reserved
        return self.embed(rows)


class GPT(nn.Module):
    """A nanochat. Its state_dict has exactly the keys of upstream's in the config's generation.

        x  = norm(wte[token])                                   then, in G7, the smear
        x0 = x
        x  = resid_lambdas[i] x + x0_lambdas[i] x0              before block i, from G2 on
        x  = transformer.h[i](x)
        logits = softcap tanh(lm_head(norm(x)) / softcap)       in G7 after x -= backout_lambda * (block n_layer // 2)

    A new model is initialised by init_weights, except on the meta device.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.eps = norm_eps(config)
        L, C, V = config.n_layer, config.n_embd, config.padded_vocab
        blocks = nn.ModuleList(Block(config, layer) for layer in range(L))
        self.transformer = nn.ModuleDict({"wte": embedding(V, C), "h": blocks})
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.lambdas:
            self.resid_lambdas = nn.Parameter(torch.ones(L))
            self.x0_lambdas = nn.Parameter(torch.zeros(L))
        self.value_embeds = nn.ModuleDict(
            {
                str(i): embedding(V, config.n_kv_head * config.head_dim)
                for i in range(L)
                if config.has_value_embedding(i)
            }
        )
        if config.bigram:
            self.bigram_embed = Bigram(config)
            self.bigram_lambdas = nn.Parameter(torch.zeros(L))
        if config.smear:
            self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        device = self.lm_head.weight.device
        for name, table in zip(("cos", "sin"), rope_tables(config), strict=True):
            self.register_buffer(name, table if device.type == "meta" else table.to(device), persistent=False)
        if device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise the weights for training: unit-variance signals, and a loss that starts near ln(vocab_size).

        Matrices are normal with variance 1 / fan-in; those that write to the residual stream are also divided by
        sqrt(2 n_layer), so that its variance does not grow with depth. Token embeddings have unit variance (they are
        normalised), value and bigram embeddings that of a matrix. Gates start half open. Lambdas start neutral: 1 for
        the residual stream, 0.1 for x0, 0 for all others.
        """
        config = self.config
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                start = {"resid_lambdas": 1.0, "x0_lambdas": 0.1}
                weight.fill_(start.get(name, 0.0))
            elif "gate" in name:
                weight.zero_()
            else:
                std = 1.0 if "wte" in name else weight.size(1) ** -0.5
                std *= (2 * config.n_layer) ** -0.5 if "c_proj" in name else 1.0
                std *= 0.01 if "lm_head" in name else 1.0
                weight.normal_(0.0, std, generator=generator)

    def new_cache(self, batch_size: int, max_len: int | None = None) -> Cache:
        """Return an empty cache of batch_size rows for max_len tokens each (default: sequence_len).

        Raises ValueError if max_len exceeds the rope tables.
        """
        config, weight = self.config, self.lm_head.weight
        max_len = config.sequence_len if max_len is None else max_len
        if batch_size < 1 or not 1 <= max_len <= config.max_positions:
            raise ValueError(
                f"a cache needs at least one row and 1 to {config.max_positions} tokens (10 times sequence_len), "
                f"got batch_size={batch_size}, max_len={max_len}"
            )
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_dim)
        k, v = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        return Cache(k, v)

    def forward(
        self, tokens: Int[Tensor, "B T"], cache: KeyValues | None = None, run: Runner | None = None
    ) -> Float[Tensor, "B T V"]:
        """Return float32 logits, softcapped, without the padding rows of the vocabulary.

        With a cache, tokens continue the text in the cache, in chunks of any size, and the logits equal those of the
        full forward pass. The chunk is added to the cache at the end of the forward pass.

        Args:
            tokens: token ids.
            cache: the text before them.
            run: calls the parts of a forward pass without a cache (`bridge.nanochat.compiled`); hooks take effect.

        Raises:
            TypeError: the tokens are not integers.
            ValueError: the chunk is empty, an id is outside the vocabulary (checked on the CPU only, because the check
                would synchronise with other devices), or the cache or the rope tables are too short.
        """
        self._check(tokens, cache, 0 if cache is None else cache.position)
        run = run if cache is None else None
        embed = (GPT.embed, self, tokens, None if cache is None else cache.last_embedding)
        embedded, x = run(*embed) if run is not None else self.embed(*embed[2:])
        rows = slice(tokens.size(1)) if cache is None else cache.rows(tokens.size(1))
        logits = self.unembed(self._blocks(tokens, x, self.rope(rows, x.dtype), cache, run))
        if cache is not None:
            cache.advance(tokens, embedded if self.config.smear else None)
        return logits

    def unembed(self, x: Float[Tensor, "*axes C"]) -> Float[Tensor, "*axes V"]:
        """Return float32 logits, softcapped, of the residual stream before the final norm."""
        logits = self.lm_head(norm(x, self.eps))[..., : self.config.vocab_size].float()
        if torch.is_grad_enabled():
            return self.config.softcap * torch.tanh(logits / self.config.softcap)
        return logits.div_(self.config.softcap).tanh_().mul_(self.config.softcap)  # without three more arrays

    def rope(self, rows: slice | Tensor, dtype: torch.dtype) -> Rope:
        """Return cos and sin of these positions."""
        return self.cos[rows][None, :, None].to(dtype), self.sin[rows][None, :, None].to(dtype)

    def embed(self, tokens: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (embedded, x), (B, T, C) each: the normed embeddings, and the residual stream before the first block.

        `before` is the normed embedding of the token before each row, (B, 1, C); None at the start of a text.
        """
        embedded = norm(self.transformer.wte(tokens), self.eps)
        return embedded, self._smear(embedded, before) if self.config.smear else embedded

    def _blocks(
        self, tokens: Tensor, x: Float[Tensor, "B T C"], rope: Rope, cache: KeyValues | None, run: Runner | None
    ) -> Float[Tensor, "B T C"]:
        """Return the residual stream before the final norm."""
        config = self.config
        x0 = x
        bigram = self.bigram_embed(tokens, None if cache is None else cache.last_token) if config.bigram else None
        for i, block in enumerate(self.transformer.h):
            if config.lambdas:
                mixed = (mix, x, x0, self.resid_lambdas[i], self.x0_lambdas[i])
                x = run(*mixed) if run is not None else mix(*mixed[1:])
            if bigram is not None:
                x = x + self.bigram_lambdas[i] * bigram
            ve = self.value_embeds[str(i)](tokens) if config.has_value_embedding(i) else None
            x = block(x, ve, rope, cache) if run is None else block(x, ve, rope, None, run=run)
            if i == config.n_layer // 2:
                middle = x
        return x - self.backout_lambda.to(x.dtype) * middle if config.backout else x

    def _smear(self, x: Float[Tensor, "B T C"], before: Float[Tensor, "B 1 C"] | None) -> Float[Tensor, "B T C"]:
        """Return x_t + smear_lambda sigmoid(smear_gate(x_t)) x_{t-1}, where x_{t-1} is not smeared itself."""
        before = torch.zeros_like(x[:, :1]) if before is None else before
        return x + self.smear_factor(x) * torch.cat([before, x[:, :-1]], dim=1)

    def smear_factor(self, x: Float[Tensor, "*axes C"]) -> Float[Tensor, "*axes 1"]:
        """Return the factors on the embedding of the token before, from the normed embeddings (G7)."""
        return self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))

    def _check(self, tokens: Tensor, cache: KeyValues | None, start: int) -> None:
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"token ids must be int64 or int32, got {tokens.dtype}")
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens must be (B, T) with B, T >= 1, got shape {tuple(tokens.shape)}")
        stop = start + tokens.size(1)
        if stop > self.config.max_positions:
            raise ValueError(
                f"got {stop} tokens, at most {self.config.max_positions} (10 times sequence_len) have positions: "
                "give fewer"
            )
        if cache is not None and (tokens.size(0) != cache.batch_size or stop > cache.max_len):
            raise ValueError(
                f"the cache has {cache.batch_size} rows of {cache.max_len} tokens, {start} of them used; "
                f"got tokens of shape {tuple(tokens.shape)}: create a larger cache with new_cache"
            )
        if tokens.device.type == "cpu":
            low, high = tokens.min().item(), tokens.max().item()
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"token ids must be from 0 to {self.config.vocab_size - 1}, got {low} to {high}")


def rope_tables(config: GPTConfig) -> tuple[Float[Tensor, "P half"], Float[Tensor, "P half"]]:
    """Return cos and sin of position * rope_base^(-2d / head_dim) in float32 for all positions.

    The tables are computed on the CPU even if the default device is another, so a model on the meta device has them.
    """
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    positions = torch.arange(config.max_positions, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, 1.0 / config.rope_base ** (channels / config.head_dim))
    tables = angles.cos(), angles.sin()
    return tuple(t.bfloat16().float() for t in tables) if config.rope_table == "bf16" else tables
