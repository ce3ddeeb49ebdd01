"""Named starting points for an adapter, as plain keyword arguments of ``LoraConfig``.

Knows nothing of models, files or the command line, and imports nothing.
A key given beside a preset wins over it.
"""

__all__ = ["DEFAULT_PRESET", "PRESETS"]

DEFAULT_PRESET = "standard"

PRESETS: dict[str, dict[str, object]] = {
    # the choice to begin with: every linear layer, a moderate rank
    "standard": {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
        "use_rslora": False,
    },
    # the fewest parameters and optimizer states that still learn a format or a style
    "memory_efficient": {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": False,
    },
    # a high rank, kept stable by scaling with alpha / sqrt(r)
    "high_performance": {
        "r": 64,
        "lora_alpha": 128,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
        "use_rslora": True,
    },
}
