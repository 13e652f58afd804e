"""Configuration of a nanochat: upstream's six sizes, and the differences between generations."""

import dataclasses
from typing import Literal

HEAD_DIM = 128  # upstream's default, for files that do not say
SMEAR_CHANNELS = 24  # the smear gate reads this many channels of the embedding
EPS = 2.0**-23  # float32's epsilon: the default of torch's rms_norm, which upstream uses
_LIMITS = {
    "sequence_len": 2**17,
    "vocab_size": 2**22,
    "n_layer": 2**10,
    "n_head": 2**12,
    "n_kv_head": 2**12,
    "n_embd": 2**16,
}
_MAX_ROPE = 2**23  # limit of sequence_len * head_dim; the rope tables take 40 bytes for each
_NUMBERS = ("rope_base", "qk_scale", "softcap", "eps")
_SHORT_WINDOW = {
    "half": lambda length: length // 2,
    "third_ceil128": lambda length: -(-length // 3 // 128) * 128,
    "quarter_ceil128": lambda length: -(-length // 4 // 128) * 128,
}

# Differences of each generation of nanochat from G0, the first commit (2025-10-13). The dates are those of master;
# G4e existed for one day. G0 and G1 are the same when vocab_size is a multiple of 64.
_G2 = {"vocab_pad": 64, "lambdas": True}
_G3 = _G2 | {"window": "half", "window_pattern": "SSSL"}
_G4 = _G3 | {"ve": "gated_alternating", "ve_gate_channels": 32, "ve_gate_mult": 2.0}
_G6 = _G4 | {
    "ve_gate_channels": 12,
    "ve_gate_mult": 3.0,
    "rope_base": 100000.0,
    "rope_table": "compute",
    "qk_scale": 1.15,
    "window": "third_ceil128",
}
GENERATIONS: dict[str, dict] = {
    "G0": {},
    "G1": {"vocab_pad": 64},  # 2025-12-23: rows of the embeddings padded to a multiple of 64
    "G2": _G2,  # 2026-01-11: the stream and x0 are mixed before every block
    "G3": _G3,  # 2026-01-11: sliding windows
    "G4": _G4,  # 2026-01-18: gated value embeddings in every other layer
    "G4e": _G4 | {"bigram": True},  # 2026-01-27: hashed bigram embeddings
    "G5": _G4 | {"softcap": 20.0},  # 2026-03-03
    "G6": _G6,  # 2026-03-09: sharper attention, another rope base, narrower gates
    "G7": _G6 | {"qk_scale": 1.2, "window": "quarter_ceil128", "smear": True, "backout": True},  # 2026-03-14
}


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes and arithmetic of one nanochat; the defaults of the second half are those of generation G0.

    Raises ValueError for inconsistent sizes: n_embd is not a multiple of n_head, the head size is odd, n_head is not a
    multiple of n_kv_head, the window pattern has letters other than S and L, or a size is far beyond any nanochat's.
    """

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    rope_base: float | int = 10000.0
    rope_table: Literal["bf16", "compute"] = "bf16"  # bf16: cos and sin are rounded to bfloat16 at any precision
    qk_scale: float | int = 1.0  # factor on q and on k, after their norms
    softcap: float | int = 15.0
    eps: float | int = EPS  # of every norm; transformers and mlx use 1e-6 and 1e-5
    window: Literal["none", "half", "third_ceil128", "quarter_ceil128"] = "none"  # the length of a short window
    window_pattern: str = "L"  # S (short) or L (sequence_len) per layer, repeated; the last layer is L
    lambdas: bool = False
    ve: Literal["none", "gated_alternating"] = "none"
    ve_gate_channels: int = 0
    ve_gate_mult: float = 0.0
    smear: bool = False
    backout: bool = False
    bigram: bool = False
    vocab_pad: int = 1  # rows of wte, lm_head and value embeddings are rounded up to a multiple of this

    def __post_init__(self):
        self._check_sizes()
        self._check_choices()
        for name in _NUMBERS:
            object.__setattr__(self, name, float(getattr(self, name)))  # 20 and 20.0 are one config

    @classmethod
    def of_generation(cls, generation: str, **fields) -> "GPTConfig":
        """Return the config of a generation.

        Args:
            generation: a key of `GENERATIONS`.
            fields: the sizes, and any field that differs from the generation.
        """
        if generation not in GENERATIONS:
            raise ValueError(f"no generation {generation!r} of nanochat; known are {', '.join(GENERATIONS)}")
        return cls(**(GENERATIONS[generation] | fields))

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        """Number of rows of the embeddings and of lm_head."""
        return -(-self.vocab_size // self.vocab_pad) * self.vocab_pad

    @property
    def max_positions(self) -> int:
        """Number of positions in the rope tables: ten times sequence_len, as upstream."""
        return 10 * self.sequence_len

    @property
    def window_sizes(self) -> tuple[int | None, ...]:
        """Attention window w of each layer: a query at t sees keys t-w .. t; None is unlimited.

        Long layers ("L") have a window too, of sequence_len; it matters for longer texts only.
        """
        if self.window == "none":
            return (None,) * self.n_layer
        size = {"S": _SHORT_WINDOW[self.window](self.sequence_len), "L": self.sequence_len}
        layers = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)]
        return tuple(size[letter] for letter in [*layers, "L"])

    def has_value_embedding(self, layer: int) -> bool:
        """Return whether a layer adds value embeddings: every other layer, including the last."""
        return self.ve != "none" and layer % 2 == (self.n_layer - 1) % 2

    def _check_sizes(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise ValueError(f"{name} must be a whole number from 1 to {limit}, got {value!r}")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"n_embd {self.n_embd} over n_head {self.n_head} must give an even whole head size")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if self.sequence_len * self.head_dim > _MAX_ROPE:
            raise ValueError(
                f"sequence_len {self.sequence_len} times the head size {self.head_dim} must be at most {_MAX_ROPE}, "
                "which limits the memory of the rope tables"
            )
        if self.ve != "none" and not 1 <= self.ve_gate_channels <= self.n_embd:
            raise ValueError(f"ve_gate_channels must be from 1 to n_embd {self.n_embd}, got {self.ve_gate_channels}")
        if self.smear and self.n_embd < SMEAR_CHANNELS:
            raise ValueError(f"smear reads {SMEAR_CHANNELS} channels, but n_embd is {self.n_embd}")

    def _check_choices(self) -> None:
        choices = {
            "rope_table": ("bf16", "compute"),
            "window": ("none", *_SHORT_WINDOW),
            "ve": ("none", "gated_alternating"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in (*_NUMBERS, "vocab_pad"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if not isinstance(self.window_pattern, str) or not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(
                f"window_pattern must consist of the letters S and L, such as SSSL, got {self.window_pattern!r}"
            )
        if self.window == "none" and self.window_pattern != "L":
            raise ValueError(f"window_pattern {self.window_pattern!r} needs a window, which this generation lacks")
        if self.bigram and not self.lambdas:
            raise ValueError("bigram=True needs lambdas=True, which weight the bigram embeddings")
