"""The examples that `--help` shows."""

TRAIN_EXAMPLES = """
**Examples**

    llmkd train recipes/quickstart.yaml

    llmkd train recipes/quickstart.yaml train.max_steps=20 objective.1.weight=0.5 train.output_dir=runs/short

    llmkd train recipes/quickstart.yaml --resume

    accelerate launch --config_file recipes/accelerate/zero3.yaml -m llmkd train recipes/quickstart.yaml
"""

STAGE_EXAMPLES = """
**Examples**

    llmkd stage recipes/miniplm/1_score.yaml

    accelerate launch -m llmkd stage recipes/miniplm/1_score.yaml

    llmkd stage recipes/miniplm/2_select.yaml stage.ratio=0.25 output_dir=runs/quarter

    llmkd stage recipes/miniplm/2_select.yaml --report selection.html

    llmkd stage --verify runs/quarter
"""

EVALUATE_EXAMPLES = """
**Examples**

    llmkd evaluate runs/quickstart --tasks glue

    llmkd evaluate runs/chat --tasks aime24,aime25 --repeats 32 --max-tokens 16384 --backend vllm

    llmkd evaluate org/model --tasks gsm8k --baseline org/other --limit 100

    llmkd evaluate runs/quickstart --tasks glue --data datasets

    llmkd evaluate runs/glue/cola runs/glue/mrpc runs/glue/rte
"""

PUSH_EXAMPLES = """
**Examples**

    llmkd push runs/quickstart your-name/smollm2-10-layers --dry-run

    HF_TOKEN=... llmkd push runs/quickstart your-name/smollm2-10-layers --private
"""
