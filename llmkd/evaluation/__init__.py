"""Evaluation of trained students: lm-eval's tasks, AIME sampled, GLUE with a head; results in RUN/evaluation.json."""
