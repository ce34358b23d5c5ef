"""The README.md that travels with an adapter."""

from collections.abc import Mapping
from typing import Any

from lit_adapters.adapters import OWN_TYPE


def adapter_card(config: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """Return a short model card: what this is, its base, and how to load it."""
    hub_id = config["base_model_name_or_path"]
    with_peft = not config["peft_type"].startswith(OWN_TYPE)
    front = [f"library_name: {'peft' if with_peft else 'lit_adapters'}"]
    front.append(f"tags: [lit_adapters, {extra['method']}]")
    if hub_id:
        front.append(f"base_model: {hub_id}")
    settings = "\n".join(
        f"| {key} | {value} |"
        for key, value in {**config, **extra}.items()
        if isinstance(value, str | int | float) and key not in {"format", "base_fingerprint"}
    )
    other = "  # or peft.PeftModel.from_pretrained(model, ...)" if with_peft else ""
    return f"""---
{chr(10).join(front)}
---

# {extra["method"]} adapter for {extra["base"]}

Only what was trained is here, nothing else of the base model (`{extra["base_fingerprint"]}`).

| setting | value |
|---|---|
{settings}

```python
from lit_adapters import load_adapter

load_adapter(model, "this/folder"){other}
```

Written by lit_adapters {extra["versions"]["lit_adapters"]}.
"""
