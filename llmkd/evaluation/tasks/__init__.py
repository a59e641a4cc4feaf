"""llmkd's own tasks in lm-eval's format: AIME sampled, STS-B. They come before lm-eval's tasks of the same name."""
