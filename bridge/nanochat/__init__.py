"""nanochat of every generation in one small PyTorch model: files, tokenizer, text and sampling."""


def __getattr__(name: str):
    # Imported lazily, so that the package and its torch-free modules can be imported without torch.
    if name in ("load", "Nanochat"):
        from bridge.nanochat import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
