"""`python -m llmkd`, for `accelerate launch -m llmkd`."""

from llmkd.cli import main

if __name__ == "__main__":
    main()
