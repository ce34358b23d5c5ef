"""The README.md that travels with an adapter."""

from collections.abc import Mapping
from typing import Any


def adapter_card(config: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """Return a short model card: what this is, its base, and how to load it."""
    hub_id = config["base_model_name_or_path"]
    front = ["library_name: peft", "tags: [lit_adapters, lora]"]
    if hub_id:
        front.append(f"base_model: {hub_id}")
    settings = "\n".join(
        f"| {key} | {config[key]} |" for key in ("r", "lora_alpha", "use_rslora") if key in config
    )
    return f"""---
{chr(10).join(front)}
---

# {extra["method"]} adapter for {extra["base"]}

Low-rank weights only; the base model (fingerprint `{extra["base_fingerprint"]}`) is not included.

| setting | value |
|---|---|
{settings}

```python
from lit_adapters import load_adapter

load_adapter(model, "this/folder")  # or peft.PeftModel.from_pretrained(model, "this/folder")
```

Written by lit_adapters {extra["versions"]["lit_adapters"]}.
"""
