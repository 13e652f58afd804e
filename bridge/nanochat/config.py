"""What one nanochat is: upstream's six sizes, and what its generation does differently."""

import dataclasses
from typing import Literal

HEAD_DIM = 128  # upstream's default, for files that do not say
SMEAR_CHANNELS = 24  # the smear gate reads this many channels of the embedding
EPS = 2.0**-23  # float32's epsilon, which torch adds to mean squares in a norm without an eps of its own
_LIMITS = {
    "sequence_len": 2**17,
    "vocab_size": 2**22,
    "n_layer": 2**10,
    "n_head": 2**12,
    "n_kv_head": 2**12,
    "n_embd": 2**16,
}
_MAX_ROPE = 2**23  # of sequence_len * head_dim: the rope tables are forty times as many bytes
_NUMBERS = ("rope_base", "qk_scale", "softcap", "eps")
_SHORT_WINDOW = {
    "half": lambda length: length // 2,
    "third_ceil128": lambda length: -(-length // 3 // 128) * 128,
    "quarter_ceil128": lambda length: -(-length // 4 // 128) * 128,
}

# What each generation of nanochat does differently from G0, the first commit (2025-10-13). The dates are those of
# master; G4e lived for a day. G0 and G1 are one thing when vocab_size is a multiple of 64.
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

    Raises ValueError for sizes that make no model: n_embd not a multiple of n_head, an odd head size, n_head not
    a multiple of n_kv_head, a window pattern of other letters than S and L, and sizes beyond any real nanochat.
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
    eps: float | int = EPS  # of every norm; other libraries that run nanochats compute with 1e-6 or 1e-5
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
    def of(cls, generation: str, **fields) -> "GPTConfig":
        """The config of a generation; fields are the sizes, and whatever shall differ from the generation."""
        if generation not in GENERATIONS:
            raise ValueError(f"no generation {generation!r} of nanochat; known are {', '.join(GENERATIONS)}")
        return cls(**(GENERATIONS[generation] | fields))

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        """Rows of the embeddings and of lm_head."""
        return -(-self.vocab_size // self.vocab_pad) * self.vocab_pad

    @property
    def max_positions(self) -> int:
        """Tokens that the rope tables reach: ten times sequence_len, as upstream's."""
        return 10 * self.sequence_len

    @property
    def window_sizes(self) -> tuple[int | None, ...]:
        """How far back each layer looks: a query at t sees keys t-w .. t; None sees everything.

        A long layer is itself windowed, to sequence_len: that shows beyond sequence_len tokens.
        """
        if self.window == "none":
            return (None,) * self.n_layer
        size = {"S": _SHORT_WINDOW[self.window](self.sequence_len), "L": self.sequence_len}
        layers = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)]
        return tuple(size[letter] for letter in [*layers, "L"])

    def has_value_embedding(self, layer: int) -> bool:
        """Whether a layer adds value embeddings: every other layer, the last one among them."""
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
                f"sequence_len {self.sequence_len} times a head size of {self.head_dim} is beyond {_MAX_ROPE}, "
                "and with it the memory for rope tables"
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
                f"window_pattern must be of the letters S and L, such as SSSL, got {self.window_pattern!r}"
            )
        if self.window == "none" and self.window_pattern != "L":
            raise ValueError(f"window_pattern {self.window_pattern!r} needs a window; this generation has none")
        if self.bigram and not self.lambdas:
            raise ValueError("bigram embeddings are mixed in with the lambdas: they need lambdas=True")
