"""`python -m benchmarks refine`: MiniPLM and DDK against their controls."""
