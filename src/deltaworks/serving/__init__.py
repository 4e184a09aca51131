"""Many LoRA adapters -> few GPUs: profile, digital twin, placement."""
