"""Model folders as `transformers` and PEFT have them: safetensors, configurations, heads, adapters."""
